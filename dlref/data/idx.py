"""The idx format of MNIST: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", 1998.

A file is big-endian: two zero bytes, a type code (8: unsigned byte), the number of dimensions, the size of each
in 32 bits, then the values, last dimension fastest. The published files are gzipped; unpacked files are read, too.
"""

import math
import struct
from pathlib import Path

import numpy as np

from dlref.data.files import check_class_ids
from dlref.runtime.errors import UserError
from dlref.runtime.lines import opened

CHUNK = 1 << 20
CONTENTS = {1: "labels, idx1", 3: "images, idx3"}


def read_idx(path: str | Path, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes with `dimensions` dimensions, gzipped if its name ends in .gz."""
    with opened(path, "a readable idx file") as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions:
            raise UserError(f"{path}: {len(header)} bytes; expected a header of {4 + 4 * dimensions}")
        magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
        expected = 0x0800 + dimensions
        if magic != expected:
            contents = CONTENTS.get(dimensions, f"idx{dimensions}")
            raise UserError(f"{path}: magic number {magic}; expected {expected} ({contents})")
        size = math.prod(shape)
        sizes = " x ".join(map(str, shape))
        if size == 0:
            raise UserError(f"{path}: sizes {sizes} in the header; expected at least one value")
        # Read in chunks, so that memory use depends on the size of the file, not on the size its header claims.
        values = bytearray()
        while len(values) <= size and (chunk := file.read(CHUNK)):
            values += chunk
    if len(values) != size:
        held = f"more than {size}" if len(values) > size else f"only {len(values)}"
        raise UserError(f"{path}: {held} bytes after the header; expected {sizes} = {size}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_idx_pair(images_path: str | Path, labels_path: str | Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read images (N, H, W) and their labels (N,), and check each against the other.

    Raises:
        UserError: if the files are not idx, their counts differ or a label is not a class id.
    """
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(f"{labels_path}: {len(labels)} labels; expected {len(images)}, as in {images_path}")
    check_class_ids(labels_path, labels, classes)
    return images, labels
