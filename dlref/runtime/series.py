"""Process one time series, in training and on a device: check it, fill its gaps, compute its features.

T times, L lags; D dynamic features, R static features, F features of a time in total; G categories; P points of all
series.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as shorten
from typing import Any, NamedTuple

import numpy as np

from dlref.runtime.calendar import Frequency, parse_start
from dlref.runtime.errors import UserError

MAX_CATEGORIES = 1_000_000  # a mistyped category must not allocate a huge embedding
OF_GLUONTS = {"feat_static_cat": "cat", "feat_dynamic_real": "dynamic_feat"}  # GluonTS's names -> SageMaker's
LARGEST = float(np.finfo(np.float32).max)
NONE = np.zeros((0, 0), np.float32)


class Record(NamedTuple):
    """One series: its name, the time of its first point, its values (T,), categories and features.

    `cat` has G whole numbers, `dynamic` is (T or more, D), `static` (R,).
    """

    name: str
    start: np.datetime64
    target: np.ndarray
    cat: Sequence[int] = ()
    dynamic: np.ndarray = NONE
    static: np.ndarray = np.zeros(0, np.float32)


def first_differences(values: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the differences between neighbouring values (T,) -> (T - 1,) and which are observed.

    A difference is observed if both values are; otherwise it is 0.
    """
    both = observed[1:] & observed[:-1]
    with np.errstate(over="ignore"):  # the forecast will be refused as not finite
        return np.where(both, np.diff(values), np.float32(0)), both


# SageMaker's format


def parse_record(entry: Mapping[str, Any], where: str, frequency: Frequency) -> Record:
    """Parse a series in SageMaker's format for DeepAR, as described in `dlref.data.series_files`."""
    for theirs, ours in OF_GLUONTS.items():
        if theirs in entry:
            raise UserError(f"{where}: {theirs}; expected {ours}, its name in SageMaker's DeepAR")
    start = parse_start(entry.get("start"), f"{where}: start", frequency)
    target = entry.get("target")
    if not isinstance(target, list):
        raise UserError(f"{where}: target: {shorten(target)}; expected a list of numbers")
    target = [math.nan if value is None or (isinstance(value, str) and value == "NaN") else value for value in target]
    values = to_float32(target, where, "target[{}]".format)
    known = _parse_cat(entry, where), _parse_dynamic(entry, where), _parse_static(entry, where)
    return Record(where, start, values, *known)


def _parse_cat(entry: Mapping[str, Any], where: str) -> Sequence[int]:
    cat = entry.get("cat")
    if cat is None:  # Parquet has None for a record without categories
        return ()
    cat = cat if isinstance(cat, list) else [cat]
    for i, value in enumerate(cat):
        if type(value) is not int or not 0 <= value < MAX_CATEGORIES:  # not isinstance: True is an int too
            expected = f"a whole number from 0 to {MAX_CATEGORIES - 1}"
            raise UserError(f"{where}: cat[{i}]: {shorten(value)}; expected {expected}")
    return cat


def _parse_dynamic(entry: Mapping[str, Any], where: str) -> np.ndarray:
    features = entry.get("dynamic_feat")
    features = [] if features is None else features
    if not isinstance(features, list) or not all(isinstance(values, list) for values in features):
        raise UserError(f"{where}: dynamic_feat: {shorten(features)}; expected a list of lists of numbers")
    if not features:
        return NONE
    columns = []
    for i, values in enumerate(features):
        if len(values) != len(features[0]):
            expected = f"{len(features[0])}, as dynamic_feat[0] has"
            raise UserError(f"{where}: dynamic_feat[{i}]: {len(values)} values; expected {expected}")
        columns.append(to_float32(values, where, f"dynamic_feat[{i}][{{}}]".format, missing=False))
    return np.stack(columns, axis=1)


def _parse_static(entry: Mapping[str, Any], where: str) -> np.ndarray:
    static = entry.get("feat_static_real")
    static = [] if static is None else static
    if not isinstance(static, list):
        raise UserError(f"{where}: feat_static_real: {shorten(static)}; expected a list of numbers")
    return to_float32(static, where, "feat_static_real[{}]".format, missing=False)


def to_float32(values: list, where: str, field: Callable[[int], str], missing: bool = True) -> np.ndarray:
    """Convert numbers to float32. Raises UserError for other values, and NaN unless values may be missing.

    `field` names each value in an error.
    """
    if set(map(type, values)) <= {int, float}:  # type, not isinstance: True is an int too
        try:
            array = np.array(values, np.float64)
            if (np.abs(array) <= LARGEST).all() or (missing and not (np.abs(array) > LARGEST).any()):
                return array.astype(np.float32)
        except OverflowError:  # a whole number of hundreds of digits
            pass
    for i, value in enumerate(values):
        if type(value) not in (int, float) or not (abs(value) <= LARGEST or (missing and value != value)):
            expected = "a finite number of float32" + (" or a missing value" if missing else "")
            raise UserError(f"{where}: {field(i)}: {shorten(value)}; expected {expected}")
    raise AssertionError("one of the values was refused")


# Inputs of a network


def forward_filled(target: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace each NaN in values (P,) by the last value before it in the same series, or by 0 if there is none.

    Returns the filled values and which of them were observed, bool (P,). Series i is target[offsets[i]:offsets[i + 1]].
    """
    observed = ~np.isnan(target)
    places = np.arange(len(target))
    begin = np.repeat(offsets[:-1], np.diff(offsets))
    last = np.maximum.accumulate(np.where(observed, places, -1))
    return np.where(last >= begin, target[np.maximum(last, 0)], 0).astype(np.float32), observed


def features_at(frequency: Frequency, record: Record, steps: np.ndarray) -> np.ndarray:
    """Return the features of the times `steps` (T,) after a series' start: float32 (T, F).

    They are the places in the calendar's cycles, the age, the static and the dynamic features. Steps are 0 or more.
    """
    calendar = frequency.features(frequency.times(record.start, steps))
    age = np.log10(2.0 + steps)[:, None]  # as in GluonTS
    static = np.broadcast_to(record.static, (len(steps), len(record.static)))
    dynamic = record.dynamic[steps] if record.dynamic.shape[1] else np.zeros((len(steps), 0))
    return np.concatenate([calendar, age, static, dynamic], axis=1, dtype=np.float32)


def lag_indices(lags: Sequence[int] | np.ndarray, times: int) -> np.ndarray:
    """Return the indices of lagged values in a window, for its last `times` times, int64 (T, L).

    The window has max(lags) more values before these times.
    """
    return max(lags) + np.arange(times)[:, None] - np.asarray(lags)
