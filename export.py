"""Export a run for a device: `python export.py runs/NAME --target cpu --output bundles/NAME`."""

import argparse
import sys
from pathlib import Path

from dlref.export.targets import TARGETS
from dlref.runtime import UserError


def main() -> int:
    """0, or 2 with one line on stderr when something given is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further arguments change the run's config, such as --data.init_args.root DIR.",
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run that train.py wrote")
    parser.add_argument("--target", help="the device; see --list-targets")
    parser.add_argument("--output", type=Path, help="folder of the bundle")
    parser.add_argument("--list-targets", action="store_true", help="print the targets and stop")
    options, overrides = parser.parse_known_args()
    if options.list_targets:
        print_targets()
        return 0
    try:
        export_run(options.run, options.target, options.output, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def print_targets() -> None:
    """A line for each device."""
    for target in TARGETS.values():
        print(f"{target.name:10} {target.precision:10} {target.provider:24} {target.description}")


def export_run(run: Path | None, target: str | None, output: Path | None, overrides: list[str]) -> None:
    """Write the bundle and print how it compares. Raises UserError."""
    if not (run and target and output):
        raise UserError("expected RUN --target TARGET --output FOLDER; see --help")
    if target not in TARGETS:
        raise UserError(f"target {target!r} is unknown; expected one of {', '.join(TARGETS)}")
    from dlref.cli import load_run  # only now: torch takes seconds to import
    from dlref.export.bundle import export

    metric = export(*load_run(run, overrides), TARGETS[target], output)["verification"]["metric"]
    print(
        f"{output}: {metric['name']} {metric['bundle']:.4f} on {metric['n']} {metric['split']} samples (PyTorch "
        f"{metric['pytorch']:.4f}), largest difference {metric['max_abs_error']:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
