"""Choose tokens and turn them into text: the part of generation that does not depend on a network.

V tokens of the vocabulary.
"""

import codecs
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np


class Settings(NamedTuple):
    """How to continue a text.

    Attributes:
        max_new_tokens: stop after this many.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: sample from this many of the likeliest tokens; 0 for all.
        top_p: sample from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        repetition_penalty: logits of earlier tokens are divided by it, or multiplied if they are negative (Keskar et
            al. 2019, section 4.1, always divide). The end-of-text token before a prompt does not count as earlier.
        stop: texts that must not appear: the text ends before the first of them.
        seed: of the sampling. Other texts in the batch do not affect a text, except in an int8 graph, whose ranges are
            computed over all of them.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


def next_token(logits: np.ndarray, before: Collection[int], settings: Settings, generator: np.random.Generator) -> int:
    """Choose the next token given logits (V): penalise tokens in `before`, apply temperature, top-k and top-p, sample.

    `before` has each token once.
    """
    if settings.repetition_penalty != 1 and len(before):
        known = np.fromiter(before, np.int64)
        logits = logits.astype(np.float64)
        penalised = logits[known]
        logits[known] = np.where(
            penalised > 0, penalised / settings.repetition_penalty, penalised * settings.repetition_penalty
        )
    if settings.temperature == 0:
        return int(logits.argmax())
    tokens, probabilities = distribution(logits, settings)
    place = np.searchsorted(probabilities.cumsum(), generator.random() * probabilities.sum(), side="right")
    return int(tokens[min(place, len(tokens) - 1)])


def distribution(logits: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that may be sampled given logits (V), and their probabilities."""
    logits = logits / max(settings.temperature, 1e-6)
    tokens = np.arange(len(logits))
    if 0 < settings.top_k < len(logits):
        tokens = np.sort(np.argpartition(-logits, settings.top_k - 1)[: settings.top_k])
    probabilities = np.exp(logits[tokens] - logits[tokens].max(), dtype=np.float64)
    probabilities /= probabilities.sum()
    if settings.top_p < 1:
        # Tokens below an even share of 1 - top_p cannot be among those kept; without them, few are left to sort.
        chance = probabilities >= min((1 - settings.top_p) / len(tokens), probabilities.max())
        tokens, probabilities = tokens[chance], probabilities[chance]
        order = np.argsort(-probabilities, kind="stable")
        needed = np.searchsorted(probabilities[order].cumsum(), settings.top_p) + 1
        kept = np.sort(order[:needed])
        tokens, probabilities = tokens[kept], probabilities[kept] / probabilities[kept].sum()
    return tokens, probabilities


class Writing:
    """A text being generated: joins the bytes of its tokens, and ends before a stop text.

    Args:
        prompt: the tokens to continue.
        settings: how to continue them.
        tokenizer: an exact one.
    """

    def __init__(self, prompt: Sequence[int], settings: Settings, tokenizer):
        self.tokens, self.settings = list(prompt), settings
        self.spelling, self.end = tokenizer.spelling, tokenizer.end
        self.known = set(prompt) - {self.end}  # precedes every prompt, so ending a text is no repetition
        self.prompt_length, self.generator = len(prompt), np.random.default_rng(settings.seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.returned, self.reason = "", 0, ""

    @property
    def new_tokens(self) -> int:
        """The number of tokens after the prompt."""
        return len(self.tokens) - self.prompt_length

    def go_on(self, logits: np.ndarray) -> None:
        """Append the next token given logits (V). Set `reason` if this ends the text."""
        token = next_token(logits, self.known, self.settings, self.generator)
        self.tokens.append(token)
        self.known.add(token)
        searched = max(0, len(self.text) - max(map(len, self.settings.stop), default=0))  # not the whole text
        self.text += self.decoder.decode(self.spelling[token])
        places = [place for stop in self.settings.stop if (place := self.text.find(stop, searched)) >= 0]
        if token == self.end:
            self.reason = "end"
        elif places:
            self.text, self.reason = self.text[: min(places)], "stop"
        elif self.new_tokens >= self.settings.max_new_tokens:
            self.reason = "length"
        if self.reason in ("end", "length"):
            self.text += self.decoder.decode(b"", final=True)

    def new_text(self) -> str:
        """Return the text since the last call, except for an end that may be the beginning of a stop text."""
        end = len(self.text)
        if not self.reason:
            end -= max(map(self.partial_stop, self.settings.stop), default=0)
        piece, self.returned = self.text[self.returned : end], max(end, self.returned)
        return piece

    def partial_stop(self, stop: str) -> int:
        """Return how many of the first letters of a stop text are at the end of the text so far."""
        return next((n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n])), 0)
