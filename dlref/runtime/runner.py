"""The base class of all runners: predicts for one input, a list, or a stream that a bad input does not stop."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

import numpy as np

from dlref.runtime.errors import UserError

BATCH = 32  # inputs at once; larger batches gain nothing on a CPU
ROOM = 1 << 24  # elements of a batch, to limit memory: 5 photographs of a megapixel, or one of any size


class Runner:
    """Maps inputs to predictions. A subclass defines how to read an input and how to predict for several at once."""

    # Other formats of a prediction by name: those of other services, for programs that were written for them.
    forms: Mapping[str, Callable[[dict], dict]] = {}
    # Attributes that the command sets by --name: a parser for each, and its help. An attribute whose value is a tuple
    # may be given several times.
    options: Mapping[str, tuple[Callable[[str], object], str]] = {}
    # Whether `answer` distributes its work with `spread`, over graphs that use one thread each. For many small steps
    # this is faster than several threads within each step.
    spreads = False
    workers = 1

    def __init__(self, graphs: Mapping[str, Any], metadata: Mapping[str, Any]):
        raise NotImplementedError

    @staticmethod
    def takes(metadata: dict) -> str:
        """Describe the input of a bundle with this metadata, in Markdown, for a reader who has only the bundle."""
        raise NotImplementedError

    def inputs(self, path: str) -> Iterable[tuple[str, object]]:
        """Return a name and a source for each input in a file. Raises UserError."""
        return [(path, path)]

    def read(self, source):
        """Convert a source to the input of the graph. Raises UserError if it is invalid."""
        raise NotImplementedError

    def answer(self, items: list) -> list[dict]:
        """Predict for each of the items that `read` returned. Raises UserError."""
        raise NotImplementedError

    def size(self, item) -> int:
        """Return the number of elements of an item; 0 if items are always small."""
        return 0

    def together(self, first, second) -> bool:
        """Return whether two items may share a batch."""
        return True

    def draw(self, source, answer: dict):
        """Draw a prediction for `source` as a picture (PIL). Raises UserError if this kind has none."""
        raise UserError(
            "this bundle's answers cannot be drawn; expected a bundle of detection, segmentation or translation"
        )

    def written(self, source) -> Iterator[str]:
        """Yield a predicted text piece by piece, as it is generated. Raises UserError if this kind generates none."""
        raise UserError("this bundle does not generate text piece by piece; expected a bundle of a language model")

    def picture(self, answer: dict):
        """Return a prediction that is itself a picture (PIL). Raises UserError if this kind predicts none."""
        raise UserError("this bundle's answers are not pictures; expected a bundle of segmentation")

    def spread(self, function: Callable, parts: list) -> list:
        """Apply `function` to each part, `workers` of them at a time."""
        if self.workers == 1 or len(parts) < 2:
            return list(map(function, parts))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, parts))

    @overload
    def __call__(self, source: list) -> list[dict]: ...
    @overload
    def __call__(self, source: Any) -> dict: ...
    def __call__(self, source):
        """Predict for one input, or for each in a list. Raises UserError for the first bad one."""
        answers = []
        for answer in self.stream(source if isinstance(source, list) else [source]):
            if isinstance(answer, UserError):
                raise answer
            answers.append(answer)
        return answers if isinstance(source, list) else answers[0]

    def stream(self, sources: Iterable, batch_size: int = BATCH) -> Iterator[dict | UserError]:
        """Yield predictions one by one, in the order of `sources`. A bad input yields its UserError instead."""
        waiting: list = []
        room = 0
        for source in sources:
            try:
                item = self.read(source)
            except (UserError, MemoryError) as error:
                yield from self._answers(waiting)
                waiting, room = [], 0
                yield refusal(error)
                continue
            if waiting and (room + self.size(item) > ROOM or not self.together(waiting[0], item)):
                yield from self._answers(waiting)
                waiting, room = [], 0
            waiting.append(item)
            room += self.size(item)
            if len(waiting) >= batch_size:
                yield from self._answers(waiting)
                waiting, room = [], 0
        yield from self._answers(waiting)

    def _answers(self, items: list) -> Sequence[dict | UserError]:
        """Predict for a batch. If it is refused, retry item by item, so that only the bad ones fail."""
        if not items:
            return []
        try:
            return self.answer(items)
        except (UserError, MemoryError) as error:
            if len(items) > 1:
                return [answer for item in items for answer in self._answers([item])]
            return [refusal(error)]


def refusal(error: UserError | MemoryError) -> UserError:
    """Return the reason why an input has no prediction."""
    if isinstance(error, UserError):
        return error
    return UserError("not enough memory; expected a smaller input, or more memory")


def fixed_or(size: int | str, free: int) -> int:
    """Return the size of an axis in a graph's `shape`: its number if it is fixed, else `free`."""
    return size if isinstance(size, int) else free


def whole_number(value: Any) -> int | None:
    """Return a whole number of Python's or numpy's as an int; None for anything else, including True and False."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def plain(answer: dict) -> dict:
    """Return a prediction without its arrays, which do not fit on a line of text."""
    return {name: value for name, value in answer.items() if not isinstance(value, np.ndarray)}
