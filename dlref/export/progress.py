"""What whoever waits for an export sees."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import track

console = Console(stderr=True)


def say(line: str) -> None:
    """Print a line."""
    console.print(line, soft_wrap=True, highlight=False)


def watched(batches: Iterable, title: str) -> Iterator:
    """The same batches, with a bar that shows on a terminal how far they are."""
    hidden = not (console.is_terminal or console.is_jupyter)  # elsewhere rich would leave an empty line
    return track(batches, title, console=console, transient=True, disable=hidden)
