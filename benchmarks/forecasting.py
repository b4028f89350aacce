"""DeepAR compared with GluonTS's.

Both train two LSTM layers of 40 cells with Lightning's Trainer on the same series, with the same context length,
prediction length, batch size and numbers of windows. GluonTS with its defaults, GluonTS with cached data and dlref take
turns in one process. Then GluonTS, dlref in PyTorch, and dlref's float32 and int8 graphs, in onnxruntime as in a
bundle, take turns to forecast the same windows with 100 sample paths. Training is timed over epochs, without start-up
and validation. Forecasts are timed from the raw series, with features and quantiles included. The series are synthetic;
if DLREF_DATA has them, the exchange rates and the hourly series of M4 are used as well. GluonTS reads whole series
repeatedly, and is slower on longer ones.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from benchmarks.gluonts_deepar import before_test, pasts
from benchmarks.rows import QUIET, Row, Rows, data_file, figures_in_turns, in_turns, needs, rest, run
from dlref.data.forecasting import Channels, ForecastingData, RowSeries, SyntheticSeries, WideSeries
from dlref.export.convert import Plan, convert
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.models import DeepAR
from dlref.runtime.bundle import OnnxGraph
from dlref.runtime.calendar import Frequency
from dlref.runtime.machine import cores
from dlref.tasks import Forecaster, StudentT
from dlref.tasks.deployable import Deployable

BATCH, BATCHES, EPOCHS = 32, 50, 3  # an epoch as in GluonTS; the first is not timed
SIZES = {"batch_size": BATCH, "batches": BATCHES}
MOST = 100  # most windows to forecast, spread over the test split
TURNS, SINGLE = 5, 20  # fits, and forecasts of all series; forecasts of one series
PATHS, LEVELS = 100, np.arange(1, 10) / 10
INT8 = TARGETS["x86-64"]


class Clock(Callback):
    """Measures the seconds of all epochs except the first."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, task) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, task) -> None:
        """Stop the clock."""
        if trainer.current_epoch:
            self.seconds += time.perf_counter() - self.start

    @property
    def rate(self) -> float:
        """Windows per second over all timed epochs."""
        return BATCH * BATCHES * (EPOCHS - 1) / self.seconds


class Plain(SyntheticSeries):
    """Synthetic series without categories and promotions, which GluonTS ignores by default."""

    def read(self, frequency: Frequency) -> Channels:
        """Return the targets alone."""
        series = super().read(frequency).train
        nothing = np.zeros((0, 0), np.float32)
        series = series._replace(cat=series.cat[:, :0], dynamic=nothing, dynamic_offsets=np.zeros_like(series.offsets))
        return Channels(series, series)


def synthetic() -> Plain:
    """Return a hundred hourly series of 1,000 hours."""
    return Plain(count=100, frequency="1H", prediction_length=24, context_length=24, **SIZES)


def exchange_rate() -> WideSeries:
    """Return eight daily series of 6,221 days, with GluonTS's split and context length."""
    path = str(data_file("exchange_rate/exchange_rate.txt.gz"))
    lengths = {"prediction_length": 30, "context_length": 30, "points": 6221, "test_windows": 5}
    return WideSeries(path=path, start="1990-01-01", frequency="1B", **lengths, **SIZES)


def m4_hourly() -> RowSeries:
    """Return the 414 series of up to 1,008 hours, with GluonTS's split and context length."""
    paths = {name: str(data_file(f"m4/Hourly-{name}.csv.gz")) for name in ("train", "test")}
    return RowSeries(**paths, frequency="1H", prediction_length=48, context_length=48, **SIZES)


def made(make: Callable[[], ForecastingData]) -> ForecastingData:
    """Make a data module and read its data."""
    needs("gluonts")
    torch.manual_seed(0)
    data = make()
    data.setup()
    return data


def train_gluonts(data: ForecastingData, cached: bool):
    """Return windows per second and a predictor. Uses GluonTS's defaults except for the number of epochs."""
    from gluonts.torch.model.deepar import DeepAREstimator

    clock, series = Clock(), before_test(data, pasts(data))
    trainer = {**QUIET, "max_epochs": EPOCHS, "default_root_dir": tempfile.mkdtemp(), "callbacks": [clock]}
    estimator = DeepAREstimator(
        freq=series[0]["start"].freqstr,
        prediction_length=data.prediction_length,
        context_length=data.context_length,
        batch_size=BATCH,
        trainer_kwargs=trainer,
    )
    predictor = estimator.train(series, cache_data=cached)
    return clock.rate, predictor


def fused(groups) -> torch.optim.Optimizer:
    """Return the optimiser of dlref's configs, with GluonTS's learning rate."""
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


def train_dlref(data: ForecastingData) -> tuple[float, Forecaster]:
    """Return windows per second and the task."""
    frequency = Frequency.parse(data.frequency)
    clock, network = Clock(), DeepAR(lags=len(frequency.lags), features=len(frequency.cycles) + 1)
    task = Forecaster(StudentT(), network=network, optimizer=fused)
    options = {"max_epochs": EPOCHS, "callbacks": [clock], "gradient_clip_val": 10, "limit_val_batches": 0}
    trainer = Trainer(**options, enable_checkpointing=False, **QUIET)
    trainer.fit(task, datamodule=data)
    return clock.rate, task.eval()


def training(make: Callable[[], ForecastingData]) -> Rows:
    """Compare windows per second, in turns."""
    data = made(make)
    calls = {
        "GluonTS, data cached": lambda: train_gluonts(data, cached=True)[0],
        "GluonTS, defaults": lambda: train_gluonts(data, cached=False)[0],
        "dlref": lambda: train_dlref(data)[0],
    }
    cached, plain, own = figures_in_turns("training", calls, turns=TURNS).values()
    title = f"training, {make.__name__}"
    return {
        title: Row(own, plain, "windows/s", "GluonTS, defaults", ">= 5"),
        f"{title}, beside cached data": Row(own, cached, "windows/s", "GluonTS, data cached", ">= 5"),
    }


def runners(served: Deployable, folder: Path) -> dict[str, Callable]:
    """Return the same runner over PyTorch and, in two precisions, over the graphs of a bundle as `load` opens it."""
    found = {"PyTorch": served.runner()}
    for name, graph in served.graphs.items():
        write_onnx(graph, folder / f"{name}.onnx", INT8)
    for precision in ("float32", "int8"):
        graphs = {}
        for name, graph in served.graphs.items():
            path = folder / f"{name}.{precision}.onnx"
            convert(folder / f"{name}.onnx", path, INT8, Plan(precision), [], graph.unbounded)
            graphs[name] = OnnxGraph(path, INT8.provider, 1)
        found[precision] = served.runner(graphs)
        found[precision].workers = cores()
    return found


def sampling(make: Callable[[], ForecastingData]) -> Rows:
    """Compare series per second for all windows, and seconds for a single series, in turns."""
    data = made(make)
    _, predictor = train_gluonts(data, cached=True)
    _, task = train_dlref(data)
    series = pasts(data)
    series = series[:: -(-len(series) // MOST)]
    requests = [{"start": entry["start"].strftime("%Y-%m-%d %H:%M:%S"), "target": entry["target"]} for entry in series]

    def gluonts() -> list:
        return [[f.quantile(level) for level in LEVELS] for f in predictor.predict(series, num_samples=PATHS)]

    with tempfile.TemporaryDirectory() as folder:
        opened = runners(task.deployable(next(iter(data.val_dataloader()))), Path(folder))
        order = ("float32", "int8", "PyTorch")  # PyTorch last, and then rest
        calls = {name: partial(opened[name], requests) for name in order}
        every = in_turns("forecasts", {**calls, "GluonTS": gluonts, "rest": rest}, turns=TURNS)
        calls = {name: partial(opened[name], requests[0]) for name in order}
        single = in_turns("one series", {**calls, "rest": rest}, turns=SINGLE)
    rates = {name: [len(series) / s for s in seconds] for name, seconds in every.items()}
    title, one = f"forecasts, {make.__name__}, {len(series)} series", f"forecast of one series, {make.__name__}"
    rows = {f"{title}, PyTorch": Row(rates["PyTorch"], rates["GluonTS"], "series/s", "GluonTS")}
    for name, goals in {"float32": ("", ""), "int8": (">= 10", ">= 2")}.items():
        rows[f"{title}, {name} bundle"] = Row(rates[name], rates["GluonTS"], "series/s", "GluonTS", goals[0])
        rows[f"{title}, {name} bundle beside PyTorch"] = Row(
            rates[name], rates["PyTorch"], "series/s", "dlref in PyTorch", goals[1]
        )
        rows[f"{one}, {name} bundle"] = Row(single[name], single["PyTorch"], "s", "dlref in PyTorch")
    return rows


BENCHMARKS = {
    f"forecasting-{what.__name__}{suffix}": partial(what, make)
    for what in (training, sampling)
    for suffix, make in {"": synthetic, "-exchange-rate": exchange_rate, "-m4-hourly": m4_hourly}.items()
}


if __name__ == "__main__":
    run(BENCHMARKS)
