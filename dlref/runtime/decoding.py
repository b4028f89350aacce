"""Beam search over a small interface: `step(token, state, sentences)` says what may come next.

B sentences, K hypotheses of each, W best next tokens of a hypothesis, S source tokens, Y rows of a state, D its size.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dlref.runtime.text import BEGIN, END, PAD


class Next(NamedTuple):
    """What a step answers.

    Attributes:
        log_probability: float (B, K, W) of the W likeliest next tokens of each hypothesis.
        token: int (B, K, W), which they are.
        state: (Y, B, K, D) after the token that was given.
        attention: (B, K, S) of that step.
    """

    log_probability: np.ndarray
    token: np.ndarray
    state: np.ndarray
    attention: np.ndarray


class Hypothesis(NamedTuple):
    """An answer.

    Attributes:
        tokens: without those that begin and end it.
        log_probability: of the tokens and of the end.
        ended: whether it came to its end, or is as long as allowed.
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
    """The best hypothesis of each sentence among those that a beam of K keeps; a beam of 1 is greedy.

    Hypotheses are ranked by their log-probability over ((5 + length) / 6)^length_penalty (Wu et al. 2016, equation 14).
    One that has ended stays as it is until nothing that is kept can outrank it.

    Args:
        step: (token (b, K), state (Y, b, K, D), sentences (b,)) -> Next; of the sentences still open.
        state: (Y, B, D), where decoding starts.
        beam: K.
        length_penalty: 0: none.
        longest: tokens of an answer, its end among them.
    """
    count = state.shape[1]
    open_, state = np.arange(count), state[:, :, None]
    token = np.full((count, 1), BEGIN)
    total, length, ended = np.zeros((count, 1)), np.zeros((count, 1), int), np.zeros((count, 1), bool)
    trail: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    answers: list[Hypothesis | None] = [None] * count

    def norm(length: np.ndarray | int) -> np.ndarray | float:
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
        hope = (total / norm(longest)).max(axis=1, where=~ended, initial=-np.inf)  # no total grows
        over = ended.any(axis=1) & (best >= hope) if time + 1 < longest else np.ones(len(open_), bool)
        for row in np.flatnonzero(over):
            # At the last step what has not ended counts only where nothing has.
            value = np.where(ended[row] | ~ended[row].any(), total[row] / norm(length[row]), -np.inf)
            answers[open_[row]] = follow(trail, row, int(value.argmax()), total[row], ended[row])
        state = found.state[:, rows, parent][:, ~over]
        open_, token, total, length, ended = (part[~over] for part in (open_, token, total, length, ended))
        if not len(open_):
            break
    return answers


def follow(trail: list, row: int, kept: int, total: np.ndarray, ended: np.ndarray) -> Hypothesis:
    """The hypothesis that ends at place `kept` of the last step, from there back to its beginning."""
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
