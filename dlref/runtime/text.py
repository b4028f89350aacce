"""Convert text to tokens and back, in training and in a bundle: words, characters, byte pairs or bytes.

A tokeniser is data, plain JSON: `{"kind": "word" or "character", "tokens": [...]}` with a token for each number, or
`{"kind": "bpe", "model": ...}` with the text that the `tokenizers` library reads, or `{"kind": "byte"}`. The first four
tokens are SPECIAL, numbered as in SageMaker's vocabularies.

With `"exact": true` a text is not normalised: white space and the forms of letters are kept. Each token then has a
`spelling` in bytes, and the spellings of a text's tokens, joined, are the text. Language models require this. Byte-pair
tokenisers from elsewhere, such as GPT-2's, can be exact too; their special tokens keep their numbers.
"""

import unicodedata
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from dlref.runtime.errors import UserError, one_line

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
PAD, UNKNOWN, BEGIN, END = range(4)


class Words:
    """Splits text at white space; unknown tokens become UNKNOWN."""

    between = " "
    end = END

    def __init__(self, tokens: list[str], exact: bool = False):
        self.names, self.normal = tokens, str if exact else normal
        names = tokens if exact else [unicodedata.normalize("NFC", name) for name in tokens]
        known = [*enumerate(names)][len(SPECIAL) :]  # a special token's name in a text is plain text
        self.numbers = {name: number for number, name in reversed(known)}  # the first equal name wins

    def __len__(self) -> int:
        return len(self.names)

    def parts(self, text: str) -> list[str]:
        """Split a text into tokens, known or not."""
        return text.split()

    def written(self, text: str) -> str:
        """Return a text as its tokens spell it if all are known."""
        return self.between.join(self.parts(self.normal(text)))

    def encode(self, text: str) -> list[int]:
        """Return the number of each token."""
        return [self.numbers.get(part, UNKNOWN) for part in self.parts(self.normal(text))]

    def pieces(self, numbers: list[int]) -> list[str]:
        """Return each token in readable form."""
        return [self.names[number] for number in numbers]

    def decode(self, numbers: list[int]) -> str:
        """Return the text of tokens, without the special tokens for begin, end and padding."""
        return self.between.join(self.pieces([n for n in numbers if n not in (PAD, BEGIN, END)]))


class Characters(Words):
    """Splits text into characters."""

    between = ""

    def parts(self, text: str) -> list[str]:
        """Return the characters."""
        return list(text)

    @cached_property
    def spelling(self) -> list[bytes]:
        """The bytes of each token; empty for special tokens."""
        return [b""] * len(SPECIAL) + [name.encode() for name in self.names[len(SPECIAL) :]]


class Bytes:
    """Splits text into UTF-8 bytes."""

    end = END
    spelling = (*[b""] * len(SPECIAL), *[bytes([byte]) for byte in range(256)])

    def __len__(self) -> int:
        return len(self.spelling)

    def encode(self, text: str) -> list[int]:
        """Return the number of each token."""
        return [byte + len(SPECIAL) for byte in text.encode()]

    def pieces(self, numbers: list[int]) -> list[str]:
        """Return each token in readable form."""
        return [self.spelling[number].decode("ascii", "backslashreplace") or SPECIAL[number] for number in numbers]


class BytePairs:
    """Byte-pair encoding over bytes, so that every text is known (Sennrich et al. 2016; `tokenizers`)."""

    ends = (SPECIAL[END], "<|endoftext|>")  # the second is GPT-2's

    def __init__(self, model: str, exact: bool = False):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("a byte-pair tokeniser; expected the package tokenizers (the extra [text])") from None
        self.tokenizer, self.exact = Tokenizer.from_str(model), exact
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if getattr(self.tokenizer.model, "dropout", None):
            self.tokenizer.model.dropout = None  # it leaves out merges at random: a text would have various tokens
        numbers = [self.tokenizer.token_to_id(token) for token in SPECIAL]
        if not exact and numbers != list(range(len(SPECIAL))):
            raise UserError(f"tokeniser of byte pairs: expected {' '.join(SPECIAL)} as its first tokens")
        ends = [number for token in self.ends if (number := self.tokenizer.token_to_id(token)) is not None]
        if not ends:
            raise UserError(f"tokeniser of byte pairs: no token that ends a text; expected {' or '.join(self.ends)}")
        added = self.tokenizer.get_added_tokens_decoder()
        special = [number for number in ends if number in added and added[number].special]
        self.end = special[0] if special else ends[-1]  # an ordinary </s> may come from pages in HTML
        self.tokenizer.encode_special_tokens = True  # a special token's name in a text is plain text

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def written(self, text: str) -> str:
        """Return a text as its tokens spell it."""
        return text if self.exact else normal(text)

    def encode(self, text: str) -> list[int]:
        """Return the number of each token. Raises UserError if an exact tokeniser changes the text."""
        try:
            found = self.tokenizer.encode(self.written(text), add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises plain exceptions
            raise UserError(f"tokeniser of byte pairs: {one_line(error)}; expected tokens") from None
        if self.exact:
            check_same(text.encode(), b"".join([self.spelling[number] for number in found]))
        return found

    def pieces(self, numbers: list[int]) -> list[str]:
        """Return each token in readable form."""
        return [self.tokenizer.decode([n]) or self.tokenizer.id_to_token(n) or "" for n in numbers]

    def decode(self, numbers: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self.tokenizer.decode(numbers).strip()

    @cached_property
    def spelling(self) -> list[bytes]:
        """The bytes of each token; empty for special tokens and the end. Raises UserError for a token not of bytes."""
        added = self.tokenizer.get_added_tokens_decoder()
        names = {number: name for name, number in self.tokenizer.get_vocab().items()}
        try:
            found = [
                added[number].content.encode() * (not added[number].special)
                if number in added
                else bytes(BYTES[letter] for letter in names[number])
                for number in range(len(self))
            ]
        except KeyError as error:
            raise UserError(f"tokeniser of byte pairs: {error} in its vocabulary; expected GPT-2's bytes") from None
        found[self.end] = b""  # even if it is not special: a text that is encoded with it is refused
        return found


# Letters for bytes in a vocabulary of byte pairs; printable bytes stand for themselves (GPT-2, encoder.py).
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)
}


def check_same(text: bytes, spelt: bytes) -> None:
    """Raise UserError if the tokens of a text spell a different text."""
    if spelt != text:
        place = next((i for i, (a, b) in enumerate(zip(text, spelt, strict=False)) if a != b), len(spelt))
        found, known = spelt[place : place + 20], text[place : place + 20]
        raise UserError(f"tokeniser of byte pairs: {known!r} becomes {found!r}; expected the text unchanged")


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can encode a text, unlike half of a surrogate pair from JSON or a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(text: str, where: str) -> None:
    """Raise UserError at `where` for a text that UTF-8 cannot encode."""
    if not is_unicode(text):
        raise UserError(f"{where}: half of a surrogate pair, or not UTF-8; expected Unicode text")


def normal(text: str) -> str:
    """Normalise a text: one form for letters with marks, however they were typed, and no white space around it."""
    return unicodedata.normalize("NFC", text).strip()


def make_tokenizer(described: Any) -> Words | Bytes | BytePairs:
    """Return the tokeniser that `described` specifies. Raises UserError if it is invalid."""
    kind, exact = (described.get(key) if isinstance(described, Mapping) else None for key in ("kind", "exact"))
    if kind == "byte":
        return Bytes()
    if kind == "bpe" and isinstance(described.get("model"), str):
        try:
            return BytePairs(described["model"], exact is True)
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises plain exceptions, and panics, which are BaseExceptions
            raise UserError(f"tokeniser: {one_line(error)}; expected one of the package tokenizers") from None
    tokens = described.get("tokens") if kind in ("word", "character") else None
    if not isinstance(tokens, list) or not all(isinstance(token, str) and is_unicode(token) for token in tokens):
        raise UserError(
            f"tokeniser of kind {kind!r}; expected word or character with tokens, bpe with its model, or byte"
        )
    if tuple(tokens[: len(SPECIAL)]) != SPECIAL or len(set(tokens)) < len(tokens):
        raise UserError(
            f"tokeniser of kind {kind!r}: duplicate tokens, or wrong special tokens at the start; expected unique "
            f"tokens, the first {' '.join(SPECIAL)}"
        )
    return Words(tokens) if kind == "word" else Characters(tokens, exact is True)
