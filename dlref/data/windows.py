"""Windows of many series at once, gathered by index on the device that holds them.

All series lie one after the other in one tensor. A batch of windows is one indexing of it: no Python for a window.

N series, P points in all, B windows, T times of a window (history, context and prediction), K the last of them, which
have features (context and prediction), F features of a time, G categories, H times to forecast, Q quantile levels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from dlref.data.series import Series
from dlref.runtime.calendar import Frequency
from dlref.runtime.series import Record, features_at, forward_filled


class Window(NamedTuple):
    """A batch. What lies before a series begins or after it ends is not observed, and its value is 0.

    Windows to evaluate on also have `seasonal_error`, the mean absolute difference of values a season apart in all that
    lies before the forecast (0: none is known), and `truth`, the true quantiles of the times to forecast, where these
    are known.
    """

    values: Float[Tensor, "B T"]
    observed: Bool[Tensor, "B T"]
    features: Float[Tensor, "B K F"]
    categories: Int[Tensor, "B G"]
    seasonal_error: Float[Tensor, "B"] | None = None
    truth: Float[Tensor, "B H Q"] | None = None


class SeriesStore(nn.Module):
    """Series as tensors, to be moved to a device.

    The features of a time are those of `runtime.series.features_at`; they are there for `future` steps after the end of
    each series too. Missing values take the last one before them that is not missing, so that lags see no holes; they
    stay not observed.

    Args:
        series: checked; dynamic features have to reach `future` steps beyond the values.
        frequency: of all of them.
        future: steps after the last value for which there are features.
        truth: (P, Q) true quantiles of each point, where they are known.
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
            "seasonal_errors": seasonal_errors(series, frequency.season),
        }
        for name, array in tensors.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)
        truth = None if truth is None else torch.from_numpy(truth.astype(np.float32))
        self.register_buffer("truth", truth, persistent=False)

    def forward(self, item: Int[Tensor, "B"], end: Int[Tensor, "B"], steps: int, featured: int) -> Window:
        """The `steps` times before the time `end` of each series `item`, counted from its first value, 0; the last
        `featured` of them with features.
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

    def outcomes(self, difference: bool) -> Float[Tensor, "P"]:
        """All observed values; or all changes from one of a series to its next, where both are observed."""
        if not difference:
            return self.values[self.observed]
        both = self.observed[1:] & self.observed[:-1]
        both[self.begin[1:] - 1] = False  # from one series to the next
        return self.values.diff()[both]

    def seasonal_error(self, item: Int[Tensor, "B"], end: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Mean absolute difference of the values a season apart before the time `end` of each series; 0: none."""
        return self.seasonal_errors[self.begin[item] + item + end]

    def truth_of(self, item: Int[Tensor, "B"], end: Int[Tensor, "B"], steps: int) -> Float[Tensor, "B H Q"] | None:
        """The true quantiles of the `steps` times before `end`, which lie in the series; None where none are known."""
        place = (self.begin[item] + end)[:, None] + torch.arange(-steps, 0, device=end.device)
        return None if self.truth is None else self.truth[place]


def rows_at(tensor: Tensor, index: Int[Tensor, "B T"]) -> Tensor:
    """`tensor[index]`; on a processor torch's indexing takes six times as long as its selecting."""
    return tensor.index_select(0, index.flatten()).unflatten(0, index.shape)


def features(series: Series, frequency: Frequency, future: int) -> np.ndarray:
    """What is known of each time of each series and of `future` more, float32 (P + N * future, F)."""
    parts = []
    for i, start in enumerate(series.start):
        target = series.target[series.offsets[i] : series.offsets[i + 1]]
        steps = np.arange(len(target) + future)
        dynamic = series.dynamic[series.dynamic_offsets[i] : series.dynamic_offsets[i + 1]]
        if series.dynamic.shape[1] and len(dynamic) < len(steps):
            raise ValueError(f"{series.names[i]}: dynamic features of {len(dynamic)} times; expected {len(steps)}")
        record = Record(series.names[i], start, target, dynamic=dynamic, static=series.static[i])
        parts.append(features_at(frequency, record, steps))
    return np.concatenate(parts)


def seasonal_errors(series: Series, season: int) -> np.ndarray:
    """Mean absolute difference of the values a season apart, of those before each point of a series and of all: float32
    (P + N,), 0 where there are none. A missing value has no difference.
    """
    parts = []  # each summed by itself: in a sum over all, what is small would be lost behind what is large
    for target in np.split(series.target.astype(np.float64), series.offsets[1:-1]):
        apart = np.abs(target[season:] - target[:-season])
        there = ~np.isnan(apart)
        parts += [np.zeros(len(target) + 1 - len(apart)), np.where(there, apart, 0).cumsum() / there.cumsum().clip(1)]
    return np.concatenate(parts).astype(np.float32)


class Windows(Dataset):
    """Some windows of each series, numbered through: item by item, in the order of their ends. A batch is one indexing.

    Args:
        store: the series.
        first: (N,) where the first window of each series ends.
        count: (N,) how many windows it has.
        stride: from the end of a window to the end of the next.
        steps: T.
        featured: K.
        horizon: H; evaluated windows are given their seasonal error, and the truth where it is known. 0: for training.
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
        """The series of each window and where in it the window ends."""
        item = torch.searchsorted(self.stop, number, right=True)
        return item, self.first[item] + self.stride * (number - self.stop[item] + self.count[item])

    def __getitem__(self, number: Int[Tensor, "B"]) -> Window:
        # Non-blocking: an index in the host's memory would make every batch wait for the GPU to catch up.
        item, end = self.ends(number.to(self.stop.device, non_blocking=True))
        window = self.store(item, end, self.steps, self.featured)
        if not self.horizon:
            return window
        error = self.store.seasonal_error(item, end - self.horizon)
        return window._replace(seasonal_error=error, truth=self.store.truth_of(item, end, self.horizon))

    def to(self, device: torch.device) -> "Windows":
        """Return the same windows on a device. The store, which several share, is moved."""
        parts = self.first.to(device), self.count.to(device)
        return Windows(self.store.to(device), *parts, self.stride, self.steps, self.featured, self.horizon)


class Draws:
    """Batches of windows drawn with replacement: a series first, then one of its windows, each as likely.

    Args:
        count: (N,) the windows of each series.
        weight: (N,) how likely a series is; one without windows is never drawn.
        batch_size: B.
        batches: how many an epoch has.
    """

    def __init__(self, count: Int[Tensor, "N"], weight: Float[Tensor, "N"], batch_size: int, batches: int):
        self.count, self.weight = count.cpu(), weight.double().cpu() * (count.cpu() > 0)
        self.batch_size, self.batches = batch_size, batches

    def __len__(self) -> int:
        return self.batches

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """The numbers of the windows of each batch."""
        total = self.batch_size * self.batches
        item = torch.multinomial(self.weight, total, replacement=True, generator=generator)
        place = (torch.rand(total, dtype=torch.float64, generator=generator) * self.count[item]).long()
        number = self.count.cumsum(0)[item] - self.count[item] + place
        return iter(number.split(self.batch_size))
