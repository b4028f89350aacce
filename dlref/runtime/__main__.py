"""`python -m dlref.runtime BUNDLE INPUT...` prints one JSON line for each input; a folder stands for its files.

`python -m dlref.runtime BUNDLE --prompt TEXT` lets a language model continue TEXT and prints it as it is generated.

`python -m dlref.runtime bench BUNDLE` measures the bundle on this device instead.
"""

import argparse
import codecs
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from dlref.runtime import UserError, kinds, load, runner_of
from dlref.runtime.arguments import Parser, discard_output, exit_code, positive
from dlref.runtime.bench import bench, difference
from dlref.runtime.bundle import read_manifest
from dlref.runtime.machine import comparable, cores
from dlref.runtime.runner import BATCH, Runner, plain

PICTURES = (".bmp", ".gif", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # can move a terminal's cursor; not tab and line feed


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Return its exit code: 0, 2 with one line on stderr for bad input, or 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = benchmark if arguments[:1] == ["bench"] else transform
    if sys.stderr is None:  # closed by the caller; messages must not end up in the output
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is None:  # closed by the caller
        print("error: standard output is closed; expected somewhere to write to", file=sys.stderr)
        return 2
    # Pillow's warnings: an image that is too large is refused, transparency is dropped, damaged EXIF is ignored.
    warnings.filterwarnings("ignore", module=r"PIL\.")

    def run() -> None:
        command(arguments)
        sys.stdout.flush()

    try:
        return exit_code(run)
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        discard_output()
        return 0
    except OSError as error:  # a full disk
        if error.filename is not None:  # not about standard output
            raise
        print(f"error: standard output: {error.strerror}; expected room for the answers", file=sys.stderr)
        discard_output()
        return 2


def parser(description: str, name: str = "") -> argparse.ArgumentParser:
    """Return a parser with the arguments that both commands share."""
    parser = Parser(prog=f"python -m dlref.runtime{name}", description=description)
    parser.add_argument("bundle", type=Path, help="a folder that export.py wrote")
    parser.add_argument("--threads", type=positive, help="cores to use (default: the target's, or all)")
    parser.add_argument("--provider", help="execution provider of onnxruntime (default: the target's)")
    return parser


def command_line(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    """Return the parsed arguments and, by name, the runner-specific options that were given. Raises UserError."""
    known = parser(__doc__)
    known.add_argument("inputs", nargs="*", metavar="INPUT", help="an image file, a text, ..., or a folder of files")
    known.add_argument("--prompt", metavar="TEXT", help="instead of INPUT: a text to continue, printed while generated")
    known.add_argument("--batch-size", type=positive, default=BATCH, help=f"inputs per batch (default: {BATCH})")
    known.add_argument("--form", help="another format for the answers, such as sagemaker")
    for option, what in (("--output", "save masks"), ("--overlay", "draw answers over the inputs, or attention")):
        where = "NAME.png for one input, otherwise a folder"
        known.add_argument(option, type=Path, metavar="PLACE", help=f"{what}: {where}")
    own = {name: (kind, *option) for kind in map(runner_of, kinds()) for name, option in kind.options.items()}
    for name, (kind, read, text) in own.items():
        action = "append" if isinstance(getattr(kind, name, None), tuple) else "store"
        known.add_argument(f"--{name.replace('_', '-')}", type=read, action=action, help=text)
    for argument in takewhile("--".__ne__, arguments):
        if argument.startswith("-h") and argument != "-h":  # since 3.13 Python reads -heute as -h
            known.error(f"unrecognized arguments: {argument}")
    options = known.parse_intermixed_args(arguments)  # an option may stand between the bundle and its inputs
    if bool(options.inputs) == (options.prompt is not None):
        known.error("either INPUT or --prompt is required, and not both")
    if options.prompt is not None and (options.form or options.output or options.overlay):
        known.error("--prompt only prints a text: --form, --output and --overlay cannot be used with it")
    return options, {name: value for name in own if (value := getattr(options, name)) is not None}


def opened(options: argparse.Namespace, own: dict[str, object]) -> Runner:
    """Open the requested bundle and set its runner's options. Raises UserError."""
    runner = load(options.bundle, options.threads, options.provider)
    for name, value in own.items():
        if name not in runner.options:
            raise UserError(f"--{name.replace('_', '-')}: unknown to this bundle; expected a bundle of another kind")
        setattr(runner, name, tuple(value) if isinstance(value, list) else value)
    return runner


def transform(arguments: list[str]) -> None:
    """Predict for every input, in order. A bad input gets a record with its error, and the exit code is 2."""
    options, own = command_line(arguments)
    runner = opened(options, own)
    if options.prompt is not None:
        print_stream(runner.written(options.prompt))
        return
    if options.form and options.form not in runner.forms:
        raise UserError(f"--form {options.form}; expected {', '.join(runner.forms) or 'none'} with this bundle")
    if options.output and type(runner).picture is Runner.picture:
        runner.picture({})  # raises the error before anything is predicted
    if options.overlay and type(runner).draw is Runner.draw:
        runner.draw(None, {})
    inputs = [one for given in options.inputs for file in files(given) for one in runner.inputs(file)]
    names, sources = [name for name, _ in inputs], [source for _, source in inputs]
    places = {"--output": options.output, "--overlay": options.overlay}
    written = {option: places_of(names, path, option) for option, path in places.items() if path}
    check_places(written, options.bundle)
    bad: list[UserError] = []
    answers = progress(runner.stream(sources, options.batch_size), len(sources))
    for i, ((name, source), answer) in enumerate(zip(inputs, answers, strict=True)):
        try:
            if isinstance(answer, UserError):
                raise answer
            if "--output" in written:
                save(runner.picture(answer), written["--output"][i])
            if "--overlay" in written:
                save(runner.draw(source, answer), written["--overlay"][i])
            if options.form:
                answer = runner.forms[options.form](answer)
        except UserError as error:
            bad.append(error)
            answer = ({} if isinstance(answer, UserError) else answer) | {"error": str(error)}
        print(line({"input": name, **plain(answer)}), flush=True)
    if bad:
        raise UserError(f"{bad[0]}" + f" ({len(bad)} of {len(sources)} inputs have no answer)" * (len(sources) > 1))


def print_stream(pieces: Iterable[str]) -> None:
    """Print pieces of text as they arrive, escaping characters that the output cannot show."""
    for piece in pieces:
        piece = CONTROLS.sub(lambda found: ascii(found[0])[1:-1], piece)
        known = piece.encode(sys.stdout.encoding or "ascii", "backslashreplace")
        print(known.decode(sys.stdout.encoding or "ascii"), end="", flush=True)
    print()


def line(record: dict) -> str:
    """Return a record as JSON, with non-ASCII letters if the terminal can show them or redirected output is UTF-8."""
    text, encoding = json.dumps(record, ensure_ascii=False), sys.stdout.encoding or "ascii"
    if CONTROLS.search(text) or not (sys.stdout.isatty() or codecs.lookup(encoding).name == "utf-8"):
        return json.dumps(record)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def places_of(sources: list[str], path: Path, option: str) -> list[Path]:
    """Return where to write each source's picture: a single one to `path` if it is named .png, else into folder `path`.

    In the folder a picture has the name of its source file. If the source is not a file but a line or a text, the name
    is the input's number, with the prefix "input-" if a source file has this number as its name.
    """
    single = len(sources) == 1 and path.suffix.lower() == ".png" and not os.path.isdir(path)
    if not single and (path.suffix.lower() in PICTURES or (os.path.exists(path) and not os.path.isdir(path))):
        raise UserError(f"{option} {path}: expected a folder, or for one input the name of a PNG")
    stems = [Path(source).stem if os.path.isfile(source) else None for source in sources]
    known = set(stems)
    numbers = [f"input-{n}" if str(n) in known else str(n) for n in range(1, len(sources) + 1)]
    paths = [path] if single else [path / f"{stem or n}.png" for stem, n in zip(stems, numbers, strict=True)]
    names: set[Path] = set()
    for one in paths:
        if comparable(one) in names:
            raise UserError(f"{option} {path}: two inputs would be written to {one.name}; expected names that differ")
        names.add(comparable(one))
    taken = {identity(one) for one in paths} - {None}
    for source in sources:
        if identity(source) in taken:
            raise UserError(f"{option} {path}: {source} would be overwritten; expected another place")
    return paths


def check_places(written: dict[str, list[Path]], bundle: Path) -> None:
    """Raise UserError for a picture that would be written into the bundle or over another picture."""
    bundle, taken = real(bundle), set()
    for option, paths in written.items():
        for path in map(real, paths):
            if bundle in path.parents:
                raise UserError(
                    f"{option} {path}: inside the bundle, which holds only its own files; expected another place"
                )
            if comparable(path) in taken:
                raise UserError(f"--output and --overlay are both {path}; expected two places")
            taken.add(comparable(path))


def identity(path: str | Path) -> tuple[int, int] | None:
    """Return the device and inode of a file: the same for links and other spellings of its name. None: no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def real(path: str | Path) -> Path:
    """Return a path with links resolved. Path.resolve raises for a link that points to itself."""
    return Path(os.path.realpath(path))


def save(picture, path: Path) -> None:
    """Write a picture whole or not at all. Raises UserError."""
    # Not named by process id: other machines may write here too. Derived from the picture's name, hashed to be short.
    part = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.part")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: exists and is not a file; expected a place for a PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(part, format="PNG")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); expected a place for a PNG") from None


def files(given: str) -> list[str]:
    """Return every file below a folder, sorted by path, without hidden files; anything else is returned as it is.

    Linked folders are followed, and no folder is listed twice. Raises UserError.
    """
    if not os.path.isdir(given):  # Path.is_dir raises for a text longer than a file name may be
        return [given]
    found, seen = [], set()
    for folder, folders, names in os.walk(given, onerror=refuse_folder, followlinks=True):
        if (place := real(folder)) in seen:  # visited before, through a link
            folders.clear()
            continue
        seen.add(place)
        linked = [(os.path.islink(os.path.join(folder, name)), name) for name in folders if name[0] != "."]
        folders[:] = [name for _, name in sorted(linked)]  # folders before links to them
        paths = [Path(folder, name) for name in names if name[0] != "."]
        # A broken link, or a file that cannot be accessed, is an input too: reading it reports the error.
        found += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]
    if not found:
        raise UserError(f"{given}: no files in this folder; expected inputs")
    return [str(path) for path in sorted(found)]


def refuse_folder(error: OSError) -> None:
    """Raise UserError for a folder that cannot be listed."""
    raise UserError(f"{error.filename}: {error.strerror}; expected a folder of inputs")


def progress(answers: Iterable, total: int) -> Iterator:
    """Yield the predictions, with a progress bar on stderr if stderr is a terminal and stdout is not."""
    shown = total > 1 and sys.stderr.isatty() and not sys.stdout.isatty()
    start = last = time.monotonic()
    for done, answer in enumerate(answers, start=1):
        yield answer
        now = time.monotonic()
        if shown and (now - last > 0.1 or done == total):
            last = now
            bar = "#" * (30 * done // total)
            rate = done / max(now - start, 1e-9)
            print(f"\r[{bar:30}] {done}/{total}, {rate:.0f}/s", end="\n" if done == total else "", file=sys.stderr)


def benchmark(arguments: list[str]) -> None:
    """Print a bundle's speed, memory and sizes, and how far its outputs are from those at export, as JSON."""
    options = parser("Measure a bundle on this device, in a process of its own.", " bench").parse_args(arguments[1:])
    target = read_manifest(options.bundle)["target"]
    threads = min(options.threads or target.get("threads") or 0, cores())  # 0: all, as in `load`
    provider = options.provider or target["provider"]
    found = {"difference": difference(options.bundle, threads, provider)}
    asked = {"bundle": str(options.bundle), "provider": provider, "threads": threads or cores()}
    print(json.dumps(asked | bench(options.bundle, threads, provider) | found, indent=2))


if __name__ == "__main__":
    sys.exit(main())
