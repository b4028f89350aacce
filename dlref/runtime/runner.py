"""What every runner shares: one input, a list of them, or a stream that no bad input stops."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dlref.runtime.errors import UserError

BATCH = 32  # inputs at once; larger batches gain nothing on a CPU
ROOM = 1 << 24  # elements of a batch: 5 photographs of a megapixel, or one of any size; bounds the memory


class Runner:
    """Inputs -> answers. A subclass says how to read an input and how to answer for several at once."""

    # Other forms of an answer, by name: what other services answer, for programs that were written for these.
    forms: Mapping[str, Callable[[dict], dict]] = {}
    # Attributes that the command sets by --name: how to read each, and its help. One whose value here is a tuple may be
    # given several times.
    options: Mapping[str, tuple[Callable[[str], object], str]] = {}
    # Whether `answer` shares its work out by `spread`, over graphs that use one thread each: of many small steps this
    # makes more than threads within each.
    spreads = False
    workers = 1

    @staticmethod
    def takes(metadata: dict) -> str:
        """What a bundle with this metadata is given, in Markdown, for who has the bundle and nothing else."""
        raise NotImplementedError

    def inputs(self, path: str) -> Iterable[tuple[str, object]]:
        """The inputs in a file: a name and a source for each. Raises UserError."""
        return [(path, path)]

    def read(self, source):
        """An input as the graph takes it. Raises UserError where it is none."""
        raise NotImplementedError

    def answer(self, items: list) -> list[dict]:
        """Plain values for each of the items that `read` gave. Raises UserError."""
        raise NotImplementedError

    def size(self, item) -> int:
        """The elements of an item, where they can be many."""
        return 0

    def together(self, first, second) -> bool:
        """Whether two items may be answered in one batch."""
        return True

    def draw(self, source, answer: dict):
        """A picture (PIL) of an answer to `source`. Raises UserError where answers are none to look at."""
        raise UserError("these answers are not drawn; expected a bundle of detection, segmentation or translation")

    def written(self, source) -> Iterator[str]:
        """An answer that is a text, piece by piece as it comes. Raises UserError where answers are none."""
        raise UserError("these answers do not come piece by piece; expected a bundle of a language model")

    def picture(self, answer: dict):
        """An answer that is itself a picture (PIL). Raises UserError where answers are none."""
        raise UserError("these answers are no pictures; expected a bundle of segmentation")

    def spread(self, function: Callable, parts: list) -> list:
        """What `function` answers to each part, `workers` of them at a time."""
        if self.workers == 1 or len(parts) < 2:
            return list(map(function, parts))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, parts))

    def __call__(self, source) -> dict | list[dict]:
        """The answer for one input, or a list of them for a list. Raises UserError for the first bad one."""
        sources = source if isinstance(source, list) else [source]
        answers = list(self.stream(sources))
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
        return answers if isinstance(source, list) else answers[0]

    def stream(self, sources: Iterable, batch_size: int = BATCH) -> Iterator[dict | UserError]:
        """Answers one by one, in the order of `sources`; a bad input's place is taken by its UserError."""
        waiting, room = [], 0
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

    def _answers(self, items: list) -> list[dict | UserError]:
        """A batch that is refused is asked again item by item, so that only the bad ones fail."""
        if not items:
            return []
        try:
            return self.answer(items)
        except (UserError, MemoryError) as error:
            if len(items) > 1:
                return [answer for item in items for answer in self._answers([item])]
            return [refusal(error)]


def refusal(error: UserError | MemoryError) -> UserError:
    """Why an input has no answer."""
    if isinstance(error, UserError):
        return error
    return UserError("not enough memory; expected a smaller input, or more memory")


def fixed_or(size: int | str, free: int) -> int:
    """The size of an axis, as a graph's `shape` gives it: a number where it is fixed, else `free`."""
    return size if isinstance(size, int) else free


def whole_number(value: object) -> int | None:
    """A whole number of Python's or numpy's; None for anything else, True and False too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def plain(answer: dict) -> dict:
    """An answer without its arrays, which no line of text holds."""
    return {name: value for name, value in answer.items() if not isinstance(value, np.ndarray)}
