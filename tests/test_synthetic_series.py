import numpy as np
import pytest
from scipy import stats

from dlref.data.series import check
from dlref.data.synthetic_series import DEGREES, KINDS, LEVELS, PROMOTED, Synthetic, make_series, quantiles
from dlref.runtime.calendar import Frequency

COUNT, LENGTH = 300, 1000
DECILES = np.arange(1, 10) / 10


@pytest.fixture(scope="module")
def synthetic() -> Synthetic:
    return make_series(COUNT, LENGTH, seed=3)


def table(flat: np.ndarray) -> np.ndarray:
    """Reshape values of all points to (N, T)."""
    return flat.reshape(COUNT, LENGTH)


def runs(inside: np.ndarray) -> np.ndarray:
    """Return the lengths of the runs of True in a row, except runs cut off by its ends."""
    starts, ends = (np.flatnonzero(np.diff(inside.astype(int)) == step) for step in (1, -1))
    ends = ends[ends > starts[0]] if len(starts) else ends[:0]
    return ends - starts[: len(ends)]


def loss(target: np.ndarray, forecast: np.ndarray) -> float:
    """Return the mean weighted quantile loss of deciles (P, 9) over the points that are observed and forecast."""
    known = ~np.isnan(target) & ~np.isnan(forecast[:, 0])
    above = target[known, None].astype(np.float64) - forecast[known]
    pinball = np.maximum(DECILES * above, (DECILES - 1) * above)
    return float((2 * pinball.sum(0) / np.abs(target[known]).sum()).mean())


def times(synthetic: Synthetic) -> np.ndarray:
    start = synthetic.series.start
    return np.concatenate([Frequency.parse("H").times(first, np.arange(LENGTH)) for first in start])


def hour_of(moments: np.ndarray) -> np.ndarray:
    return moments.astype("datetime64[h]").astype(np.int64) % 24


def day_of(moments: np.ndarray) -> np.ndarray:
    """Return the day of the week, 0 for Monday."""
    return (moments.astype("datetime64[D]").astype(np.int64) + 3) % 7


def test_series_and_truth_have_the_documented_types_and_shapes(synthetic):
    points = COUNT * LENGTH
    promised = {
        "target": (np.float32, (points,)),
        "offsets": (np.int64, (COUNT + 1,)),
        "start": ("datetime64[s]", (COUNT,)),
        "cat": (np.int64, (COUNT, 1)),
        "dynamic": (np.float32, (points, 1)),
        "dynamic_offsets": (np.int64, (COUNT + 1,)),
    }
    for field, (dtype, shape) in promised.items():
        found = getattr(synthetic.series, field)
        assert (found.dtype, found.shape) == (dtype, shape), field
    assert synthetic.series.offsets[[1, -1]].tolist() == [LENGTH, points]
    assert len(set(synthetic.series.names)) == COUNT
    for truth in (synthetic.loc, synthetic.scale):
        assert (truth.dtype, truth.shape) == (np.float64, (points,))
        assert np.isfinite(truth).all()
        assert truth.min() > 0


def test_synthetic_series_pass_the_check_of_training_series(synthetic):
    assert check(synthetic.series) == [len(KINDS)]


def test_the_same_seed_gives_the_same_series_and_another_seed_others():
    a, b, c = (make_series(5, 100, seed) for seed in (1, 1, 2))
    np.testing.assert_equal(a, b)
    assert not np.array_equal(a.loc, c.loc)


def test_a_longer_list_of_series_from_a_seed_starts_with_the_shorter_one(synthetic):
    few = make_series(7, LENGTH, seed=3)
    for field in ("target", "start", "cat", "dynamic", "names"):
        first = getattr(few.series, field)
        np.testing.assert_equal(first, getattr(synthetic.series, field)[: len(first)])
    np.testing.assert_equal(few.loc, synthetic.loc[: 7 * LENGTH])
    np.testing.assert_equal(few.scale, synthetic.scale[: 7 * LENGTH])


def test_about_three_per_cent_of_values_are_missing_in_runs_of_1_to_48_hours(synthetic):
    missing = np.isnan(synthetic.series.target)
    assert 0.025 < missing.mean() < 0.035
    assert not table(missing)[:, 0].any()
    lengths = np.concatenate([runs(row) for row in table(missing)])
    assert (lengths.min(), lengths.max()) == (1, 48)


def test_promotions_last_hours_and_lift_the_mean_by_the_factor_of_their_kind(synthetic):
    promoted = table(synthetic.series.dynamic) == 1
    assert set(np.unique(synthetic.series.dynamic)) == {0, 1}
    assert 0.04 < promoted.mean() < 0.1
    lengths = np.concatenate([runs(row) for row in promoted])
    assert (lengths.min(), lengths.max()) == PROMOTED
    # Compare a promoted hour with the same hour, not promoted, a week earlier. The logarithms differ by the lift, up to
    # a week's growth of at most 168 × 0.0005.
    change = table(np.log(synthetic.loc))[:, 168:] - table(np.log(synthetic.loc))[:, :-168]
    lifted = promoted[:, 168:] & ~promoted[:, :-168]
    for i, kind in enumerate(synthetic.series.cat[:, 0]):
        assert np.abs(change[i, lifted[i]] - np.log(KINDS[kind].lift)).max(initial=0) < 0.0841
    observed = table(synthetic.series.target / synthetic.loc.mean())
    assert np.nanmean(observed[promoted]) > 1.3 * np.nanmean(observed[~promoted])


def test_the_mean_repeats_daily_and_more_strongly_weekly(synthetic):
    logs = table(np.log(synthetic.loc))
    day, odd, week = (
        np.mean([np.corrcoef(row[lag:], row[:-lag])[0, 1] for row in logs]) for lag in (24, 24 * 7 - 12, 168)
    )
    assert week > 0.8 > day > 0.5 > 0 > odd


def test_each_kind_peaks_at_its_hour_and_on_its_weekdays(synthetic):
    plain = synthetic.series.dynamic[:, 0] == 0
    kinds, moments = np.repeat(synthetic.series.cat[:, 0], LENGTH), times(synthetic)
    hour, day = hour_of(moments)[plain], day_of(moments)[plain]
    for k, (busiest, days) in enumerate(((13, {0, 1, 2, 3, 4}), (19, {5, 6}), (17, {5}), (21, {5}))):
        mine = kinds[plain] == k
        logs = np.log(synthetic.loc[plain])[mine]
        by_hour, by_day = (np.bincount(x[mine], logs) / np.bincount(x[mine]) for x in (hour, day))
        assert np.argmax(by_hour) == busiest
        assert set(np.argsort(by_day)[-len(days) :]) == days


def test_levels_span_two_orders_of_magnitude_and_growth_varies(synthetic):
    weeks = np.log(table(synthetic.loc)[:, : 168 * 5]).reshape(COUNT, 5, 168).mean(2)
    assert np.ptp(weeks[:, 0]) > 0.95 * np.log(LEVELS[1] / LEVELS[0])
    assert np.ptp(weeks[:, 4] - weeks[:, 0]) > 0.4


def test_noise_is_proportional_to_the_mean_and_grows_over_the_day(synthetic):
    share, hour = synthetic.scale / synthetic.loc, hour_of(times(synthetic))
    for k, kind in enumerate(KINDS):
        mine = np.repeat(synthetic.series.cat[:, 0], LENGTH) == k
        shares = [share[mine & (hour == h)] for h in range(24)]
        assert max(np.ptp(values) for values in shares) < 1e-12
        by_hour = np.array([values[0] for values in shares])
        assert (np.diff(by_hour) > 0).all()
        assert by_hour.mean() == pytest.approx(kind.noise)


def test_residuals_follow_students_t_and_are_independent(synthetic):
    residuals = (synthetic.series.target - synthetic.loc) / synthetic.scale
    known = ~np.isnan(residuals)
    assert stats.kstest(residuals[known], stats.t(DEGREES).cdf).pvalue > 0.01
    assert stats.kstest(residuals[known], stats.norm(scale=residuals[known].std()).cdf).pvalue < 1e-6
    for lag in (1, 24, 168):
        before, after = residuals[:-lag], residuals[lag:]
        both = known[:-lag] & known[lag:]
        assert abs(np.corrcoef(before[both], after[both])[0, 1]) < 0.01


def test_quantiles_match_scipy_and_cover_their_share_of_values(synthetic):
    levels = (0.01, *DECILES, 0.99)
    truth = quantiles(synthetic, levels)
    some = np.arange(0, COUNT * LENGTH, 999)
    expected = stats.t.ppf(levels, DEGREES, synthetic.loc[some, None], synthetic.scale[some, None])
    np.testing.assert_allclose(truth[some], expected, rtol=1e-9)
    known = ~np.isnan(synthetic.series.target)
    covered = (synthetic.series.target[known, None] <= truth[known]).mean(0)
    np.testing.assert_allclose(covered, levels, rtol=0, atol=0.01)


def test_the_oracle_has_a_lower_loss_than_distorted_and_naive_forecasts(synthetic):
    target, best = synthetic.series.target, loss(synthetic.series.target, quantiles(synthetic, DECILES))
    for factor in (0.9, 1.1):
        for field in ("loc", "scale"):
            wrong = synthetic._replace(**{field: getattr(synthetic, field) * factor})
            assert best < loss(target, quantiles(wrong, DECILES)), (field, factor)
    for season in (24, 168):
        naive = np.full((COUNT, LENGTH), np.nan)
        naive[:, season:] = table(target)[:, :-season]
        forecast = np.repeat(naive.reshape(-1, 1), len(DECILES), 1)
        known = ~np.isnan(naive.ravel())
        oracle = loss(target[known], quantiles(synthetic, DECILES)[known])
        assert oracle < 0.75 * loss(target, forecast)
