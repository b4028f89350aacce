"""DeepAR beside GluonTS's: `python -m benchmarks.forecasting` (needs the extra `bench`).

Both train two LSTM layers of 40 cells on the same synthetic series with the same context, prediction, batch and numbers
of windows, by Lightning's Trainer, in one process and in turns: GluonTS as it comes, GluonTS with its data cached, and
dlref. Then each forecasts the same series with 100 sample paths, one after the other: GluonTS, dlref in PyTorch, and
its graphs in onnxruntime as a bundle has them, float32 and int8. Timed are epochs without start-up and validation,
and whole forecasts from series as they are, features and quantiles included.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import track

from dlref.data import SyntheticSeries
from dlref.data.series import Series
from dlref.export.convert import Plan, convert
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.models import DeepAR
from dlref.runtime import make_runner
from dlref.runtime.bundle import OnnxGraph, cores
from dlref.tasks import Forecaster, StudentT

BATCH, BATCHES, EPOCHS = 32, 50, 3  # an epoch as GluonTS has it; the first is not timed
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
INT8 = TARGETS["x86-64"]


class Clock(Callback):
    """Windows a second of each epoch but the first."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, task) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, task) -> None:
        """Stop."""
        if trainer.current_epoch:
            self.rates.append(BATCH * BATCHES / (time.perf_counter() - self.start))


def gluonts_estimator(horizon: int, context: int, clock: Clock):
    """GluonTS's defaults but for the number of epochs."""
    from gluonts.torch.model.deepar import DeepAREstimator

    trainer = {**QUIET, "max_epochs": EPOCHS, "default_root_dir": tempfile.mkdtemp(), "callbacks": [clock]}
    return DeepAREstimator(
        freq="h", prediction_length=horizon, context_length=context, batch_size=BATCH, trainer_kwargs=trainer
    )


def listed(series: Series, cut: int = 0) -> list[dict]:
    """Series as GluonTS takes them, without their last `cut` points."""
    import pandas as pd

    targets = np.split(series.target, series.offsets[1:-1])
    return [
        {"start": pd.Period(str(start), freq="h"), "target": target[: len(target) - cut]}
        for start, target in zip(series.start, targets, strict=True)
    ]


def train_gluonts(series: Series, horizon: int, context: int, cached: bool):
    """Windows a second of each timed epoch, and a predictor."""
    clock = Clock()
    estimator = gluonts_estimator(horizon, context, clock)
    predictor = estimator.train(listed(series, horizon), cache_data=cached)
    return clock.rates, predictor


def train_dlref(data: SyntheticSeries) -> tuple[list[float], Forecaster]:
    """Windows a second of each timed epoch, and the task."""
    clock, network = Clock(), DeepAR(lags=40, features=5)
    task = Forecaster(StudentT(), network=network, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    options = {"max_epochs": EPOCHS, "callbacks": [clock], "gradient_clip_val": 10, "limit_val_batches": 0}
    trainer = Trainer(**options, enable_checkpointing=False, **QUIET)
    trainer.fit(task, datamodule=data)
    return clock.rates, task.eval()


class Plain(SyntheticSeries):
    """Without categories and promotions, which GluonTS's defaults do not see."""

    def read(self, frequency):
        """The targets alone."""
        channels = super().read(frequency)
        nothing = np.zeros((0, 0), np.float32)
        self.series = channels.train._replace(
            cat=channels.train.cat[:, :0], dynamic=nothing, dynamic_offsets=np.zeros_like(channels.train.offsets)
        )
        return channels._replace(train=self.series, test=self.series, predict=None)


def runners(task: Forecaster, data: SyntheticSeries, folder: Path) -> Iterator[tuple[str, Callable]]:
    """The same runner over PyTorch and over the graphs of a bundle, each opened when the one before is done with.

    Not in turns: PyTorch's threads wait busily for a while, and would take a core from what comes next.
    """
    served = task.deployable(next(iter(data.val_dataloader())))
    yield "dlref, PyTorch", make_runner(served.kind, served.graphs, served.metadata)
    for title, precision in (("dlref, float32 bundle", "float32"), ("dlref, int8 bundle", "int8")):
        graphs = {}
        for name, graph in served.graphs.items():
            exact, path = folder / f"{name}.onnx", folder / f"{name}.{precision}.onnx"
            write_onnx(graph, exact, INT8)
            convert(exact, path, INT8, Plan(precision), [])
            graphs[name] = OnnxGraph(path, INT8.provider, 1)
        runner = make_runner(served.kind, graphs, served.metadata)
        runner.workers = cores()  # as `load` opens a bundle
        yield title, runner


def timed(call: Callable, turns: int) -> list[float]:
    """Seconds of each of several calls, after one that does not count."""
    seconds = []
    for turn in range(turns + 1):
        start = time.perf_counter()
        call()
        seconds += [time.perf_counter() - start] * bool(turn)
    return seconds


def row(title: str, rates: list[float], peer: list[float]) -> str:
    """Medians and their ratio to a peer's."""
    own, theirs = statistics.median(rates), statistics.median(peer)
    return f"| {title} | {own:.0f} | {own / theirs:.1f}× | {min(rates):.0f} to {max(rates):.0f} |"


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--horizon", type=int, default=24, help="hours to forecast (default: 24)")
    parser.add_argument("--context", type=int, default=24, help="hours before them (default: 24)")
    parser.add_argument("--series", type=int, default=200, help="series (default: 200)")
    parser.add_argument("--turns", type=int, default=3, help="fits and forecasts of each (default: 3)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    horizon, context = options.horizon, options.context
    data = Plain(
        count=options.series,
        frequency="1H",
        prediction_length=horizon,
        context_length=context,
        batch_size=BATCH,
        batches=BATCHES,
    )
    data.setup()
    rates: dict[str, list[float]] = {"GluonTS, data cached": [], "GluonTS, as it comes": [], "dlref": []}
    for _ in track(range(options.turns), "training", console=Console(stderr=True), transient=True):
        rates["GluonTS, data cached"] += train_gluonts(data.series, horizon, context, cached=True)[0]
        found, predictor = train_gluonts(data.series, horizon, context, cached=False)
        rates["GluonTS, as it comes"] += found
        found, task = train_dlref(data)
        rates["dlref"] += found
    series, levels = listed(data.series, horizon), np.arange(1, 10) / 10

    def gluonts() -> list:
        return [[f.quantile(level) for level in levels] for f in predictor.predict(series, num_samples=100)]

    starts = [str(start).replace("T", " ") for start in data.series.start]
    requests = [{"start": start, "target": entry["target"]} for start, entry in zip(starts, series, strict=True)]
    seconds, single = {"GluonTS": timed(gluonts, options.turns)}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, runner in track(
            runners(task, data, Path(folder)), "forecasts", total=3, console=Console(stderr=True)
        ):
            seconds[name] = timed(lambda r=runner: r(requests), options.turns)
            single[name] = timed(lambda r=runner: r(requests[0]), 20)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; torch {version('torch')}, "
        f"gluonts {version('gluonts')}, onnxruntime {version('onnxruntime')}; {options.series} series, "
        f"context {context}, prediction {horizon}, batch {BATCH}\n"
    )
    peer = rates["GluonTS, as it comes"]
    print("| training | windows a second | beside GluonTS as it comes | spread |\n| --- | --- | --- | --- |")
    print("\n".join(row(name, found, peer) for name, found in rates.items()))
    forecasts = {name: [options.series / s for s in found] for name, found in seconds.items()}
    print("\n| forecasts, 100 paths | series a second | beside GluonTS | spread |\n| --- | --- | --- | --- |")
    print("\n".join(row(name, found, forecasts["GluonTS"]) for name, found in forecasts.items()))
    print("\n| one series | milliseconds |\n| --- | --- |")
    print("\n".join(f"| {name} | {1e3 * statistics.median(found):.1f} |" for name, found in single.items()))


if __name__ == "__main__":
    main()
