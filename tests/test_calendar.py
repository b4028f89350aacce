"""Lags against GluonTS's lists and calendar features against Python's calendar."""

from datetime import datetime

import numpy as np
import pytest

from dlref.runtime.calendar import Frequency, parse_date
from dlref.runtime.errors import UserError

LAGS = {  # returned by get_lags_for_frequency of GluonTS 0.17
    "H": "1 2 3 4 5 6 7 23 24 25 47 48 49 71 72 73 95 96 97 119 120 121 143 144 145 167 168 169 335 336 337 503 504 "
    "505 671 672 673 719 720 721",
    "D": "1 2 3 4 5 6 7 8 13 14 15 20 21 22 27 28 29 30 31 56 84 363 364 365 727 728 729 1091 1092 1093",
    "W": "1 2 3 4 5 6 7 8 12 51 52 53 103 104 105 155 156 157",
    "M": "1 2 3 4 5 6 7 11 12 13 23 24 25 35 36 37",
    "B": "1 2 3 4 5 6 7 9 10 11 14 15 16 19 20 21 22 23 39 59 258 259 260 518 519 520 778 779 780",
    "min": "1 2 3 4 5 6 7 58 59 60 61 62 118 119 120 121 122 178 179 180 181 182",
    "5min": "1 2 3 4 5 6 7 10 11 12 13 14 22 23 24 25 26 34 35 36 37 38 287 288 289 575 576 577 863 864 865 "
    "1151 1152 1153",
    "15min": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 95 96 97 191 192 193 287 288 289 383 384 385 479 480 481 575 576 577 "
    "671 672 673",
    "12H": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 27 28 29 41 42 43 55 56 57 59 60 61 112 168 727 728 729",
    "2D": "1 2 3 4 5 6 7 8 9 10 11 13 14 15 16 28 42 181 182 183 363 364 365 545 546 547",
    "3M": "1 2 3 4 5 6 7 8 9 11 12 13",
}


@pytest.mark.parametrize("frequency", LAGS)
def test_lags_match_gluonts(frequency):
    assert Frequency.parse(frequency).lags == list(map(int, LAGS[frequency].split()))


@pytest.mark.parametrize(
    ("frequency", "season"),
    [
        *[("H", 24), ("15min", 96), ("D", 7), ("B", 5), ("W", 52), ("M", 12), ("3M", 4), ("24H", 1)],
        *[("2D", 1), ("5H", 1), ("7min", 1), ("5M", 1), ("2B", 1), ("48H", 1)],  # these do not divide their cycle
    ],
)
def test_season_lengths_of_frequencies(frequency, season):
    assert Frequency.parse(frequency).season == season


@pytest.mark.parametrize("frequency", ["15min", "H", "7H", "D", "B", "W", "M", "3M"])
def test_times_lie_on_whole_steps_of_the_frequency(frequency):
    frequency = Frequency.parse(frequency)
    times = frequency.times(np.datetime64("2019-01-31T07:15:00"), np.arange(-30, 60))
    steps, whole = frequency.steps(times)
    assert whole.all()
    assert steps.tolist() == list(range(90))
    assert str(times[30]) == "2019-01-31T07:15:00"


@pytest.mark.parametrize(
    "text", ["2024-02-29 05:00:00", "2024-02-29T05:00:00", "2024-02-29 05:00", "2024-02-29T05:00:00.000"]
)
def test_common_formats_of_a_time_are_parsed(text):
    assert parse_date(text, "start") == 1709182800


@pytest.mark.parametrize(
    "text", ["2024-02-29T05:00:00Z", "2024-02-29 05:00:00.5", "2024-02-29T05", "2024-02-30", "20240229", None]
)
def test_unsupported_times_are_refused(text):
    with pytest.raises(UserError, match="without a time zone"):
        parse_date(text, "start")


def test_monthly_times_from_the_31st_fall_on_the_last_day_of_each_month():
    times = Frequency.parse("M").times(np.datetime64("2020-01-31T00:00:00"), np.arange(5))
    assert [str(time)[:10] for time in times] == ["2020-01-31", "2020-02-29", "2020-03-31", "2020-04-30", "2020-05-31"]


@pytest.mark.parametrize("start", ["2023-12-29T05:00:00", "2023-12-30T05:00:00", "2023-12-31T05:00:00"])
def test_monthly_times_are_whole_steps_when_february_is_too_short(start):
    """February is shorter than a month that ends on its 29th or 30th."""
    monthly, steps = Frequency.parse("M"), np.arange(0, 60, 2)
    found, whole = monthly.steps(monthly.times(np.datetime64(start), steps))
    assert (found == steps).all()
    assert whole.all()


def test_calendar_features_match_pythons_calendar():
    """Every 439 minutes of nine years, including leap years and 53rd weeks."""
    start = np.datetime64("2015-12-25T00:00:00")
    times = start + np.arange(0, 9 * 8766 * 60, 439) * np.timedelta64(60, "s")
    days = [datetime.fromisoformat(str(time)) for time in times]
    expected = {
        "minute_of_hour": [day.minute / 59 for day in days],
        "hour_of_day": [day.hour / 23 for day in days],
        "day_of_week": [day.weekday() / 6 for day in days],
        "day_of_month": [(day.day - 1) / 30 for day in days],
        "day_of_year": [(day.timetuple().tm_yday - 1) / 365 for day in days],
        "week_of_year": [(day.isocalendar().week - 1) / 52 for day in days],
        "month_of_year": [(day.month - 1) / 11 for day in days],
    }
    for unit in ("min", "H", "D", "B", "W", "M"):
        frequency = Frequency.parse(unit)
        found = frequency.features(times)
        assert found.shape == (len(times), len(frequency.cycles))
        assert found.dtype == np.float32
        for column, name in zip(found.T, frequency.cycles, strict=True):
            np.testing.assert_allclose(column, np.array(expected[name]) - 0.5, atol=1e-6)
