"""Dates and frequencies of time series, with the lags and calendar features that follow from them.

Training and devices share this module. Lags and features are GluonTS's for the same frequency, except that a week's day
of the month is that of its own date, GluonTS's that of its Sunday.

T times, F features.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, lru_cache
from reprlib import repr as shorten
from typing import Any, Self

import numpy as np

from dlref.runtime.errors import UserError

LARGEST_LAG = 1200  # steps; longer histories are rarely available
MONTH, DAY = np.timedelta64(1, "M"), np.timedelta64(1, "D")
SECONDS = {"min": 60, "H": 3600, "D": 86_400, "W": 604_800}
# Excludes hour 24, which Python reads as hour 0 of the next day since 3.14.
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([ T](?!24)[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.0{1,9})?)?)?")
ORIGIN, SECOND = datetime(1970, 1, 1), timedelta(seconds=1)


@dataclass(frozen=True)
class Frequency:
    """The time from one point of a series to the next.

    Attributes:
        count: how many units, 1 to 9999.
        unit: "min", "H", "D", "W", "M" (calendar months) or "B" (business days, Monday to Friday).
    """

    count: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse text such as "H", "15min" or "3M". Raises UserError for anything else."""
        match = re.fullmatch("([1-9][0-9]{0,3})?(min|H|D|W|M|B)", str(text))
        if match is None:
            raise UserError(f"frequency: {shorten(text)}; expected a whole number and min, H, D, W, M or B, such as 1H")
        return cls(int(match[1] or 1), match[2])

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"

    def steps(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count the steps from the first of the times, datetime64[s] (T,), to each.

        Returns:
            The steps, int64 (T,), and whether each time lies on a whole step, bool (T,). With business days, no time on
            a weekend does, not even the first.
        """
        if self.unit == "M":
            units, whole = _months(times)
        elif self.unit == "B":
            units, whole = _business_days(times)
        else:
            units, rest = np.divmod((times - times[0]).astype(np.int64), SECONDS[self.unit])
            whole = rest == 0
        steps, rest = np.divmod(units, self.count)
        return steps, whole & (rest == 0)

    def expected(self, start: np.datetime64) -> str:
        """Return the end of an error message: which times `steps` accepts as whole."""
        days = " over business days" if self.unit == "B" else ""
        return f"expected whole steps of {self}{days} from {show(start)}"

    def times(self, start: np.datetime64, steps: np.ndarray) -> np.ndarray:
        """Return the times, datetime64[s] (T,), that lie `steps` after `start`, or before it for negative steps."""
        units = np.asarray(steps, dtype=np.int64) * self.count
        if self.unit == "M":
            return _with_clock(_same_day(start, units), start)
        if self.unit == "B":
            return _with_clock(np.busday_offset(start.astype("datetime64[D]"), units, roll="forward"), start)
        return start.astype("datetime64[s]") + units * np.timedelta64(SECONDS[self.unit], "s")

    @property
    def season(self) -> int:
        """Steps of the cycle that a seasonal naive forecast repeats: a day, a week or a year.

        1, which repeats the last value, if the cycle is not a whole number of steps. The same as in GluonTS, except for
        days and weeks, for which GluonTS has 1.
        """
        steps, rest = divmod({"min": 1440, "H": 24, "D": 7, "B": 5, "W": 52, "M": 12}[self.unit], self.count)
        return 1 if rest else steps

    @cached_property
    def lags(self) -> list[int]:
        """Steps back at which a network reads values: the last seven, and around the same place in earlier cycles."""
        minutes = self.count * SECONDS.get(self.unit, 0) / 60
        around: list[int] = []
        if self.unit == "min":
            around += _around(60, self.count, 3, 2)
        if self.unit in ("min", "H"):
            around += _around(24, minutes / 60, 7)
        if self.unit in ("min", "H", "D"):
            around += _around(7, minutes / 1440, 4) + _around(30, minutes / 1440, 1) + _around_weeks(minutes / 10080)
        if self.unit == "B":
            around += _around(5, self.count, 4) + _around(22, self.count, 1) + _around_weeks(self.count / 5)
        if self.unit == "W":
            around += _around_weeks(self.count)
        if self.unit == "M":
            around += _around(12, self.count, 3)
        return [*range(1, 8), *sorted({lag for lag in around if 7 < lag <= LARGEST_LAG})]

    @property
    def cycles(self) -> tuple[str, ...]:
        """The names of the F features."""
        days = ("day_of_week", "day_of_month", "day_of_year")
        return {
            "min": ("minute_of_hour", "hour_of_day", *days),
            "H": ("hour_of_day", *days),
            "D": days,
            "B": days,
            "W": ("day_of_month", "week_of_year"),
            "M": ("month_of_year",),
        }[self.unit]

    def features(self, times: np.ndarray) -> np.ndarray:
        """Return the places of times (T,) in the cycles of this frequency, float32 (T, F), from -0.5 to 0.5."""
        return np.stack([PLACES[name](times) for name in self.cycles], axis=-1).astype(np.float32)


def _around(length: float, step: float, count: int, reach: int = 1) -> list[int]:
    """Return the steps around each of `count` cycles of `length`, for a step of length `step`."""
    return [int(k * length // step) + near for k in range(1, count + 1) for near in range(-reach, reach + 1)]


def _around_weeks(step: float) -> list[int]:
    """Return the steps around the same week of three earlier years, and 4, 8 and 12 weeks back."""
    return [*_around(52, step, 3), *(int(weeks // step) for weeks in (4, 8, 12))]


def _same_day(start: np.datetime64, months: np.ndarray) -> np.ndarray:
    """Return the same day of other months, or the last day of a shorter month, datetime64[D]."""
    first = start.astype("datetime64[M]")
    day = start.astype("datetime64[D]") - first
    others = first + months.astype("timedelta64[M]")
    longest = (others + MONTH).astype("datetime64[D]") - others - DAY
    return others.astype("datetime64[D]") + np.minimum(day, longest)


def _with_clock(days: np.ndarray, start: np.datetime64) -> np.ndarray:
    """Return days at the time of day of `start`, datetime64[s]."""
    return days.astype("datetime64[s]") + (start.astype("datetime64[s]") - start.astype("datetime64[D]"))


def _since(times: np.ndarray, unit: str, inside: str) -> np.ndarray:
    """Return how many of `inside` have passed since the last `unit` began."""
    return (times.astype(f"datetime64[{inside}]") - times.astype(f"datetime64[{unit}]")).astype(np.int64)


def _day_of_week(times: np.ndarray) -> np.ndarray:
    return (times.astype("datetime64[D]").astype(np.int64) + 3) % 7  # from Monday; 1 January 1970 was a Thursday


def _week_of_year(times: np.ndarray) -> np.ndarray:
    to_thursday = (3 - _day_of_week(times)).astype("timedelta64[D]")
    thursday = times.astype("datetime64[D]") + to_thursday  # determines the year of a week (ISO)
    return _since(thursday, "Y", "D") // 7


PLACES = {
    "minute_of_hour": lambda times: _since(times, "h", "m") / 59 - 0.5,
    "hour_of_day": lambda times: _since(times, "D", "h") / 23 - 0.5,
    "day_of_week": lambda times: _day_of_week(times) / 6 - 0.5,
    "day_of_month": lambda times: _since(times, "M", "D") / 30 - 0.5,
    "day_of_year": lambda times: _since(times, "Y", "D") / 365 - 0.5,
    "week_of_year": lambda times: _week_of_year(times) / 52 - 0.5,
    "month_of_year": lambda times: _since(times, "Y", "M") / 11 - 0.5,
}


def _months(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    months = times.astype("datetime64[M]")
    steps, left = (months - months[0]).astype(np.int64), months + MONTH - times
    # The last days of months are regular too, and pandas writes them.
    last = (left == left[0]) & (left[0] <= DAY)
    return steps, (times == _with_clock(_same_day(times[0], steps), times[0])) | last


def _business_days(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    days = times.astype("datetime64[D]")
    hours = times - days
    return np.busday_count(days[0], days), np.is_busday(days) & (hours == hours[0])


def parse_date(text: Any, where: str) -> int:
    """Return the seconds from 1970 to a date or a date and time. Raises UserError at `where` for anything else."""
    try:
        return _seconds(text)
    except (TypeError, ValueError):  # not a text, or no such day
        expected = "YYYY-MM-DD or YYYY-MM-DD HH:MM:SS, without a time zone"
        raise UserError(f"{where}: {shorten(text)}; expected {expected}") from None


@lru_cache(maxsize=1 << 16)  # the series of a file share their dates
def _seconds(text: str) -> int:
    if not DATE.fullmatch(text):  # fromisoformat would also accept weeks and time zones
        raise ValueError
    return (datetime.fromisoformat(text.partition(".")[0]) - ORIGIN) // SECOND


def parse_start(text: Any, where: str, frequency: Frequency) -> np.datetime64:
    """Parse the first time of a series, to the second. Raises UserError also for a weekend with business days."""
    start = np.datetime64(parse_date(text, where), "s")
    if not frequency.steps(np.array([start]))[1][0]:
        raise UserError(f"{where}: {show(start)} is a weekend; expected a business day")
    return start


def show(time: np.datetime64) -> str:
    """Format a time as `parse_date` reads it."""
    return str(time).replace("T", " ")
