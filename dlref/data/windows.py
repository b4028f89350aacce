"""Windows of many series at once, gathered by index on the device that holds them.

All series are concatenated in one tensor. A batch of windows is one indexing of it: no Python code runs per window.

N series, P points in all, B windows, T times of a window (history, context and prediction), K the last of them, which
have features (context and prediction), F features of a time, G categories, H times to forecast, Q quantile levels.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from dlref.data.loader import sent
from dlref.data.series import Series
from dlref.runtime.calendar import Frequency
from dlref.runtime.series import features_at, forward_filled


class Window(NamedTuple):
    """A batch of windows. Times before a series begins or after it ends are not observed, and their values are 0.

    Windows for evaluation also have `seasonal_error`, the mean absolute difference of values a season apart over all
    times before the forecast (0: none is known); `truth`, the true quantiles of the times to forecast, if they are
    known; and `known`, the number of times from the first observed value of the series to the forecast.
    """

    values: Float[Tensor, "B T"]
    observed: Bool[Tensor, "B T"]
    features: Float[Tensor, "B K F"]
    categories: Int[Tensor, "B G"]
    seasonal_error: Float[Tensor, "B"] | None = None
    truth: Float[Tensor, "B H Q"] | None = None
    known: Int[Tensor, "B"] | None = None


class SeriesStore(nn.Module):
    """Series as tensors, to be moved to a device.

    The features of a time are those of `runtime.series.features_at`; `future` steps after the end of each series have
    features, too. A missing value is replaced by the last observed one before it, so that lags see no gaps, but it
    still counts as not observed.

    Args:
        series: checked series; dynamic features must reach `future` steps beyond the values.
        frequency: the frequency of all series.
        future: number of steps after the last value that have features.
        truth: (P, Q), the true quantiles of each point, if they are known.
    """

    def __init__(self, series: Series, frequency: Frequency, future: int = 0, truth: np.ndarray | None = None):
        super().__init__()
        self.future = future
        values, observed = forward_filled(series.target, series.offsets)
        tensors = {
            "values": values,
            "observed": observed,
            "features": features(series, frequency, future),
            "categories": series.cat,
            "begin": series.offsets[:-1],
            "length": np.diff(series.offsets),
            "lead": leads(observed, series.offsets),
            "seasonal_errors": seasonal_errors(series, frequency.season),
        }
        for name, array in tensors.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)
        truth = None if truth is None else torch.from_numpy(truth.astype(np.float32))
        self.register_buffer("truth", truth, persistent=False)

    def forward(self, item: Int[Tensor, "B"], end: Int[Tensor, "B"], steps: int, featured: int) -> Window:
        """Return the `steps` times before the time `end` of each series `item`, the last `featured` with features.

        Times are counted from a series' first value, which is 0.
        """
        begin, length = self.begin[item][:, None], self.length[item][:, None]
        place = end[:, None] + torch.arange(-steps, 0, device=end.device)  # (B, T)
        there = (place >= 0) & (place < length)
        index = begin + place.clamp(min=0).minimum(length - 1)
        late, stop = place[:, -featured:], length + self.future  # (B, K)
        feature = begin + item[:, None] * self.future + late.clamp(min=0).minimum(stop - 1)
        known = (late >= 0) & (late < stop)
        return Window(
            values=rows_at(self.values, index).where(there, 0),
            observed=rows_at(self.observed, index) & there,
            features=rows_at(self.features, feature).where(known[..., None], 0),
            categories=self.categories[item],
        )

    def outcomes(self, difference: bool) -> tuple[Float[Tensor, "P"], Bool[Tensor, "P"]]:
        """Return each value, or its change from the point before, and which are observed; a change if both points are.

        The first point of a series has no change.
        """
        if not difference:
            return self.values, self.observed
        both = self.observed & self.observed.roll(1)
        both[self.begin] = False
        return self.values - self.values.roll(1), both

    def mean_absolute(self, end: Int[Tensor, "N"], difference: bool = False) -> Float[Tensor, "N"]:
        """Return the mean absolute value, or change, observed before time `end` of each series; 0 if there is none.

        The result is on the CPU: not every device has float64.
        """
        values, observed, begin = (tensor.cpu() for tensor in (*self.outcomes(difference), self.begin))
        item = torch.arange(len(begin)).repeat_interleave(self.length.cpu())
        known = observed & (torch.arange(len(values)) - begin[item] < end.cpu()[item])
        # One sum per series: in a running sum over all series, small values would be lost beside large ones.
        zeros = torch.zeros(len(begin), dtype=torch.float64)
        total = zeros.index_add(0, item, values.abs().where(known, 0).double())
        return total / zeros.index_add(0, item, known.double()).clamp(min=1)

    def seasonal_error(self, item: Int[Tensor, "B"], end: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return the mean absolute difference of values a season apart before time `end` of each series; 0: none."""
        return self.seasonal_errors[self.begin[item] + item + end]

    def truth_of(self, item: Int[Tensor, "B"], end: Int[Tensor, "B"], steps: int) -> Float[Tensor, "B H Q"] | None:
        """Return the true quantiles of the `steps` times before `end`, all within the series; None if unknown."""
        place = (self.begin[item] + end)[:, None] + torch.arange(-steps, 0, device=end.device)
        return None if self.truth is None else self.truth[place]


def rows_at(tensor: Tensor, index: Int[Tensor, "B T"]) -> Tensor:
    """Return `tensor[index]`; on a CPU, torch's indexing takes six times as long as `index_select`."""
    return tensor.index_select(0, index.flatten()).unflatten(0, index.shape)


def leads(observed: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the number of points before the first observed one of each series, (N,); all if none is observed."""
    parts = np.split(observed, offsets[1:-1])
    return np.array([part.argmax() if part.any() else len(part) for part in parts])


def features(series: Series, frequency: Frequency, future: int) -> np.ndarray:
    """Return the features of each time of each series and of `future` more, float32 (P + N * future, F)."""
    records = series.records()
    return np.concatenate([features_at(frequency, one, np.arange(len(one.target) + future)) for one in records])


def seasonal_errors(series: Series, season: int) -> np.ndarray:
    """Return the mean absolute difference of values a season apart, before each point of a series and over all of it.

    The result is float32 (P + N,), 0 if there is no difference. Differences with a missing value are left out.
    """
    parts = []  # one sum per series: in a sum over all series, small values would be lost beside large ones
    for target in np.split(series.target.astype(np.float64), series.offsets[1:-1]):
        apart = np.abs(target[season:] - target[:-season])
        there = ~np.isnan(apart)
        parts += [np.zeros(len(target) + 1 - len(apart)), np.where(there, apart, 0).cumsum() / there.cumsum().clip(1)]
    return np.concatenate(parts).astype(np.float32)


class Windows(Dataset):
    """Some windows of each series, numbered series by series in the order of their ends. A batch is one indexing.

    Args:
        store: the series.
        first: (N,), the end of the first window of each series.
        count: (N,), the number of windows of each series.
        stride: distance from the end of a window to the end of the next.
        steps: T.
        featured: K.
        horizon: H, for windows that are evaluated; 0: for training.
    """

    def __init__(
        self, store: SeriesStore, first: Tensor, count: Tensor, stride: int, steps: int, featured: int, horizon: int = 0
    ):
        self.store, self.first, self.count = store, first, count
        self.stride, self.steps, self.featured, self.horizon = stride, steps, featured, horizon
        self.stop = count.cumsum(0)

    def __len__(self) -> int:
        return int(self.stop[-1])

    def ends(self, number: Int[Tensor, "B"]) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
        """Return the series of each window and the time in it at which the window ends."""
        item = torch.searchsorted(self.stop, number, right=True)
        return item, self.first[item] + self.stride * (number - self.stop[item] + self.count[item])

    def typical(self, difference: bool) -> float:
        """Return the geometric mean, over series, of the mean absolute value, or change, before the last window's end.

        Series with zeros alone, or without windows, have no part in it; if there are no others, it is 1.
        """
        end = (self.first + self.stride * (self.count - 1)).where(self.count > 0, 0)
        means = self.store.mean_absolute(end, difference)
        logs = means[means > 0].log()
        return math.exp(logs.sum().item() / max(1, len(logs)))

    def __getitem__(self, number: Int[Tensor, "B"]) -> Window:
        item, end = self.ends(sent(number, self.stop.device))
        window = self.store(item, end, self.steps, self.featured)
        if not self.horizon:
            return window
        begin = end - self.horizon
        return window._replace(
            seasonal_error=self.store.seasonal_error(item, begin),
            truth=self.store.truth_of(item, end, self.horizon),
            known=begin - self.store.lead[item],
        )

    def to(self, device: torch.device) -> "Windows":
        """Return the same windows on a device. The store, which several instances share, is moved in place."""
        parts = self.first.to(device), self.count.to(device)
        return Windows(self.store.to(device), *parts, self.stride, self.steps, self.featured, self.horizon)


class Draws:
    """Batches of windows drawn with replacement: first a series, then one of its windows with equal probability.

    Args:
        count: (N,), the number of windows of each series.
        weight: (N,), the relative probability of each series; a series without windows is never drawn.
        batch_size: B.
        batches: number of batches in an epoch.
    """

    def __init__(self, count: Int[Tensor, "N"], weight: Float[Tensor, "N"], batch_size: int, batches: int):
        self.count, self.weight = count.cpu(), weight.double().cpu() * (count.cpu() > 0)
        self.batch_size, self.batches = batch_size, batches

    def __len__(self) -> int:
        return self.batches

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Return the numbers of the windows in each batch."""
        total = self.batch_size * self.batches
        item = torch.multinomial(self.weight, total, replacement=True, generator=generator)
        place = (torch.rand(total, dtype=torch.float64, generator=generator) * self.count[item]).long()
        number = self.count.cumsum(0)[item] - self.count[item] + place
        return iter(number.split(self.batch_size))
