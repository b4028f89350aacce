"""Read sources and targets from files and make batches of them.

B sentences, S source tokens, T target tokens, P tokens of all sentences.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import NamedTuple

import numpy as np
import torch
from google.protobuf import message_factory, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from dlref.data.loader import sent
from dlref.runtime.errors import UserError
from dlref.runtime.lines import numbered, opened, parse_object
from dlref.runtime.runner import whole_number
from dlref.runtime.text import PAD, SPECIAL, UNKNOWN, check_unicode

MAGIC = 0xCED7230A  # begins each record of RecordIO
# The part of SageMaker's record.proto that these files use. Its values are int32, but are read as int64 so that a value
# that does not fit is detected instead of truncated.
RECORD = """
name: "record.proto"  package: "aialgs.data"  syntax: "proto3"
message_type {
  name: "Int32Tensor"
  field { name: "values"  number: 1  label: LABEL_REPEATED  type: TYPE_INT64 }
}
message_type {
  name: "Value"
  field { name: "int32_tensor"  number: 7  type: TYPE_MESSAGE  type_name: ".aialgs.data.Int32Tensor" }
}
message_type {
  name: "Record"
  field { name: "features"  number: 1  label: LABEL_REPEATED  type: TYPE_MESSAGE
          type_name: ".aialgs.data.Record.FeaturesEntry" }
  nested_type {
    name: "FeaturesEntry"  options { map_entry: true }
    field { name: "key"  number: 1  type: TYPE_STRING }
    field { name: "value"  number: 2  type: TYPE_MESSAGE  type_name: ".aialgs.data.Value" }
  }
}
"""
DESCRIBED = text_format.Parse(RECORD, FileDescriptorProto())
Record = message_factory.GetMessages([DESCRIBED], DescriptorPool())["aialgs.data.Record"]


class Pairs(NamedTuple):
    """Equally many sources and targets, and the name of each pair for messages.

    Sources and targets are texts, or lists of tokens if the files contain tokens.
    """

    source: Sequence
    target: Sequence
    names: Sequence[str]


def check_pairs(split: str, pairs: object) -> None:
    """Raise UserError unless `pairs` are `Pairs`, as many sources as targets and names, and some of each."""
    if not isinstance(pairs, Pairs):
        raise UserError(f"{split}: {type(pairs).__name__}; expected Pairs of sources, targets and names")
    if kinds := [type(part).__name__ for part in pairs if not hasattr(part, "__len__")]:
        raise UserError(f"{split}: {kinds[0]}; expected lists of sources, targets and names")
    sources, targets, names = map(len, pairs)
    if not sources == targets == names or not names:
        counts = f"{sources} sources, {targets} targets and {names} names"
        raise UserError(f"{split}: {counts}; expected one of each for every pair, and at least one pair")
    for side, given in (("source", pairs.source), ("target", pairs.target)):
        if isinstance(given, str):  # each of its characters would be a sentence
            raise UserError(f"{split}: {side}: one text; expected a list of texts, or of lists of tokens")
        for name, one in zip(pairs.names, given, strict=True):
            if isinstance(one, bytes) or not hasattr(one, "__len__"):
                raise UserError(f"{name}: {side}: {type(one).__name__}; expected a text or a list of tokens")
            if isinstance(one, str):  # a surrogate would be met only after training, by the figures' file
                check_unicode(one, f"{name}: {side}")


def check_tokens(tokens: Iterable[object], size: int, where: str) -> None:
    """Raise UserError for the first of the tokens that is not in a vocabulary of `size`, or only frames sentences."""
    first = len(SPECIAL)
    for token in tokens:
        number = token if type(token) is int else whole_number(token)  # nearly all are: a call takes most of the time
        if number is None or not (first <= number < size or number == UNKNOWN):
            raise UserError(f"{where}: token {shorten(token)}; expected {UNKNOWN} or {first} to {size - 1}")


# Files


def read_parallel(source: Path, target: Path) -> Pairs:
    """Read two files whose lines are the same sentences. Raises UserError for empty lines or different counts."""
    sides = [[line for _, line in numbered(path, "lines of text")] for path in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{target}: {len(sides[1])} lines; expected {len(sides[0])}, as {source} has")
    if not sides[0]:
        raise UserError(f"{source}: no lines; expected a sentence on each")
    for path, lines in zip((source, target), sides, strict=True):
        for number, line in enumerate(lines, start=1):
            _check_text(line, f"{path}:{number}")
    return Pairs(*sides, [f"{source}:{number}" for number in range(1, len(sides[0]) + 1)])


def read_table(path: Path) -> Pairs:
    """Read lines of a source, a tab and a target; or JSON Lines of objects with `source` and `target`."""
    objects = path.name.lower().removesuffix(".gz").endswith((".jsonl", ".json"))
    pairs, names = [], []
    for number, line in numbered(path, "lines of text"):
        where = f"{path}:{number}"
        if objects:
            entry = parse_object(line, where)
            pair = [entry.get(side) for side in ("source", "target")]
            for side, text in zip(("source", "target"), pair, strict=True):
                if not isinstance(text, str):
                    raise UserError(f"{where}: {side}: {type(text).__name__}; expected a text")
        else:
            pair = line.split("\t")
            if len(pair) != 2:
                raise UserError(f"{where}: {len(pair)} columns; expected a source, a tab and a target")
        for side, text in zip(("source", "target"), pair, strict=True):
            _check_text(text, f"{where}: {side}")
        pairs.append(pair)
        names.append(where)
    if not pairs:
        raise UserError(f"{path}: no lines; expected a source and a target on each")
    return Pairs(*zip(*pairs, strict=True), names)


def _check_text(text: str, where: str) -> None:
    """Raise UserError for a blank text."""
    if not text.strip():
        raise UserError(f"{where}: empty; expected a text")


# SageMaker's records


def read_records(path: Path) -> Pairs:
    """Read a RecordIO file of protobuf records, as written by SageMaker's create_vocab_proto.py.

    Each record has the features `source` and `target`, lists of int32 tokens without those that begin and end a
    sentence. `check_tokens` checks them against a vocabulary.
    """
    with opened(path, "RecordIO") as file:
        data = file.read()
    sides: tuple[list, list] = ([], [])
    names = []
    for number, record in enumerate(_records(data, path), start=1):
        where = f"{path}: record {number}"
        try:
            features = Record.FromString(record).features
        except DecodeError:
            raise UserError(f"{where}: broken; expected a protobuf Record of int32 tensors") from None
        for side, tokens in zip(("source", "target"), sides, strict=True):
            values = list(features[side].int32_tensor.values)
            if not values:
                raise UserError(f"{where}: {side}: empty; expected tokens")
            tokens.append(values)
        names.append(where)
    if not names:
        raise UserError(f"{path}: no records; expected RecordIO of sources and targets")
    return Pairs(*sides, names)


def _records(data: bytes, path: Path) -> Iterator[bytes]:
    """Yield the content of each record: a magic number, a length, and that many bytes padded to a multiple of four."""
    place, number = 0, 0
    while place < len(data):
        number += 1
        header = data[place : place + 8]
        magic, length = struct.unpack("<II", header) if len(header) == 8 else (0, 0)
        if magic != MAGIC or place + 8 + length > len(data):
            raise UserError(f"{path}: record {number} at byte {place}: broken; expected RecordIO")
        yield data[place + 8 : place + 8 + length]
        place += 8 + (length + 3) // 4 * 4


# Batches


class Batch(NamedTuple):
    """A batch of sentences, padded with PAD.

    Attributes:
        source: (B, S), with an END after the last token of each source.
        target: (B, T), from BEGIN to END.
        sources: the sources as text, for evaluated splits only.
        references: the targets as text, for evaluated splits only.
    """

    source: Int[Tensor, "B S"]
    target: Int[Tensor, "B T"]
    sources: Sequence[str] = ()
    references: Sequence[str] = ()


class Ragged:
    """Lists of tokens as one tensor with offsets, on a device; a batch is one indexing operation."""

    def __init__(self, rows: Iterable[Sequence[int]]):
        rows = [np.asarray(row, np.int32) for row in rows]
        self.lengths = torch.tensor([len(row) for row in rows])  # stays on the host: sizes of batches come from it
        self.begin = self.lengths.cumsum(0) - self.lengths
        self.tokens = torch.from_numpy(np.concatenate([*rows, np.zeros(1, np.int32)]))

    def to(self, device: torch.device) -> None:
        """Move the tokens to a device."""
        self.tokens = self.tokens.to(device)

    def __call__(self, number: Int[Tensor, "B"]) -> Int[Tensor, "B N"]:
        """Return the rows with these numbers, padded with PAD."""
        device, length = self.tokens.device, self.lengths[number]
        place = torch.arange(int(length.max()), device=device)
        begin, length = (sent(part, device)[:, None] for part in (self.begin[number], length))
        there = place < length
        return self.tokens[torch.where(there, begin + place, 0)].long().where(there, PAD)


class Corpus(Dataset):
    """A split as tokens. Items are whole batches: index with the numbers of their sentences.

    Args:
        source: tokens of each source, including END.
        target: tokens of each target, including BEGIN and END.
        texts: the sources and targets of an evaluated split as text.
    """

    def __init__(
        self,
        source: Iterable[Sequence[int]],
        target: Iterable[Sequence[int]],
        texts: tuple[Sequence[str], Sequence[str]] | None = None,
    ):
        self.source, self.target, self.texts = Ragged(source), Ragged(target), texts

    def __len__(self) -> int:
        return len(self.source.lengths)

    def __getitem__(self, number: Int[Tensor, "B"]) -> Batch:
        batch = Batch(self.source(number), self.target(number))
        if self.texts is None:
            return batch
        sources, references = ([side[i] for i in number.tolist()] for side in self.texts)
        return batch._replace(sources=sources, references=references)


class TokenBatches:
    """Batches of sentences of similar length, each of at most `tokens` tokens, including padding.

    Sentences of one length are shuffled, and so are the batches: the content of the batches changes in every epoch,
    their number does not. A batch has at least one sentence for each of the `devices`, even if this exceeds `tokens`.
    """

    def __init__(self, source: Int[Tensor, "N"], target: Int[Tensor, "N"], tokens: int, devices: int = 1):
        self.source, self.target, self.batch_size = source, target, tokens
        self.cuts = [0]
        widths = self.width(self.order(torch.arange(len(source))))
        for place, width in enumerate(widths.tolist()):
            full = (place + 1 - self.cuts[-1]) * width > tokens
            if full and min(place - self.cuts[-1], len(widths) - place) >= devices:
                self.cuts.append(place)
        self.cuts.append(len(widths))

    def order(self, drawn: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """Sort sentences by width, then by source length; sentences equal in both keep the given order."""
        keys = self.width(drawn) * (int(self.source.max()) + 1) + self.source[drawn]
        return drawn[keys.argsort(stable=True)]

    def width(self, number: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """Return the tokens that each sentence takes in a batch: the length of its longer side."""
        return torch.maximum(self.source[number], self.target[number])

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the numbers of the sentences in each batch."""
        order = self.order(torch.randperm(len(self.source), generator=generator))
        for i in torch.randperm(len(self), generator=generator).tolist():
            yield order[self.cuts[i] : self.cuts[i + 1]]
