"""Choosing tokens, and the text that they become: what does not depend on a network.

V tokens of the vocabulary.
"""

import codecs
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np


class Settings(NamedTuple):
    """How a text goes on.

    Attributes:
        max_new_tokens: after which it stops.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: draw from so many of the likeliest tokens; 0 is all.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        repetition_penalty: by which logits of tokens that were there are divided, or multiplied where they are below
            zero (Keskar et al. 2019, section 4.1, who always divide); the end of text that stands before a prompt is
            none of them.
        stop: texts of which none appears: before it the text ends.
        seed: of what is drawn; texts beside this one change nothing, but to an int8 graph, whose ranges are of all.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


def next_token(logits: np.ndarray, before: Collection[int], settings: Settings, generator: np.random.Generator) -> int:
    """The next token given logits (V): penalty on those `before`, temperature, top-k, top-p, and a draw of the rest.

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
    """The tokens that may be drawn from logits (V), and how likely each is."""
    logits = logits / max(settings.temperature, 1e-6)
    tokens = np.arange(len(logits))
    if 0 < settings.top_k < len(logits):
        tokens = np.sort(np.argpartition(-logits, settings.top_k - 1)[: settings.top_k])
    probabilities = np.exp(logits[tokens] - logits[tokens].max(), dtype=np.float64)
    probabilities /= probabilities.sum()
    if settings.top_p < 1:
        # No token of less than an even share of what is left out can be among the likeliest: few are left to sort.
        chance = probabilities >= min((1 - settings.top_p) / len(tokens), probabilities.max())
        tokens, probabilities = tokens[chance], probabilities[chance]
        order = np.argsort(-probabilities, kind="stable")
        needed = np.searchsorted(probabilities[order].cumsum(), settings.top_p) + 1
        kept = np.sort(order[:needed])
        tokens, probabilities = tokens[kept], probabilities[kept] / probabilities[kept].sum()
    return tokens, probabilities


class Writing:
    """A text as its tokens come: their bytes put together, ended before a stop text.

    Args:
        prompt: the tokens before.
        settings: how it goes on.
        tokenizer: an exact one.
    """

    def __init__(self, prompt: Sequence[int], settings: Settings, tokenizer):
        self.tokens, self.settings = list(prompt), settings
        self.spelling, self.end = tokenizer.spelling, tokenizer.end
        self.known = set(prompt) - {self.end}  # which stands before every prompt: no repetition when the text ends
        self.prompt_length, self.generator = len(prompt), np.random.default_rng(settings.seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.returned, self.reason = "", 0, ""
        if not settings.max_new_tokens:
            self.reason = "length"

    @property
    def new_tokens(self) -> int:
        """How many there are after the prompt."""
        return len(self.tokens) - self.prompt_length

    def go_on(self, logits: np.ndarray) -> None:
        """Add the token after the last one, given logits (V); set `reason` where it ends the text."""
        token = next_token(logits, self.known, self.settings, self.generator)
        self.tokens.append(token)
        self.known.add(token)
        searched = max(0, len(self.text) - max(map(len, self.settings.stop), default=0))  # not all of it each time
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
        """The text since the last call, without an end that may be the beginning of a stop text."""
        end = len(self.text)
        if not self.reason:
            end -= max(map(self.partial_stop, self.settings.stop), default=0)
        piece, self.returned = self.text[self.returned : end], max(end, self.returned)
        return piece

    def partial_stop(self, stop: str) -> int:
        """How many of the first letters of a stop text end the text so far."""
        return next((n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n])), 0)
