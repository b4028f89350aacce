"""Windows of increasing integers, in which each value shows where it comes from."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlref.data.series import Series
from dlref.data.windows import SeriesStore
from dlref.runtime.calendar import Frequency
from dlref.runtime.series import forward_filled

H = Frequency.parse("H")


def counting(lengths=(5, 9, 3), future=0):
    """Series i has the values 100 i + 1, 100 i + 2, ..., a dynamic feature ten times as large and category i."""
    targets = [100 * i + 1 + np.arange(n, dtype=np.float32) for i, n in enumerate(lengths)]
    dynamic = [10 * (100 * i + 1 + np.arange(n + future, dtype=np.float32)) for i, n in enumerate(lengths)]
    offsets = np.cumsum([0, *lengths])
    return Series(
        target=np.concatenate(targets),
        offsets=offsets,
        start=np.array(["2020-01-01T05:00:00", "2020-01-02T00:00:00", "2021-03-04T23:00:00"], "datetime64[s]"),
        cat=np.arange(len(lengths))[:, None],
        dynamic=np.concatenate(dynamic)[:, None],
        dynamic_offsets=offsets + future * np.arange(len(lengths) + 1),
        static=np.zeros((len(lengths), 0), np.float32),
        names=list("abc"),
    )


def test_windows_hold_only_values_of_their_own_series():
    window = SeriesStore(counting(), H)(torch.tensor([1, 0, 2, 1]), torch.tensor([9, 2, 3, 4]), 4, 3)
    assert window.values.tolist() == [[106, 107, 108, 109], [0, 0, 1, 2], [0, 201, 202, 203], [101, 102, 103, 104]]
    assert window.observed.tolist() == [[True] * 4, [False, False, True, True], [False, True, True, True], [True] * 4]
    assert window.categories.tolist() == [[1], [0], [2], [1]]
    torch.testing.assert_close(window.features[..., -1], 10 * window.values[:, 1:])  # of the last three times only
    assert not window.features[1, 0].any()


def test_a_window_holds_the_lagged_values_of_its_context():
    """In a series of increasing integers, the value k steps back is k less."""
    store, steps, context = SeriesStore(counting((50, 90, 60)), H), 40, 10
    window = store(torch.tensor([0, 1, 2]), torch.tensor([50, 77, 41]), steps, context)
    now = window.values[:, -context:]
    for lag in (1, 2, 7, 24, 30):
        before = window.values[:, steps - context - lag : steps - lag]
        assert torch.equal(now - before, torch.full_like(now, lag))


def test_windows_into_the_future_have_features_but_no_values():
    store = SeriesStore(counting(future=2), H, future=2)
    window = store(torch.tensor([0, 1, 2]), torch.tensor([7, 11, 5]), 4, 4)
    assert window.values.tolist() == [[4, 5, 0, 0], [108, 109, 0, 0], [202, 203, 0, 0]]
    assert window.observed.tolist() == [[True, True, False, False]] * 3
    assert window.features[..., -1].tolist() == [
        [40, 50, 60, 70],
        [1080, 1090, 1100, 1110],
        [2020, 2030, 2040, 2050],
    ]


def test_features_hold_the_calendar_and_the_age_of_each_time():
    window = SeriesStore(counting(), H)(torch.tensor([0, 2]), torch.tensor([5, 2]), 2, 2)
    hours = (window.features[..., 0] + 0.5) * 23
    torch.testing.assert_close(hours, torch.tensor([[8.0, 9.0], [23.0, 0.0]]))
    torch.testing.assert_close(window.features[..., -2], torch.tensor([[5.0, 6.0], [2.0, 3.0]]).log10())


def test_seasonal_error_compares_only_values_of_the_same_series():
    """In the second series, 20 hours contain no pair of values a day apart and 30 hours contain six."""
    store = SeriesStore(counting((30, 30, 30)), H)
    assert store.seasonal_error(torch.tensor([1, 1]), torch.tensor([20, 30])).tolist() == [0, 24]


def test_forward_filling_repeats_the_last_value_within_each_series():
    target = np.array([np.nan, 1, np.nan, np.nan, 4, np.nan, np.nan, 7, np.nan], np.float32)
    values, observed = forward_filled(target, np.array([0, 5, 9]))
    assert values.tolist() == [0, 1, 1, 1, 4, 0, 0, 7, 7]  # nothing is carried over from the previous series
    assert observed.tolist() == [False, True, False, False, True, False, False, True, False]


def test_seasonal_error_of_small_values_is_exact_after_a_series_of_large_ones():
    """In a running sum over all series, the small differences would be lost to rounding."""
    large, small = np.tile([0, 1e12], 50), np.tile([0.3, 0.31, 0.33, 0.37, 0.4], 20)
    series = counting((100, 100, 100))._replace(target=np.concatenate([large, small, small]).astype(np.float32))
    found = SeriesStore(series, H).seasonal_error(torch.tensor([1, 2, 2]), torch.tensor([100, 100, 30]))
    apart = np.abs(np.float32(small[24:]).astype(float) - np.float32(small[:-24]))
    np.testing.assert_allclose(found, [apart.mean(), apart.mean(), apart[:6].mean()], rtol=1e-6)


class Counted(TorchDispatchMode):
    """Counts torch operations. torch's profiler would start threads, which hang processes forked later."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += 1
        return operation(*arguments, **(options or {}))


def test_gathering_windows_takes_a_constant_number_of_operations():
    store = SeriesStore(counting((500, 900, 300)), H)
    counts = []
    for windows in (2, 200):
        item, end = torch.randint(0, 3, (windows,)), torch.randint(1, 300, (windows,))
        with Counted() as counted:
            store(item, end, 48, 24)
        counts.append(counted.count)
    assert counts[0] == counts[1] < 60
