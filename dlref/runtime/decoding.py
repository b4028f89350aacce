"""Beam search over a small interface: `step(token, state, sentences)` returns the candidates for the next token.

B sentences, K hypotheses of each, W best next tokens of a hypothesis, S source tokens, Y rows of a state, D its size.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dlref.runtime.text import BEGIN, END, PAD


class Next(NamedTuple):
    """The output of a step.

    Attributes:
        log_probability: float (B, K, W), of the W likeliest next tokens of each hypothesis.
        token: int (B, K, W), these tokens.
        state: (Y, B, K, D), after the token that was given.
        attention: (B, K, S), at this step.
    """

    log_probability: np.ndarray
    token: np.ndarray
    state: np.ndarray
    attention: np.ndarray


class Hypothesis(NamedTuple):
    """A translation found by the search.

    Attributes:
        tokens: without the tokens that begin and end it.
        log_probability: of the tokens and of the end.
        ended: whether it reached its end; if not, it was cut at the greatest length.
        attention: (tokens, S), to the source when each token was chosen; one more row for the end.
    """

    tokens: list[int]
    log_probability: float
    ended: bool
    attention: np.ndarray


def beam_search(
    step: Callable[[np.ndarray, np.ndarray, np.ndarray], Next],
    state: np.ndarray,
    beam: int,
    length_penalty: float,
    longest: int,
) -> list[Hypothesis]:
    """Return the best hypothesis of each sentence in a beam of K; a beam of 1 is greedy.

    Hypotheses are ranked by their log-probability over ((5 + length) / 6)^length_penalty (Wu et al. 2016, equation 14).
    Ended hypotheses keep their score and compete for the K places. A sentence is finished when no open hypothesis can
    outrank its best ended one.

    Args:
        step: (token (b, K), state (Y, b, K, D), sentences (b,)) -> Next, for the b sentences that are still open.
        state: (Y, B, D), at the start of decoding.
        beam: K.
        length_penalty: 0 for none.
        longest: most tokens of a hypothesis, including its end.
    """
    count = state.shape[1]
    open_, state = np.arange(count), state[:, :, None]
    token = np.full((count, 1), BEGIN)
    total, length, ended = np.zeros((count, 1)), np.zeros((count, 1), int), np.zeros((count, 1), bool)
    trail: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    answers: dict[int, Hypothesis] = {}

    def norm(length: np.ndarray) -> np.ndarray:
        return ((5 + length) / 6) ** length_penalty

    for time in range(longest):
        found = step(token, state, open_)
        gain, choice = found.log_probability.astype(np.float64), found.token
        gain = np.where(ended[..., None], np.where(np.arange(gain.shape[2]) == 0, 0, -np.inf), gain)
        choice = np.where(ended[..., None], PAD, choice)
        totals = total[..., None] + gain
        rank = totals / norm(length + ~ended)[..., None]
        kept = np.argsort(-rank.reshape(len(open_), -1), axis=1, kind="stable")[:, :beam]
        parent, place = np.divmod(kept, gain.shape[2])
        rows = np.arange(len(open_))[:, None]
        token, total = choice[rows, parent, place], totals[rows, parent, place]
        before = ended[rows, parent]
        length, ended = length[rows, parent] + ~before, before | (token == END)
        trail.append((open_, parent, token, found.attention))
        best = (total / norm(length)).max(axis=1, where=ended, initial=-np.inf)
        hope = (total / norm(np.array(longest))).max(axis=1, where=~ended, initial=-np.inf)  # totals never grow
        over = ended.any(axis=1) & (best >= hope) if time + 1 < longest else np.ones(len(open_), bool)
        for row in np.flatnonzero(over).tolist():
            # At the last step, open hypotheses count only if none has ended.
            value = np.where(ended[row] | ~ended[row].any(), total[row] / norm(length[row]), -np.inf)
            answers[open_[row]] = follow(trail, row, int(value.argmax()), total[row], ended[row])
        state = found.state[:, rows, parent][:, ~over]
        open_, token, total, length, ended = (part[~over] for part in (open_, token, total, length, ended))
        if not len(open_):
            break
    return [answers[i] for i in range(count)]


def follow(trail: list, row: int, kept: int, total: np.ndarray, ended: np.ndarray) -> Hypothesis:
    """Return the hypothesis at place `kept` of the last step, traced back to its beginning."""
    sentence, log_probability, complete = trail[-1][0][row], float(total[kept]), bool(ended[kept])
    tokens, attention = [], []
    for open_, parent, token, looked in reversed(trail):
        row = int(np.searchsorted(open_, sentence))
        if token[row, kept] != PAD:
            tokens.append(int(token[row, kept]))
            attention.append(looked[row, parent[row, kept]])
        kept = parent[row, kept]
    tokens.reverse()
    return Hypothesis([one for one in tokens if one != END], log_probability, complete, np.stack(attention[::-1]))
