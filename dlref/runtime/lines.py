"""Files of lines: text in UTF-8, gzipped or not, with a JSON object or something else on each line."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shorten
from typing import IO, Any, NamedTuple

from dlref.runtime.errors import UserError, one_line

LARGEST_TEXT = 1 << 28  # bytes of a file
FILE_NAME = re.compile(r"[^\s{}]{1,200}\.(txt|md|csv|tsv|jsonl?|gz)", re.IGNORECASE)


class Line(NamedTuple):
    """A line of a file, and where it stands."""

    where: str
    text: str


def read_text(path: str | Path, expected: str, largest: int | None = LARGEST_TEXT) -> str:
    """A whole file of at most so many bytes. Raises UserError."""
    with opened(path, expected) as file:
        text = file.read(-1 if largest is None else largest + 1)
        if largest is not None and len(text) > largest:
            raise UserError(f"{path}: more than {largest} bytes; expected a smaller file")
        return decoded(text, str(path), expected).removeprefix("\ufeff")


def numbered(path: str | Path, expected: str) -> Iterator[tuple[int, str]]:
    """The lines of a file, without their ends, numbered from 1. Raises UserError."""
    with opened(path, expected) as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line.rstrip(b"\r\n"), f"{path}:{number}", expected)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def decoded(text: bytes, where: str, expected: str = "text") -> str:
    """Bytes as text. Raises UserError, with the offset of what is none."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{text[error.start]:02x}, not UTF-8"
        raise UserError(f"{where}: {byte}; expected {expected} in UTF-8") from None


@contextmanager
def opened(path: str | Path, expected: str) -> Iterator[IO[bytes]]:
    """A file, gzipped or not. What goes wrong in reading it is a UserError."""
    try:
        with gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: no name that a file may have
        reason = getattr(error, "strerror", None) or f"unreadable ({one_line(error)})"
        raise UserError(f"{path}: {reason}; expected {expected}") from None


def text_in(path: str) -> str | Path | None:
    """The text in a file; None where no file has this name, and the file where reading it will say what is wrong.

    A single word that ends as a file's name does is one that is not there, and no text. Raises UserError for a pipe.
    """
    if not os.path.isfile(path):  # not Path's, which raises for a text longer than a name may be
        if os.path.exists(path) and not os.path.isdir(path):  # a pipe, which gives what it has once
            return read_text(path, "text")
        return Path(path) if os.path.islink(path) or FILE_NAME.fullmatch(path) else None
    try:
        return read_text(path, "text")
    except UserError:
        return Path(path)


def only(path: str, inputs: Iterator[tuple[str, Any]]) -> Any:
    """The one input that a file holds. Raises UserError where it holds several."""
    (_, first), *others = inputs
    if others:
        raise UserError(f"{path}: {1 + len(others)} inputs; expected one, several are given as a list")
    return first


def is_object(text: str) -> bool:
    """Whether a text is one JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def parse_object(line: str, where: str) -> dict[str, Any]:
    """Read a line with one JSON object; anything else is a `UserError` at `where`."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {shorten(line)}; expected one JSON object")
    return entry
