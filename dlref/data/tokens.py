"""Turn texts into one row of tokens, cut windows from it, and read files of tokens for texts too large for memory.

Each text in a row is preceded by the token that ends texts. A file of tokens contains only tokens, as in nanoGPT: 16
bits each if the vocabulary is small enough, otherwise 32.

Shapes: N tokens in a row, B windows, U tokens in a window.
"""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor
from torch.utils.data import Dataset

from dlref.data.loader import sent
from dlref.data.vocabulary import Exact, make_exact, read_exact, tokenizers_of_run
from dlref.runtime.errors import UserError
from dlref.runtime.lines import decoded, numbered, opened, parse_object
from dlref.runtime.text import UNKNOWN, check_unicode

TRAINED = get_args(Exact)  # tokenisers that are made from the training text
BLOCK = 1 << 24  # tokens processed at once
PIECE = 1 << 20  # characters encoded at once
HEAD = 64  # first tokens of a file, which show its layout


# Texts


def files_of(pattern: str) -> list[Path]:
    """Return all files that match a pattern such as 'books/**/*.txt', in order. Raises UserError if there are none."""
    paths = [Path(pattern)]
    if not paths[0].is_file():  # a file name may contain brackets, too
        paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise UserError(f"{pattern}: no such file; expected the name of a text, or a pattern such as 'texts/**/*.txt'")
    return paths


def texts_of(pattern: str) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of all files that match a pattern, in order.

    A file is one text; in a .jsonl file, gzipped or not, each line is one, under `text`. Raises UserError; for an
    undecodable byte, the message gives its offset in the file or in the line.
    """
    for path in files_of(pattern):
        if not path.name.lower().removesuffix(".gz").endswith(".jsonl"):
            yield str(path), read_whole(path)
            continue
        for number, line in numbered(path, "texts"):
            where = f"{path}:{number}"
            found = parse_object(line, where).get("text")
            if not isinstance(found, str):
                raise UserError(f"{where}: text: {type(found).__name__}; expected a text")
            check_unicode(found, where)
            yield where, found


def read_whole(path: Path) -> str:
    """Return the text of a file unchanged, including its line ends. Raises UserError."""
    with opened(path, "text") as file:
        return decoded(file.read(), str(path))


def tokenizer_of(asked: str, texts: Iterable[str], size: int) -> dict:
    """Return the tokeniser of a run's folder or a file, or make one of kind `asked` from `texts`. Raises UserError."""
    if asked in TRAINED:
        return make_exact(texts, asked, size)
    path = Path(asked)
    if path.is_dir():
        return tokenizers_of_run(path, "vocabulary")[0]
    if not path.is_file():
        raise UserError(f"tokenizer: {asked}; expected {', '.join(TRAINED)}, a file of tokenizers or a run's folder")
    return read_exact(path)


def rows_of(texts: Iterable[str], tokenizer) -> Iterator[Integer[np.ndarray, "N"]]:
    """Yield the tokens of each text, preceded by the token that ends texts: a text begins after it.

    A long text is encoded piece by piece, because encoding takes a hundred times the memory of the resulting tokens.
    """
    kind = width(tokenizer)
    for text in texts:
        yield np.array([tokenizer.end], kind)
        for start in range(0, len(text), PIECE):
            yield np.array(tokenizer.encode(text[start : start + PIECE]), kind)


def width(tokenizer) -> type:
    """Return the data type of the tokens in a file."""
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.int32


def unknown_in(tokens: Integer[np.ndarray, "N"], tokenizer) -> int:
    """Count the tokens of unknown characters; only a character tokeniser has any."""
    return int((tokens == UNKNOWN).sum()) if hasattr(tokenizer, "numbers") else 0


# Windows


class Windows(Dataset):
    """Windows of a row of tokens. Indexing with B start places returns the B windows, (B, U), -1 beyond the end."""

    def __init__(self, tokens: Integer[Tensor, "N"], context_length: int):
        self.tokens, self.context_length = tokens, context_length

    def __len__(self) -> int:
        """Return the number of windows that cover every token after the first once."""
        return -(-(len(self.tokens) - 1) // self.context_length)

    def __getitem__(self, starts: Int[Tensor, "B"]) -> Int[Tensor, "B U"]:
        device = self.tokens.device
        places = sent(starts, device)[:, None] + torch.arange(self.context_length + 1, device=device)
        last = len(self.tokens) - 1
        return self.tokens[places.clamp(max=last)].long().masked_fill(places > last, -1)

    def to(self, device: torch.device) -> None:
        """Move the tokens to a device as int32: few operators support uint16."""
        self.tokens = self.tokens.to(device, torch.int32)


class RandomStarts:
    """Batches of random places where a window can begin, drawn anew in each epoch."""

    def __init__(self, places: int, batch_size: int, batches: int):
        self.places, self.batch_size, self.batches = places, batch_size, batches

    def __len__(self) -> int:
        return self.batches

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the places of each batch."""
        for _ in range(self.batches):
            yield torch.randint(self.places, (self.batch_size,), generator=generator)


# Files


def open_tokens(path: Path, tokenizer) -> Integer[Tensor, "N"]:
    """Return the tokens of a .bin file, memory-mapped, after checking layout and range. Raises UserError."""
    kind = np.dtype(width(tokenizer))
    try:
        size = path.stat().st_size
        if size % kind.itemsize or not size:
            raise UserError(f"{path}: {size} bytes; expected tokens of {kind.itemsize} bytes each")
        # Copy-on-write, although nothing writes to it: torch warns about read-only arrays.
        tokens = np.memmap(path, kind, mode="c")
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror}); expected a file of tokens") from None
    check_layout(path, tokens[:HEAD])
    check_range(path, tokens, len(tokenizer))
    return torch.from_numpy(tokens)


def check_range(where: str | Path, tokens: Integer[np.ndarray, "N"], size: int) -> None:
    """Raise UserError for the first token that is not in a vocabulary of `size`."""
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        if block.min() < 0 or block.max() >= size:
            wrong = int(np.flatnonzero((block < 0) | (block >= size))[0])
            known = f"expected 0 to {size - 1}, the tokens of its tokeniser"
            raise UserError(f"{where}: token {start + wrong} is {block[wrong]}; {known}")


def check_layout(path: Path, head: Integer[np.ndarray, "N"]) -> None:
    """Refuse a file whose first tokens look like another layout: in a large vocabulary, any bytes are tokens."""
    bits, found = 8 * head.itemsize, None
    if head.tobytes().startswith(b"\x93NUMPY"):
        found = "a file of numpy.save"
    elif len(head) == HEAD and not head[1::2].any():
        found = f"every second token is 0, as with {2 * bits} bits each"
    if found:
        raise UserError(f"{path}: {found}; expected tokens of {bits} bits and nothing else, as from ndarray.tofile")
