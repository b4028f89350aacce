"""Properties of this machine."""

import os
import platform
import sys
from functools import cache
from pathlib import Path

import numpy as np

# A model of one MatMulInteger, y = a b: uint8 times int8 to int32. The tests build it from its parts.
PRODUCT = (
    b'\x08\x05:b\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01s'
    b"Z\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12\x01m\n\x03\x12\x01k"
    b"Z\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01n"
    b"b\x15\n\x01y\x12\x10\n\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\n"
)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def saturates() -> bool:
    """Test whether onnxruntime gets sums of 8-bit products wrong here, as on x86-64 without VNNI. Takes a millisecond.

    The option that makes them exact is not used everywhere: where sums are exact without it, it more than doubles the
    time of a convolution.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    a, b = np.full((8, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    try:
        session = onnxruntime.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"a": a, "b": b})
    except Exception:  # a build without the operator: exact sums are correct on any processor
        return True
    return bool((y != 64 * 255 * 127).any())


def comparable(path: Path) -> Path:
    """Return a path that is equal for two spellings of one name: on a Mac, names that differ only in case.

    On Windows, paths compare without case anyway.
    """
    return Path(str(path).casefold()) if sys.platform == "darwin" else path


def processor() -> str:
    """Return the name of this machine's processor and its number of cores."""
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
