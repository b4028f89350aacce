"""Windows of many series at once, gathered by index on the device that holds them.

All series lie one after the other in one tensor. A batch of windows is one indexing of it: no Python for a window.

N series, P points in all, B windows, T times of a window (history, context and prediction), F features of a time,
G categories.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dlref.data.series import Series
from dlref.runtime.calendar import Frequency


class Window(NamedTuple):
    """A batch. What lies before a series begins or after it ends is not observed, and its value is 0."""

    values: Float[Tensor, "B T"]
    observed: Bool[Tensor, "B T"]
    features: Float[Tensor, "B T F"]
    categories: Int[Tensor, "B G"]


class SeriesStore(nn.Module):
    """Series as tensors, to be moved to a device.

    The features of a time are its places in the cycles of the calendar, the age of the series and the dynamic features;
    they are there for `future` steps after the end of each series too. Missing values take the last one before them
    that is not missing, so that lags see no holes; they stay not observed.

    Args:
        series: checked; dynamic features have to reach `future` steps beyond the values.
        frequency: of all of them.
        future: steps after the last value for which there are features.
    """

    def __init__(self, series: Series, frequency: Frequency, future: int = 0):
        super().__init__()
        self.future = future
        values, observed = carried(series.target, series.offsets)
        tensors = {
            "values": values,
            "observed": observed,
            "features": features(series, frequency, future),
            "categories": series.cat,
            "begin": series.offsets[:-1],
            "length": np.diff(series.offsets),
        }
        for name, array in tensors.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)

    def forward(self, item: Int[Tensor, "B"], end: Int[Tensor, "B"], steps: int) -> Window:
        """The `steps` times before the time `end` of each series `item`, counted from its first value, 0."""
        place = end[:, None] + torch.arange(-steps, 0, device=end.device)  # (B, T)
        begin, length = self.begin[item][:, None], self.length[item][:, None]
        there = (place >= 0) & (place < length)
        known = (place >= 0) & (place < length + self.future)
        index = begin + place.clamp(min=0).minimum(length - 1)
        feature = begin + item[:, None] * self.future + place.clamp(min=0).minimum(length - 1 + self.future)
        return Window(
            values=self.values[index].where(there, 0),
            observed=self.observed[index] & there,
            features=self.features[feature].where(known[..., None], 0),
            categories=self.categories[item],
        )


def carried(target: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (P,) with NaN -> the last value of the same series before each NaN, 0 where there is none, and what was
    there, bool (P,).
    """
    observed = ~np.isnan(target)
    places = np.arange(len(target))
    begin = np.repeat(offsets[:-1], np.diff(offsets))
    last = np.maximum.accumulate(np.where(observed, places, -1))
    return np.where(last >= begin, target[np.maximum(last, 0)], 0).astype(np.float32), observed


def features(series: Series, frequency: Frequency, future: int) -> np.ndarray:
    """What is known of each time of each series and of `future` more, float32 (P + N * future, F)."""
    parts = []
    for i, start in enumerate(series.start):
        steps = np.arange(series.offsets[i + 1] - series.offsets[i] + future)
        dynamic = series.dynamic[series.dynamic_offsets[i] : series.dynamic_offsets[i + 1]]
        if series.dynamic.shape[1] == 0:
            dynamic = np.zeros((len(steps), 0), np.float32)
        if len(dynamic) < len(steps):
            raise ValueError(f"{series.names[i]}: dynamic features of {len(dynamic)} times; expected {len(steps)}")
        calendar = frequency.features(frequency.times(start, steps))
        age = np.log10(2.0 + steps)[:, None]  # GluonTS's
        parts.append(np.concatenate([calendar, age, dynamic[: len(steps)]], axis=1, dtype=np.float32))
    return np.concatenate(parts)
