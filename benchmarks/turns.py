"""Calls timed one after the other, again and again, so that what else a machine does meets all of them alike."""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track

TURNS = 7


def in_turns(title: str, calls: dict[str, Callable], device: str, turns: int = TURNS) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `turns` times after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in track(range(turns + 1), title, console=Console(stderr=True), transient=True):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """One row: medians, their ratio, and the ratios of the pairs from least to most."""
    theirs, own = seconds["torchvision"], seconds["dlref"]
    ratios = [a / b for a, b in zip(theirs, own, strict=True)]
    median = statistics.median
    print(
        f"| {title} | {1e3 * median(theirs):.0f} | {1e3 * median(own):.0f} | {median(ratios):.2f}× "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )
