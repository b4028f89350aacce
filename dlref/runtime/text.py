"""Text <-> tokens, as the training and a bundle have it: by words, by characters, or by byte pairs.

A tokeniser is data, plain JSON: `{"kind": "word" or "character", "tokens": [...]}` with a token for each number, or
`{"kind": "bpe", "model": ...}` with the text that the `tokenizers` library reads. The first four tokens are SPECIAL,
numbered as SageMaker's vocabularies are.
"""

import unicodedata
from collections.abc import Mapping
from typing import Any

from dlref.runtime.errors import UserError

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
PAD, UNKNOWN, BEGIN, END = range(4)


class Words:
    """Text split at white space; a token that is not known is UNKNOWN."""

    between = " "

    def __init__(self, tokens: list[str]):
        self.names = tokens
        self.numbers = {unicodedata.normalize("NFC", name): number for number, name in enumerate(tokens)}

    def __len__(self) -> int:
        return len(self.names)

    def parts(self, text: str) -> list[str]:
        """The tokens of a text, known or not."""
        return text.split()

    def encode(self, text: str) -> list[int]:
        """The number of each token."""
        numbers, known = self.numbers, range(len(SPECIAL), len(self))
        found = (numbers.get(part, UNKNOWN) for part in self.parts(normal(text)))
        return [number if number in known else UNKNOWN for number in found]

    def pieces(self, numbers: list[int]) -> list[str]:
        """Each token as people read it."""
        return [self.names[number] for number in numbers]

    def decode(self, numbers: list[int]) -> str:
        """The text of tokens, without those that begin, end or fill up."""
        return self.between.join(self.pieces([n for n in numbers if n not in (PAD, BEGIN, END)]))


class Characters(Words):
    """Every character a token."""

    between = ""

    def parts(self, text: str) -> list[str]:
        """The characters."""
        return list(text)


class BytePairs:
    """Byte-pair encoding over bytes, so that no text is unknown (Sennrich et al. 2016; `tokenizers`)."""

    def __init__(self, model: str):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("a tokeniser of byte pairs; expected the package tokenizers, or install [text]") from None
        self.tokenizer = Tokenizer.from_str(model)
        if [self.tokenizer.token_to_id(token) for token in SPECIAL] != list(range(len(SPECIAL))):
            raise UserError(f"tokeniser of byte pairs: expected {' '.join(SPECIAL)} as its first tokens")
        self.tokenizer.encode_special_tokens = True  # what looks like one in a text is text

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The number of each token."""
        return self.tokenizer.encode(normal(text), add_special_tokens=False).ids

    def pieces(self, numbers: list[int]) -> list[str]:
        """Each token as people read it."""
        return [self.tokenizer.decode([n]) or self.tokenizer.id_to_token(n) for n in numbers]

    def decode(self, numbers: list[int]) -> str:
        """The text of tokens, without those that begin, end or fill up."""
        return self.tokenizer.decode(numbers).strip()


def normal(text: str) -> str:
    """One form for letters with marks, however they were typed; white space around is none."""
    return unicodedata.normalize("NFC", text).strip()


def make_tokenizer(described: Mapping[str, Any]) -> Words | BytePairs:
    """The tokeniser that `described` says. Raises UserError where it says none."""
    kind = described.get("kind") if isinstance(described, Mapping) else None
    if kind == "bpe" and isinstance(described.get("model"), str):
        try:
            return BytePairs(described["model"])
        except UserError:
            raise
        except Exception as error:  # tokenizers raises plain exceptions
            raise UserError(f"tokeniser: {' '.join(str(error).split())}; expected one of tokenizers") from None
    tokens = described.get("tokens") if kind in ("word", "character") else None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"tokeniser of kind {kind!r}; expected word or character with tokens, or bpe with its model")
    made = Words(tokens) if kind == "word" else Characters(tokens)
    if tuple(tokens[: len(SPECIAL)]) != SPECIAL or len(made.numbers) < len(tokens):
        raise UserError(
            f"tokeniser of kind {kind!r}: tokens that are equal, or first ones that are others; expected tokens that "
            f"differ, the first {' '.join(SPECIAL)}"
        )
    return made
