"""What a command line is read by."""

import argparse
from collections.abc import Callable

from dlref.runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """Errors are one line, raised instead of printed with the usage."""

    def error(self, message: str):
        """Raise UserError."""
        raise UserError(f"{message}; expected arguments as in --help, and -- before a text that begins with a dash")


def positive(text: str) -> int:
    """A number of at least 1, from a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return int(text)


def non_empty(text: str) -> str:
    """A command-line text that must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("empty; expected a text")
    return text


def number(lowest: float, highest: float, kind: type = float) -> Callable[[str], float]:
    """What reads a number between two others, from a command line."""

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
