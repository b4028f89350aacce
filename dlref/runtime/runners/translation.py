"""The runner of translation: text, plain or in SageMaker's requests -> the text that a beam search finds.

B sentences, S source tokens, T target tokens, K hypotheses, D hidden size, Y rows of the decoder's state, W best next
tokens.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

import numpy as np

from dlref.runtime.arguments import positive
from dlref.runtime.attention import heat_map
from dlref.runtime.decoding import Hypothesis, Next, beam_search
from dlref.runtime.errors import UserError
from dlref.runtime.lines import Line, is_object, only, parse_object, read_text, text_in
from dlref.runtime.runner import Runner as Base
from dlref.runtime.runner import fixed_or, whole_number
from dlref.runtime.text import END, PAD, Bytes, check_unicode, make_tokenizer

SENTENCES = 32  # at once
LONGEST = 100_000  # tokens
KEYS = {
    "source": dict,
    "target": dict,
    "longest": int,
    "longest_answer": int,
    "too_long": str,
    "beam": int,
    "widest": int,
    "length_penalty": float,
}


class Sentence(NamedTuple):
    """A source as tokens, including its end. `cut`: it was longer. `matrix`: its attention is requested."""

    tokens: list[int]
    cut: bool
    matrix: bool = False


class Request(NamedTuple):
    """Sentences to translate; `single` means one sentence without a list around it."""

    sentences: list[Sentence]
    single: bool


class Runner(Base):
    """Serves two graphs, and joins them by a beam search.

    `encode`: source int64 (B, S) -> values, keys (B, S, D), state (Y, B, D).
    `step`: token int64 (B, K), state (Y, B, K, D), values, keys, source -> log_probability (B, K, W), next_token
    int64 (B, K, W), next_state (Y, B, K, D), attention (B, K, S).

    Raises UserError for other metadata or graphs.
    """

    spreads = True
    forms: Mapping = {"sagemaker": lambda answer: answer if "predictions" in answer else as_sagemaker(answer)}
    options: Mapping = {"beam": (positive, "beam width (default: the model's)")}

    def __init__(self, graphs: Mapping[str, Any], metadata: Mapping[str, Any]):
        if set(graphs) != {"encode", "step"} or not all(type(metadata.get(key)) is KEYS[key] for key in KEYS):
            raise UserError(f"not translation; expected graphs encode, step and metadata {', '.join(KEYS)}")
        if not all(0 < metadata[key] <= LONGEST for key in ("longest", "longest_answer", "beam", "widest")):
            raise UserError(f"not translation; expected longest, longest_answer, beam and widest from 1 to {LONGEST}")
        if not 0 <= metadata["length_penalty"] <= 10:
            raise UserError("not translation; expected length_penalty from 0 to 10")
        if metadata["too_long"] not in ("error", "truncate"):
            raise UserError("not translation; expected too_long: error or truncate")
        if "source" not in graphs["encode"].shape or not {"token", "state"} <= set(graphs["step"].shape):
            raise UserError("not translation; expected graphs with inputs source, token and state")
        if len(graphs["encode"].shape["source"]) != 2 or len(graphs["step"].shape["token"]) != 2:
            raise UserError("not translation; expected inputs source and token of two axes")
        source, target = (make_tokenizer(metadata[side]) for side in ("source", "target"))
        if isinstance(target, Bytes):
            raise UserError("not translation; expected a target of words, characters or byte pairs")
        self.source, self.target = source, target
        self.encode, self.step = graphs["encode"], graphs["step"]
        longest, widest = metadata["longest"], metadata["widest"]
        self.longest = min(longest, fixed_or(self.encode.shape["source"][1], longest))
        self.widest = min(widest, fixed_or(self.step.shape["token"][1], widest))
        self.longest_answer = metadata["longest_answer"]
        self.truncates = metadata["too_long"] == "truncate"
        self.beam, self.length_penalty = metadata["beam"], metadata["length_penalty"]

    # Requests

    @staticmethod
    def takes(metadata: dict) -> str:
        """Describe the input: sentences."""
        return 'A text, a file with one on each line, or a request `{"instances": [{"data": text}, ...]}`.'

    def inputs(self, path: str) -> Iterator[tuple[str, str | Path | Line]]:
        """Return a name and a source for each input.

        A `path` that is not a file, and not a single word that ends like a file name, is itself a text or JSON request.
        A file has a text on each line, or is one request.
        """
        text = text_in(path)
        if isinstance(text, str):
            yield from self.within(path, text)
        else:
            yield path, text or Line("input", path)

    def within(self, path: str, text: str) -> Iterator[tuple[str, Line]]:
        """Return the sentences, or the request, in a file's text, with their places."""
        lines = text.removesuffix("\n").split("\n")
        if len(lines) > 1 and is_object(text):
            yield path, Line(path, " ".join(lines))
            return
        yield from ((f"{path}:{number}", Line(f"{path}:{number}", line)) for number, line in enumerate(lines, start=1))

    def read(self, source: Any) -> Request:
        """Read a text, or SageMaker's {"source": ...} or {"instances": [{"data": ...}, ...]}.

        `source` can also be a line or a file that holds one of these.
        """
        if not 1 <= (whole_number(self.beam) or 0) <= self.widest:
            raise UserError(f"beam: {self.beam}; expected a whole number from 1 to {self.widest}")
        where = "input"
        if isinstance(source, Path):
            source = only(str(source), self.within(str(source), read_text(source, "text").rstrip("\r\n")))
        if isinstance(source, Line):
            where, text = source
            source = parse_object(text, where) if text.lstrip().startswith("{") else text
        if isinstance(source, str):
            return Request([self.sentence(source, where)], single=True)
        if not isinstance(source, Mapping):
            raise UserError(f"{where}: {type(source).__name__}; expected a text or a request, as an object")
        if "instances" not in source:
            return Request([self.asked(source, "source", where)], single=True)
        instances = source["instances"]
        if not isinstance(instances, list) or not instances:
            raise UserError(f"{where}: instances: expected a list of objects with data")
        asked = [self.asked(one, "data", f"{where}: instances[{i}]") for i, one in enumerate(instances)]
        return Request(asked, single=False)

    def asked(self, instance: object, key: str, where: str) -> Sentence:
        """Return the sentence of one instance, marked if it requests the attention matrix. Raises UserError."""
        if not isinstance(instance, Mapping) or not isinstance(instance.get(key), str):
            raise UserError(f"{where}: {shorten(instance)}; expected an object with {key}, a text")
        unknown = set(instance) - {key, "configuration"}
        configuration = instance.get("configuration", {})
        if unknown or not isinstance(configuration, Mapping) or set(configuration) - {"attention_matrix"}:
            raise UserError(f"{where}: {shorten(instance)}; expected only {key} and configuration of attention_matrix")
        matrix = str(configuration.get("attention_matrix", "false")).lower()
        if matrix not in ("true", "false"):
            raise UserError(f"{where}: attention_matrix: {shorten(matrix)}; expected true or false")
        return self.sentence(instance[key], f"{where}: {key}" if where == "input" else where, matrix == "true")

    def sentence(self, text: str, where: str, matrix: bool = False) -> Sentence:
        """Tokenise a text. Raises UserError if it is empty, or too long and this bundle does not truncate."""
        check_unicode(text, where)
        tokens = self.source.encode(text)
        if not tokens:
            raise UserError(f"{where}: empty; expected a text")
        cut = len(tokens) >= self.longest
        if cut and not self.truncates:
            raise UserError(f"{where}: {len(tokens)} tokens; expected at most {self.longest - 1}")
        return Sentence([*tokens[: self.longest - 1], END], cut, matrix)

    # Answers

    def size(self, item: Request) -> int:
        """Return the number of elements in the attention of a request's translations."""
        return sum(len(sentence.tokens) for sentence in item.sentences) * self.beam * self.longest_answer

    def answer(self, items: list[Request]) -> list[dict]:
        """Return `target`, its log-probability, and arrays for programs: `tokens`, `source_tokens` and `attention`.

        A request with `instances` gets `predictions`, with `matrix` if requested.
        """
        hypotheses = iter(self.search([sentence.tokens for item in items for sentence in item.sentences]))
        answers = []
        for item in items:
            translations = [self.prediction(sentence, next(hypotheses)) for sentence in item.sentences]
            answers.append(translations[0] if item.single else {"predictions": list(map(as_sagemaker, translations))})
        return answers

    def prediction(self, sentence: Sentence, found: Hypothesis) -> dict:
        """Convert a hypothesis to a prediction."""
        attention = found.attention[: len(found.tokens), : len(sentence.tokens)]
        answer = {"target": self.target.decode(found.tokens), "log_probability": found.log_probability}
        if sentence.cut:
            answer["truncated"] = True
        if not found.ended:
            answer["ended"] = False
        if sentence.matrix:
            answer["matrix"] = attention.tolist()
        numbers = {"tokens": found.tokens, "source_tokens": sentence.tokens}
        tokens = {name: np.array(given, np.int64) for name, given in numbers.items()}  # also if there are none
        return answer | tokens | {"attention": attention}

    def search(self, sources: list[list[int]]) -> list[Hypothesis]:
        """Return the best hypothesis of each source. Sources of similar length are searched together."""
        many = fixed_or(self.encode.shape["source"][0], max(1, min(SENTENCES, -(-len(sources) // self.workers))))
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        parts = [order[i : i + many] for i in range(0, len(order), many)]
        found = self.spread(lambda part: self._search([sources[i] for i in part]), parts)
        if any(token >= len(self.target) for several in found for one in several for token in one.tokens):
            raise UserError(f"not translation; expected a target vocabulary of more than {len(self.target)} tokens")
        answers = dict(zip(order, (one for several in found for one in several), strict=True))
        return [answers[i] for i in range(len(sources))]

    def _search(self, sources: list[list[int]]) -> list[Hypothesis]:
        """Return the hypotheses of sources that fit into one batch."""
        rows, length = self.encode.shape["source"]
        padded = np.full((fixed_or(rows, len(sources)), fixed_or(length, max(map(len, sources)))), PAD)
        padded[:, 0] = END  # for rows that are only padding
        for row, tokens in zip(padded, sources, strict=False):
            row[: len(tokens)] = tokens
        memory = {"source": padded, **self.encode(source=padded)}
        state = memory.pop("state")
        known = {name: memory[name] for name in self.step.shape if name in memory}
        beam = fixed_or(self.step.shape["token"][1], 0)

        def step(token: np.ndarray, state: np.ndarray, sentences: np.ndarray) -> Next:
            kept = token.shape[1]
            if kept < beam:  # a graph of fixed width: the padding is ignored
                token = np.pad(token, [(0, 0), (0, beam - kept)])
                state = np.pad(state, [(0, 0), (0, 0), (0, beam - kept), (0, 0)])
            memory = {name: array[sentences] for name, array in known.items()}
            answer = self.step(token=token, state=state, **memory)
            if not (answer["log_probability"] < np.inf).all() or not np.isfinite(answer["attention"]).all():
                raise UserError("graph returns probabilities or attention that are not finite; expected finite numbers")
            return Next(
                answer["log_probability"][:, :kept],
                answer["next_token"][:, :kept],
                answer["next_state"][:, :, :kept],
                answer["attention"][:, :kept],
            )

        return beam_search(step, state, self.beam, self.length_penalty, self.longest_answer)[: len(sources)]

    def draw(self, source: Any, answer: dict):
        """Draw the attention of the output tokens as a heat map (PIL). Raises UserError."""
        if "attention" not in answer:
            raise UserError("a request with instances cannot be drawn; expected one text")
        source_tokens, tokens = (answer[key].tolist() for key in ("source_tokens", "tokens"))
        return heat_map(answer["attention"], self.source.pieces(source_tokens), self.target.pieces(tokens))


def as_sagemaker(answer: dict) -> dict:
    """Return only the fields that SageMaker's endpoint returns for an instance."""
    return {key: answer[key] for key in ("target", "matrix") if key in answer}
