"""Read files of lines: text in UTF-8, gzipped or not, with a JSON object or something else on each line."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

from dlref.runtime.errors import UserError, one_line

LARGEST_TEXT = 1 << 28  # bytes of a file
FILE_NAME = re.compile(r"[^\s{}]{1,200}\.(txt|md|csv|tsv|jsonl?|gz)", re.IGNORECASE)


class Line(NamedTuple):
    """A line and its place in a file."""

    where: str
    text: str


def read_text(path: str | Path, expected: str, largest: int | None = LARGEST_TEXT) -> str:
    """Read a whole file of at most `largest` bytes. Raises UserError."""
    with opened(path, expected) as file:
        text = file.read(-1 if largest is None else largest + 1)
        if largest is not None and len(text) > largest:
            raise UserError(f"{path}: more than {largest} bytes; expected a smaller file")
        return decoded(text, str(path), expected).removeprefix("\ufeff")


def numbered(path: str | Path, expected: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file, without line ends, numbered from 1. Raises UserError."""
    with opened(path, expected) as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line.rstrip(b"\r\n"), f"{path}:{number}", expected)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def decoded(text: bytes, where: str, expected: str = "text") -> str:
    """Decode UTF-8. Raises UserError with the offset of the first invalid byte."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{text[error.start]:02x}, not UTF-8"
        raise UserError(f"{where}: {byte}; expected {expected} in UTF-8") from None


@contextmanager
def opened(path: str | Path, expected: str) -> Iterator[BufferedIOBase]:
    """Open a file, gzipped or not. Errors while it is read become UserErrors."""
    try:
        with gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: an invalid file name
        reason = getattr(error, "strerror", None) or f"unreadable ({one_line(error)})"
        raise UserError(f"{path}: {reason}; expected {expected}") from None


def text_in(path: str) -> str | Path | None:
    """Return the text in a file, None if there is no such file, or a Path whose reading will raise the error.

    A single word that ends like a file name is taken for a missing file. Raises UserError for an unreadable pipe.
    """
    if not os.path.isfile(path):  # Path.is_file raises for a text longer than a file name may be
        if os.path.exists(path) and not os.path.isdir(path):  # a pipe, which can be read only once
            return read_text(path, "text")
        return Path(path) if os.path.islink(path) or FILE_NAME.fullmatch(path) else None
    try:
        return read_text(path, "text")
    except UserError:
        return Path(path)


def only(path: str, inputs: Iterator[tuple[str, Any]]) -> Any:
    """Return the single input in a file. Raises UserError if the file holds several."""
    (_, first), *others = inputs
    if others:
        raise UserError(f"{path}: {1 + len(others)} inputs; expected one, several are given as a list")
    return first


def is_object(text: str) -> bool:
    """Return whether a text is one JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def parse_object(line: str, where: str) -> dict[str, Any]:
    """Parse a line with one JSON object. Raises UserError at `where` for anything else."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {shorten(line)}; expected one JSON object")
    return entry
