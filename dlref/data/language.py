"""Data modules for language modelling: texts as one row of tokens, random windows to train from, all of it to test on.

What passes to a task: batches (B, T + 1) of tokens, the first T to read and the last T to predict, -1 beyond the end of
a split. After `setup`, `vocabulary` is the tokeniser as `dlref.runtime.text` describes it, an exact one, and
`context_length` is T.
"""

import glob
import hashlib
import lzma
import os
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from dlref.data.files import warn_of_shared
from dlref.data.loader import SplitData, check_at_least
from dlref.data.tokens import (
    BLOCK,
    RandomStarts,
    Windows,
    open_tokens,
    read_whole,
    rows_of,
    texts_of,
    tokenizer_of,
    unknown_in,
)
from dlref.data.vocabulary import read_exact
from dlref.runtime.errors import UserError
from dlref.runtime.text import make_tokenizer

EVALUATED = 8192  # tokens at once
PROMPTS = 8  # beginnings of the test split that `predict` goes on from
HELD_OUT = 0.1  # of a text that has to serve as everything
SHARES = 20  # of Python's files one is for validation, one for the test


class LanguageData(SplitData):
    """Rows of tokens; a subclass makes them.

    Args:
        context_length: T, tokens of a window.
        batch_size: windows of a training batch.
        batches: training batches until the next validation.
        prompts: texts that `predict` goes on from; left out: the beginnings of the test split.
    """

    resident = True  # whether a split fits into the memory of the device

    def __init__(
        self, context_length: int = 256, batch_size: int = 32, batches: int = 250, prompts: list[str] | None = None
    ):
        super().__init__()
        self.context_length, self.batch_size, self.batches = context_length, batch_size, batches
        self.prompts = prompts
        self.splits: dict[str, Windows] = {}

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """The tokeniser, and the tokens of the splits `train`, `val` and `test`."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read and check everything, once, and move it to the trainer's device."""
        if not self.splits:
            check_at_least(1, batch_size=self.batch_size, batches=self.batches)
            check_at_least(8, context_length=self.context_length)
            self.vocabulary, splits = self.read()
            self.tokenizer = make_tokenizer(self.vocabulary)
            for split, tokens in splits.items():
                needed = self.context_length + 1 if split == "train" else 2
                if len(tokens) < needed:
                    raise UserError(f"{self.where(split)}: {len(tokens)} tokens; expected at least {needed}")
                self.splits[split] = Windows(tokens, self.context_length)
        if self.resident:
            for windows in self.splits.values():
                windows.to(self.device)

    def where(self, split: str) -> str:
        """What an error of a split names."""
        return split

    def order(self, devices: int) -> RandomStarts:
        """Windows from anywhere in the training text."""
        places = len(self.splits["train"].tokens) - self.context_length
        return RandomStarts(places, self.batch_size * devices, self.batches)

    def samples(self, split: str) -> torch.Tensor:
        """The beginnings of windows one after the other, so that every token but the first is predicted once."""
        return torch.arange(len(self.splits[split])) * self.context_length

    def eval_batch_size(self, split: str) -> int:
        """As many windows as have so many tokens; two at least, with which devices have as many batches each."""
        return max(2, EVALUATED // self.context_length)

    def predict_dataloader(self) -> DataLoader:
        """Prompts, one by one."""
        return DataLoader(list(self.sources()), batch_size=None)

    def sources(self) -> Sequence[str]:
        """The prompts."""
        if self.prompts:
            return self.prompts
        windows = self.splits["test"]
        half = self.context_length // 2
        rows = [windows.tokens[i * self.context_length :][:half].tolist() for i in range(min(PROMPTS, len(windows)))]
        spelling = self.tokenizer.spelling
        return [b"".join(spelling[token] for token in row).decode(errors="ignore") for row in rows]

    def compressed(self, split: str) -> dict[str, float]:
        """Bits per byte that gzip and xz take at their best for a split, all of it at once."""
        tokens, spelling = self.splits[split].tokens, self.tokenizer.spelling
        packers = {"gzip": zlib.compressobj(9, wbits=31), "xz": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)}
        size, packed = 0, dict.fromkeys(packers, 0)
        for block in tokens.split(BLOCK):
            text = b"".join([spelling[token] for token in block.tolist()])
            size += len(text)
            for name, packer in packers.items():
                packed[name] += len(packer.compress(text))
        return {
            f"{name}_bits_per_byte": 8 * (packed[name] + len(packer.flush())) / size for name, packer in packers.items()
        }


class Texts(LanguageData):
    """Splits that are texts, and fit into memory.

    Args:
        tokenizer: what a token is: a `byte`, a `character`, or pairs of bytes merged from the training text (`bpe`); or
            the name of a file of `tokenizers`, such as GPT-2's tokenizer.json, or the folder of a run, for its own.
        vocabulary_size: tokens, four special ones among them: the most frequent characters, or as many as byte pairs
            are merged to.
        windows: what every `LanguageData` takes.
    """

    def __init__(self, tokenizer: str = "bpe", vocabulary_size: int = 4096, **windows: Any):
        super().__init__(**windows)
        self.asked, self.vocabulary_size = tokenizer, vocabulary_size

    def texts(self) -> dict[str, list[str]]:
        """The texts of each split."""
        raise NotImplementedError

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Make the tokeniser, and apply it."""
        check_at_least(1, vocabulary_size=self.vocabulary_size)
        texts = self.texts()
        described = tokenizer_of(self.asked, texts["train"], self.vocabulary_size)
        tokenizer, splits = make_tokenizer(described), {}
        for split, known in texts.items():
            if not any(known):
                raise UserError(f"{self.where(split)}: no text in its files; expected some")
            row = np.concatenate(list(rows_of(known, tokenizer)))
            splits[split] = torch.from_numpy(row)
            if unknown := unknown_in(row, tokenizer):
                rank_zero_warn(
                    f"{split}: {unknown} characters are not in the vocabulary, and are one and the same token"
                )
        return described, splits


class TextFiles(Texts):
    """Text files: each is a text; of .jsonl files each line is one, under `text`. Gzipped or not.

    Args:
        train: name of a file to train from, or a pattern such as 'books/**/*.txt'.
        val: to validate on; left out: the last tenth of `train`, which is not trained from.
        test: to test on; left out: what validates.
        root: folder in which they are.
        texts: what every `Texts` takes.
    """

    def __init__(self, train: str, val: str | None = None, test: str | None = None, root: str = ".", **texts: Any):
        super().__init__(**texts)
        self.patterns, self.root = {"train": train, "val": val, "test": test}, Path(root)

    def place(self, pattern: str) -> str:
        """A name or a pattern below the root, whose own name is no pattern."""
        path = self.root / pattern
        return str(path) if path.is_file() else os.path.join(glob.escape(str(self.root)), pattern)

    def where(self, split: str) -> str:
        """The files; those that train also make the splits that are left out."""
        return f"{split}: {self.place(self.patterns[split] or self.patterns['train'])}"

    def texts(self) -> dict[str, list[str]]:
        """Read the files."""
        given = {split: list(texts_of(self.place(pattern))) for split, pattern in self.patterns.items() if pattern}
        names = {split: [name for name, _ in texts] for split, texts in given.items()}
        warn_of_shared({"val": (), "test": (), **names}, "texts")
        found = {split: [text for _, text in texts] for split, texts in given.items()}
        if "val" not in found:
            found["train"], found["val"] = cut(found["train"], HELD_OUT)
        return {"test": found["val"], **found}


class PythonSources(Texts):
    """The sources of Python's standard library, which every Python has; whole files are held out.

    A file's place is drawn by its name: one of 20 is for validation, one for the test. Tests and installed packages are
    left out, so that it is the same library everywhere; which version it is decides the rest.

    Args:
        root: another folder of sources.
        texts: what every `Texts` takes.
    """

    left_out = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))

    def __init__(self, root: str | None = None, **texts: Any):
        super().__init__(**texts)
        self.root = Path(root or sysconfig.get_paths()["stdlib"])

    def texts(self) -> dict[str, list[str]]:
        """Read the files. Those that are not in UTF-8, as Python's own tests of this are, are counted and left out."""
        found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        refused = 0
        for path in sorted(self.root.rglob("*.py")):
            name = path.relative_to(self.root)
            if self.left_out.isdisjoint(name.parts) and path.is_file():
                try:
                    found[split_of(name.as_posix())].append(read_whole(path))
                except UserError:
                    refused += 1
        if not found["train"]:
            raise UserError(f"{self.root}: no sources in it; expected .py files")
        if refused:
            rank_zero_warn(f"{self.root}: {refused} files are not in UTF-8 or cannot be read, and are left out")
        return found


class TokenFiles(LanguageData):
    """Files of tokens, which stay on the disk: for texts that no memory holds; see `dlref.data.make_tokens`.

    Args:
        root: folder of the files.
        train: to train from.
        val: to validate on.
        test: to test on; left out: `val`.
        tokenizer: the tokeniser that they were made with: a file of `tokenizers`, or what `make_tokens` writes.
        windows: what every `LanguageData` takes.
    """

    resident = False

    def __init__(
        self,
        root: str,
        train: str = "train.bin",
        val: str = "val.bin",
        test: str | None = None,
        tokenizer: str = "tokenizer.json",
        **windows: Any,
    ):
        super().__init__(**windows)
        self.root, self.names, self.asked = Path(root), {"train": train, "val": val, "test": test or val}, tokenizer

    def where(self, split: str) -> str:
        """The file."""
        return f"{split}: {self.root / self.names[split]}"

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Open the files."""
        path = self.root / self.asked
        if not path.is_file():
            raise UserError(f"{path}: not found; expected the tokeniser of these tokens")
        described = read_exact(path)
        tokenizer = make_tokenizer(described)
        return described, {split: open_tokens(self.root / name, tokenizer) for split, name in self.names.items()}


def split_of(name: str) -> str:
    """Where the file of a name belongs, whatever other files there are."""
    share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % SHARES
    return {0: "val", 1: "test"}.get(share, "train")


def cut(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """The first texts and the last ones, which have this share of all characters; one may be cut in two."""
    left = int((1 - share) * sum(map(len, texts)))
    first, last = [], []
    for text in texts:
        first.append(text[:left])
        last.append(text[left:])
        left = max(left - len(text), 0)
    return list(filter(None, first)), list(filter(None, last))
