"""Convert text files to token files, for texts that do not fit in memory; see `dlref.data.TokenFiles`.

    python -m dlref.data.make_tokens FOLDER --train 'books/*.txt' --val 'held/*.txt' --vocabulary-size 32768

writes FOLDER/train.bin, FOLDER/val.bin and FOLDER/tokenizer.json, all of them or none.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dlref.data.files import warn_of_shared
from dlref.data.tokens import files_of, rows_of, texts_of, tokenizer_of, unknown_in
from dlref.runtime.arguments import Parser, exit_code, positive
from dlref.runtime.errors import UserError
from dlref.runtime.text import make_tokenizer


def write_tokens(path: Path, texts: Iterable[str], tokenizer) -> None:
    """Write texts as tokens and print the number of tokens."""
    count = unknown = 0
    with path.open("wb") as file:
        for row in rows_of(texts, tokenizer):
            row.tofile(file)
            count, unknown = count + len(row), unknown + unknown_in(row, tokenizer)
    strange = f", {unknown} of them for characters that are not in the vocabulary" if unknown else ""
    print(f"{path.stem}: {count} tokens{strange}")


def watched(pattern: str, title: str) -> Iterator[str]:
    """Yield the texts of files, showing on a terminal how many characters have been read."""
    console, shown = Console(stderr=True), "{task.description}: {task.completed:.1f} million characters"
    hidden = not (console.is_terminal or console.is_jupyter)  # elsewhere rich would leave an empty line
    with Progress(shown, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=None)
        for _, text in texts_of(pattern):
            yield text
            progress.advance(task, len(text) / 1e6)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Return 0, or 2 for wrong input or 130 if interrupted, with one line on stderr."""
    parser = Parser(prog="python -m dlref.data.make_tokens", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write the tokens to")
    parser.add_argument("--train", required=True, metavar="PATTERN", help="texts to train from")
    parser.add_argument("--val", required=True, metavar="PATTERN", help="texts to validate on")
    parser.add_argument(
        "--tokenizer", default="bpe", help="byte, character, bpe, a file of tokenizers or a run's folder"
    )
    parser.add_argument("--vocabulary-size", type=positive, default=32768, help="number of tokens (default: 32768)")
    return exit_code(lambda: make(parser.parse_args(arguments)))


def make(asked: argparse.Namespace) -> None:
    """Write all files or none. Raises UserError."""
    there = os.path.exists(asked.folder)  # Path.exists raises if the path is not accessible
    for path in (asked.folder / name for name in ("train.bin", "val.bin", "tokenizer.json")):
        if os.path.isdir(path):
            raise UserError(f"{path}: a folder; expected a place for a file")
    try:
        asked.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=asked.folder, prefix=".part-") as part:
            described = tokenizer_of(asked.tokenizer, watched(asked.train, "tokeniser"), asked.vocabulary_size)
            tokenizer = make_tokenizer(described)
            patterns = {"train": asked.train, "val": asked.val}
            for split, pattern in patterns.items():
                write_tokens(Path(part, f"{split}.bin"), watched(pattern, split), tokenizer)
            warn_of_shared({split: map(str, files_of(pattern)) for split, pattern in patterns.items()}, "files")
            Path(part, "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
            for path in Path(part).iterdir():
                path.replace(asked.folder / path.name)
    except OSError as error:
        reason = error.strerror or f"no room ({error})"  # numpy's error has no errno
        raise UserError(f"{asked.folder}: {reason}; expected a folder to write to") from None
    finally:
        if not there:
            with suppress(OSError):  # if it is not empty
                asked.folder.rmdir()
    print(f"train.bin, val.bin and tokenizer.json are in {asked.folder}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that no partial files remain
    sys.exit(main())
