"""Progress of an export, shown on stderr."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import track

console = Console(stderr=True)


def say(line: str) -> None:
    """Print a line."""
    console.print(line, soft_wrap=True, highlight=False)


def watched(batches: Iterable, title: str) -> Iterator:
    """Iterate over the same batches, with a progress bar on a terminal."""
    hidden = not (console.is_terminal or console.is_jupyter)  # elsewhere rich would leave an empty line
    return track(batches, title, console=console, transient=True, disable=hidden)
