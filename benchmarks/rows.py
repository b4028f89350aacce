"""The rows that benchmarks return: figures of dlref and of a peer, side by side, from one run.

A module of this folder has BENCHMARKS: names -> functions without arguments that measure and return rows by title.
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
# Options of a Trainer that shows and keeps nothing.
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class NotHere(Exception):
    """Raised if a benchmark cannot be run on this machine; the message says why."""


def needs(package: str) -> None:
    """Raise NotHere unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise NotHere(f"{package} is not installed; pip install -e '.[bench]'")


def data_file(name: str) -> Path:
    """Return the path of a file in the folder that DLREF_DATA names. Raises NotHere if it is missing."""
    path = Path(os.environ.get("DLREF_DATA", "data")) / name
    if not path.exists():
        raise NotHere(f"the folder that DLREF_DATA names has no {name}")
    return path


@dataclass
class Row:
    """One comparison.

    Attributes:
        own: dlref's figures, one per turn.
        peer: the peer's figures in the same turns; none for a figure without a peer.
        unit: of both. With a peer, more is better for units that end with "/s", less for all others, such as "s", "MB".
        beside: name of the peer.
        goal: for the ratio, or for the figure if there is no peer, in the format that `met` reads: ">= 2", "<= 0.05".
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
        """How many times better dlref is, pair by pair; its own figures if there is no peer."""
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
        """The median of the values."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None without a goal."""
        if not self.goal:
            return None
        sign, number = self.goal.split()
        return self.median >= float(number) if sign == ">=" else self.median <= float(number)


Rows = dict[str, Row]


def run(benchmarks: dict[str, Callable[[], Rows]]) -> NoReturn:
    """Run `python -m benchmarks.MODULE`: the same as `python -m benchmarks` with the names of the module."""
    from benchmarks.__main__ import main  # imports every module

    sys.exit(main(sys.argv[1:], list(benchmarks)))


def watched(items: Iterable, title: str) -> Iterator:
    """Yield the items and show a progress bar."""
    return track(items, title, console=Console(stderr=True), transient=True)


def in_turns(
    title: str, calls: dict[str, Callable], device: str = DEVICE, turns: int = TURNS
) -> dict[str, list[float]]:
    """Return the seconds of each call, made in turns."""

    def seconds(call: Callable) -> float:
        start = time.perf_counter()
        call()
        finish(device)
        return time.perf_counter() - start

    return figures_in_turns(title, {name: partial(seconds, call) for name, call in calls.items()}, turns)


def figures_in_turns(title: str, calls: dict[str, Callable[[], float]], turns: int = TURNS) -> dict[str, list[float]]:
    """Return the results of each call, made one after the other, `turns` times after one round that does not count.

    So disturbances of the machine affect all calls equally.
    """
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for turn in watched(range(turns + 1), title):
        for name, call in calls.items():
            figure = call()
            if turn:
                figures[name].append(figure)
    return figures


def finish(device: str = DEVICE) -> None:
    """Wait until the device has finished; a CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()


def rest() -> None:
    """Sleep until PyTorch's threads have stopped spinning: they would take a core from the next measurement."""
    time.sleep(0.5)
