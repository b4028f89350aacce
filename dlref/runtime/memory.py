"""Keep the memory of an opened graph small."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt, and the initial and largest values of its automatic adjustment.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
INITIAL, LARGEST = 128 << 10, 32 << 20


@contextmanager
def returned_to_the_system() -> Iterator[None]:
    """Return large freed blocks to the system within this context, if the allocator is glibc's.

    onnxruntime copies each weight into the layout of its kernel and frees the original. By default glibc soon
    stops returning such blocks, and the process may stay larger by up to the whole model. After the context, freed
    blocks are kept, because every prediction allocates activations of the same size again.
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
