"""Data modules for language modelling: one row of tokens per split, for training in random windows, else as a whole.

Tasks receive batches of tokens (B, T + 1): the first T are the input, the last T the targets, -1 beyond the end of a
split. After `setup`, `vocabulary` is the tokeniser as `dlref.runtime.text` describes it, an exact one, and
`context_length` is T.
"""

import glob
import hashlib
import lzma
import os
import sysconfig
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from dlref.data.files import warn_of_shared
from dlref.data.loader import SplitData, check_at_least, check_split
from dlref.data.tokens import (
    BLOCK,
    RandomStarts,
    Windows,
    check_range,
    open_tokens,
    read_whole,
    rows_of,
    texts_of,
    tokenizer_of,
    unknown_in,
)
from dlref.data.vocabulary import read_exact
from dlref.runtime.errors import UserError
from dlref.runtime.text import check_unicode, make_tokenizer

EVALUATED = 8192  # tokens in an evaluation batch
PROMPTS = 8  # windows of the test split whose beginnings are the default prompts
HELD_OUT = 0.1  # share of the training text that is held out if there are no validation files
SHARES = 20  # one of this many of Python's files is for validation, one for testing


class LanguageData(SplitData):
    """Rows of tokens; a subclass reads them.

    Args:
        context_length: T, the number of tokens that a window predicts.
        batch_size: windows in a training batch.
        batches: training batches until the next validation.
        prompts: texts for `predict` to continue; by default, the beginnings of windows of the test split.
    """

    resident = True  # whether the splits are kept in the memory of the device

    def __init__(
        self, context_length: int = 256, batch_size: int = 32, batches: int = 250, prompts: list[str] | None = None
    ):
        super().__init__(batch_size)
        self.context_length, self.batches, self.prompts = context_length, batches, prompts

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Return the tokeniser and the tokens of the splits `train`, `val` and `test`."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read and check all data once, and move it to the trainer's device if it is `resident`."""
        if not self.splits:
            check_at_least(1, batch_size=self.batch_size, batches=self.batches)
            check_at_least(8, context_length=self.context_length)
            self.vocabulary, splits = self.read()
            self.tokenizer = make_tokenizer(self.vocabulary)
            exact = self.vocabulary["kind"] == "byte" or self.vocabulary.get("exact") is True
            if not exact or not hasattr(self.tokenizer, "spelling"):
                raise UserError("vocabulary: a tokeniser that changes texts; expected one with exact: true")
            for split, tokens in splits.items():
                self.check_row(split, tokens)
                needed = self.context_length + 1 if split == "train" else 2
                if len(tokens) < needed:
                    raise UserError(f"{self.where(split)}: {len(tokens)} tokens; expected at least {needed}")
                self.splits[split] = Windows(tokens, self.context_length)
        if self.resident:
            for windows in self.splits.values():
                windows.to(self.device)

    def check_row(self, split: str, tokens: object) -> None:
        """Raise UserError unless these are tokens of this data's tokeniser; those on disk are checked as they open."""
        there = isinstance(tokens, torch.Tensor)
        if not there or tokens.ndim != 1 or tokens.is_floating_point():
            found = f"{tokens.dtype} {list(tokens.shape)}" if there else type(tokens).__name__
            raise UserError(f"{self.where(split)}: {found}; expected a tensor of whole numbers (N), one row of tokens")
        if self.resident:
            check_range(self.where(split), tokens.numpy(), len(self.tokenizer))

    def where(self, split: str) -> str:
        """Return the name of a split for error messages."""
        return split

    def order(self, devices: int) -> RandomStarts:
        """Return batches of windows from anywhere in the training text."""
        places = len(self.splits["train"].tokens) - self.context_length
        return RandomStarts(places, self.batch_size * devices, self.batches)

    def samples(self, split: str) -> torch.Tensor:
        """Return the places of consecutive windows, which predict every token except for the first once."""
        return torch.arange(len(self.splits[split])) * self.context_length

    def eval_batch_size(self, split: str) -> int:
        """Return the number of windows with `EVALUATED` tokens, at least two: devices then get equally many batches."""
        return max(2, EVALUATED // self.context_length)

    def predict_dataloader(self) -> DataLoader:
        """Return the prompts, one at a time."""
        return DataLoader(list(self.sources()), batch_size=None)

    def sources(self) -> Sequence[str]:
        """Return the prompts."""
        if self.prompts:
            return self.prompts
        windows = self.splits["test"]
        half = self.context_length // 2
        rows = [windows.tokens[i * self.context_length :][:half].tolist() for i in range(min(PROMPTS, len(windows)))]
        spelling = self.tokenizer.spelling
        return [b"".join(spelling[token] for token in row).decode(errors="ignore") for row in rows]

    def compressed(self, split: str) -> dict[str, float]:
        """Return the bits per byte of a whole split compressed by gzip and by xz at their highest settings."""
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
    """Splits made of texts that fit into memory.

    Args:
        tokenizer: the kind of token: `byte`, `character`, or byte pairs merged from the training text (`bpe`); or a
            file of the `tokenizers` library, such as GPT-2's tokenizer.json, or the folder of a run, to use its own.
        vocabulary_size: number of tokens, including four special ones: the most frequent characters, or byte pairs
            merged until there are so many.
        windows: further arguments of `LanguageData`.
    """

    def __init__(self, tokenizer: str = "bpe", vocabulary_size: int = 4096, **windows: Any):
        super().__init__(**windows)
        self.asked, self.vocabulary_size = tokenizer, vocabulary_size

    def texts(self) -> dict[str, list[str]]:
        """Return the texts of each split."""
        raise NotImplementedError

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Make the tokeniser and apply it."""
        check_at_least(1, vocabulary_size=self.vocabulary_size)
        texts = self.texts()
        check_split("train", texts)
        for split, known in texts.items():
            check_texts(split, known)
        described = tokenizer_of(self.asked, texts["train"], self.vocabulary_size)
        tokenizer, splits = make_tokenizer(described), {}
        for split, known in texts.items():
            if not any(known):
                raise UserError(f"{self.where(split)}: no text in its files; expected some")
            row = np.concatenate(list(rows_of(known, tokenizer)))
            splits[split] = torch.from_numpy(row)
            if unknown := unknown_in(row, tokenizer):
                rank_zero_warn(
                    f"{split}: {unknown} characters are not in the vocabulary and become the same unknown token"
                )
        return described, splits


class TextFiles(Texts):
    """Text files, gzipped or not: each file is one text; in a .jsonl file each line is one, under `text`.

    Args:
        train: file to train on, or a pattern such as 'books/**/*.txt'.
        val: file or pattern to validate on; by default, the last tenth of `train`, which is then not trained on.
        test: file or pattern to test on; by default, the validation texts.
        root: folder that contains the files.
        texts: further arguments of `Texts`.
    """

    def __init__(self, train: str, val: str | None = None, test: str | None = None, root: str = ".", **texts: Any):
        super().__init__(**texts)
        self.patterns, self.root = {"train": train, "val": val, "test": test}, Path(root)

    def place(self, pattern: str) -> str:
        """Return a name or a pattern below the root; the root's own name is not read as a pattern."""
        path = self.root / pattern
        return str(path) if path.is_file() else os.path.join(glob.escape(str(self.root)), pattern)

    def where(self, split: str) -> str:
        """Return the split and its files; a split without files of its own gets those of `train`."""
        return f"{split}: {self.place(self.patterns[split] or self.patterns['train'])}"

    def texts(self) -> dict[str, list[str]]:
        """Read the files."""
        given = {split: list(texts_of(self.place(pattern))) for split, pattern in self.patterns.items() if pattern}
        warn_of_shared({split: [name for name, _ in texts] for split, texts in given.items()}, "texts")
        found = {split: [text for _, text in texts] for split, texts in given.items()}
        if "val" not in found:
            found["train"], found["val"] = cut(found["train"], HELD_OUT)
        return {"test": found["val"], **found}


class PythonSources(Texts):
    """The sources of Python's standard library, which every Python has; whole files are held out.

    A file's name decides its split: one file in 20 is for validation and one for testing. Tests and installed packages
    are left out, so that the texts depend only on the version of Python.

    Args:
        root: another folder of sources.
        texts: further arguments of `Texts`.
    """

    left_out = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))

    def __init__(self, root: str | None = None, **texts: Any):
        super().__init__(**texts)
        self.root = Path(root or sysconfig.get_paths()["stdlib"])

    def texts(self) -> dict[str, list[str]]:
        """Read the files. Those that are not in UTF-8 or cannot be read are counted and left out."""
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
    """Files of tokens, which stay on disk, for texts too large for memory; see `dlref.data.make_tokens`.

    Args:
        root: folder of the files.
        train: file to train on.
        val: file to validate on.
        test: file to test on; by default, `val`.
        tokenizer: file of the tokeniser that made the tokens, written by the `tokenizers` library or `make_tokens`.
        windows: further arguments of `LanguageData`.
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
        """Return the split and its file."""
        return f"{split}: {self.root / self.names[split]}"

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Read the tokeniser and open the files of tokens."""
        warn_of_shared({split: [name] for split, name in self.names.items()}, "files")
        path = self.root / self.asked
        if not path.is_file():
            raise UserError(f"{path}: not found; expected the tokeniser of these tokens")
        described = read_exact(path)
        tokenizer = make_tokenizer(described)
        return described, {split: open_tokens(self.root / name, tokenizer) for split, name in self.names.items()}


def check_texts(split: str, texts: object) -> None:
    """Raise UserError unless these are texts in order: a generator's would be gone after the first look at them."""
    # Each character of a single text would be a text of its own, and so would each key of a dict.
    if isinstance(texts, str | Mapping) or not isinstance(texts, Collection):
        found = "one text" if isinstance(texts, str) else type(texts).__name__
        raise UserError(f"{split}: {found}; expected a list of texts")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"{split}: text {number}: {type(text).__name__}; expected a text")
        check_unicode(text, f"{split}: text {number}")


def split_of(name: str) -> str:
    """Return the split of a file, which depends only on the file's name."""
    share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % SHARES
    return {0: "val", 1: "test"}.get(share, "train")


def cut(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """Split texts into the first and the last ones, which have `share` of all characters; one may be cut in two."""
    left = int((1 - share) * sum(map(len, texts)))
    first, last = [], []
    for text in texts:
        first.append(text[:left])
        last.append(text[left:])
        left = max(left - len(text), 0)
    return list(filter(None, first)), list(filter(None, last))
