"""What keeps an opened graph small."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's mallopt: parameters, and the values that its own adjustment grows to at most.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
INITIAL, LARGEST = 128 << 10, 32 << 20


@contextmanager
def returned_to_the_system() -> Iterator[None]:
    """Large blocks that are freed meanwhile leave the process, where its allocator is glibc's.

    onnxruntime copies each weight into the layout of its kernel and frees the original. By default glibc soon
    stops giving such blocks back, and the process stays larger by up to the whole model, sometimes. Afterwards
    freed blocks are kept, for activations of one size come and go with every answer.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        yield
        return
    mallopt(MMAP_THRESHOLD, INITIAL)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, 2 * LARGEST)
