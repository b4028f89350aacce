"""DeepAR beside GluonTS's.

Both train two LSTM layers of 40 cells on the same synthetic series with the same context, prediction, batch and numbers
of windows, by Lightning's Trainer, in one process and in turns: GluonTS as it comes, GluonTS with its data cached, and
dlref. Then each forecasts the same series with 100 sample paths, in turns: GluonTS, dlref in PyTorch, and its graphs in
onnxruntime as a bundle has them, float32 and int8. Timed are epochs without start-up and validation, and whole
forecasts from series as they are, features and quantiles included.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import track

from benchmarks.rows import Row, Rows, in_turns, needs, rest
from dlref.data import SyntheticSeries
from dlref.data.series import Series
from dlref.export.convert import Plan, convert
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.models import DeepAR
from dlref.runtime import make_runner
from dlref.runtime.bundle import OnnxGraph, cores
from dlref.tasks import Forecaster, StudentT
from dlref.tasks.deployable import Deployable

SERIES, HORIZON, CONTEXT = 100, 24, 24  # hours
BATCH, BATCHES, EPOCHS = 32, 50, 3  # an epoch as GluonTS has it; the first is not timed
TURNS, SINGLE = 5, 20  # fits, and forecasts of all series; forecasts of one series
PATHS, LEVELS = 100, np.arange(1, 10) / 10
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
INT8 = TARGETS["x86-64"]


class Clock(Callback):
    """Windows a second of the epochs but the first."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, task) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, task) -> None:
        """Stop."""
        if trainer.current_epoch:
            self.seconds += time.perf_counter() - self.start

    @property
    def rate(self) -> float:
        """Of all of them together."""
        return BATCH * BATCHES * (EPOCHS - 1) / self.seconds


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


def make_data() -> Plain:
    """The series of every benchmark here."""
    needs("gluonts")
    torch.manual_seed(0)
    data = Plain(
        count=SERIES,
        frequency="1H",
        prediction_length=HORIZON,
        context_length=CONTEXT,
        batch_size=BATCH,
        batches=BATCHES,
    )
    data.setup()
    return data


def listed(series: Series) -> list[dict]:
    """Series as GluonTS takes them, without the hours to forecast."""
    import pandas as pd

    targets = np.split(series.target, series.offsets[1:-1])
    return [
        {"start": pd.Period(str(start), freq="h"), "target": target[: len(target) - HORIZON]}
        for start, target in zip(series.start, targets, strict=True)
    ]


def train_gluonts(data: Plain, cached: bool):
    """Windows a second, and a predictor. GluonTS's defaults but for the number of epochs."""
    from gluonts.torch.model.deepar import DeepAREstimator

    clock = Clock()
    trainer = {**QUIET, "max_epochs": EPOCHS, "default_root_dir": tempfile.mkdtemp(), "callbacks": [clock]}
    estimator = DeepAREstimator(
        freq="h", prediction_length=HORIZON, context_length=CONTEXT, batch_size=BATCH, trainer_kwargs=trainer
    )
    predictor = estimator.train(listed(data.series), cache_data=cached)
    return clock.rate, predictor


def train_dlref(data: Plain) -> tuple[float, Forecaster]:
    """Windows a second, and the task."""
    clock, network = Clock(), DeepAR(lags=40, features=5)
    task = Forecaster(StudentT(), network=network, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    options = {"max_epochs": EPOCHS, "callbacks": [clock], "gradient_clip_val": 10, "limit_val_batches": 0}
    trainer = Trainer(**options, enable_checkpointing=False, **QUIET)
    trainer.fit(task, datamodule=data)
    return clock.rate, task.eval()


def training() -> Rows:
    """Windows a second, in turns."""
    data = make_data()
    calls = {
        "GluonTS, data cached": partial(train_gluonts, data, cached=True),
        "GluonTS, as it comes": partial(train_gluonts, data, cached=False),
        "dlref": partial(train_dlref, data),
    }
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(TURNS), "training", console=Console(stderr=True), transient=True):
        for name, call in calls.items():
            rates[name].append(call()[0])
    title, (cached, plain, own) = "training, DeepAR, two LSTM layers of 40", rates.values()
    return {
        title: Row(own, plain, "windows/s", "GluonTS, as it comes", ">= 5"),
        f"{title}, beside cached data": Row(own, cached, "windows/s", "GluonTS, data cached"),
    }


def runners(served: Deployable, folder: Path) -> dict[str, Callable]:
    """The same runner over PyTorch and over the graphs of a bundle as `load` opens it, in two precisions."""
    found = {"PyTorch": make_runner(served.kind, served.graphs, served.metadata)}
    for name, graph in served.graphs.items():
        write_onnx(graph, folder / f"{name}.onnx", INT8)
    for precision in ("float32", "int8"):
        graphs = {}
        for name in served.graphs:
            path = folder / f"{name}.{precision}.onnx"
            convert(folder / f"{name}.onnx", path, INT8, Plan(precision), [])
            graphs[name] = OnnxGraph(path, INT8.provider, 1)
        found[precision] = make_runner(served.kind, graphs, served.metadata)
        found[precision].workers = cores()
    return found


def sampling() -> Rows:
    """Series a second of all series, and seconds of a single one, in turns."""
    data = make_data()
    _, predictor = train_gluonts(data, cached=True)
    _, task = train_dlref(data)
    series = listed(data.series)
    starts = [str(start).replace("T", " ") for start in data.series.start]
    requests = [{"start": start, "target": entry["target"]} for start, entry in zip(starts, series, strict=True)]

    def gluonts() -> list:
        return [[f.quantile(level) for level in LEVELS] for f in predictor.predict(series, num_samples=PATHS)]

    with tempfile.TemporaryDirectory() as folder:
        opened = runners(task.deployable(next(iter(data.val_dataloader()))), Path(folder))
        order = ("float32", "int8", "PyTorch")  # PyTorch last, and then rest
        calls = {name: partial(opened[name], requests) for name in order}
        every = in_turns("forecasts", {**calls, "GluonTS": gluonts, "rest": rest}, turns=TURNS)
        calls = {name: partial(opened[name], requests[0]) for name in order}
        single = in_turns("one series", {**calls, "rest": rest}, turns=SINGLE)
    rates = {name: [SERIES / s for s in seconds] for name, seconds in every.items()}
    title, one = f"forecasts of {SERIES} series, {PATHS} paths", f"forecast of one series, {PATHS} paths"
    rows = {f"{title}, PyTorch": Row(rates["PyTorch"], rates["GluonTS"], "series/s", "GluonTS")}
    for name, goals in {"float32": ("", ""), "int8": (">= 10", ">= 2")}.items():
        rows[f"{title}, {name} bundle"] = Row(rates[name], rates["GluonTS"], "series/s", "GluonTS", goals[0])
        rows[f"{title}, {name} bundle beside PyTorch"] = Row(
            rates[name], rates["PyTorch"], "series/s", "dlref in PyTorch", goals[1]
        )
        rows[f"{one}, {name} bundle"] = Row(single[name], single["PyTorch"], "s", "dlref in PyTorch")
    return rows


BENCHMARKS = {"forecasting-training": training, "forecasting-sampling": sampling}
