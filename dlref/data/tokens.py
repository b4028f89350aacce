"""Texts -> one row of tokens with a token between texts; windows of it; and files of tokens, for what no memory holds.

A file of tokens is nothing but tokens, as nanoGPT's are: 16 bits each where the vocabulary is small enough, else 32.

Legend of shapes: N tokens in a row, B windows, U tokens of one.
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

from dlref.data.vocabulary import Exact, make_exact, read_exact, tokenizers_of_run
from dlref.runtime.errors import UserError
from dlref.runtime.lines import decoded, numbered, opened, parse_object
from dlref.runtime.text import UNKNOWN, check_unicode

TRAINED = get_args(Exact)  # tokenisers that are made from the training text
BLOCK = 1 << 24  # tokens that are looked at at once
PIECE = 1 << 20  # characters that are encoded at once


# Texts


def texts_of(pattern: str) -> Iterator[tuple[str, str]]:
    """The texts of all files that a pattern such as 'books/**/*.txt' matches, with their names, in order.

    A file is one text; of .jsonl, gzipped or not, each line is one, under `text`. Raises UserError, for an undecodable
    byte with its offset in the file, or in the line.
    """
    paths = [Path(pattern)]
    if not paths[0].is_file():  # a name may have brackets, too
        paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise UserError(f"{pattern}: no such file; expected the name of a text, or a pattern such as 'texts/**/*.txt'")
    for path in paths:
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
    """A file as it is, its line ends too. Raises UserError."""
    with opened(path, "text") as file:
        return decoded(file.read(), str(path))


def tokenizer_of(asked: str, texts: Iterable[str], size: int) -> dict:
    """The tokeniser of a run's folder or a file, or of the kind `asked` for, made from `texts`. Raises UserError."""
    if asked in TRAINED:
        return make_exact(texts, asked, size)
    path = Path(asked)
    if path.is_dir():
        return tokenizers_of_run(path, "vocabulary")[0]
    if not path.is_file():
        raise UserError(f"tokenizer: {asked}; expected {', '.join(TRAINED)}, a file of tokenizers or a run's folder")
    return read_exact(path)


def rows_of(texts: Iterable[str], tokenizer) -> Iterator[Integer[np.ndarray, "N"]]:
    """The tokens of each text, before them the one that ends a text: there the next begins.

    A long text comes in pieces, each encoded by itself: a row takes a hundred times the memory while it is made.
    """
    kind = width(tokenizer)
    for text in texts:
        yield np.array([tokenizer.end], kind)
        for start in range(0, len(text), PIECE):
            yield np.array(tokenizer.encode(text[start : start + PIECE]), kind)


def width(tokenizer) -> type:
    """The type of a token in a file."""
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.int32


def unknown_in(tokens: Integer[np.ndarray, "N"], tokenizer) -> int:
    """How many tokens stand for characters that the tokeniser does not know: of characters, for others have none."""
    return int((tokens == UNKNOWN).sum()) if hasattr(tokenizer, "numbers") else 0


# Windows


class Windows(Dataset):
    """Windows of a row of tokens: (B, U) of those that begin at B places, -1 beyond the end."""

    def __init__(self, tokens: Integer[Tensor, "N"], context_length: int):
        self.tokens, self.context_length = tokens, context_length

    def __len__(self) -> int:
        """Windows that cover every token after the first once."""
        return -(-(len(self.tokens) - 1) // self.context_length)

    def __getitem__(self, starts: Int[Tensor, "B"]) -> Int[Tensor, "B U"]:
        device = self.tokens.device
        # Non-blocking: starts in the host's memory would make every batch wait for the GPU to catch up.
        places = starts.to(device, non_blocking=True)[:, None] + torch.arange(self.context_length + 1, device=device)
        last = len(self.tokens) - 1
        return self.tokens[places.clamp(max=last)].long().masked_fill(places > last, -1)

    def to(self, device: torch.device) -> None:
        """Move the tokens to where they are used, as int32: few operators take uint16."""
        self.tokens = self.tokens.to(device, torch.int32)


class RandomStarts:
    """Batches of places at which a window can begin, drawn anew at each turn."""

    def __init__(self, places: int, batch_size: int, batches: int):
        self.places, self.batch_size, self.batches = places, batch_size, batches

    def __len__(self) -> int:
        return self.batches

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """The places of each batch."""
        for _ in range(self.batches):
            yield torch.randint(self.places, (self.batch_size,), generator=generator)


# Files


def open_tokens(path: Path, tokenizer) -> Integer[Tensor, "N"]:
    """The tokens of a .bin file, which stay on the disk until they are looked at. Raises UserError."""
    kind = np.dtype(width(tokenizer))
    try:
        size = path.stat().st_size
        if size % kind.itemsize or not size:
            raise UserError(f"{path}: {size} bytes; expected tokens of {kind.itemsize} bytes each")
        # Copied where it is written to, which nothing does: torch warns of arrays that cannot be.
        tokens = np.memmap(path, kind, mode="c")
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror}); expected a file of tokens") from None
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        if block.min() < 0 or block.max() >= len(tokenizer):
            wrong = int(np.flatnonzero((block < 0) | (block >= len(tokenizer)))[0])
            known = f"expected 0 to {len(tokenizer) - 1}, as its tokeniser has"
            raise UserError(f"{path}: token {start + wrong} is {block[wrong]}; {known}")
    return torch.from_numpy(tokens)
