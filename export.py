"""Export a run for a device: `python export.py runs/NAME --target cpu --output bundles/NAME`."""

import argparse
import signal
import sys
from pathlib import Path

from dlref.export.report import held_up
from dlref.export.targets import TARGETS
from dlref.runtime import UserError
from dlref.runtime.arguments import Parser, discard_output, exit_code

TIMES = ("latency_ms", "first_answer_s")


def main() -> int:
    """Return 0, 2 with one line on stderr if the input is wrong, or 130 if interrupted."""
    parser = Parser(
        description=__doc__,
        epilog="Further arguments change the run's config, such as --data.init_args.root DIR.",
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run that train.py wrote")
    parser.add_argument("--target", help="the device; see --list-targets")
    parser.add_argument("--output", type=Path, help="folder to write the bundle to")
    parser.add_argument("--list-targets", action="store_true", help="print the targets and stop")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: nothing half-written stays
    return exit_code(lambda: run(*parser.parse_known_args()), "interrupted; nothing was written")


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    """Do what the options ask for. Raises UserError."""
    if options.list_targets:
        print_targets()
    else:
        export_run(options.run, options.target, options.output, overrides)


def show(text: str) -> None:
    """Print a text; a reader that has closed the pipe, such as head, is no error. Raises UserError on a full disk."""
    try:
        print(text, flush=True)
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"standard output: {error.strerror}; expected room for a few lines") from None


def print_targets() -> None:
    """Print a table of the targets."""
    rows = [("target", "precision", "provider", "file", "shapes", "for")]
    for target in TARGETS.values():
        provider = target.provider.removesuffix("ExecutionProvider")
        shapes = "fixed" if target.static else "free"
        rows.append((target.name, target.precision, provider, f".{target.file_format}", shapes, target.description))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    show("\n".join(lines))


def export_run(run: Path | None, target: str | None, output: Path | None, overrides: list[str]) -> None:
    """Write the bundle and print a comparison with PyTorch. Raises UserError."""
    if not (run and target and output):
        raise UserError("expected RUN --target TARGET --output FOLDER; see --help")
    if target not in TARGETS:
        raise UserError(f"target {target!r} is unknown; expected one of {', '.join(TARGETS)}")
    from dlref.cli import load_run  # only now: torch takes seconds to import
    from dlref.export.bundle import export

    manifest = export(*load_run(run, overrides), TARGETS[target], output)
    metric = manifest["verification"]["metric"]
    show(
        f"{output}: {manifest['precision']}, {metric['name']} {metric['bundle']:.4f} on {metric['n']} "
        f"{metric['split']} samples (PyTorch {metric['pytorch']:.4f})"
    )
    measured = manifest["measurement"]["contenders"]
    if {"bundle", "pytorch-eager"} <= measured.keys():
        show(gains(measured["bundle"], measured["pytorch-eager"]))


def gains(bundle: dict, eager: dict) -> str:
    """Return a line that compares the bundle with PyTorch; without times if other programs held one of them up."""
    disturbed = held_up(bundle) or held_up(eager)
    words = {
        "latency_ms": "faster",
        "first_answer_s": "faster to the first answer",
        "peak_rss_mb": "less memory",
        "installed_mb": "less to install",
    }
    known = [key for key in words if bundle[key] and eager[key] and not (disturbed and key in TIMES)]
    parts = [f"{eager[key] / bundle[key]:.1f}x {words[key]}" for key in known]
    if disturbed:
        parts.append("no times, because other programs kept the machine busy")
    return f"compared with PyTorch: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
