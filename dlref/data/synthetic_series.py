"""Related hourly series whose true predictive distribution is known, so that a forecast's loss has a known floor.

A point is its true mean, `loc`, plus noise: `scale` times a draw from Student's t with 5 degrees of freedom, each
independent of all others. Earlier points contain no information about a point beyond its loc and scale, so no
forecast has a lower expected quantile loss than `quantiles`.

The mean is a product of the series' level and growth, its kind's shape of the day and of the week raised to the power
of the series' amplitude, and, during promotions, its kind's lift. The scale is a share of the mean that depends on
the kind and grows with the hour of the day. No file is needed.

N series of T points, P points in all; L levels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dlref.data.scenes import below
from dlref.data.series import Series

DEGREES = 5  # degrees of freedom of the noise
FIRST = np.datetime64("2024-01-01T00:00:00", "s")  # a Monday; series start up to STARTS hours later
WEEK = 168
STARTS = 4 * WEEK
LEVELS = 10, 1000  # a series' geometric mean over a week without growth; its logarithm is uniform
AMPLITUDES = 0.6, 1.4
GROWTHS = -0.3, 0.5  # growth of the logarithm over 1000 hours
SPREADS = 0.6, 1.4  # factors of a kind's noise in the first and the last hour of the day
PROMOTED = 6, 24  # hours
BETWEEN_PROMOTIONS = 200  # hours on average
MISSED = 1, 48  # hours
BETWEEN_MISSED = 790  # hours on average, so that about 3% of the points are missing


class Kind(NamedTuple):
    """The properties that series of a kind share.

    Attributes:
        name: the name of the kind, with which the names of its series begin.
        peaks: the peaks of a day: hour, width in hours and height of each.
        days: the heights of the days from Monday to Sunday, like those of the peaks in units of the mean's logarithm.
        noise: the scale as a share of the mean, on average over the hours of the day.
        lift: the factor of the mean during a promotion.
    """

    name: str
    peaks: tuple[tuple[float, float, float], ...]
    days: tuple[float, ...]
    noise: float
    lift: float


KINDS = (
    Kind("office", ((13, 4, 1.2),), (0.1, 0.15, 0.15, 0.1, 0, -0.6, -0.7), 0.08, 1.25),
    Kind("home", ((7.5, 1.5, 0.6), (19, 2.5, 0.9)), (0, -0.05, -0.05, 0, 0.05, 0.15, 0.15), 0.12, 1.4),
    Kind("shop", ((11, 2, 0.6), (17, 2.5, 1)), (-0.2, -0.1, 0, 0.05, 0.2, 0.5, -0.6), 0.16, 1.8),
    Kind("theatre", ((21, 3, 1.3),), (-0.3, -0.25, -0.1, 0, 0.35, 0.5, 0.1), 0.2, 1.5),
)


class Synthetic(NamedTuple):
    """Series and the true distribution of each of their points.

    Attributes:
        series: series with one category, the index in `KINDS`, and one dynamic feature as long as the target, 1 during
            promotions and otherwise 0. The first point of each series is observed.
        loc: float64 (P,), the true mean; like the scale, it is positive and known even where the target is missing.
        scale: float64 (P,), the scale of the noise, whose standard deviation is √(5/3) times as large.
    """

    series: Series
    loc: np.ndarray
    scale: np.ndarray


def make_series(count: int, length: int, seed: int) -> Synthetic:
    """Draw hourly series. For one seed and length, a larger `count` only adds series at the end.

    Args:
        count: series to draw.
        length: points in each series; two weeks show both seasons.
        seed: seed of everything drawn at random.
    """
    # RandomState, as NumPy never changes its numbers; the global generators of NumPy and torch belong to the caller.
    rng = np.random.RandomState(seed)
    shapes = [_shape(kind) for kind in KINDS]
    spreads = np.tile(np.linspace(*SPREADS, 24), 7)
    target, loc, scale = np.empty((3, count, length))
    promoted = np.empty((count, length), np.float32)
    starts, kinds = np.empty((2, count), np.int64)
    for i in range(count):
        starts[i], kinds[i] = below(rng, STARTS), below(rng, len(KINDS))
        kind, hours = KINDS[kinds[i]], (starts[i] + np.arange(length)) % WEEK
        promoted[i] = _stretches(rng, length, BETWEEN_PROMOTIONS, PROMOTED)
        loc[i] = _mean(rng, shapes[kinds[i]][hours]) * np.where(promoted[i], kind.lift, 1)
        scale[i] = loc[i] * kind.noise * spreads[hours]
        target[i] = loc[i] + scale[i] * rng.standard_t(DEGREES, length)
        target[i, _stretches(rng, length, BETWEEN_MISSED, MISSED)] = np.nan
    offsets = np.arange(count + 1, dtype=np.int64) * length
    series = Series(
        target=target.ravel().astype(np.float32),
        offsets=offsets,
        start=FIRST + starts * np.timedelta64(3600, "s"),
        cat=kinds[:, None],
        dynamic=promoted.reshape(-1, 1),
        dynamic_offsets=offsets.copy(),
        static=np.zeros((count, 0), np.float32),
        names=[f"{KINDS[kind].name} {i}" for i, kind in enumerate(kinds)],
    )
    return Synthetic(series, loc.ravel(), scale.ravel())


def quantiles(synthetic: Synthetic, levels: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the true quantiles of each point, float64 (P, L), for levels between 0 and 1, (L,)."""
    from scipy.special import stdtrit  # comes with scikit-learn

    return synthetic.loc[:, None] + synthetic.scale[:, None] * stdtrit(DEGREES, np.asarray(levels, np.float64))


def _shape(kind: Kind) -> np.ndarray:
    """Return the logarithm of a kind's mean over a week from Monday's first hour, (168,); 0 on average."""
    day = np.zeros(24)
    for hour, width, height in kind.peaks:
        away = (np.arange(24) - hour + 12) % 24 - 12  # across midnight, too
        day += height * np.exp(-0.5 * (away / width) ** 2)
    week = np.add.outer(kind.days, day).ravel()
    return week - week.mean()


def _mean(rng: np.random.RandomState, shape: np.ndarray) -> np.ndarray:
    """Draw a series' level, amplitude and growth; return its mean without promotions, (T,)."""
    level = rng.uniform(*np.log(LEVELS))
    amplitude, growth = rng.uniform(*AMPLITUDES), rng.uniform(*GROWTHS)
    return np.exp(level + amplitude * shape + growth * np.arange(len(shape)) / 1000)


def _stretches(rng: np.random.RandomState, length: int, between: float, hours: tuple[int, int]) -> np.ndarray:
    """Draw which points lie in stretches of `hours`, the shortest and the longest length, bool (T,).

    The first point never does, and no two stretches touch; the gaps between them are `between` points on average.
    """
    shortest, longest = hours
    most = length // (1 + shortest) + 1
    gaps = rng.geometric(1 / between, most)
    lengths = rng.randint(shortest, longest + 1, size=most, dtype=np.int64)
    inside = np.tile([False, True], most)
    return np.repeat(inside, np.stack([gaps, lengths], 1).ravel())[:length]
