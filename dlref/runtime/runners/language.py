"""The runner of language models: a text -> its continuation, token by token.

B texts, T new tokens, P tokens of the past, W tokens whose logits are requested, V tokens of the vocabulary, L layers,
H heads, D width of a head.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

import numpy as np

from dlref.runtime.arguments import non_empty, number
from dlref.runtime.errors import UserError
from dlref.runtime.generation import Settings, Writing
from dlref.runtime.lines import Line, is_object, only, parse_object, read_text, text_in
from dlref.runtime.runner import Runner as Base
from dlref.runtime.runner import fixed_or
from dlref.runtime.text import check_unicode, make_tokenizer

READ = 512  # tokens per call: attention compares each of them with all
LOGITS = 1 << 25  # elements per call that requests logits after every token
GROWTH = 64  # tokens by which the capacity of a cache grows
LONGEST = 1 << 24  # tokens

OPTIONS = {
    "max_new_tokens": (number(1, LONGEST, int), "maximum number of tokens to generate"),
    "temperature": (number(0, 100), "divisor of the logits; 0 takes the likeliest token"),
    "top_k": (number(0, LONGEST, int), "sample from this many of the likeliest tokens; 0 for all"),
    "top_p": (number(0.001, 1), "sample from the likeliest tokens that together have this probability"),
    "repetition_penalty": (number(0.01, 100), "above 1, tokens already seen become less likely"),
    "stop": (non_empty, "end before this text; may be repeated"),
    "seed": (number(0, 1 << 63, int), "seed of the sampling"),
}


class Request(NamedTuple):
    """A prompt as tokens, and how to continue it."""

    tokens: list[int]
    settings: Settings


class Cache:
    """Keys and values of the tokens read so far. Earlier ones are copied only when the room is full and has to grow.

    Args:
        shape: of the graph's inputs; key_0, value_0, ... determine the numbers of layers, heads and so on.
        texts: number of texts that are read side by side; a graph with fixed rows determines it itself.
    """

    def __init__(self, shape: Mapping[str, list], texts: int):
        rows = fixed_or(shape["tokens"][0], texts)
        layers = sum(name.startswith("key_") for name in shape)
        _, heads, room, width = shape["key_0"]
        self.fixed = isinstance(room, int)
        self.array = np.zeros((layers, 2, rows, heads, room if self.fixed else 0, width), np.float32)
        self.length = np.zeros(rows, np.int64)

    def inputs(self) -> dict[str, np.ndarray]:
        """Return the past as inputs of the graph: each layer's keys and values, without a copy."""
        known = {"length": self.length}
        for i, (key, value) in enumerate(self.array):
            known |= {f"key_{i}": key, f"value_{i}": value}
        return known

    def add(self, present: np.ndarray, counts: np.ndarray) -> None:
        """Append the first `counts` of new keys and values (L, 2, B, H, T, D) to those of each text."""
        needed, room = int((self.length + counts).max()), self.array.shape[4]
        if needed > room and not self.fixed:
            more = -(-(needed - room) // GROWTH) * GROWTH
            self.array = np.pad(self.array, [(0, 0)] * 4 + [(0, more), (0, 0)])
        for row, (start, count) in enumerate(zip(self.length.tolist(), counts.tolist(), strict=True)):
            self.array[:, :, row, :, start : start + count] = present[:, :, row, :, :count]
        self.length = self.length + counts


class Runner(Base):
    """Serves one graph.

    `decode`: tokens int64 (B, T) to read after a past, back int64 (B, W): the tokens whose logits are requested,
    counted back from the last; length int64 (B) of the past, and for each layer i key_i and value_i (B, H, P, D) ->
    logits (B, W, V), present (L, 2, B, H, T, D): the keys and values of the new tokens.

    Raises UserError for other metadata or graphs.
    """

    forms: Mapping = {"sagemaker": lambda answer: {"generated_text": answer["text"]}}
    options: Mapping = OPTIONS
    stop: tuple[str, ...] = ()

    def __init__(self, graphs: Mapping[str, Any], metadata: Mapping[str, Any]):
        context = metadata.get("context_length")
        if set(graphs) != {"decode"} or type(context) is not int or not 2 <= context <= LONGEST:
            raise UserError("not a language model; expected a graph decode and metadata context_length, tokenizer")
        self.decode, self.context_length = graphs["decode"], context
        if not {"tokens", "back", "length", "key_0", "value_0"} <= set(self.decode.shape):
            raise UserError(
                "not a language model; expected a graph with inputs tokens, back, length, key_0 and value_0"
            )
        if len(self.decode.shape["key_0"]) != 4 or not all(type(n) is int for n in self.decode.shape["key_0"][1::2]):
            raise UserError("not a language model; expected an input key_0 of four axes, heads and widths fixed")
        self.tokenizer = make_tokenizer(metadata.get("tokenizer"))
        if not hasattr(self.tokenizer, "spelling"):
            raise UserError("not a language model; expected a tokeniser of bytes, characters or byte pairs")
        for name, value in Settings()._asdict().items():
            setattr(self, name, value)

    # Requests

    @staticmethod
    def takes(metadata: dict) -> str:
        """Describe the input: prompts."""
        context = metadata["context_length"]
        return (
            "A text to continue, a file that holds one, or a request "
            '`{"inputs": text, "parameters": {"max_new_tokens": 50}}`. The model reads up to '
            f"{context - 1} tokens after the one that begins a text; of a longer text, only the last {context // 2}."
        )

    def inputs(self, path: str) -> Iterator[tuple[str, str | Path | Line]]:
        """Return a name and a source for each input.

        A `path` that is not a file, and not a single word that ends like a file name, is itself a prompt or JSON
        request. A file is one prompt or one request, or has one on each line.
        """
        text = text_in(path)
        if isinstance(text, str):
            yield from self.within(path, text)
        else:
            yield path, text or (Line("input", path) if is_object(path) else path)

    def within(self, path: str, text: str) -> Iterator[tuple[str, str | Line]]:
        """Return the prompts and requests in a file's text, with their places."""
        lines = {f"{path}:{n}": line for n, line in enumerate(text.split("\n"), start=1) if line.strip()}
        if not path.lower().removesuffix(".gz").endswith(".jsonl") and not is_object(next(iter(lines.values()), "")):
            yield path, Line(path, text) if is_object(text) else text
            return
        yield from ((where, Line(where, line)) for where, line in (lines or {f"{path}:1": ""}).items())

    def read(self, source: Any) -> Request:
        """Read a text, or a request {"inputs": text, "parameters": {"max_new_tokens": ...}}.

        `source` can also be a line or a file that holds one of these.
        """
        where, asked = "input", {}
        if isinstance(source, Path):
            source = only(str(source), self.within(str(source), read_text(source, "text")))
        if isinstance(source, Line):
            where = source.where
            source = parse_object(source.text, where)
        if isinstance(source, Mapping):
            if not isinstance(source.get("inputs"), str) or set(source) - {"inputs", "parameters"}:
                raise UserError(f"{where}: {shorten(source)}; expected only inputs, a text, and parameters")
            source, asked = source["inputs"], source.get("parameters", {})
        if not isinstance(source, str):
            raise UserError(f"{where}: {type(source).__name__}; expected a text or a request, as an object")
        check_unicode(source, where)
        return Request([self.tokenizer.end, *self.tokenizer.encode(source)], self.settings(asked, where))

    def settings(self, asked: object, where: str) -> Settings:
        """Return the runner's own settings, overridden by those of a request. Raises UserError."""
        if not isinstance(asked, Mapping) or set(asked) - set(OPTIONS):
            raise UserError(f"{where}: parameters: {shorten(asked)}; expected some of {', '.join(OPTIONS)}")
        known = {name: getattr(self, name) for name in OPTIONS} | dict(asked)
        for name, value in known.items():
            if name == "stop":
                continue
            value = value.item() if isinstance(value, np.generic) else value
            if type(value) not in (int, float):
                raise UserError(f"{where}: {name}: {shorten(value)}; expected a number")
            try:
                known[name] = OPTIONS[name][0](str(value))
            except (argparse.ArgumentTypeError, ValueError) as error:  # Python does not write numbers of 5,000 digits
                raise UserError(f"{where}: {name}: {error}") from None
        stop = known["stop"] if isinstance(known["stop"], list | tuple) else [known["stop"]]
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"{where}: stop: {shorten(stop)}; expected texts")
        return Settings(**known | {"stop": tuple(stop)})

    # Answers

    def size(self, item: Request) -> int:
        """Return the number of elements in a request's keys and values."""
        heads, width = self.decode.shape["key_0"][1::2]
        tokens = min(len(item.tokens) + item.settings.max_new_tokens, self.context_length)
        return tokens * 2 * heads * width * sum(name.startswith("key_") for name in self.decode.shape)

    def answer(self, items: list[Request]) -> list[dict]:
        """Return `text`, the continuation of a prompt, its number of `new_tokens`, and the `reason` why it ends.

        The reason is length, stop or end. `truncated` means that the prompt was longer than the context, and that only
        its end was read.
        """
        many, answers = fixed_or(self.decode.shape["tokens"][0], len(items)), []
        for i in range(0, len(items), many):
            texts = [Writing(item.tokens, item.settings, self.tokenizer) for item in items[i : i + many]]
            for _ in self.write(texts):
                pass
            for one in texts:
                answer = {"text": one.text, "new_tokens": one.new_tokens, "reason": one.reason}
                answers.append(answer | ({"truncated": True} if one.prompt_length > self.context_length else {}))
        return answers

    def written(self, prompt: str) -> Iterator[str]:
        """Yield the prompt and its continuation, piece by piece as it is generated."""
        asked = self.read(prompt)
        text = Writing(asked.tokens, asked.settings, self.tokenizer)
        yield prompt
        for _ in self.write([text]):
            yield text.new_text()

    def write(self, texts: list[Writing]) -> Iterator[None]:
        """Continue texts until all have ended, one token of each at a time.

        When a text fills the context, its older half is dropped and the rest is read again.
        """
        cache = Cache(self.decode.shape, len(texts))
        unread = [text.tokens for text in texts]
        while not all(text.reason for text in texts):
            for row, text in enumerate(texts):
                if cache.length[row] + len(unread[row]) > self.context_length:
                    cache.length[row], unread[row] = 0, text.tokens[-(self.context_length // 2) :]
            logits = self.last(cache, unread)
            for text, row in zip(texts, logits, strict=False):
                if not text.reason:
                    text.go_on(row)
            unread = [[] if text.reason else text.tokens[-1:] for text in texts]
            yield

    # The graph

    def last(self, cache: Cache, unread: list[list[int]]) -> np.ndarray:
        """Read tokens of each text, several at a time -> logits (B, V) after the last one of each. The cache grows."""
        found: Any = None
        width = self.decode.shape["tokens"][1]
        step = fixed_or(width, READ)
        for start in range(0, max(map(len, unread)), step):
            parts = [tokens[start : start + step] for tokens in unread]
            parts += [[]] * (len(cache.length) - len(parts))
            counts = np.array([len(part) for part in parts])
            tokens = np.full((len(parts), fixed_or(width, counts.max())), self.tokenizer.end)
            for row, part in zip(tokens, parts, strict=True):
                row[: len(part)] = part
            back = tokens.shape[1] - np.maximum(counts, 1)[:, None]
            logits = self.step(cache, tokens, back, counts)[:, 0]
            found = logits if found is None else np.where(counts[:, None] > 0, logits, found)
        return found

    def step(self, cache: Cache, tokens: np.ndarray, back: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Call the graph -> logits (B, W, V). The first `counts` of each row's tokens are added to the cache."""
        answer = self.decode(tokens=tokens, back=back, **cache.inputs())
        if not {"logits", "present"} <= set(answer) or answer["logits"].shape[-1] != len(self.tokenizer):
            raise UserError(f"not a language model; expected logits of {len(self.tokenizer)} tokens")
        if not np.isfinite(answer["logits"].max(axis=-1)).all():  # finds NaN too; -inf rules out a token
            raise UserError("graph returns logits that are not finite; expected finite numbers")
        cache.add(answer["present"], counts)
        return answer["logits"]

    def nll(self, tokens: np.ndarray) -> np.ndarray:
        """Return nats (B, T) of each token after the first of `tokens` (B, T + 1), given the tokens before it.

        The tokens are read in at least two parts, the first a little more than half (at most 513 tokens), so that
        reading after a past is tested too. A past of exactly half a window would often fill its capacity, which is rare
        in generation.
        """
        rows, width = len(tokens), tokens.shape[1] - 1
        axes = self.decode.shape["tokens"]
        step = fixed_or(axes[1], max(1, min(READ + 1, math.ceil(width / 2) + 1, width - 1)))
        many = fixed_or(axes[0], max(1, LOGITS // (step * len(self.tokenizer))))
        if many < rows:
            return np.concatenate([self.nll(part) for part in np.split(tokens, range(many, rows, many))])
        cache, nats = Cache(self.decode.shape, rows), []
        for start in range(0, width, step):
            part = tokens[:, start : min(start + step, width)]
            counts = np.full(len(cache.length), part.shape[1])
            padded = np.full((len(counts), fixed_or(axes[1], part.shape[1])), self.tokenizer.end)
            padded[:rows, : part.shape[1]] = part
            back = np.tile(np.arange(padded.shape[1])[::-1], (len(counts), 1))
            logits = self.step(cache, padded, back, counts)[:rows, : part.shape[1]].astype(np.float64)
            after = tokens[:, start + 1 : start + 1 + part.shape[1], None]
            most = logits.max(axis=2)
            whole = most + np.log(np.exp(logits - most[..., None]).sum(axis=2))
            nats.append(whole - np.take_along_axis(logits, after, axis=2)[..., 0])
        return np.concatenate(nats, axis=1)
