"""The runner of forecasting: series in the format of SageMaker's DeepAR -> means, quantiles and sample paths.

T times of context, L lags, F features, G categories, H times to forecast, S sample paths, U uniform numbers of a draw.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

import numpy as np

from dlref.runtime.calendar import LARGEST_LAG, Frequency
from dlref.runtime.errors import UserError
from dlref.runtime.lines import Line, is_object, parse_object, read_text
from dlref.runtime.runner import Runner as Base
from dlref.runtime.runner import fixed_or
from dlref.runtime.series import Record, features_at, first_differences, forward_filled, lag_indices, parse_record

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # SageMaker's, at which forecasts are evaluated
SAMPLES = 100  # SageMaker's
LARGEST_ANSWER = 1 << 26  # values of a request's sample paths: 256 MB
LONGEST = 100_000  # steps of a context or a prediction
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
LEVEL = re.compile(r"0?\.[0-9]{1,20}")  # a decimal fraction without an exponent
ROWS = 3200  # per call of a graph: 32 series of 100 paths; more do not fit into the processor's caches
OUTPUT_TYPES = ("mean", "quantiles", "samples")
OPTIONS = ("num_samples", "output_types", "quantiles", "seed")
KEYS = {
    "frequency": str,
    "lags": list,
    "context_length": int,
    "prediction_length": int,
    "cardinality": list,
    "unseen": list,
    "dynamic_features": int,
    "static_features": int,
    "uniforms": int,
    "differenced": bool,
    "whole_numbers": bool,
}


class Past(NamedTuple):
    """The known part of a series.

    Attributes:
        values: float32 (max(lags) + T,), or their differences.
        observed: bool (T,), which of the last T values are observed.
        features: float32 (T + H, F).
        categories: int64 (G,).
        last: float32, the last value, to which forecast differences are added.
    """

    values: np.ndarray
    observed: np.ndarray
    features: np.ndarray
    categories: np.ndarray
    last: np.ndarray


class Request(NamedTuple):
    """Series to forecast and the outputs requested; `single` means one series without a list around it."""

    where: str
    pasts: list[Past]
    samples: int
    seed: int
    types: tuple[str, ...]
    levels: Mapping[str, float]
    single: bool


class Runner(Base):
    """Serves two graphs, and joins them by drawing one time after the other.

    `encode`: target float32 (B, T), observed bool (B, T), lagged (B, T, L), features (B, T, F), categories int64 (B, G)
    -> scale (B), state (Y, B, D).
    `step`, whose values are divided by the scale: lagged (B, S, L), features (B, F), categories (B, G), scale (B),
    state (Y, B, S, D), noise (B, S, U), uniform from 0 to 1 -> value (B, S), next_state (Y, B, S, D).

    The noise of a series depends only on its values and the request's seed: the same past gives the same paths,
    whatever other series are in the batch. An int8 graph is an exception: its ranges are those of all series in a call.

    Raises UserError for other metadata or graphs.
    """

    spreads = True

    def __init__(self, graphs: Mapping[str, Any], metadata: Mapping[str, Any]):
        if set(graphs) != {"encode", "step"} or not all(type(metadata.get(key)) is KEYS[key] for key in KEYS):
            raise UserError(f"not forecasting; expected graphs encode, step and metadata {', '.join(KEYS)}")
        self.frequency = Frequency.parse(metadata["frequency"])
        self.context, self.horizon = metadata["context_length"], metadata["prediction_length"]
        lags, cardinality, steps = metadata["lags"], metadata["cardinality"], (self.context, self.horizon)
        rising = all(type(lag) is int for lag in lags) and lags == sorted(set(lags))
        if not lags or not rising or not 0 < lags[0] <= lags[-1] <= LARGEST_LAG:
            raise UserError(f"not forecasting; expected lags from 1 to {LARGEST_LAG}, in increasing order")
        if not all(0 < length <= LONGEST for length in steps) or not 0 <= metadata["uniforms"] < LONGEST:
            raise UserError(f"not forecasting; expected context_length and prediction_length from 1 to {LONGEST}")
        counted = all(type(size) is int and size > 0 for size in cardinality)
        if not counted or len(metadata["unseen"]) != len(cardinality):
            raise UserError("not forecasting; expected cardinality above 0, and as many lists of unseen values")
        if not {"noise", "lagged"} <= set(graphs["step"].shape):
            raise UserError("not forecasting; expected a graph step with inputs lagged and noise")
        self.encode, self.step = graphs["encode"], graphs["step"]
        self.lags, self.metadata = np.array(lags), metadata

    # Requests

    @staticmethod
    def takes(metadata: dict) -> str:
        """Describe the input: a series, with an example for this bundle."""
        horizon, values = metadata["prediction_length"], [10.0, 12.5, None, 11.0]
        series: dict[str, Any] = {"start": "2024-01-01 00:00:00", "target": values}
        if metadata["cardinality"]:
            sizes = zip(metadata["cardinality"], metadata["unseen"], strict=True)
            series["cat"] = [next(value for value in range(size) if value not in unseen) for size, unseen in sizes]
        if metadata["dynamic_features"]:
            series["dynamic_feat"] = [[0.0] * (len(values) + horizon)] * metadata["dynamic_features"]
        if metadata["static_features"]:
            series["feat_static_real"] = [0.0] * metadata["static_features"]
        return (
            f"A series in the format of SageMaker's DeepAR, with one value every {metadata['frequency']} from `start` "
            f"and null for missing values, such as\n\n    {json.dumps(series)}\n\n"
            "in a file (one series, or one on each line) or as a Python object; or a request "
            f'`{{"instances": [series, ...], "configuration": {{...}}}}`. The {horizon} values after `target` are '
            "forecast, and each row of `dynamic_feat` must also have values for them. Pass the whole series: a "
            "forecast depends on the age of the series as well as on its last "
            f"{metadata['context_length'] + max(metadata['lags']) + metadata['differenced']} values."
        )

    def inputs(self, path: str) -> Iterator[tuple[str, str | Line]]:
        """Return a name and a source for each input.

        `path` is a request or series in JSON, or a file that holds one, or one on each line.
        """
        if is_object(path):
            yield path, Line("request", path)
            return
        try:
            text = read_text(path, "JSON")
        except UserError:
            yield path, path  # `read` raises the error later
            return
        lines = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if len(lines) > 1 and not is_object(text) and any(is_object(line) for _, line in lines):
            yield from ((name, Line(name, line)) for name, line in lines)
        else:
            yield path, Line(path, text)

    def read(self, source: Any) -> Request:
        """Read a request {"instances": [...], "configuration": {...}} or a series {"start": ..., "target": [...], ...}.

        `source` is such an object, or a line or file that holds one. Numbers, lists and times may be numpy's
        or Python's.
        """
        where, source = _object_in(source)
        if "instances" not in source:
            settings = _settings({}, where, LARGEST_ANSWER // self.horizon)
            return Request(where, [self.past(source, where)], *settings, single=True)
        if others := [key for key in source if key not in ("instances", "configuration")]:
            raise UserError(f"{where}: {shorten(others[0])}; expected only instances and configuration in a request")
        instances = source["instances"]
        if not isinstance(instances, list) or not instances:
            raise UserError(f"{where}: instances: expected a list of series")
        most = LARGEST_ANSWER // (len(instances) * self.horizon)
        settings = _settings(source.get("configuration", {}), where, most)
        pasts = []
        for i, instance in enumerate(instances):
            if not isinstance(instance, Mapping):
                raise UserError(f"{where}: instances[{i}]: {type(instance).__name__}; expected a series as an object")
            pasts.append(self.past(instance, f"{where}: instances[{i}]"))
        return Request(where, pasts, *settings, single=False)

    def past(self, entry: Mapping[str, Any], where: str) -> Past:
        """Parse a series and check it against the training's metadata. Raises UserError."""
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
            if value in known["unseen"][i]:
                raise UserError(f"{where}: cat[{i}]: {value}; expected a value seen in training")
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
        """Return the end of a series, padded with zeros before its start."""
        points = len(record.target)
        values, observed = forward_filled(record.target, np.array([0, points]))
        last, first = values[-1], max(0, points - self.context)
        if self.metadata["differenced"]:
            values, observed = first_differences(values, observed)
        features = features_at(self.frequency, record, np.arange(first, points + self.horizon))
        return Past(
            _last(values, max(self.lags) + self.context),
            _last(observed, self.context),
            _last(features, self.context + self.horizon),
            np.array(record.cat, np.int64),
            last,
        )

    # Answers

    def size(self, item: Request) -> int:
        """Return the number of values in the paths and their noise."""
        return len(item.pasts) * item.samples * self.horizon * (1 + self.metadata["uniforms"])

    def together(self, first: Request, second: Request) -> bool:
        """Return whether two requests have the same number of paths and the same seed."""
        return (first.samples, first.seed) == (second.samples, second.seed)

    def answer(self, items: list[Request]) -> list[dict]:
        """Return the requested `mean`, `quantiles` and `samples` of a series, or a list of them as `predictions`."""
        pasts = [past for item in items for past in item.pasts]
        paths = iter(self.paths(Past(*map(np.stack, zip(*pasts, strict=True))), items[0].samples, items[0].seed))
        answers = []
        for item in items:
            drawn = [next(paths) for _ in item.pasts]
            for i, one in enumerate(drawn):
                if not np.isfinite(one).all():
                    place = item.where if item.single else f"{item.where}: instances[{i}]"
                    raise UserError(
                        f"{place}: the forecast is not finite; expected values that do not overflow float32"
                    )
            found = [prediction(one, item.types, item.levels) for one in drawn]
            answers.append(found[0] if item.single else {"predictions": found})
        return answers

    def paths(self, past: Past, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
        """Return sample paths float32 (B, S, H) of B series, whose arrays in `past` are stacked."""
        rows, drawn = self.step.shape["noise"][:2]
        if fixed_or(drawn, samples) != samples:
            raise UserError(f"num_samples: {samples}; expected {drawn}, the fixed number of this bundle")
        count = len(past.values)
        many = fixed_or(rows, max(1, min(ROWS // samples, -(-count // self.workers))))
        parts = [Past(*(array[i : i + many] for array in past)) for i in range(0, count, many)]
        return np.concatenate(self.spread(lambda part: self._paths(part, samples, seed), parts))

    @np.errstate(over="ignore", invalid="ignore")  # `answer` refuses paths that are not finite
    def _paths(self, past: Past, samples: int, seed: int) -> np.ndarray:
        """Draw paths by ancestral sampling (section 3 of the paper): each value given those drawn before it."""
        values, features, categories = past.values, past.features, past.categories
        known, longest = values.shape[1], max(self.lags)
        encoded = self.encode(
            target=values[:, longest:],
            observed=past.observed,
            lagged=values[:, lag_indices(self.lags, self.context)],
            features=features[:, : self.context],
            categories=categories,
        )
        scale = encoded["scale"]
        state = np.repeat(encoded["state"][:, :, None], samples, axis=2)
        scaled = values / scale[:, None]
        noise = np.stack([self.noise(row, samples, seed) for row in values])  # (B, S, H, U)
        paths = np.empty((len(values), samples, self.horizon), np.float32)
        lagged = np.empty((len(values), samples, len(self.lags)), np.float32)
        for time in range(self.horizon):
            drawn = np.searchsorted(self.lags, time, side="right")  # lags within the path; others are the same for all
            lagged[:, :, drawn:] = scaled[:, None, known + time - self.lags[drawn:]]
            lagged[:, :, :drawn] = paths[:, :, time - self.lags[:drawn]]
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
        if self.metadata["whole_numbers"]:  # changes are, even if the level is not
            paths = np.rint(paths)
        return past.last[:, None, None] + paths.cumsum(axis=2) if self.metadata["differenced"] else paths

    def noise(self, values: np.ndarray, samples: int, seed: int) -> np.ndarray:
        """Return uniform numbers float32 (S, H, U) for a series, which depend only on its values and a seed.

        The range from 0 to 1 is divided into S equal parts, and each path draws from a different part (M. D. McKay,
        R. J. Beckman and W. J. Conover, 1979). This does not change the distribution of a path, but the mean and
        quantiles of the paths are nearer to those of very many.
        """
        rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(values).data, seed))
        uniform = rng.random((samples, self.horizon, self.metadata["uniforms"]), np.float32)
        strata = np.broadcast_to(np.arange(samples, dtype=np.float32)[:, None, None], uniform.shape)
        return np.minimum((rng.permuted(strata, axis=0) + uniform) / samples, BELOW_ONE, dtype=np.float32)


def prediction(paths: np.ndarray, types: tuple[str, ...] = OUTPUT_TYPES[:2], levels: Mapping | None = None) -> dict:
    """Return plain values for one series from its paths (S, H): the outputs in `types`, with quantiles by name."""
    levels = {str(level): level for level in LEVELS} if levels is None else levels
    answer = {}
    if "mean" in types:
        answer["mean"] = paths.mean(axis=0, dtype=np.float64).tolist()
    if "quantiles" in types:
        found = np.quantile(paths.astype(np.float64), list(levels.values()), axis=0)  # float64: sums of two stay finite
        answer["quantiles"] = {name: row.tolist() for name, row in zip(levels, found, strict=True)}
    if "samples" in types:
        answer["samples"] = paths.tolist()
    return answer


def _object_in(source: Any) -> tuple[str, Mapping[str, Any]]:
    """Return an object, or the object in a line or file, with its place for error messages. Raises UserError."""
    where = "request"
    if isinstance(source, (str, Path)):
        where = str(source)
        source = Line(where, read_text(where, "JSON"))
    if isinstance(source, Line):
        where = source.where
        source = parse_object(source.text, where)
    if not isinstance(source, Mapping):
        raise UserError(f"{where}: {type(source).__name__}; expected a series or a request, as an object")
    try:
        return where, as_json(source)
    except RecursionError:
        raise UserError(f"{where}: lists nested too deeply; expected a series or a request") from None


def _settings(configuration: Any, where: str, most: int) -> tuple[int, int, tuple[str, ...], dict[str, float]]:
    """Return a request's number of sample paths (at most `most`), its seed, its outputs, and its quantiles by name."""
    if not isinstance(configuration, Mapping):
        raise UserError(f"{where}: configuration: {shorten(configuration)}; expected an object")
    unknown = next((key for key in configuration if key not in OPTIONS), None)
    if unknown is not None:
        raise UserError(f"{where}: configuration: {shorten(unknown)}; expected {', '.join(OPTIONS)}")
    samples, seed = configuration.get("num_samples", SAMPLES), configuration.get("seed", 0)
    if type(samples) is not int or not 0 < samples <= most:
        raise UserError(f"{where}: num_samples: {shorten(samples)}; expected 1 to {most}")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"{where}: seed: {shorten(seed)}; expected 0 to {2**32 - 1}")
    types = configuration.get("output_types", list(OUTPUT_TYPES[:2]))
    if not isinstance(types, list) or not types or not all(name in OUTPUT_TYPES for name in types):
        raise UserError(f"{where}: output_types: {shorten(types)}; expected a list of {', '.join(OUTPUT_TYPES)}")
    names = configuration.get("quantiles", [str(level) for level in LEVELS])
    given = names if isinstance(names, list) else []
    levels = {str(name): float(name) for name in given if LEVEL.fullmatch(str(name))}
    if not given or len(levels) < len(set(map(str, given))) or not all(0 < level < 1 for level in levels.values()):
        raise UserError(
            f'{where}: quantiles: {shorten(names)}; expected a list such as ["0.1", "0.5"], between 0 and 1'
        )
    return samples, seed, tuple(types), levels


def as_json(value: Any) -> Any:
    """Convert Python and numpy values to those of JSON: lists, numbers, and times as text."""
    if isinstance(value, Mapping):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, np.datetime64):
        seconds = value.astype("datetime64[s]")
        value = seconds.item() if seconds == value else str(value)  # a fraction is refused later, as in a text
    if isinstance(value, date):
        return value.isoformat(sep=" ") if isinstance(value, datetime) else value.isoformat()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if not isinstance(value, list | tuple | range):
        return value
    plain = set(map(type, value)) <= {int, float, str, bool, type(None)}  # as in long series
    return list(value) if plain else [as_json(one) for one in value]


def _last(array: np.ndarray, count: int) -> np.ndarray:
    """Return the last `count` rows, padded with zeros before them if there are fewer."""
    cut = array[max(0, len(array) - count) :]
    return np.concatenate([np.zeros((count - len(cut), *cut.shape[1:]), cut.dtype), cut])
