"""Make tokenisers from training text; `dlref.runtime.text` applies them, here and on a device."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import torch

from dlref.data.files import read_json
from dlref.runtime.errors import UserError, one_line
from dlref.runtime.lines import is_object, read_text
from dlref.runtime.text import SPECIAL, make_tokenizer, normal

Kind = Literal["word", "character", "bpe"]
KINDS = get_args(Kind)
Exact = Literal["byte", "character", "bpe"]
PROBE = " Straße\n\t 多言語  e\u0301 = 1e-3  ½ <s>\r\n"  # many tokenisers that change texts would change this one


def make_exact(texts: Iterable[str], kind: Exact, size: int) -> dict:
    """Make a tokeniser whose tokens spell a text exactly; otherwise like `make_vocabulary`."""
    if kind == "byte":
        return {"kind": kind, "exact": True}
    if kind == "bpe":
        return {"kind": kind, "exact": True, "model": _byte_pairs(texts, size, exact=True)}
    return {"kind": kind, "exact": True, "tokens": _most_frequent(texts, size)}


def read_exact(path: Path) -> dict:
    """Read a tokeniser from a file: byte pairs as `tokenizers` writes them, such as GPT-2's, or a dict as made here.

    Raises UserError if the file contains no tokeniser, or one that changes texts.
    """
    text = read_text(path, "a tokeniser")
    known = json.loads(text) if is_object(text) else {}
    described = known if "kind" in known else {"kind": "bpe", "exact": True, "model": text}
    if described.get("exact") is not True:
        raise UserError(f"{path}: a tokeniser that changes texts; expected one with exact: true")
    try:
        tokenizer = make_tokenizer(described)
        if described["kind"] == "bpe":
            tokenizer.encode(PROBE)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return described


def tokenizers_of_run(run: Path, *names: str) -> list[dict]:
    """Return the tokenisers that the best checkpoint of a run stores under `names`. Raises UserError."""
    path = run / "checkpoints" / "best.ckpt"
    try:
        facts = torch.load(path, map_location="cpu", weights_only=True)["facts"]
        found = [facts[name] for name in names]
        for described in found:
            make_tokenizer(described)
    except Exception as error:  # torch's reader, pickle and zipfile each raise their own
        reason = one_line(error)
        raise UserError(f"tokenizer: {path}: {reason}; expected the folder of a run with {', '.join(names)}") from None
    return found


def make_vocabulary(texts: Iterable[str], kind: Kind, size: int) -> dict:
    """Make a tokeniser of `kind` with at most `size` tokens, as described in `dlref.runtime.text`.

    Words and characters are the most frequent ones, sorted by frequency, then alphabetically; byte pairs are merged
    until there are `size` tokens or no pair occurs twice.
    """
    if kind == "bpe":
        return {"kind": kind, "model": _byte_pairs(map(normal, texts), size)}
    parts = (normal(text).split() if kind == "word" else normal(text) for text in texts)
    return {"kind": kind, "tokens": _most_frequent(parts, size)}


def _most_frequent(texts: Iterable[Iterable[str]], size: int) -> list[str]:
    if size <= len(SPECIAL):
        raise UserError(f"vocabulary_size: {size}; expected more than the {len(SPECIAL)} special tokens")
    counts = Counter()
    for text in texts:
        counts.update(text)
    for special in SPECIAL:
        counts.pop(special, None)
    found = sorted(counts, key=lambda token: (-counts[token], token))
    return [*SPECIAL, *found[: size - len(SPECIAL)]]


def _byte_pairs(texts: Iterable[str], size: int, exact: bool = False) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(SPECIAL) + len(alphabet):
        raise UserError(f"vocabulary_size: {size}; expected at least {len(SPECIAL) + len(alphabet)} for byte pairs")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not exact)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def read_vocabulary(path: Path) -> dict:
    """Read SageMaker's vocab.src.json or vocab.trg.json: tokens to numbers from 0 on, the first four SPECIAL."""
    numbers = read_json(path)
    if not all(type(number) is int for number in numbers.values()):
        raise UserError(f"{path}: not a vocabulary; expected an object of tokens and their numbers")
    tokens = sorted(numbers, key=numbers.get)
    if [numbers[token] for token in tokens] != list(range(len(tokens))):
        raise UserError(
            f"{path}: {len(tokens)} tokens whose numbers have gaps or repeat; expected 0 to {len(tokens) - 1}"
        )
    if tuple(tokens[: len(SPECIAL)]) != SPECIAL:
        raise UserError(f"{path}: begins with {' '.join(tokens[:4])}; expected {' '.join(SPECIAL)}")
    described = {"kind": "word", "tokens": tokens}
    try:
        make_tokenizer(described)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return described
