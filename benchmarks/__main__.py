"""Run every benchmark that this machine can run: `python -m benchmarks`, with the extra [bench].

    python -m benchmarks                    run all, and write docs/benchmarks.md and its pictures
    python -m benchmarks NAME...            run these; the other rows stay as they are
    python -m benchmarks.MODULE             run those of a module of this folder
    python -m benchmarks --list             list the names
    python -m benchmarks reproduce NAME...  run these again, and check each row against its stated spread

Each benchmark has a process of its own, and needs the machine for itself. Figures are saved after each of them.
`reproduce` writes nothing. It returns 1 if a row is outside its spread, and 2 if a row cannot be compared.

DLREF_DATA names the folder of the data sets (default: data), JOEYNMT_PYTHON an interpreter that has JoeyNMT. Benchmarks
whose data or interpreter is missing are skipped. TORCH_CPU_PYTHON names an interpreter with torch's CPU wheel, for some
rows of the edge benchmarks: measured without it, these rows are removed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import modules
from benchmarks.page import Record, Records, near, read, record, spread, write
from benchmarks.pictures import draw
from benchmarks.rows import watched

DOCS = Path(__file__).parents[1] / "docs"


def measured(name: str) -> Record:
    """Run one benchmark in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.measure", name]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        return Record(modules()[name], not_run=f"it failed with status {child.returncode}")
    return record(**json.loads(child.stdout.splitlines()[-1]))


def measure(names: list[str], folder: Path) -> int:
    """Run benchmarks and add their records to the saved ones. Return 1 if one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    records, order = read(folder), list(modules())
    failed = False
    for name in watched(names, "benchmarks"):
        found = measured(name)
        failed |= found.not_run.startswith("it failed")
        earlier = records[name].rows if name in records else {}
        if not (found.not_run and earlier):  # keep rows from a machine that could run it
            records[name] = found
            for title in earlier.keys() - found.rows.keys():
                print(f"{name}: {title}: removed, as it was not measured this time", file=sys.stderr)
        print(f"{name}: {found.not_run or ', '.join(spread(row.values, row.sign) for row in found.rows.values())}")
        write(folder, {name: records[name] for name in order if name in records})
        draw(folder, read(folder))
    return int(failed)


def reproduce(names: list[str], stated: Records) -> int:
    """Run benchmarks again and compare. Return 1 if a row is outside its spread, 2 if one cannot be compared."""
    outside = missing = False
    for name in watched(names, "benchmarks"):
        known = name in stated and stated[name].rows
        found = (
            measured(name) if known else Record("", not_run="docs/benchmarks.md has no figures of it to compare with")
        )
        if found.not_run:
            print(f"error: {name}: {found.not_run}", file=sys.stderr)
            missing = True
            continue
        for title, row in stated[name].rows.items():
            if title not in found.rows:
                print(f"error: {name}: {title}: not measured this time", file=sys.stderr)
                missing = True
                continue
            again, inside = found.rows[title], near(row, found.rows[title].median)
            verdict = "within" if inside else "OUTSIDE"
            print(
                f"{name}: {title}: {spread(again.values, row.sign)}; stated {spread(row.values, row.sign)}: {verdict}"
            )
            outside |= not inside
    return 2 if missing else int(outside)


def main(arguments: list[str] | None = None, every: list[str] | None = None) -> int:
    """Run the command; without names, for `every` one of these."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; after reproduce: to compare again")
    parser.add_argument("--list", action="store_true", help="list the names")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where benchmarks.json and benchmarks.md are")
    options = parser.parse_args(arguments)
    again = options.names[:1] == ["reproduce"]
    names = options.names[again:] or every or list(modules())
    if options.list:
        print("\n".join(every or modules()))
        return 0
    if unknown := [name for name in names if name not in modules()]:
        print(f"error: {unknown[0]}: no such benchmark; expected one that --list shows", file=sys.stderr)
        return 2
    if again:
        stated = read(options.docs)
        return reproduce(options.names[1:] or every or [name for name in stated if stated[name].rows], stated)
    return measure(names, options.docs)


if __name__ == "__main__":
    sys.exit(main())
