"""What a benchmark finds: figures of dlref and of a peer, side by side, in one run.

A module of this folder has BENCHMARKS, from names to functions without arguments that measure and answer rows by title.
`python -m benchmarks` runs each in a process of its own.
"""

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import track

TURNS = 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class NotHere(Exception):
    """A benchmark that cannot be run on this machine, and why."""


def needs(package: str) -> None:
    """Raise NotHere unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise NotHere(f"{package} is not installed; pip install -e '.[bench]'")


def data_file(name: str) -> Path:
    """A file of the folder that DLREF_DATA names. Raises NotHere without it."""
    path = Path(os.environ.get("DLREF_DATA", "data")) / name
    if not path.exists():
        raise NotHere(f"the folder that DLREF_DATA names has no {name}")
    return path


@dataclass
class Row:
    """One comparison.

    Attributes:
        own: dlref's figures, one a turn.
        peer: those of what it is compared with in the same turns; none for a figure that stands alone.
        unit: of both. With a peer, more is better of what ends with "/s", and less of all else, such as "s" and "MB".
        beside: what the peer is.
        goal: what the ratio is to be, or the figure where there is no peer; as `met` reads it: ">= 2", "<= 0.05".
    """

    own: list[float]
    peer: list[float] = field(default_factory=list)
    unit: str = ""
    beside: str = ""
    goal: str = ""

    def __post_init__(self) -> None:
        if self.peer and not self.unit:
            raise ValueError("a row beside a peer without a unit; expected one, which says what is better")

    @property
    def values(self) -> list[float]:
        """How many times better dlref is, pair by pair; its own figures where it has no peer."""
        if not self.peer:
            return self.own
        pairs = zip(self.own, self.peer, strict=True)
        return [own / peer if self.unit.endswith("/s") else peer / own for own, peer in pairs]

    @property
    def sign(self) -> str:
        """The unit of the values."""
        return "×" if self.peer else self.unit

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median is what the goal says; None without one."""
        if not self.goal:
            return None
        sign, number = self.goal.split()
        return self.median >= float(number) if sign == ">=" else self.median <= float(number)


Rows = dict[str, Row]


def run(benchmarks: dict[str, Callable[[], Rows]]) -> NoReturn:
    """`python -m benchmarks.MODULE`: as `python -m benchmarks` with the names of the module."""
    from benchmarks.__main__ import main  # which imports every module

    sys.exit(main(sys.argv[1:], list(benchmarks)))


def watched(items: Iterable, title: str) -> Iterator:
    """The items, with a bar that shows how far they are."""
    return track(items, title, console=Console(stderr=True), transient=True)


def in_turns(
    title: str, calls: dict[str, Callable], device: str = DEVICE, turns: int = TURNS
) -> dict[str, list[float]]:
    """Seconds of each call, in turns."""

    def seconds(call: Callable) -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return figures_in_turns(title, {name: partial(seconds, call) for name, call in calls.items()}, turns)


def figures_in_turns(title: str, calls: dict[str, Callable[[], float]], turns: int = TURNS) -> dict[str, list[float]]:
    """What each call answers, one after the other, `turns` times after one that does not count.

    What else a machine does meets all of them alike.
    """
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for turn in watched(range(turns + 1), title):
        for name, call in calls.items():
            figure = call()
            if turn:
                figures[name].append(figure)
    return figures


def rest() -> None:
    """PyTorch's threads wait busily for a while, and would take a core from what comes next."""
    time.sleep(0.5)
