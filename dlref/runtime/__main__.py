"""`python -m dlref.runtime FOLDER INPUT...`: one JSON line for each input."""

import argparse
import json
import os
import sys

from dlref.runtime import UserError, load


def main(arguments: list[str] | None = None) -> int:
    """Answer for each input; 0, or 2 with one line on stderr when something given is wrong."""
    parser = argparse.ArgumentParser(prog="python -m dlref.runtime", description=__doc__)
    parser.add_argument("folder", help="a bundle, as export.py writes it")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="what the model reads: image files, ...")
    parser.add_argument("--threads", type=int, help="cores to use (default: all)")
    options = parser.parse_args(arguments)
    try:
        if options.threads is not None and options.threads < 1:
            raise UserError(f"--threads {options.threads}; expected 1 or more")
        runner = load(options.folder, options.threads)
        for source, answer in zip(options.inputs, runner.stream(options.inputs), strict=True):
            print(json.dumps({"input": source, **answer}, ensure_ascii=False), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
