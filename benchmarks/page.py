"""Measured figures, kept in docs/benchmarks.json and shown in docs/benchmarks.md."""

import json
import math
import statistics
import textwrap
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.rows import Row
from dlref.export.report import table
from dlref.runtime.machine import processor
from dlref.training.run_folder import write_text

PACKAGES = ("torch", "torchvision", "lightning", "onnxruntime", "timm", "transformers", "gluonts", "airbench")
MARGIN, SCORE_MARGIN = 0.05, 0.01
HEADER = """\
# Benchmarks

`python -m benchmarks` writes this page; do not edit it. benchmarks.json holds every single figure. A ratio says how
many times better dlref is than its peer: faster, smaller, sooner. Both sides of a row are measured in turns in one run.
The ratio is the median of the ratios of all turns, with the least and the greatest in brackets. The figures of the two
sides are medians as well, so their quotient may differ from the ratio. A row without a peer has only dlref's figure.

`python -m benchmarks reproduce NAME` measures the rows of a name again. It reports for each row whether the new median
lies between the least and the greatest value here, or at most 5% beyond them (and at most 0.01 for figures without a
unit, such as scores). Times and speeds without a peer are those of the machine that the row names.
[results.md](results.md) explains the figures.

![ratios that have a goal: median, spread and goal](images/benchmarks.png)
"""


@dataclass
class Where:
    """The machine, the packages and the day of a measurement."""

    machine: str
    packages: str
    day: str

    @classmethod
    def here(cls) -> "Where":
        """Describe this machine, today."""
        machine = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        if torch.cuda.is_available():
            machine = f"{torch.cuda.get_device_name()}; {machine}"
        packages = ", ".join(f"{name} {found}" for name in PACKAGES if (found := installed(name)))
        return cls(machine, packages, str(date.today()))


def installed(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass
class Record:
    """A benchmark's last measurement: its rows by title, or the reason why it was not run."""

    module: str
    rows: dict[str, Row] = field(default_factory=dict)
    not_run: str = ""
    where: Where | None = None


Records = dict[str, Record]


def read(folder: Path) -> Records:
    """Read all records by name."""
    path = folder / "benchmarks.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: record(**parts) for name, parts in known.items()}


def record(module: str, rows: dict[str, dict], not_run: str, where: dict | None) -> Record:
    """Return a record from its form in JSON."""
    return Record(module, {title: Row(**row) for title, row in rows.items()}, not_run, where and Where(**where))


def write(folder: Path, records: Records) -> None:
    """Save the records and write the page."""
    figures = {name: asdict(record) for name, record in records.items()}
    write_text(folder / "benchmarks.json", json.dumps(figures, indent=1) + "\n")
    write_text(folder / "benchmarks.md", page(records))


def page(records: Records) -> str:
    """Return the page in Markdown: a section for each module, then the machines."""
    places: list[Where] = []
    for record in records.values():
        if record.where and record.where not in places:
            places.append(record.where)
    sections = [HEADER]
    for module in dict.fromkeys(record.module for record in records.values()):
        own = {name: record for name, record in records.items() if record.module == module}
        sections.append(section(module, own, places))
    lines = [f"- [{number}] {where.machine}; {where.packages}; {where.day}" for number, where in enumerate(places, 1)]
    return "\n".join([*sections, "## Machines\n", *lines]) + "\n"


def section(module: str, records: Records, places: list[Where]) -> str:
    """Return a section: the module's docstring and a table of its rows."""
    first, _, rest = import_module(f"benchmarks.{module}").__doc__.partition("\n")
    titles = ["name", "what", "peer", "its figure", "dlref", "ratio", "goal", "run"]
    lines, missing = [], []
    for name, record in records.items():
        if record.not_run:
            missing.append(f"- `{name}`: not run, {record.not_run}")
        for title, row in record.rows.items():
            lines.append([f"`{name}`", title, *cells(row), f"[{places.index(record.where) + 1}]"])
    words = textwrap.dedent(rest).strip()
    parts = [f"## {first.rstrip('.')}", *([words] if words else []), *([table(titles, lines)] if lines else [])]
    return "\n\n".join([*parts, *(["\n".join(missing)] if missing else [])]) + "\n"


def cells(row: Row) -> list[str]:
    """Return the cells of a row: peer, both sides' figures, the ratio with its spread, and the goal."""
    own = spread(row.own, row.unit) if not row.peer else figure(statistics.median(row.own), row.unit)
    goal = row.goal.replace(">=", "≥").replace("<=", "≤") + ("" if row.peer or not row.unit else f" {row.unit}")
    goal = f"{goal}: {'met' if row.met else 'not met'}" if row.goal else ""
    if not row.peer:
        return ["", "", own, "", goal]
    return [row.beside, figure(statistics.median(row.peer), row.unit), own, f"**{spread(row.values, '×')}**", goal]


def spread(values: list[float], unit: str) -> str:
    """Format the median of the values, with the least and the greatest if there are several."""
    middle = statistics.median(values)
    if unit == "s" and middle < 1:
        middle, values, unit = 1e3 * middle, [1e3 * value for value in values], "ms"
    several = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return figure(middle, unit) + several


def figure(value: float, unit: str) -> str:
    """Format a number with its unit; seconds below 1 in milliseconds."""
    if unit == "s" and value < 1:
        value, unit = 1e3 * value, "ms"
    return f"{number(value)}{unit}" if unit == "×" else f"{number(value)} {unit}".rstrip()


def number(value: float) -> str:
    """Format a number with three digits, or with all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def near(row: Row, value: float) -> bool:
    """Return whether a new value lies between the stated ones, or beyond by at most a margin.

    The margin is MARGIN of the value, and at most SCORE_MARGIN if there is no unit, as for a score. It is needed
    because a few turns do not show the whole spread.
    """
    least, greatest = min(row.values), max(row.values)
    most = math.inf if row.sign else SCORE_MARGIN
    return least - min(MARGIN * abs(least), most) <= value <= greatest + min(MARGIN * abs(greatest), most)
