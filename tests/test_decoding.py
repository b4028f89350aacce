"""Beam search against exhaustive search and a search with lists, and on models with known answers."""

from itertools import product

import numpy as np
import pytest

from dlref.runtime.decoding import Next, beam_search
from dlref.runtime.text import BEGIN, END, PAD

TOKENS = (END, 4, 5, 6)


class Table:
    """A language whose next token depends on the sentence and on the last two tokens, drawn at random.

    The state is (last but one, last) of each hypothesis, so that mixed-up states are noticed.
    """

    def __init__(self, sentences, seed=0):
        self.logits = 2 * np.random.default_rng(seed).standard_normal((sentences, 7, 7, len(TOKENS)))
        self.logits -= np.log(np.exp(self.logits).sum(-1, keepdims=True))
        self.start = np.full((2, sentences, 1), BEGIN, float)

    def __call__(self, token, state, sentences):
        before = state[1, :, :, 0].astype(int)
        found = self.logits[sentences[:, None], before, token]
        order = np.argsort(-found, axis=2, kind="stable")
        values = np.take_along_axis(found, order, 2)
        attention = np.broadcast_to(token[..., None] == np.arange(7), (*token.shape, 7)).astype(float)
        after = np.stack([before, token])[..., None].astype(float)
        return Next(values, np.array(TOKENS)[order], after, attention)

    def total(self, sentence, tokens):
        before, last, total = BEGIN, BEGIN, 0.0
        for token in tokens:
            total += self.logits[sentence, before, last, TOKENS.index(token)]
            before, last = last, token
        return total


def every(longest):
    """Yield all sequences that end within `longest` tokens."""
    for length in range(longest):
        for tokens in product(TOKENS[1:], repeat=length):
            yield [*tokens, END]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_that_keeps_everything_finds_the_best_sequence(penalty):
    table, longest = Table(5), 4
    found = beam_search(table, table.start, 3**4 * 4, penalty, longest)
    for sentence, one in enumerate(found):
        ranked = [(table.total(sentence, t) / ((5 + len(t)) / 6) ** penalty, t) for t in every(longest)]
        _, best = max(ranked)
        assert [*one.tokens, END] == best
        assert one.log_probability == pytest.approx(table.total(sentence, best))
        assert one.ended


def searched(table, sentence, beam, penalty, longest):
    """Return the tokens that a search with lists finds, and its number of steps."""

    def rank(tokens, length=None):
        return table.total(sentence, tokens) / ((5 + (length or len(tokens))) / 6) ** penalty

    def finished():
        return ended and rank(ended[0]) >= max((rank(tokens, longest) for tokens in going), default=-np.inf)

    ended, going, time = [], [[]], 0
    while time < longest and not finished():
        longer = [[*tokens, token] for tokens in going for token in TOKENS]
        kept = sorted(ended + longer, key=rank, reverse=True)[:beam]
        ended, going = ([tokens for tokens in kept if (END in tokens) == done] for done in (True, False))
        time += 1
    return (ended or going)[0], time


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("beam", [1, 2, 3, 7])
def test_a_beam_keeps_and_finishes_the_same_hypotheses_as_a_search_with_lists(beam, penalty):
    def counted(token, state, sentences):
        steps[sentences] += 1
        return table(token, state, sentences)

    table, steps = Table(15, seed=3), np.zeros(15, int)
    for sentence, one in enumerate(beam_search(counted, table.start, beam, penalty, 9)):
        tokens, time = searched(table, sentence, beam, penalty, 9)
        assert ([*one.tokens, *[END] * one.ended], steps[sentence]) == (tokens, time)


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_sentences_do_not_affect_each_other(beam):
    table = Table(8)
    together = beam_search(table, table.start, beam, 0.7, 9)
    for sentence in range(8):

        def alone(token, state, sentences, sentence=sentence):
            return table(token, state, np.full(len(token), sentence))

        (one,) = beam_search(alone, table.start[:, :1], beam, 0.7, 9)
        assert one.tokens == together[sentence].tokens
        assert one.log_probability == pytest.approx(together[sentence].log_probability)


@pytest.mark.parametrize("seed", range(20))
def test_log_probability_and_attention_belong_to_the_returned_hypothesis(seed):
    """The table attends to the previous token, which must be that of the same hypothesis."""
    table = Table(8, seed=seed)
    for sentence, one in enumerate(beam_search(table, table.start, 4, 1.0, 9)):
        written = [*one.tokens, *[END] * one.ended]
        assert one.log_probability == pytest.approx(table.total(sentence, written))
        assert one.attention.argmax(1).tolist() == [BEGIN, *written[:-1]]


def test_the_search_continues_while_a_longer_answer_could_rank_higher():
    """Ending at once scores -1.0; `4 6` totals -1.15 and ranks higher by its length, although it starts lower."""
    after = {
        BEGIN: (-1.0, -1.1, -99, -99),
        4: (-99, -99, -0.05, -0.06),
        5: (-1.0, -99, -99, -99),
        6: (0.0, -99, -99, -99),
    }

    def step(token, state, sentences):
        known = np.array([[after.get(one, after[6]) for one in row] for row in token.tolist()], float)
        order = np.argsort(-known, axis=2, kind="stable")
        values = np.take_along_axis(known, order, 2)
        return Next(values, np.array(TOKENS)[order], state, np.ones((*token.shape, 1)))

    (one,) = beam_search(step, np.zeros((1, 1, 1)), 2, 1.0, 10)
    assert one.tokens == [4, 6]


def test_a_wider_beam_finds_likelier_answers_on_average():
    table = Table(20, seed=1)
    totals = [[one.log_probability for one in beam_search(table, table.start, k, 0.0, 6)] for k in (1, 2, 4, 400)]
    assert np.mean(totals[3]) >= max(map(np.mean, totals[:3])) - 1e-9
    assert np.mean(totals[1]) > np.mean(totals[0])


def test_an_answer_that_does_not_end_is_cut_and_marked():
    def step(token, state, sentences):
        one = np.zeros((*token.shape, 1))
        return Next(one, np.full(one.shape, 5), state, np.ones((*token.shape, 2)))

    (one,) = beam_search(step, np.zeros((1, 1, 1)), 1, 1.0, 7)
    assert one.tokens == [5] * 7
    assert not one.ended
    assert one.attention.shape == (7, 2)


def test_an_ended_answer_is_preferred_at_the_last_step():
    """`4 4 4 ...` is the likeliest sequence, but a complete answer is preferred to one that is cut."""

    def step(token, state, sentences):
        values = np.log(np.broadcast_to([0.9, 0.1], (*token.shape, 2)))
        return Next(values, np.broadcast_to([4, END], values.shape), state, np.ones((*token.shape, 2)))

    (one,) = beam_search(step, np.zeros((1, 1, 1)), 3, 0.0, 5)
    assert one.ended
    assert one.tokens == []


def test_finished_sentences_are_not_passed_to_the_step_again():
    def step(token, state, sentences):
        calls.append(sentences.tolist())
        ends = np.array([2, 5, 3])[sentences] == len(calls)
        choice = np.where(ends, END, 4)[:, None, None]
        return Next(np.zeros(choice.shape), choice, state, np.ones((*token.shape, 1)))

    calls = []
    found = beam_search(step, np.zeros((1, 3, 1)), 1, 1.0, 9)
    assert [len(one.tokens) for one in found] == [1, 4, 2]
    assert calls == [[0, 1, 2], [0, 1, 2], [1, 2], [1], [1]]


def test_answers_hold_no_special_tokens():
    table = Table(10, seed=2)
    for one in beam_search(table, table.start, 6, 1.0, 8):
        assert not {PAD, BEGIN, END} & set(one.tokens)
        assert len(one.attention) == len(one.tokens) + one.ended
