"""Data modules for forecasting: series from files, and windows of them for training and evaluation.

Tasks receive batches of type `dlref.data.windows.Window`, gathered on the training device. After `setup`, the series
are described by `frequency`, `cardinality` (the number of values of each of the G categories), `dynamic_features` and
`static_features` (the numbers of these features).

The last `test_windows` stretches of `prediction_length` points of each series are for testing, the `val_windows`
stretches before them for validation, and the points before these for training. A forecast sees all earlier points.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from dlref.data.files import warn_of_shared
from dlref.data.loader import SplitData, check_at_least
from dlref.data.series import Series, check, check_layout, check_seen_in_training, to_series
from dlref.data.series_files import read_dated, read_json_lines, read_long, read_rows, read_wide
from dlref.data.synthetic_series import make_series, quantiles
from dlref.data.windows import Draws, SeriesStore, Windows
from dlref.runtime.calendar import Frequency
from dlref.runtime.errors import UserError
from dlref.runtime.runners.forecasting import LEVELS

EVALUATED = 32  # windows in an evaluation batch, each with its sample paths


class Channels(NamedTuple):
    """The series read by a subclass. `test` may be `train` itself; `truth` (P, Q) are the true quantiles of its points.

    `predict` contains the series to forecast beyond their ends, with dynamic features that reach that far; None: those
    of `test`, if there are no dynamic features.
    """

    train: Series
    test: Series
    predict: Series | None = None
    truth: np.ndarray | None = None


class ForecastingData(SplitData):
    """Series, cut into windows; a subclass reads them.

    Args:
        frequency: time from one point to the next: an integer (1 if left out) and min, H, D, B, W or M.
        prediction_length: H, number of points to forecast.
        context_length: T, number of points before a forecast that it starts from; lags look further back.
        batch_size: windows in a training batch.
        batches: batches in an epoch, drawn with replacement: first a series, then one of its windows.
        by_scale: draw series with larger values more often (section 3.3 of the paper) instead of all equally often.
        val_windows: number of forecasts of each series for validation.
        test_windows: number of forecasts of each series for testing.
        points: use only this many points from the beginning of each series.
        cardinality: number of values of each category; auto: one more than the highest value found.
    """

    category_names: Sequence[str] = ()  # set if each series is a category of its own

    def __init__(
        self,
        frequency: str,
        prediction_length: int,
        context_length: int,
        batch_size: int = 32,
        batches: int = 50,
        by_scale: bool = False,
        val_windows: int = 1,
        test_windows: int = 1,
        points: int | None = None,
        cardinality: Literal["auto"] | list[int] = "auto",
    ):
        super().__init__(batch_size)
        self.frequency, self.prediction_length, self.context_length = frequency, prediction_length, context_length
        self.batches, self.by_scale = batches, by_scale
        self.val_windows, self.test_windows = val_windows, test_windows
        self.points, self.asked_cardinality = points, cardinality

    def read(self, frequency: Frequency) -> Channels:
        """Read the series."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read and check all data once, and move it to the trainer's device."""
        if not self.splits:
            sizes = ("prediction_length", "context_length", "batch_size", "batches", "val_windows", "test_windows")
            check_at_least(1, **{name: getattr(self, name) for name in sizes}, points=self.points or 1)
            frequency = Frequency.parse(self.frequency)
            self.frequency = str(frequency)
            self.cut(self.checked(self.read(frequency), frequency), frequency)
        self.splits = {name: windows.to(self.device) for name, windows in self.splits.items()}

    def checked(self, channels: Channels, frequency: Frequency) -> Channels:
        """Check the channels against SageMaker's rules and each other, and set the attributes that a model needs."""
        if not isinstance(channels, Channels):
            raise UserError(f"the series read: {type(channels).__name__}; expected Channels of train and test")
        for name in ("train", "test", "predict"):
            if (series := getattr(channels, name)) is not None or name != "predict":
                check_layout(name, series, frequency)
        horizon, together = self.prediction_length, channels.test is channels.train
        if self.points and (not together or channels.predict is not None):
            words = "expected none, since test or predict are separate series"
            raise UserError(f"--data.init_args.points: {self.points}; {words}")
        train = channels.train if self.points is None else first_points(channels.train, self.points)
        test = train if together else channels.test
        points = [len(test.target), len(LEVELS)]
        if channels.truth is not None and list(channels.truth.shape) != points:
            raise UserError(f"truth: {list(channels.truth.shape)}; expected {points}, quantiles of test's points")
        self.cardinality = check(train, self.asked_cardinality)
        values = zip(self.cardinality, train.cat.T.tolist(), strict=True)
        self.unseen = [sorted(set(range(size)) - set(column)) for size, column in values]
        self.dynamic_features, self.static_features = train.dynamic.shape[1], train.static.shape[1]
        # Without dynamic features, whose future must be known, the points after the test series can be forecast.
        predict = test if channels.predict is None and not self.dynamic_features else channels.predict
        for series, ahead in ((test, 0), (predict, horizon if self.dynamic_features else 0)):
            if series is not None and (series is not train or ahead):
                check(series, self.cardinality, ahead)
                check_seen_in_training(train, series)
        return Channels(train, test, predict, channels.truth)

    def cut(self, channels: Channels, frequency: Frequency) -> None:
        """Cut checked series into the windows of each split."""
        train, test, predict, truth = channels
        horizon, together = self.prediction_length, test is train
        ahead = horizon if predict is test else 0  # the same series are forecast beyond their ends
        store = SeriesStore(train, frequency, ahead if together else 0, truth if together else None)
        tested = store if together else SeriesStore(test, frequency, ahead, truth)
        held = horizon * (self.val_windows + self.test_windows * together)
        # One step more than the lags need, for a task that forecasts changes.
        steps = max(max(frequency.lags) + self.context_length + 1, frequency.season) + horizon
        times = steps, self.context_length + horizon
        self.splits = {
            "train": Windows(store, *each_end(store, store.length - held, horizon), 1, *times),
            "val": self.rolling(store, store.length - held + horizon * self.val_windows, self.val_windows, *times),
            "test": self.rolling(tested, tested.length, self.test_windows, *times),
        }
        for name, windows in self.splits.items():
            self.report_short(name, windows, {"val": self.val_windows, "test": self.test_windows}.get(name, 1))
        self.weight = store.mean_absolute(store.length - held) if self.by_scale else torch.ones(len(store.length))
        if not (self.weight * (self.splits["train"].count > 0)).any():
            raise UserError("by_scale: only zeros to train from; expected other values, or by_scale false")
        self.report_idle(train.cat, ((self.weight > 0) & (self.splits["train"].count > 0)).numpy())
        self.starts = test.start
        self.names = [] if predict is None else predict.names
        if predict is not None:
            beyond = tested if predict is test else SeriesStore(predict, frequency, horizon)
            self.splits["predict"] = Windows(beyond, beyond.length + horizon, torch.ones_like(beyond.length), 1, *times)

    def rolling(self, store: SeriesStore, last: Tensor, count: int, steps: int, featured: int) -> Windows:
        """Return consecutive, non-overlapping evaluation windows up to `last`; series too short for one get none."""
        horizon = self.prediction_length
        whole = ((last - 1 - store.lead) // horizon).clamp(0, count)  # windows with a known point before their forecast
        return Windows(store, last - horizon * (whole - 1), whole, horizon, steps, featured, horizon)

    def report_short(self, split: str, windows: Windows, asked: int) -> None:
        """Log how many series are left out or have fewer windows than asked; raise UserError if all are left out."""
        short, fewer = int((windows.count <= 0).sum()), int(((windows.count > 0) & (windows.count < asked)).sum())
        if short == len(windows.count):
            raise UserError(
                f"{split}: all {short} series are too short, from their first known value on, for a forecast of "
                f"{self.prediction_length} steps in addition to those held out; expected longer series, or fewer "
                "val_windows and test_windows"
            )
        if short:
            words = "are too short for a window, from their first known value on, and left out"
            rank_zero_info(f"{split}: {short} of {len(windows.count)} series {words}")
        if fewer:
            rank_zero_info(f"{split}: {fewer} of {len(windows.count)} series have fewer than {asked} windows")

    def report_idle(self, cat: np.ndarray, drawn: np.ndarray) -> None:
        """Warn about category values (N, G) that no `drawn` (N,) series has: nothing is learnt about them."""
        for i, (there, learnt) in enumerate(zip(cat.T.tolist(), cat[drawn].T.tolist(), strict=True)):
            if idle := sorted(set(there) - set(learnt)):
                rank_zero_warn(
                    f"train: no window of a series with cat[{i}] in {shorten(idle)}: nothing is learnt about these"
                )

    def order(self, devices: int) -> Draws:
        """Return random windows, in batches all of one size."""
        windows = self.splits["train"]
        return Draws(windows.count, self.weight, self.batch_size * devices, self.batches)

    def eval_batch_size(self, split: str) -> int:
        """Return a small number: each window has all of its sample paths."""
        return EVALUATED

    def predict_dataloader(self) -> DataLoader:
        """Return the windows that follow the end of each series to predict."""
        if "predict" not in self.splits:
            raise UserError("dynamic_feat ends with the series; expected --data.init_args.predict with future values")
        return self.in_order("predict")

    def sources(self) -> list[str]:
        """Return the name of each series to predict, in order."""
        return self.names


def first_points(series: Series, points: int) -> Series:
    """Return the first `points` of each series."""
    cut = [one._replace(target=one.target[:points], dynamic=one.dynamic[:points]) for one in series.records()]
    return to_series(cut)


def each_end(store: SeriesStore, last: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Return the first end of a window with a known point before its forecast, and the number of ends up to `last`."""
    first = store.lead + horizon + 1
    return first, (last - first + 1).clamp(min=0)


class SyntheticSeries(ForecastingData):
    """Hourly series drawn from a seed, whose true distribution is known; see `synthetic_series`. No file is needed.

    Args:
        count: number of series.
        length: points in each series.
        seed: seed of all series.
        windows: further arguments of `ForecastingData`; the frequency must be 1H.
    """

    def __init__(self, count: int = 300, length: int = 1000, seed: int = 0, **windows):
        super().__init__(**windows)
        self.series_count, self.length, self.seed = count, length, seed

    def read(self, frequency: Frequency) -> Channels:
        """Draw the series, and their dynamic features for the hours to forecast."""
        check_at_least(1, count=self.series_count)
        check_at_least(336, length=self.length)  # two weeks, which show both seasons
        if str(frequency) != "1H":
            raise UserError(f"--data.init_args.frequency: {frequency}; expected 1H, because the series are hourly")
        longer = make_series(self.series_count, self.length + self.prediction_length, self.seed)
        series = first_points(longer.series, self.length)
        place = np.arange(len(longer.loc)) % (self.length + self.prediction_length)
        predict = series._replace(dynamic=longer.series.dynamic, dynamic_offsets=longer.series.dynamic_offsets)
        return Channels(series, series, predict, quantiles(longer, LEVELS)[place < self.length])


class SageMakerSeries(ForecastingData):
    """SageMaker's channels: JSON Lines or Parquet, as files or folders of them.

    Args:
        train: series to train on; each list in a record's `dynamic_feat` is as long as its target.
        test: the same series with the points to forecast at their ends, or others; by default, the ends of `train`.
        predict: series to forecast beyond their ends, with `prediction_length` more values in `dynamic_feat`; by
            default, those of `test` if they have no `dynamic_feat`.
        windows: further arguments of `ForecastingData`.
    """

    def __init__(self, train: str, test: str | None = None, predict: str | None = None, **windows):
        super().__init__(**windows)
        self.train, self.test, self.to_predict = train, test, predict

    def read(self, frequency: Frequency) -> Channels:
        """Read the channels that are given."""
        warn_of_shared({"train": [self.train], "test": filter(None, [self.test])}, "files")
        train = read_json_lines(self.train, frequency)
        test = train if self.test is None else read_json_lines(self.test, frequency)
        return Channels(train, test, self.to_predict and read_json_lines(self.to_predict, frequency))


class TableSeries(ForecastingData):
    """Series from a table that contains only their values.

    Args:
        own_category: make each series a category of its own, so that the network learns what is particular to it.
            The network can then forecast no other series.
        windows: further arguments of `ForecastingData`.
    """

    def __init__(self, own_category: bool = False, **windows):
        super().__init__(**windows)
        self.own_category = own_category

    def table(self, frequency: Frequency) -> Series:
        """Read the table."""
        raise NotImplementedError

    def read(self, frequency: Frequency) -> Channels:
        """Read the table, and use it for training, validation and testing."""
        series = self.table(frequency)
        if self.own_category:
            series = series._replace(cat=np.arange(len(series.names))[:, None])
            self.category_names = series.names
        return Channels(series, series)


class WideSeries(TableSeries):
    """A matrix without dates or header: a row for each time, a column for each series; .csv, .txt, and either with .gz.

    Args:
        path: the file.
        start: the time of its first row, YYYY-MM-DD or YYYY-MM-DD HH:MM:SS.
        windows: further arguments of `TableSeries`.
    """

    def __init__(self, path: str, start: str, **windows):
        super().__init__(**windows)
        self.path, self.start = path, start

    def table(self, frequency: Frequency) -> Series:
        """Read the matrix."""
        return read_wide(self.path, self.start, frequency)


class DatedSeries(TableSeries):
    """CSV files with a header: a row for each time, its date first, and a column for each series.

    Args:
        paths: the files; columns of the same name in two files are two series.
        windows: further arguments of `TableSeries`.
    """

    def __init__(self, paths: list[str], **windows):
        super().__init__(**windows)
        self.paths = paths

    def table(self, frequency: Frequency) -> Series:
        """Read and concatenate the tables."""
        if not self.paths:
            raise UserError("--data.init_args.paths: none; expected at least one file")
        tables = [read_dated(path, frequency) for path in self.paths]
        if len(tables) == 1:
            return tables[0]
        named = zip(names_of(self.paths), tables, strict=True)
        return to_series([one._replace(name=f"{file}: {one.name}") for file, table in named for one in table.records()])


def names_of(paths: list[str]) -> list[str]:
    """Return distinct names for files: without their folders, or without the path these share. Raises UserError."""
    files = [os.path.abspath(path) for path in paths]
    if len(set(files)) < len(files):
        raise UserError(f"--data.init_args.paths: {paths}; expected each file once")
    names = [os.path.basename(file) for file in files]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath(map(os.path.dirname, files))
    return [os.path.relpath(file, shared) for file in files]


class RowSeries(TableSeries):
    """M4's tables: a row for each series, its id first and then its values; the test file continues each series.

    Args:
        train: the file with the beginning of each series.
        test: the file with the same series, whose values come after those of `train`.
        start: the time at which all series start.
        windows: further arguments of `TableSeries`.
    """

    def __init__(self, train: str, test: str, start: str = "1750-01-01", **windows):
        super().__init__(**windows)
        self.train, self.test, self.start = train, test, start

    def table(self, frequency: Frequency) -> Series:
        """Read both tables and join the two parts of each series."""
        train, test = (read_rows(path, self.start, frequency).records() for path in (self.train, self.test))
        after = {one.name: one.target for one in test}
        unlike = sorted(after.keys() ^ {one.name for one in train})
        if unlike:
            raise UserError(
                f"{self.test}: series {unlike[0]} is in only one of the files; expected those of {self.train}"
            )
        return to_series([one._replace(target=np.concatenate([one.target, after[one.name]])) for one in train])


class LongSeries(TableSeries):
    """A CSV file with a header and a row for each value: the id of its series, its time, its value.

    Args:
        path: the file, .csv or .csv.gz.
        item_id: the column with the id.
        timestamp: the column with the time.
        target: the column with the value.
        windows: further arguments of `TableSeries`.
    """

    def __init__(
        self,
        path: str | Path,
        item_id: str = "item_id",
        timestamp: str = "timestamp",
        target: str = "target",
        **windows,
    ):
        super().__init__(**windows)
        self.path, self.columns = path, (item_id, timestamp, target)

    def table(self, frequency: Frequency) -> Series:
        """Read the table."""
        return read_long(self.path, frequency, *self.columns)
