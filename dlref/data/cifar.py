"""The binary batches of CIFAR-10: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

A batch is a sequence of records: one byte for the label, then 32 × 32 bytes each of red, green and blue.
"""

from pathlib import Path

import numpy as np

from dlref.data.files import check_class_ids
from dlref.runtime.errors import UserError
from dlref.runtime.lines import opened, read_text

SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
CLASSES = 10


def read_cifar_batch(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch: images (N, 3, 32, 32) and labels (N,), both uint8."""
    with opened(path, "a binary file of CIFAR-10") as file:
        content = file.read()
    if not content or len(content) % RECORD:
        raise UserError(f"{path}: {len(content)} bytes; expected records of {RECORD}, 10,000 as published")
    records = np.frombuffer(bytearray(content), np.uint8).reshape(-1, RECORD)
    labels, images = records[:, 0], records[:, 1:].reshape(-1, *SHAPE)
    check_class_ids(path, labels, CLASSES)
    return images, labels


def read_class_names(path: str | Path) -> list[str]:
    """Read batches.meta.txt: the ten class names, one per line."""
    names = read_text(path, f"{CLASSES} class names, one a line,").split()
    if len(names) != CLASSES:
        raise UserError(f"{path}: {len(names)} class names; expected {CLASSES}, one a line")
    return names
