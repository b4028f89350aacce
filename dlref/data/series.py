"""Time series in memory, and SageMaker's rules for those that DeepAR is trained on and forecasts.

`check` raises UserError for series against the rules, and `check_seen_in_training` compares series to forecast with the
training series. `dlref/data/series_files.py` reads series from files.

N series, P points in all; D dynamic features of Q points in all; R static features; G categories.
"""

from reprlib import repr as shorten
from typing import Literal, NamedTuple

import numpy as np

from dlref.runtime.calendar import Frequency, show
from dlref.runtime.errors import UserError
from dlref.runtime.series import LARGEST, MAX_CATEGORIES, Record

MIN_OBSERVATIONS = 300  # SageMaker's minimum for all training series together


class Series(NamedTuple):
    """Time series and their features, concatenated.

    Attributes:
        target: float32 (P,), NaN where missing.
        offsets: int64 (N + 1,): series i is target[offsets[i]:offsets[i + 1]].
        start: datetime64[s] (N,), the time of each series' first point.
        cat: int64 (N, G), the categories of each series, from 0; G is 0 if there are none.
        dynamic: float32 (Q, D), features whose future is known; D is 0 if there are none.
        dynamic_offsets: int64 (N + 1,): series i has dynamic[dynamic_offsets[i]:dynamic_offsets[i + 1]].
        static: float32 (N, R), features that are the same at all times; R is 0 if there are none.
        names: N names: the id or the column of a series in its file, or file:line.
    """

    target: np.ndarray
    offsets: np.ndarray
    start: np.ndarray
    cat: np.ndarray
    dynamic: np.ndarray
    dynamic_offsets: np.ndarray
    static: np.ndarray
    names: list[str]

    def records(self) -> list[Record]:
        """Return the series one by one."""
        targets = np.split(self.target, self.offsets[1:-1])
        dynamics = np.split(self.dynamic, self.dynamic_offsets[1:-1])
        return list(map(Record, self.names, self.start, targets, self.cat, dynamics, self.static))


def to_series(records: list[Record]) -> Series:
    """Concatenate series, which must have equally many categories and features."""
    return Series(
        target=np.concatenate([record.target for record in records]),
        offsets=_offsets([record.target for record in records]),
        start=np.array([record.start for record in records]),
        cat=np.array([record.cat for record in records], np.int64),
        dynamic=np.concatenate([record.dynamic for record in records]),
        dynamic_offsets=_offsets([record.dynamic for record in records]),
        static=np.array([record.static for record in records], np.float32),
        names=[record.name for record in records],
    )


def _offsets(arrays: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, arrays)])


# Rules


def check(series: Series, cardinality: Literal["auto"] | list[int] = "auto", ahead: int | None = None) -> list[int]:
    """Check series against SageMaker's rules for DeepAR; series that are too short for a window are allowed.

    Args:
        series: the series returned by a reader.
        cardinality: the number of values of each category, G numbers; "auto": one more than the highest found.
        ahead: points after the target for which the dynamic features are known. None: these series are for training,
            which needs 300 observations in all, not all of them zero.

    Returns:
        The cardinality, G numbers.
    """
    _check_target(series, train=ahead is None)
    for field, values in (("dynamic_feat", series.dynamic), ("feat_static_real", series.static)):
        # The readers name the value; this is for series from elsewhere. Beside float16 a Python float is infinite.
        unlike = ~(np.abs(values) <= np.float32(LARGEST))
        if unlike.any():
            raise UserError(f"{field}: {values[unlike][0]} among the values; expected finite numbers of float32")
    if series.dynamic.shape[1]:
        more = ahead or 0
        lengths, expected = np.diff(series.dynamic_offsets), np.diff(series.offsets) + more
        for name, length, points in zip(series.names, lengths, expected, strict=True):
            if length != points:
                why = "as many as target" + (f" and {more} more" if more else "")
                raise UserError(f"{name}: dynamic_feat: {length} values; expected {points}, {why}")
    return _check_cat(series, cardinality)


def check_layout(split: str, series: object, frequency: Frequency) -> None:
    """Raise UserError unless the arrays are as `Series` describes them and, counted in business days, begin on one.

    The readers' always do.
    """
    if not isinstance(series, Series):
        raise UserError(f"{split}: {type(series).__name__}; expected a Series")
    if not all(isinstance(name, str) for name in series.names):
        raise UserError(f"{split}: names {shorten(list(series.names))}; expected texts")
    count = len(series.names)
    if not count:
        raise UserError(f"{split}: no series; expected some")
    layout = {  # kinds of numpy's types, unless there are no values, and the shape; None: any size
        "target": ("fiu", (None,)),
        "offsets": ("iu", (count + 1,)),
        "start": ("M", (count,)),
        "cat": ("iu", (count, None)),
        "dynamic": ("fiu", (None, None)),
        "dynamic_offsets": ("iu", (count + 1,)),
        "static": ("fiu", (count, None)),
    }
    for field, (kinds, shape) in layout.items():
        array = getattr(series, field)
        kind, sizes = (array.dtype.kind, array.shape) if isinstance(array, np.ndarray) else ("", ())
        known = tuple(None if size is None else own for own, size in zip(sizes, shape, strict=False))
        if len(sizes) != len(shape) or known != shape or (array.size and kind not in kinds):
            shown = f"{array.dtype} {list(sizes)}" if kind else type(array).__name__
            raise UserError(f"{split}: {field}: {shown}; expected an array for {count} names, as in Series")
    for field, values in (("offsets", series.target), ("dynamic_offsets", series.dynamic)):
        places, last = getattr(series, field), len(values)
        if places[0] != 0 or places[-1] != last or (np.diff(places) < 0).any():
            raise UserError(f"{split}: {field}: {shorten(places.tolist())}; expected them to rise from 0 to {last}")
    if np.isnat(series.start).any():
        raise UserError(f"{series.names[int(np.isnat(series.start).argmax())]}: start: no time; expected one")
    if frequency.unit == "B" and not (working := np.is_busday(series.start.astype("datetime64[D]"))).all():
        i = int(working.argmin())
        raise UserError(f"{series.names[i]}: start: {show(series.start[i])} is a weekend; expected a business day")


def _check_target(series: Series, train: bool) -> None:
    if (unlike := np.abs(series.target) > np.float32(LARGEST)).any():
        at = int(unlike.argmax())
        name = series.names[int(np.searchsorted(series.offsets, at, side="right")) - 1]
        expected = "finite numbers of float32, or NaN where missing"
        raise UserError(f"{name}: target: {series.target[at]}; expected {expected}")
    observed = np.append(0, np.cumsum(~np.isnan(series.target)))
    counts = np.diff(observed[series.offsets])
    if not counts.all():
        i = int(np.argmin(counts))
        points = series.offsets[i + 1] - series.offsets[i]
        raise UserError(f"{series.names[i]}: target: {points} values, all missing; expected at least one observed")
    names = " to ".join(dict.fromkeys((series.names[0], series.names[-1])))
    if train and observed[-1] < MIN_OBSERVATIONS:
        raise UserError(f"{names}: target: {observed[-1]} values observed; expected {MIN_OBSERVATIONS} to train from")
    if train and not np.nan_to_num(series.target).any():
        raise UserError(f"{names}: target: only zeros; expected other values to train from")


def _check_cat(series: Series, cardinality: Literal["auto"] | list[int]) -> list[int]:
    for i, column in enumerate(series.cat.T):
        unlike = (column < 0) | (column >= MAX_CATEGORIES)  # the readers have checked theirs
        _refuse_cat(series, i, unlike, f"0 to {MAX_CATEGORIES - 1}")
    if cardinality == "auto":
        return (series.cat.max(axis=0) + 1).tolist()
    count = series.cat.shape[1]
    if not isinstance(cardinality, list) or len(cardinality) != count:
        raise UserError(f"cardinality: {shorten(cardinality)}; expected auto or {count} numbers, one for each cat")
    for i, size in enumerate(cardinality):
        if type(size) is not int or not 0 < size <= MAX_CATEGORIES:
            raise UserError(f"cardinality[{i}]: {shorten(size)}; expected 1 to {MAX_CATEGORIES}")
        _refuse_cat(series, i, series.cat[:, i] >= size, f"0 to {size - 1}, as cardinality says")
    return cardinality


def check_seen_in_training(train: Series, other: Series) -> None:
    """Raise UserError if `other` has other fields than the training series, or category values that they lack."""
    fields = [("cat", other.cat, train.cat), ("dynamic_feat", other.dynamic, train.dynamic)]
    for field, found, known in [*fields, ("feat_static_real", other.static, train.static)]:
        if found.shape[1] != known.shape[1]:
            expected = f"{known.shape[1]}, as in training"
            raise UserError(f"{other.names[0]}: {field}: {found.shape[1]} of them; expected {expected}")
    for i, known in enumerate(map(np.unique, train.cat.T)):
        _refuse_cat(other, i, ~np.isin(other.cat[:, i], known), f"one seen in training, {shorten(known.tolist())}")


def _refuse_cat(series: Series, i: int, bad: np.ndarray, expected: str) -> None:
    if bad.any():
        at = int(np.argmax(bad))
        raise UserError(f"{series.names[at]}: cat[{i}]: {series.cat[at, i]}; expected {expected}")
