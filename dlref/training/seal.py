"""Files of torch.save whose damage can be found: each ends with the hash of all before it.

torch.load ignores what follows the archive, so other programs read them as before.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

SEAL = b"\ndlref sha256 "
SIZE = len(SEAL) + 64
BLOCK = 1 << 24  # bytes that are hashed at once


class HashingWriter:
    """A file that is written to, and the hash of all of it; `error` keeps the OSError that torch.save hides."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        """Write all of it."""
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            error.filename, self.error = self.file.name, error
            raise

    def flush(self) -> None:
        """To the operating system."""
        self.file.flush()


def write_sealed(state: dict, path: Path, before: Path | None = None) -> None:
    """Write a checkpoint beside `path` and put it there when it is whole; nothing is left of one that is not.

    What is there goes to `before`. Raises OSError.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("wb") as file:
            hashed = HashingWriter(file)
            try:
                torch.save(state, hashed)
            except RuntimeError:  # torch.save's own words for an OSError
                if hashed.error is None:
                    raise
                raise hashed.error from None
            file.write(SEAL + hashed.sha256.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())  # a rename that outlives a power cut must not name a file that does not
        if before is not None:
            os.replace(path, before)
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def seal_of(path: Path) -> bytes:
    """The end of a file where a seal is, if there is one; else nothing."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SIZE))
        end = file.read()
    return end if end.startswith(SEAL) and len(end) == SIZE else b""


def damage(path: Path) -> str | None:
    """What is wrong with a file that was written with a seal, in words; None: it is whole."""
    left, seal, sha256 = path.stat().st_size - SIZE, seal_of(path), hashlib.sha256()
    if not seal:
        return f"cut off after {path.stat().st_size} bytes"
    with path.open("rb") as file:
        while left:
            block = file.read(min(BLOCK, left))
            sha256.update(block)
            left -= len(block)
    return None if seal.endswith(sha256.hexdigest().encode()) else "its hash is another"
