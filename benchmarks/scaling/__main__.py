"""Measure how cost grows with size: `python -m benchmarks.scaling` (with the extra [train]).

Each sweep makes one thing larger (the batch, a side of the pictures, the context, the number of series, the width of a
network, ...) and keeps everything else as it is. It measures memory and the seconds of a training step, as the median
of several turns that each include every size. Both are compared with what follows on paper. docs/scaling.json holds all
measurements, docs/images/scaling.png and scaling-memory.png are drawn from it, and the tables of docs/scaling.md stand
between two comments. `--draw` writes pictures and tables again without measuring.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.rows import in_turns
from benchmarks.scaling.measure import TURNS, measured, memory, rounded
from benchmarks.scaling.page import lines_of, write
from benchmarks.scaling.sweeps import levers, sweeps
from dlref.runtime.machine import processor

DOCS = Path(__file__).parents[2] / "docs"


def measure(device: str) -> dict:
    """Measure everything."""
    torch.manual_seed(0)
    found = {}
    known = sweeps(device)
    for number, (name, sweep) in enumerate(known.items(), 1):
        found[name] = measured(sweep, f"{number}/{len(known) + 1} {sweep.title}: {sweep.axis}", device)
    ways: dict[str, dict] = {}
    for title, cases in levers(device).items():
        calls = {name: case.step for name, case in cases.items()}
        seconds = in_turns(f"{len(known) + 1}/{len(known) + 1} {title}", calls, device, TURNS)
        ways[title] = {
            name: {"seconds": rounded(seconds[name]), "bytes": memory(cases[name], device)} for name in cases
        }
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "turns": TURNS,
        "sweeps": found,
        "levers": ways,
    }


def main() -> None:
    """Measure, save, draw."""
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures and tables again")
    options = parser.parse_args()
    path = DOCS / "scaling.json"
    if not options.draw:
        path.write_text(lines_of(measure(options.device)), encoding="utf-8")
    write(json.loads(path.read_text(encoding="utf-8")), DOCS)


if __name__ == "__main__":
    main()
