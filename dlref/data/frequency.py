"""Dates and the time from one point of a series to the next.

T times.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from reprlib import repr as shorten
from typing import Any, Self

import numpy as np

from dlref.runtime.errors import UserError

SECONDS = {"min": 60, "H": 3600, "D": 86_400, "W": 604_800}
DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}( [0-9]{2}:[0-9]{2}:[0-9]{2})?")
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
        """Read text such as "H", "15min" or "3M"; anything else is a `UserError`."""
        match = re.fullmatch("([1-9][0-9]{0,3})?(min|H|D|W|M|B)", str(text))
        if match is None:
            raise UserError(f"frequency: {shorten(text)}; expected a whole number and min, H, D, W, M or B, such as 1H")
        return cls(int(match[1] or 1), match[2])

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"

    def steps(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count the steps from the first of the times, datetime64[s] (T,), to each.

        Returns:
            The steps, int64 (T,), and whether each time lies on a whole one, bool (T,). No business day is whole on a
            weekend, not even the first.
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
        """Say which times `steps` takes for whole, for an error to end with."""
        days = " over business days" if self.unit == "B" else ""
        return f"expected whole steps of {self}{days} from {show(start)}"


def _months(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    months = times.astype("datetime64[M]")
    since, left = times - months, months + 1 - times
    # The last days of months are as regular as the first, and what pandas writes.
    last = (left == left[0]) & (left[0] <= np.timedelta64(1, "D"))
    return (months - months[0]).astype(np.int64), (since == since[0]) | last


def _business_days(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    days = times.astype("datetime64[D]")
    hours = times - days
    return np.busday_count(days[0], days), np.is_busday(days) & (hours == hours[0])


def parse_date(text: Any, where: str) -> int:
    """Return the seconds from 1970 to a date or a date and time; anything else is a `UserError` at `where`."""
    try:
        return _seconds(text)
    except (TypeError, ValueError):  # no text, or no such day
        expected = "YYYY-MM-DD or YYYY-MM-DD HH:MM:SS, without a time zone"
        raise UserError(f"{where}: {shorten(text)}; expected {expected}") from None


@lru_cache(maxsize=1 << 16)  # the series of a file have the same dates
def _seconds(text: str) -> int:
    if not DATE.fullmatch(text):  # fromisoformat alone takes weeks and time zones
        raise ValueError
    return (datetime.fromisoformat(text) - ORIGIN) // SECOND


def parse_start(text: Any, where: str, frequency: Frequency) -> np.datetime64:
    """Read the first time of a series, to the second; one that is not on its own grid is a `UserError` too."""
    start = np.datetime64(parse_date(text, where), "s")
    if not frequency.steps(np.array([start]))[1][0]:
        raise UserError(f"{where}: {show(start)} is a weekend; expected a business day")
    return start


def show(time: np.datetime64) -> str:
    """Write a time as `parse_date` reads it."""
    return str(time).replace("T", " ")
