"""Run one benchmark in this process: `python -m benchmarks.measure NAME` prints its record as a last line of JSON."""

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
    """Return the module of each benchmark, by name."""
    return {name: module for module in MODULES for name in import_module(f"benchmarks.{module}").BENCHMARKS}


def measure(name: str) -> Record:
    """Run a benchmark and return its record."""
    logging.disable(logging.WARNING)  # Lightning logs at every start
    warnings.simplefilter("ignore")  # advice on workers and intervals, which does not apply here
    module = modules()[name]
    try:
        rows = import_module(f"benchmarks.{module}").BENCHMARKS[name]()
    except NotHere as reason:
        return Record(module, not_run=str(reason))
    return Record(module, rows, where=Where.here())


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1]))))
