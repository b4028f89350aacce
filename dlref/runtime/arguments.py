"""What command lines share: parsing, exit codes, and what to do with a standard output that takes nothing."""

import argparse
import os
import sys
from collections.abc import Callable

from dlref.runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises errors as one line instead of printing them with the usage."""

    def error(self, message: str):
        """Raise UserError."""
        raise UserError(f"{message}; expected arguments as in --help, and -- before a text that begins with a dash")


def positive(text: str) -> int:
    """Parse a command-line number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return int(text)


def non_empty(text: str) -> str:
    """Return a command-line text, which must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("empty; expected a text")
    return text


def number(lowest: float, highest: float, kind: type = float) -> Callable[[str], float]:
    """Return a function that parses a command-line number from `lowest` to `highest`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= highest:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}; expected {what} from {lowest} to {highest}")
        return value

    return read


def exit_code(command: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Run a command. Return 0, or 2 for wrong input or 130 if interrupted, with one line on stderr."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"error: {interrupted}", file=sys.stderr)
        return 130
    return 0


def discard_output() -> None:
    """Print nothing more to a standard output that takes nothing: Python flushes once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
