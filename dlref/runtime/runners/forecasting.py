"""The runner of forecasting: series as SageMaker's DeepAR takes them -> means, quantiles and sample paths.

T times of context, L lags, F features, G categories, H times to forecast, S sample paths, U uniform numbers of a draw.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlref.runtime.calendar import Frequency
from dlref.runtime.errors import UserError
from dlref.runtime.runner import Runner as Base
from dlref.runtime.series import Record, carried, features_at, lag_places, parse_object, parse_record

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # SageMaker's, at which forecasts are judged
SAMPLES = 100  # SageMaker's
MOST_SAMPLES = 100_000
ROWS = 3200  # of one call of a graph: 32 series of 100 paths; more do not fit the caches
OUTPUT_TYPES = ("mean", "quantiles", "samples")
KEYS = {
    "frequency": str,
    "lags": list,
    "context_length": int,
    "prediction_length": int,
    "cardinality": list,
    "dynamic_features": int,
    "static_features": int,
    "uniforms": int,
    "whole_numbers": bool,
}


class Past(NamedTuple):
    """What is known of a series.

    Attributes:
        values: float32 (max(lags) + T,).
        observed: bool (T,), which of the last values are there.
        features: float32 (T + H, F).
        categories: int64 (G,).
    """

    values: np.ndarray
    observed: np.ndarray
    features: np.ndarray
    categories: np.ndarray


class Request(NamedTuple):
    """Series to forecast and what is asked of them; `single` says that there is one and no list around it."""

    pasts: list[Past]
    samples: int
    types: tuple[str, ...]
    levels: Mapping[str, float]
    single: bool


class Line(NamedTuple):
    """A line of a file, and where it stands."""

    where: str
    text: str


class Runner(Base):
    """Serves two graphs, and joins them by drawing one time after the other.

    `encode`: target float32 (B, T), observed bool (B, T), lagged (B, T, L), features (B, T, F), categories int64 (B, G)
    -> scale (B), state (Y, B, D).
    `step`, in which values are divided by the scale: lagged (B, S, L), features (B, F), categories (B, G), scale (B),
    state (Y, B, S, D), noise (B, S, U), uniform from 0 to 1 -> value (B, S), next_state (Y, B, S, D).

    The noise of a series comes from its values alone: the same past has the same paths, in whatever company.

    Raises UserError for metadata or graphs that are others.
    """

    def __init__(self, graphs: Mapping[str, Any], metadata: Mapping[str, Any]):
        if set(graphs) != {"encode", "step"} or not all(type(metadata.get(key)) is KEYS[key] for key in KEYS):
            raise UserError(f"not forecasting; expected graphs encode, step and metadata {', '.join(KEYS)}")
        self.frequency = Frequency.parse(metadata["frequency"])
        self.context, self.horizon = metadata["context_length"], metadata["prediction_length"]
        lags, sizes = metadata["lags"], (self.context, self.horizon, 1 + metadata["uniforms"])
        if not all(type(number) is int and number > 0 for number in (*lags, *sizes)) or not lags:
            raise UserError("not forecasting; expected lags, context_length and prediction_length above 0")
        self.encode, self.step = graphs["encode"], graphs["step"]
        self.lags, self.metadata = np.array(lags), metadata

    # Requests

    def inputs(self, path: str) -> Iterator[tuple[str, Line]]:
        """A file of JSON is one request or series, or has one on each line: a name and a source for each."""
        text = _read(path)
        lines = [(f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        if len(lines) > 1 and _is_json(lines[0][1]):
            yield from ((name, Line(name, line)) for name, line in lines)
        else:
            yield path, Line(path, text)

    def read(self, source: Any) -> Request:
        """A request {"instances": [...], "configuration": {...}}, or one series {"start": ..., "target": [...], ...}.

        `source` is such an object, a line or a file that holds one. Targets and features may be arrays.
        """
        where = "request"
        if isinstance(source, (str, Path)):
            where = str(source)
            source = Line(where, _read(where))
        if isinstance(source, Line):
            where = source.where
            source = parse_object(source.text, where)
        if not isinstance(source, Mapping):
            raise UserError(f"{where}: {type(source).__name__}; expected a series or a request, as an object")
        if "instances" not in source:
            return Request([self.past(source, where)], SAMPLES, *_outputs({}, where), single=True)
        instances, configuration = source["instances"], source.get("configuration", {})
        if not isinstance(instances, list) or not instances:
            raise UserError(f"{where}: instances: expected a list of series")
        if not isinstance(configuration, Mapping):
            raise UserError(f"{where}: configuration: {configuration!r}; expected an object")
        samples = configuration.get("num_samples", SAMPLES)
        if type(samples) is not int or not 0 < samples <= MOST_SAMPLES:
            raise UserError(f"{where}: num_samples: {samples!r}; expected 1 to {MOST_SAMPLES}")
        pasts = []
        for i, instance in enumerate(instances):
            if not isinstance(instance, Mapping):
                raise UserError(f"{where}: instances[{i}]: {type(instance).__name__}; expected a series as an object")
            pasts.append(self.past(instance, f"{where}: instances[{i}]"))
        return Request(pasts, samples, *_outputs(configuration, where), single=False)

    def past(self, entry: Mapping[str, Any], where: str) -> Past:
        """What a series says, checked against what the model was trained with. Raises UserError."""
        entry = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in entry.items()}
        record = parse_record(entry, where, self.frequency)
        known = self.metadata
        for field, found, expected in (
            ("cat", len(record.cat), len(known["cardinality"])),
            ("dynamic_feat", record.dynamic.shape[1], known["dynamic_features"]),
            ("feat_static_real", len(record.static), known["static_features"]),
        ):
            if found != expected:
                raise UserError(f"{where}: {field}: {found} of them; expected {expected}, as in training")
        for i, (value, size) in enumerate(zip(record.cat, known["cardinality"], strict=True)):
            if value >= size:
                raise UserError(f"{where}: cat[{i}]: {value}; expected 0 to {size - 1}, as in training")
        points = len(record.target)
        if record.dynamic.shape[1] and len(record.dynamic) != points + self.horizon:
            raise UserError(
                f"{where}: dynamic_feat: {len(record.dynamic)} values; expected {points + self.horizon}, as many as "
                f"target and {self.horizon} more"
            )
        if np.isnan(record.target).all():
            raise UserError(f"{where}: target: {points} values, all missing; expected at least one observed")
        return self.cut(record)

    def cut(self, record: Record) -> Past:
        """The end of a series, with zeros before its start."""
        points = len(record.target)
        values, observed = carried(record.target, np.array([0, points]))
        first = max(0, points - self.context)
        features = features_at(self.frequency, record, np.arange(first, points + self.horizon))
        return Past(
            _last(values, max(self.lags) + self.context),
            _last(observed, self.context),
            _last(features, self.context + self.horizon),
            np.array(record.cat, np.int64),
        )

    # Answers

    def together(self, first: Request, second: Request) -> bool:
        """Requests for as many paths."""
        return first.samples == second.samples

    def answer(self, items: list[Request]) -> list[dict]:
        """`predictions`, for each series `mean`, `quantiles` and `samples` as asked; a single series has no list."""
        pasts = [past for item in items for past in item.pasts]
        paths = iter(self.paths(Past(*map(np.stack, zip(*pasts, strict=True))), items[0].samples))
        answers = []
        for item in items:
            found = [prediction(next(paths), item.types, item.levels) for _ in item.pasts]
            answers.append(found[0] if item.single else {"predictions": found})
        return answers

    def paths(self, past: Past, samples: int = SAMPLES) -> np.ndarray:
        """Sample paths float32 (B, S, H) of several series, whose arrays in `past` have a first axis B."""
        fixed = self.step.shape["noise"][:2]
        if isinstance(fixed[1], int) and fixed[1] != samples:
            raise UserError(f"num_samples: {samples}; expected {fixed[1]}, which this bundle is fixed to")
        many = fixed[0] if isinstance(fixed[0], int) else max(1, ROWS // samples)
        parts = [Past(*(array[i : i + many] for array in past)) for i in range(0, len(past.values), many)]
        paths = np.concatenate([self._paths(part, samples) for part in parts])
        if not np.isfinite(paths).all():
            raise UserError("graph answers no finite numbers; expected finite values")
        return paths

    def _paths(self, past: Past, samples: int) -> np.ndarray:
        """Ancestral sampling (section 3.2 of the paper): each value is drawn given those drawn before it."""
        values, features, categories = past.values, past.features, past.categories
        known, longest = values.shape[1], max(self.lags)
        encoded = self.encode(
            target=values[:, longest:],
            observed=past.observed,
            lagged=values[:, lag_places(self.lags, self.context)],
            features=features[:, : self.context],
            categories=categories,
        )
        scale = encoded["scale"]
        state = np.repeat(encoded["state"][:, :, None], samples, axis=2)
        scaled = values / scale[:, None]
        noise = np.stack([self.noise(row, samples) for row in values])  # (B, S, H, U)
        paths = np.empty((len(values), samples, self.horizon), np.float32)
        lagged = np.empty((len(values), samples, len(self.lags)), np.float32)
        for time in range(self.horizon):
            drawn = self.lags <= time  # of this path; those before are the same for all
            lagged[:, :, ~drawn] = scaled[:, None, known + time - self.lags[~drawn]]
            lagged[:, :, drawn] = paths[:, :, time - self.lags[drawn]]
            answer = self.step(
                lagged=lagged,
                features=features[:, self.context + time],
                categories=categories,
                scale=scale,
                state=state,
                noise=noise[:, :, time],
            )
            paths[:, :, time], state = answer["value"], answer["next_state"]
        paths *= scale[:, None, None]
        return np.rint(paths) if self.metadata["whole_numbers"] else paths

    def noise(self, values: np.ndarray, samples: int) -> np.ndarray:
        """Uniform numbers float32 (S, H, U) of a series that only its values decide."""
        seed = zlib.crc32(np.ascontiguousarray(values))
        shape = samples, self.horizon, self.metadata["uniforms"]
        return np.random.default_rng(seed).random(shape, np.float32)


def prediction(paths: np.ndarray, types: tuple[str, ...] = OUTPUT_TYPES[:2], levels: Mapping | None = None) -> dict:
    """Plain values of one series from its paths (S, H): those of `types`, quantiles by their names."""
    levels = {str(level): level for level in LEVELS} if levels is None else levels
    answer = {}
    if "mean" in types:
        answer["mean"] = paths.mean(axis=0, dtype=np.float64).tolist()
    if "quantiles" in types:
        found = np.quantile(paths, list(levels.values()), axis=0)
        answer["quantiles"] = {name: row.tolist() for name, row in zip(levels, found, strict=True)}
    if "samples" in types:
        answer["samples"] = paths.tolist()
    return answer


def _outputs(configuration: Mapping, where: str) -> tuple[tuple[str, ...], dict[str, float]]:
    """Which outputs a request asks for, and the quantiles by their names."""
    types = configuration.get("output_types", list(OUTPUT_TYPES[:2]))
    if not isinstance(types, list) or not types or not all(name in OUTPUT_TYPES for name in types):
        raise UserError(f"{where}: output_types: {types!r}; expected a list of {', '.join(OUTPUT_TYPES)}")
    names = configuration.get("quantiles", [str(level) for level in LEVELS])
    try:
        levels = {str(name): float(name) for name in names}
    except (TypeError, ValueError):
        levels = {}
    if not levels or not all(0 < level < 1 for level in levels.values()):
        raise UserError(f'{where}: quantiles: {names!r}; expected a list such as ["0.1", "0.5"], between 0 and 1')
    return tuple(types), levels


def _last(array: np.ndarray, count: int) -> np.ndarray:
    """The last `count` rows, with zeros before them where there are fewer."""
    cut = array[max(0, len(array) - count) :]
    return np.concatenate([np.zeros((count - len(cut), *cut.shape[1:]), cut.dtype), cut])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read(path: str) -> str:
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: unreadable ({reason}); expected JSON in UTF-8") from None
