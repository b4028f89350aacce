"""Token sampling against `transformers`, streaming of texts, and the past that a runner keeps."""

import gzip
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlref.data.vocabulary import make_exact
from dlref.runtime import UserError, make_runner
from dlref.runtime.generation import Settings, Writing, distribution, next_token
from dlref.runtime.runners import language
from dlref.runtime.text import END, SPECIAL, UNKNOWN, make_tokenizer

BYTES = make_tokenizer({"kind": "byte"})


def of_hugging_face(logits, chosen, before):
    """Return the probabilities after `transformers`' own processors, in the order of its `generate`."""
    from transformers.generation import logits_process as theirs

    steps = [theirs.RepetitionPenaltyLogitsProcessor(float(chosen.repetition_penalty))]
    steps += [theirs.TemperatureLogitsWarper(float(chosen.temperature))]
    steps += [theirs.TopKLogitsWarper(chosen.top_k)] if chosen.top_k else []
    steps += [theirs.TopPLogitsWarper(float(chosen.top_p))] if chosen.top_p < 1 else []
    scores = torch.from_numpy(logits)[None].double()
    for step in steps:
        scores = step(torch.tensor([before]), scores)
    return scores.softmax(1)[0].numpy()


@pytest.mark.parametrize("top_k", [0, 1, 5, 39, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.01])
@pytest.mark.parametrize("temperature", [0.001, 1.0, 3.0])
def test_the_sampling_distribution_matches_transformers(top_k, top_p, temperature):
    chosen = Settings(temperature=temperature, top_k=top_k, top_p=top_p)
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 2, 40)
        expected = of_hugging_face(logits, chosen, [0])
        found = np.zeros(40)
        tokens, probabilities = distribution(logits, chosen)
        found[tokens] = probabilities
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("mean", [0, -3])
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_matches_transformers(penalty, mean):
    chosen = Settings(temperature=0, repetition_penalty=penalty)
    generator = np.random.default_rng(0)
    for _ in range(50):
        logits, before = generator.normal(mean, 1, 12).astype(np.float32), generator.integers(0, 12, 5).tolist()
        kept = logits.copy()
        expected = of_hugging_face(logits, chosen._replace(temperature=1), before).argmax()
        assert next_token(logits, before, chosen, generator) == expected
        assert np.array_equal(logits, kept)


def test_tokens_are_drawn_with_their_probabilities():
    generator, logits = np.random.default_rng(0), np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    chosen = Settings(temperature=1.0, top_p=0.9)
    drawn = np.bincount([next_token(logits, [], chosen, generator) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(drawn, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.012)


def test_the_repetition_penalty_spares_the_end_token():
    """The end token precedes each prompt: a penalty would delay it against the network's prediction."""
    text = Writing([END, 65], Settings(temperature=0, repetition_penalty=1.5), BYTES)
    logits = np.zeros(len(BYTES))
    logits[END], logits[66] = 3, 2.5
    text.go_on(logits)
    assert text.reason == "end"


def told(settings, tokens):
    """Write a text with the given tokens; return it and its streamed pieces."""
    text = Writing([END], settings, BYTES)
    pieces = []
    for token in tokens:
        text.go_on(np.eye(len(BYTES))[token])
        pieces.append(text.new_text())
        if text.reason:
            break
    return text, pieces


@settings(max_examples=300)
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_streamed_pieces_add_up_to_the_text_before_the_first_stop(given_text, stop):
    chosen = Settings(max_new_tokens=200, temperature=0, stop=tuple(stop))
    text, pieces = told(chosen, [*BYTES.encode(given_text), END])
    # The first stop to be complete ends the text, even if another one that begins earlier would be complete later.
    prefixes = (given_text[:end] for end in range(len(given_text) + 1))
    found = ([prefix.find(one) for one in stop if one in prefix] for prefix in prefixes)
    places = next(filter(None, found), [])
    assert text.text == "".join(pieces) == (given_text[: min(places)] if places else given_text)
    assert text.reason == ("stop" if places else "end")


def test_of_two_stops_completed_by_one_token_the_earlier_start_ends_the_text():
    text, _ = told(Settings(temperature=0, stop=("c", "bc")), BYTES.encode("abc"))
    assert (text.text, text.reason) == ("a", "stop")


def test_a_multibyte_character_is_streamed_whole():
    text, pieces = told(Settings(max_new_tokens=5, temperature=0), BYTES.encode("aü€"))
    assert pieces == ["a", "", "ü", "", "\ufffd"]  # the limit cuts the last one
    assert (text.reason, text.new_tokens) == ("length", 5)


def test_text_that_could_become_a_stop_is_held_back():
    _, pieces = told(Settings(max_new_tokens=50, temperature=0, stop=("END",)), BYTES.encode("xEENEND"))
    assert pieces == ["x", "", "E", "", "EN", "", ""]


class Counting:
    """A graph with known output: the next token follows from the sum of all tokens so far and their number.

    The key of a token is its number and the value its position; unused room in the past must not matter.
    """

    def __init__(self, new="new", past="past", batch="batch", heads=2):
        self.shape = {"tokens": [batch, new], "back": [batch, "asked" if new == "new" else new], "length": [batch]}
        self.shape |= {f"{side}_{i}": [batch, heads, past, 1] for i in range(2) for side in ("key", "value")}
        self.calls, self.unused = [], []

    def __call__(self, tokens, back, length, **past):
        self.unused.append(past["key_0"].shape[2] - int(length.max()))
        for name, size in zip(("tokens", "key_0"), (tokens.shape[1], past["key_0"].shape[2]), strict=True):
            fixed = self.shape[name][1 if name == "tokens" else 2]
            assert not isinstance(fixed, int) or size == fixed
        self.calls.append(tokens.shape)
        rows, new = tokens.shape
        assert self.shape["tokens"][0] in ("batch", rows)
        logits = np.zeros((rows, back.shape[1], len(BYTES)), np.float32)
        for row in range(rows):
            before = past["key_1"][row, 0, : length[row], 0].astype(int)
            assert past["value_1"][row, 1, : length[row], 0].tolist() == list(range(length[row]))
            for column, place in enumerate(new - 1 - back[row]):
                seen = [*before, *tokens[row, : place + 1]]
                logits[row, column, follower(seen)] = 1
        places = length[:, None] + np.arange(new)
        present = np.stack([tokens, places], 0).astype(np.float32)[None, :, :, None, :, None]
        return {"logits": logits, "present": np.broadcast_to(present, (2, 2, rows, 2, new, 1))}


def follower(seen):
    return 4 + int(sum(seen) + len(seen)) % 256


def runner(context_length=1000, **shape):
    graph = Counting(**shape)
    metadata = {"tokenizer": {"kind": "byte", "exact": True}, "context_length": context_length}
    made = make_runner("language", {"decode": graph}, metadata)
    made.temperature = 0.0
    return made, graph


def by_hand(prompt, count, context_length=1000):
    """Return the text that `Counting` generates, dropping the older half of a full context."""
    seen, new = [END, *BYTES.encode(prompt)], []
    for _ in range(count):
        if len(seen) > context_length:
            seen = seen[-(context_length // 2) :]
        new.append(follower(seen))
        seen.append(new[-1])
    return b"".join(BYTES.spelling[token] for token in new).decode(errors="replace")


PROMPTS = ["a", "", "a longer one", "x" * 70]


def test_each_text_in_a_batch_has_its_own_past():
    made, graph = runner()
    made.max_new_tokens = 100
    answers = made(PROMPTS)
    assert [answer["text"] for answer in answers] == [by_hand(prompt, 100) for prompt in PROMPTS]
    assert graph.calls == [(4, 71), *[(4, 1)] * 99]
    assert made(PROMPTS[2]) == answers[2]


def test_long_prompts_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(language, "READ", 8)
    made, graph = runner()
    made.max_new_tokens = 3
    assert [answer["text"] for answer in made(PROMPTS)] == [by_hand(prompt, 3) for prompt in PROMPTS]
    assert graph.calls[:9] == [(4, 8)] * 8 + [(4, 7)]


def test_a_graph_with_fixed_shapes_gives_the_same_texts():
    made, graph = runner(new=1, past=200, batch=1)
    made.max_new_tokens = 20
    assert [answer["text"] for answer in made(PROMPTS)] == [by_hand(prompt, 20) for prompt in PROMPTS]
    assert set(graph.calls) == {(1, 1)}


@pytest.mark.parametrize(
    "prompt", ["", "abc", "0123456789abcd", "0123456789abcde", "0123456789abcdef", "0123456789abcdef" * 40]
)
def test_a_full_context_drops_its_older_half(prompt):
    made, graph = runner(context_length=16)
    made.max_new_tokens = 50
    answer = made(prompt)
    assert answer["text"] == by_hand(prompt, 50, 16)
    assert answer.get("truncated", False) is (len(prompt) >= 16)
    assert max(size for _, size in graph.calls) <= 16


def test_dropping_context_of_one_text_does_not_affect_others():
    made, _ = runner(context_length=16)
    made.max_new_tokens = 50
    prompts = ["", "abc", "0123456789abcdef" * 40]
    assert [answer["text"] for answer in made(prompts)] == [by_hand(prompt, 50, 16) for prompt in prompts]


def test_texts_in_a_batch_end_independently():
    made, _ = runner()
    made.max_new_tokens = 30
    wanted = by_hand("a", 30)
    made.stop = (wanted[3:5],)
    first, second = made(["a", "bcd"])
    assert (first["text"], first["reason"]) == (wanted[: wanted.index(wanted[3:5])], "stop")
    assert second["text"] == by_hand("bcd", 30).split(wanted[3:5])[0]


def test_a_text_is_the_same_alone_and_in_a_batch():
    made, _ = runner()
    made.temperature, made.max_new_tokens = 1.0, 20
    together = made(["a", "b", "a"])
    assert together[0] == together[2] == made("a")
    made.seed = 1
    assert made("a") != together[0]


def test_streamed_pieces_add_up_to_the_answer():
    made, _ = runner()
    made.max_new_tokens = 30
    assert "".join(made.written("abc")) == "abc" + made("abc")["text"]


@pytest.mark.parametrize("batch", ["batch", 2])
def test_nll_of_each_token_in_a_window_matches_a_known_graph(batch):
    made, graph = runner(batch=batch)
    tokens = np.random.default_rng(0).integers(4, 260, (5, 12))
    for row in tokens:
        for t in (1, 2, 5, 8, 11):  # these are predicted
            row[t] = follower(row[:t])
    found = made.nll(tokens)
    base = np.log(np.exp(1) + len(BYTES) - 1)
    for row, nats in zip(tokens, found, strict=True):
        right = [follower(row[: t + 1]) == row[t + 1] for t in range(11)]
        np.testing.assert_allclose(nats, base - np.array(right), rtol=1e-6)
    assert [shape[1] for shape in graph.calls[:2]] == [7, 4]


def test_logits_of_many_windows_are_computed_in_groups(monkeypatch):
    made, graph = runner()
    tokens = np.random.default_rng(0).integers(4, 260, (5, 13))
    together = made.nll(tokens)
    monkeypatch.setattr(language, "LOGITS", 2 * 7 * len(BYTES))
    graph.calls.clear()
    np.testing.assert_array_equal(made.nll(tokens), together)
    assert [rows for rows, _ in graph.calls] == [2, 2, 2, 2, 1, 1]


def test_nll_is_the_same_with_a_graph_of_fixed_shapes():
    tokens = np.random.default_rng(0).integers(4, 260, (3, 7))
    fixed, free = runner(new=1, past=16, batch=1)[0], runner()[0]
    np.testing.assert_allclose(fixed.nll(tokens), free.nll(tokens))


def test_nll_uses_a_past_with_unused_room_as_generation_does():
    """Otherwise the score would not reveal a graph that wrongly attends to unused room."""
    for width in (2, 3, 2 * language.GROWTH - 1, 2 * language.GROWTH, 2 * language.READ, 3 * language.READ):
        made, graph = runner(context_length=width)
        made.nll(np.full((1, width + 1), 97))
        assert len(graph.unused) > 1
        assert all(graph.unused[1:])


GOOD = {"inputs": "a", "parameters": {"max_new_tokens": 2, "temperature": 0, "stop": ["zz"], "seed": 3}}


def test_a_request_overrides_the_runners_settings():
    made, _ = runner()
    made.temperature = 1.0
    assert made(GOOD)["text"] == by_hand("a", 2)
    assert made.forms["sagemaker"](made(GOOD)) == {"generated_text": by_hand("a", 2)}
    assert made({"inputs": "a", "parameters": {"max_new_tokens": np.int64(2), "temperature": np.float32(0)}}) == made(
        GOOD
    )


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("temperature", math.nan, "temperature: nan; expected a number from 0 to 100"),
        ("temperature", "1", "temperature: '1'; expected a number"),
        ("top_p", 5, "top_p: 5; expected a number from 0.001 to 1"),
        ("top_k", 2.5, "top_k: 2.5; expected a whole number from 0"),
        ("repetition_penalty", 0, "repetition_penalty: 0; expected"),
        ("max_new_tokens", -1, "max_new_tokens: -1; expected a whole number from 1"),
        ("seed", -1, "seed: -1; expected a whole number"),
    ],
)
def test_invalid_settings_of_the_runner_are_refused(name, value, complaint):
    made, _ = runner()
    setattr(made, name, value)
    with pytest.raises(UserError, match=re.escape(complaint)):
        made("a")


def test_a_path_stands_for_the_text_or_request_in_its_file(tmp_path):
    made, _ = runner()
    made.max_new_tokens = 3
    (tmp_path / "request.json").write_text(json.dumps(GOOD, indent=1))
    assert made(tmp_path / "request.json") == made(GOOD)
    (tmp_path / "text.txt").write_text("a\nb")
    assert made(tmp_path / "text.txt") == made("a\nb")
    (tmp_path / "requests.jsonl").write_text(2 * f"{json.dumps(GOOD)}\n")
    with pytest.raises(UserError, match=r"requests\.jsonl: 2 inputs; expected one, several are given as a list"):
        made(tmp_path / "requests.jsonl")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (3, "input: int; expected a text or a request"),
        (None, "input: NoneType"),
        (["a"], "input: list"),
        ({}, "expected only inputs, a text"),
        ({"inputs": 3}, "expected only inputs, a text"),
        ({"inputs": "a", "more": 1}, "expected only inputs, a text"),
        ({"inputs": "a", "parameters": []}, "parameters: \\[\\]; expected some of max_new_tokens"),
        ({"inputs": "a", "parameters": {"beams": 3}}, "expected some of max_new_tokens"),
        ({"inputs": "a", "parameters": {"temperature": -1}}, "temperature: -1; expected a number from 0 to 100"),
        ({"inputs": "a", "parameters": {"temperature": "hot"}}, "temperature: 'hot'; expected a number"),
        ({"inputs": "a", "parameters": {"temperature": float("nan")}}, "temperature: nan; expected a number from 0"),
        ({"inputs": "a", "parameters": {"temperature": True}}, "temperature: True; expected a number"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "max_new_tokens: 0; expected a whole number from 1"),
        ({"inputs": "a", "parameters": {"top_k": 1.5}}, "top_k: 1.5; expected a whole number from 0"),
        ({"inputs": "a", "parameters": {"top_p": 0}}, "top_p: 0; expected a number from 0.001 to 1"),
        ({"inputs": "a", "parameters": {"repetition_penalty": 0}}, "repetition_penalty: 0; expected"),
        ({"inputs": "a", "parameters": {"seed": -1}}, "seed: -1; expected a whole number"),
        ({"inputs": "a", "parameters": {"stop": [3]}}, "stop: \\[3\\]; expected texts"),
        ({"inputs": "a", "parameters": {"stop": [""]}}, "stop: \\[''\\]; expected texts"),
        ({"inputs": "a", "parameters": {"seed": 10**5000}}, "seed: Exceeds the limit"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 1 << 30}}, "max_new_tokens: 1073741824; expected a whole"),
        ("half of a pair: \ud83d", "input: half of a surrogate pair, or not UTF-8"),
    ],
)
def test_invalid_requests_are_refused(source, complaint):
    made, _ = runner()
    with pytest.raises(UserError, match=complaint):
        made(source if not isinstance(source, list) else [source])


def test_files_hold_one_prompt_or_one_request_per_line(tmp_path):
    made, _ = runner()
    made.max_new_tokens = 2
    (tmp_path / "prompt.txt").write_text("two\nlines\n")
    (tmp_path / "requests.jsonl").write_text('{"inputs": "a"}\n{"inputs": 3}\n')
    (tmp_path / "broken.txt").write_bytes(b"abc\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "request.json").write_text('{\n"inputs": "a"\n}\n')
    (tmp_path / "torn.txt").write_text('{"inputs": "a"}\n{"inputs": "b"\n')
    (tmp_path / "list.jsonl").write_text("no object\n")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "blank.txt").write_text('\n{"inputs": "a"}\n\n{"inputs": 3}\n')
    with gzip.open(tmp_path / "list.jsonl.gz", "wt") as file:
        file.write("no object\n")

    def answers(name):
        return list(made.stream([source for _, source in made.inputs(str(tmp_path / name))]))

    assert answers("prompt.txt")[0]["text"] == by_hand("two\nlines\n", 2)
    first, second = answers("requests.jsonl")
    assert first["text"] == by_hand("a", 2)
    assert f"{tmp_path}/requests.jsonl:2: " in str(second)
    assert "byte 3" in str(answers("broken.txt")[0])
    assert answers("empty.txt")[0]["text"] == by_hand("", 2)
    assert answers("request.json")[0]["text"] == by_hand("a", 2)
    first, second = answers("torn.txt")
    assert first["text"] == by_hand("a", 2)
    assert str(second).startswith(f"{tmp_path}/torn.txt:2: ")
    for name in ("list.jsonl", "list.jsonl.gz"):
        assert str(answers(name)[0]).startswith(f"{tmp_path}/{name}:1: 'no object'; expected one JSON object")
    assert str(answers("empty.jsonl")[0]).startswith(f"{tmp_path}/empty.jsonl:1: ''; expected one JSON object")
    first, second = answers("blank.txt")
    assert first["text"] == by_hand("a", 2)
    assert str(second).startswith(f"{tmp_path}/blank.txt:4: ")


def character(**changes):
    return {"kind": "character", "exact": True, "tokens": ["<pad>", "<unk>", "<s>", "</s>", "a"]} | changes


@pytest.mark.parametrize(
    ("metadata", "shape", "complaint"),
    [
        ({"context_length": "8"}, {}, "metadata context_length, tokenizer"),
        ({"context_length": 1}, {}, "metadata context_length, tokenizer"),
        ({"tokenizer": None}, {}, "tokeniser of kind None"),
        ({"tokenizer": {"kind": "word", "tokens": character()["tokens"]}}, {}, "bytes, characters or byte pairs"),
        ({"tokenizer": {"kind": "bpe", "exact": True, "model": "{}"}}, {}, "okeniser"),
        ({"tokenizer": character(tokens=["a"])}, {}, "okeniser"),
        ({"tokenizer": character(tokens=[*character()["tokens"], "\ud800"])}, {}, "okeniser"),
        ({}, {"key_0": ["batch", "heads", "past", 1]}, "heads and widths fixed"),
        ({}, {"key_0": ["batch", 2]}, "four axes"),
        ({}, {"tokens": None}, "inputs tokens, back"),
    ],
)
def test_invalid_metadata_or_graph_inputs_are_refused(metadata, shape, complaint):
    graph = Counting()
    graph.shape = {name: size for name, size in (graph.shape | shape).items() if size}
    known = {"tokenizer": {"kind": "byte", "exact": True}, "context_length": 16}
    with pytest.raises(UserError, match=complaint):
        make_runner("language", {"decode": graph}, known | metadata)


def test_logits_of_another_vocabulary_size_are_refused():
    known = {"tokenizer": character(), "context_length": 16}
    with pytest.raises(UserError, match="expected logits of 5 tokens"):
        make_runner("language", {"decode": Counting()}, known)("a")


def test_outputs_with_unexpected_names_are_refused():
    made, graph = runner()
    made.decode = lambda **inputs: {"output": graph(**inputs)["logits"]}
    made.decode.shape = graph.shape
    with pytest.raises(UserError, match="expected logits of 260 tokens"):
        made("a")


def test_the_size_of_a_request_counts_its_past_over_prompt_and_new_tokens():
    made, _ = runner()
    made.max_new_tokens = 100
    assert made.size(made.read("abc")) == 104 * 2 * 2 * 2


def test_composed_and_decomposed_letters_are_equal_but_ligatures_are_not():
    tokenizer = make_tokenizer({"kind": "word", "tokens": [*SPECIAL, "nai\u0308f", "\ufb01x"]})
    assert tokenizer.encode("na\u00eff nai\u0308f \ufb01x fix") == [4, 4, 5, UNKNOWN]  # a ligature is another word


def test_of_two_equivalent_words_in_a_vocabulary_the_first_is_used():
    tokenizer = make_tokenizer({"kind": "word", "tokens": [*SPECIAL, "na\u00efve", "nai\u0308ve", "x"]})
    assert tokenizer.encode("na\u00efve nai\u0308ve x") == [4, 4, 6]
    with pytest.raises(UserError, match="expected unique tokens"):
        make_tokenizer({"kind": "word", "tokens": [*SPECIAL, "x", "x"]})


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}])
def test_non_finite_logits_fail_only_their_own_text(settings):
    made, graph = runner()
    whole = Counting.__call__

    def broken(tokens, **inputs):
        answer = whole(graph, tokens, **inputs)
        answer["logits"][(tokens == BYTES.encode("b")[0]).any(axis=1)] = np.nan
        return answer

    broken.shape = graph.shape
    made.decode = broken
    for name, value in (settings | {"max_new_tokens": 2}).items():
        setattr(made, name, value)
    good, bad = made.stream(["a", "b"])
    assert good["new_tokens"] == 2
    assert "logits that are not finite" in str(bad)
    with pytest.raises(UserError, match="not finite"):
        made.nll(np.array([[END, BYTES.encode("b")[0], 5, 6]]))


def test_exact_byte_pairs_spell_the_encoded_text():
    tokenizer = make_tokenizer(make_exact(["def f(x):\n    return x\n"] * 3, "bpe", 300))
    text = " \tdef <s>  ü\u0301\r\n\n"
    assert b"".join(tokenizer.spelling[token] for token in tokenizer.encode(text)).decode() == text
