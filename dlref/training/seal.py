"""torch.save files whose damage can be detected: each ends with the hash of everything before it.

torch.load ignores data after the archive, so other programs can read these files as usual.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

SEAL = b"\ndlref sha256 "
SIZE = len(SEAL) + 64
BLOCK = 1 << 24  # bytes that are hashed at once


class HashingWriter:
    """A writer that hashes all bytes written to a file; `error` keeps the OSError that torch.save hides."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        """Hash and write `data`."""
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            error.filename, self.error = self.file.name, error
            raise

    def flush(self) -> None:
        """Flush the file to the operating system."""
        self.file.flush()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and move it there once complete; nothing is left of an incomplete file.

    The folder is made if there is none. Raises OSError.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_sealed(state: dict, path: Path, before: Path | None = None) -> None:
    """Write a checkpoint completely or not at all. An existing file is moved to `before`, if given. Raises OSError."""
    with replacing(path) as part:
        with part.open("wb") as file:
            hashed = HashingWriter(file)
            try:
                torch.save(state, hashed)
            except RuntimeError:  # torch.save raises this for an OSError
                if hashed.error is None:
                    raise
                raise hashed.error from None
            file.write(SEAL + hashed.sha256.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())  # after a power cut, the renamed file must be complete
        if before is not None:
            os.replace(path, before)


def seal_of(path: Path) -> bytes:
    """Return the seal at the end of a file, or no bytes if there is none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SIZE))
        end = file.read()
    return end if end.startswith(SEAL) and len(end) == SIZE else b""


def damage(path: Path) -> str | None:
    """Describe the damage of a file that was written with a seal, or return None if it is intact."""
    left, seal, sha256 = path.stat().st_size - SIZE, seal_of(path), hashlib.sha256()
    if not seal:
        return f"cut off after {path.stat().st_size} bytes"
    with path.open("rb") as file:
        while left:
            block = file.read(min(BLOCK, left))
            sha256.update(block)
            left -= len(block)
    return None if seal.endswith(sha256.hexdigest().encode()) else "its hash does not match"
