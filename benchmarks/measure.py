"""One benchmark in this process: `python -m benchmarks.measure NAME` ends with what it found as a line of JSON."""

import json
import logging
import sys
import warnings
from dataclasses import asdict
from importlib import import_module

from benchmarks.page import Record, Where
from benchmarks.rows import NotHere

MODULES = (
    "classification",
    "detection",
    "segmentation",
    "forecasting",
    "translation",
    "language",
    "overhead",
    "techniques",
    "configs",
    "edge",
    "gpu",
)


def modules() -> dict[str, str]:
    """Of each benchmark, by name, the module."""
    return {name: module for module in MODULES for name in import_module(f"benchmarks.{module}").BENCHMARKS}


def measure(name: str) -> Record:
    """Run it."""
    logging.disable(logging.WARNING)  # Lightning's, at every start
    warnings.simplefilter("ignore")  # advice on workers and intervals; nothing is learnt here
    module = modules()[name]
    try:
        rows = import_module(f"benchmarks.{module}").BENCHMARKS[name]()
    except NotHere as reason:
        return Record(module, not_run=str(reason))
    return Record(module, rows, where=Where.here())


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1]))))
