"""Translation: loss, scheduled sampling, training, graphs against PyTorch, requests at the edge."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from PIL import Image
from sacrebleu import corpus_bleu, corpus_chrf
from test_detection import fit
from test_targets import SUMMING, Summing
from test_tasks import sgd
from torch.nn import functional as F

from dlref.data import PairFiles, SyntheticDates
from dlref.data.pairs import Batch
from dlref.data.vocabulary import make_vocabulary
from dlref.export.convert import Plan, convert, is_calibrated, is_quantised
from dlref.export.graph import example_at, write_onnx
from dlref.export.targets import TARGETS
from dlref.export.verify import Reference, parity
from dlref.models import Seq2Seq
from dlref.models.seq2seq import Memory
from dlref.runtime import UserError, make_runner
from dlref.runtime.attention import draw_attention, heat_map
from dlref.runtime.bundle import OnnxGraph
from dlref.runtime.decoding import beam_search
from dlref.runtime.runner import plain
from dlref.runtime.text import BEGIN, END, PAD, SPECIAL, UNKNOWN
from dlref.tasks import EMA, Translator
from dlref.tasks.deployable import Graph
from dlref.tasks.translation import WIDEST, bleu, chrf, exact_match

LETTERS = make_vocabulary(["abcdefghijklmnopqrstuvwxyzü .", "0123456789-"], "character", 100)
SIZE = len(LETTERS["tokens"])
SIZES = {"hidden_size": 16, "embedding_size": 16, "dropout": 0.0}


def translator(too_long="error", longest=40, network=None, **task):
    network = network or {}
    task = Translator(**{"network": Seq2Seq(64, 64, **SIZES | network), "optimizer": sgd} | task)
    vocabularies = {"source_vocabulary": LETTERS, "target_vocabulary": LETTERS}
    task.remember({**vocabularies, "longest": longest, "longest_answer": 12})
    task.too_long = too_long
    return task.eval()


def batch_of(*pairs):
    """Return a batch of pairs of texts, like those of a data module."""
    tokens = {token: number for number, token in enumerate(LETTERS["tokens"])}
    sources = [[*(tokens[c] for c in source), END] for source, _ in pairs]
    targets = [[BEGIN, *(tokens[c] for c in target), END] for _, target in pairs]

    def padded(rows):
        length = max(map(len, rows))
        return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])

    return Batch(padded(sources), padded(targets), *zip(*pairs, strict=True))


PAIRS = (("ab", "xyz"), ("abcdefg", "y"), ("c", "zzzz"))


def test_the_loss_covers_only_real_tokens_and_the_known_vocabulary():
    task, batch = translator(label_smoothing=0.0), batch_of(*PAIRS)
    task.log = lambda *arguments, **options: None
    loss = task.training_step(batch, 0)
    total, count = 0.0, 0
    for i, (source, target) in enumerate(PAIRS):
        before, after = batch.target[i : i + 1, : len(target) + 1], batch.target[i, 1 : len(target) + 2]
        length = torch.tensor([len(source) + 1])
        logits = task.network(batch.source[i : i + 1, :length], length, before)[0, :, :SIZE]
        total += F.cross_entropy(logits, after, reduction="sum")
        count += len(after)
    torch.testing.assert_close(loss, total / count)
    smoothed = translator(label_smoothing=0.1)
    smoothed.load_state_dict(task.state_dict())
    smoothed.log = task.log
    logits = task(batch, batch.target[:, :-1]).log_softmax(2)
    real = (batch.target[:, 1:] != PAD).float()
    expected = 0.9 * loss + 0.1 * -(logits.mean(2) * real).sum() / real.sum()
    torch.testing.assert_close(smoothed.training_step(batch, 0), expected)


def test_a_training_loss_is_counted_by_its_number_of_real_tokens():
    """Devices weigh their shares of a batch by this number."""
    task, said = translator(), []
    task.log_train_loss = lambda loss, count: said.append(int(count)) or loss
    task.training_step(batch_of(*PAIRS), 0)
    assert said == [sum(len(target) + 1 for _, target in PAIRS)]


def judged(task, *pairs):
    """Evaluate these pairs and return the mean loss and the accuracy of the evaluation so far."""
    task.translate, task.runner = lambda *_: {}, lambda *_: None
    task.judge(batch_of(*pairs), 1)
    return task.nll.compute().item(), task.accuracy.compute().item()


def test_padding_is_left_out_of_the_evaluation_loss_and_accuracy():
    task = translator()
    torch.nn.init.constant_(task.network.output.bias[LETTERS["tokens"].index("z")], 9.0)  # predicts only z
    together, alone = judged(task, *PAIRS), []
    for pair in PAIRS:
        task.nll.reset()
        task.accuracy.reset()
        alone.append(judged(task, pair))
    expected = np.average(alone, axis=0, weights=[len(target) + 1 for _, target in PAIRS])
    assert together == pytest.approx(expected, rel=1e-5)
    assert together[1] == pytest.approx(5 / 11)


def test_the_loss_is_reset_between_evaluations(monkeypatch):
    task, logged = translator(), []
    task.log_dict = lambda values, **_: logged.append(values)
    monkeypatch.setattr("dlref.tasks.translation.SCORES", {})
    for pairs in (PAIRS[:1], PAIRS, PAIRS[:1]):
        judged(task, *pairs)
        task.log_evaluation("val")
    assert logged[0] == logged[2] != logged[1]


def test_validation_decodes_greedily_and_test_and_predict_use_the_beam():
    task, seen = translator(beam=3), []
    task.judge = lambda batch, beam: seen.append(beam)
    task.validation_step(None, 0)
    task.test_step(None, 0)
    task.runner, task.translate = lambda batch, beam: seen.append(beam), lambda *_: []
    task.predict_step(None, 0)
    assert seen == [1, 3, 3]


def test_predict_marks_cut_sources_and_outputs_without_an_end_like_the_bundle():
    task = translator(too_long="truncate", longest=5)
    torch.nn.init.constant_(task.network.output.bias[END], -100.0)  # never ends
    batch = batch_of(("abcd", "a"), ("abcd", "a"), ("ab", "a"))
    texts = ["abcdefgh", "abcd", "ab"]  # the first is cut, the second just fits
    found = task.predict_step(batch._replace(sources=texts), 0)
    assert [(one.get("truncated"), one["ended"]) for one in found] == [(True, False), (None, False), (None, False)]
    assert found == [plain(answer) for answer in task.runner(batch, task.beam)(texts)]


def test_an_empty_translation_has_whole_numbers_for_tokens():
    task = translator()
    torch.nn.init.constant_(task.network.output.bias[END], 100.0)  # ends at once
    answer = task.runner(batch_of(*PAIRS), 1)("ab")
    assert (answer["target"], answer["tokens"].dtype, answer["tokens"].shape) == ("", np.int64, (0,))
    assert answer["attention"].shape == (0, 3)  # no row for the end


def test_the_evaluation_loss_ignores_label_smoothing():
    plain, smoothed = translator(label_smoothing=0.0), translator(label_smoothing=0.3)
    smoothed.load_state_dict(plain.state_dict())
    assert judged(smoothed, *PAIRS) == judged(plain, *PAIRS)


class Progress:
    """A trainer that has reached a given step."""

    estimated_stepping_batches = 10

    def __init__(self, step):
        self.global_step = step


def test_scheduled_sampling_uses_the_networks_own_tokens_increasingly(monkeypatch):
    task, batch = translator(scheduled_sampling=1.0), batch_of(*PAIRS)
    before = batch.target[:, :-1]
    monkeypatch.setattr(Translator, "trainer", Progress(0))
    assert torch.equal(task.mixed(batch, before), before)
    monkeypatch.setattr(Translator, "trainer", Progress(10))
    mixed = task.mixed(batch, before)
    own = task(batch, before).argmax(2)
    assert torch.equal(mixed[:, 0], before[:, 0])
    real = before[:, 1:] != PAD
    assert torch.equal(mixed[:, 1:][real], own[:, :-1][real])
    assert (mixed[:, 1:][~real] == PAD).all()
    monkeypatch.setattr(Translator, "trainer", Progress(5))
    many = batch_of(*PAIRS * 200)
    swapped = task.mixed(many, many.target[:, :-1])[:, 1:] != many.target[:, 1:-1]
    assert 0.4 < swapped[many.target[:, 1:-1] != PAD].float().mean() < 0.55


def test_scheduled_sampling_requires_a_run_of_known_length(monkeypatch):
    """Without a known length, the share of sampled tokens would stay 0."""
    task = translator(scheduled_sampling=0.5)
    monkeypatch.setattr(Translator, "trainer", SimpleNamespace(estimated_stepping_batches=math.inf))
    with pytest.raises(UserError, match="scheduled_sampling needs a run of known length"):
        task.configure_optimizers()


def numbers(folder):
    """Pairs of number words as sources; their digits, followed by the reversed digits, as targets."""
    words = ["null", "eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun"]
    rows = [f"{a} {b}\t{i} {j} {j} {i}\n" for i, a in enumerate(words) for j, b in enumerate(words)]
    path = folder / "numbers.tsv"
    path.write_text("".join(rows))
    return PairFiles(str(path), str(path), tokenizer="character", batch_size=400)


@pytest.mark.filterwarnings("ignore:.* are among those of train")
@pytest.mark.parametrize("options", [{}, {"cell": "gru", "attention": "dot", "input_feeding": True}])
def test_a_translator_trains_tests_predicts_and_draws_figures(tmp_path, options):
    network = Seq2Seq(64, 64, hidden_size=32, embedding_size=32, dropout=0.0, **options)
    adam = partial(torch.optim.Adam, lr=0.01)
    task, data = Translator(network=network, optimizer=adam, beam=3, metric="exact_match"), numbers(tmp_path)
    trainer = fit(tmp_path, task, data, max_epochs=60, check_val_every_n_epoch=30)
    (results,) = trainer.test(task, datamodule=data, verbose=False)
    assert results["test/exact_match"] >= 0.95
    assert results["test/bleu"] > 90
    assert results["test/chrf"] > 90
    assert results["test/perplexity"] == pytest.approx(math.exp(results["test/loss"]), rel=1e-5)
    assert results["test/accuracy"] > 0.95
    task.draw(tmp_path / "figures")
    for name in ("attention", "by_length"):
        with Image.open(tmp_path / f"figures/{name}.png") as figure:
            assert np.asarray(figure.convert("L")).std() > 5
    table = (tmp_path / "figures/samples.md").read_text()
    assert "BLEU" in table
    assert "|version:" in table
    assert "| null null | 0 0 0 0 | 0 0 0 0 |" in table
    (first, *_), *_ = trainer.predict(task, datamodule=data)
    assert set(first) == {"target", "log_probability"}


@pytest.mark.filterwarnings("ignore:.* are among those of train")
def test_a_fit_with_ema_leaves_averaged_weights(tmp_path):
    """Checkpoint averaging: after a fit, the network holds averaged weights instead of the last ones."""

    class Last(Callback):
        def on_train_batch_end(self, trainer, task, *rest):
            seen.append(task.network.output.bias.detach().clone())

    seen = []
    task, data = translator(), numbers(tmp_path)
    task.facts.clear()
    fit(tmp_path, task, data, max_epochs=3, callbacks=[Last(), EMA(decay=0.5)])
    weights = torch.stack(seen)
    assert not torch.equal(task.network.output.bias, weights[-1])
    assert (task.network.output.bias >= weights.min(0).values - 1e-6).all()
    assert (task.network.output.bias <= weights.max(0).values + 1e-6).all()


def test_scores_match_sacrebleu_and_degradation_is_in_points():
    texts, references = ["the cat sat", "a dog"], ["the cat sat down", "a dog"]
    assert bleu(texts, references) == corpus_bleu(texts, [references]).score
    assert exact_match(texts, references) == 0.5
    task = translator(metric="chrf")
    assert task.degradation(50.0, 49.0) == 1
    assert translator(metric="exact_match").degradation(0.9, 0.89) == pytest.approx(1)
    assert chrf(texts, references) == corpus_chrf(texts, [references]).score > 50


def test_graphs_declare_their_number_of_calls_and_the_longest_source():
    served = translator().deployable(batch_of(*PAIRS))
    assert served.graphs["step"].calls == 5  # of 5, 3 and 6 tokens
    assert {graph.sizes["source"][0] for graph in served.graphs.values()} == {40}


class Few(Seq2Seq):
    """A network with positions for 20 tokens."""

    def encode(self, source, lengths):
        return super().encode(source + torch.zeros(20, dtype=torch.long)[: source.shape[1]], lengths)


class Conditioned(Seq2Seq):
    """A decoder that reads the first state in each step (Cho et al. 2014), where only its own state is known."""

    def step(self, token, state, memory):
        return super().step(token, state + memory.state[:, :, None], memory)


class Unpacked(Seq2Seq):
    """A network whose encoder returns a plain tuple."""

    def encode(self, source, lengths):
        return tuple(super().encode(source, lengths))

    def forward(self, source, lengths, target):
        return self.decode(target, Memory(*self.encode(source, lengths)))


class Unattending(Seq2Seq):
    """A network whose attention lacks the axis of the hypotheses."""

    def step(self, token, state, memory):
        logits, after, attention = super().step(token, state, memory)
        return logits, after, attention[:, 0]


class BatchFirst(Seq2Seq):
    """A network whose encoder returns the state with the sentences as the first axis."""

    def encode(self, source, lengths):
        memory = super().encode(source, lengths)
        return memory._replace(state=memory.state.transpose(0, 1))

    def forward(self, source, lengths, target):
        memory = self.encode(source, lengths)
        return self.decode(target, memory._replace(state=memory.state.transpose(0, 1)))


class Mixed(Seq2Seq):
    """A network whose logits are also those of other tokens (axis 1), or of other sentences (axis 0)."""

    axis = 1

    def forward(self, *inputs):
        logits = super().forward(*inputs)
        return logits + logits.mean(self.axis, keepdim=True)


class Across(Mixed):
    axis = 0


class TimeFirst(Seq2Seq):
    """A network whose logits have the tokens as the first axis."""

    def forward(self, *inputs):
        return super().forward(*inputs).transpose(0, 1)


class Unmasked(Seq2Seq):
    """A network that reads padding like tokens."""

    def encode(self, source, lengths):
        return super().encode(source, torch.full_like(lengths, source.shape[1]))


CHANGED = "network's logits change with padding, later tokens or other sentences; expected them to depend on"


@pytest.mark.parametrize(
    ("network", "task", "complaint"),
    [
        (TimeFirst(64, 64, **SIZES), {}, "network returns [2, 13, 64]; expected logits (B, T, V)"),
        (Mixed(64, 64, **SIZES), {}, CHANGED),
        (Across(64, 64, **SIZES), {}, CHANGED),
        (Unmasked(64, 64, **SIZES), {}, CHANGED),
        (BatchFirst(64, 64, **SIZES), {}, "expected encode and step as docs/translation.md describes them"),
        (Conditioned(64, 64, **SIZES), {}, "expected encode and step as docs/translation.md describes them"),
        (Unpacked(64, 64, **SIZES), {}, "'tuple' object has no attribute 'values'"),
        (Unattending(64, 64, **SIZES), {}, "next state and attention have other axes; expected encode and step"),
        (Seq2Seq(20, 64, **SIZES), {}, f"source_vocabulary: {SIZE}, target_vocabulary: {SIZE}"),
        (Seq2Seq(64, 20, **SIZES), {}, f"target_vocabulary: {SIZE}"),
        (torch.nn.Linear(3, 3), {}, "network rejects"),
        (Few(64, 64, **SIZES), {}, "and room for 21 and 9 tokens"),
        (Seq2Seq(64, 64, **SIZES), {"beam": 17}, "beam: 17; expected 1 to 16"),
        (Seq2Seq(64, 64, **SIZES), {"beam": 0}, "beam: 0"),
        (Seq2Seq(64, 64, **SIZES), {"length_penalty": -1.0}, "length_penalty: -1.0; expected 0 to 10"),
        (Seq2Seq(64, 64, **SIZES), {"label_smoothing": 10.0}, "label_smoothing: 10.0; expected a share, 0 to 1"),
        (Seq2Seq(64, 64, **SIZES), {"scheduled_sampling": 30.0}, "scheduled_sampling: 30.0; expected a share"),
    ],
)
def test_a_network_or_option_that_does_not_fit_is_refused(network, task, complaint, unchecked):
    task = Translator(network=network, optimizer=sgd, **task)
    facts = {"source_vocabulary": LETTERS, "target_vocabulary": LETTERS}
    task.remember({**facts, "longest": 9, "longest_answer": 9})
    task.too_long = "error"
    with pytest.raises(UserError) as caught:
        task.check()
    assert complaint in str(caught.value)


# Graphs

NETWORKS = [
    {},
    {"cell": "gru", "attention": "mlp"},
    {"encoder": "unidirectional", "attention": "none", "num_layers": 2},
    {"encoder": "convolutional", "attention": "dot", "cell": "gru", "initial": "avg"},
    {"input_feeding": True, "tied": True, "num_layers": 2, "residual": True, "attention": "general", "initial": "zero"},
]


@pytest.fixture(scope="module", params=range(len(NETWORKS)))
def exported(request, tmp_path_factory):
    """Return a task's deployment, its graphs in onnxruntime and the folder of their files."""
    torch.manual_seed(request.param)
    task = translator(network=NETWORKS[request.param])
    served = task.deployable(batch_of(*PAIRS))
    folder = tmp_path_factory.mktemp("graphs")
    graphs = {}
    for name, graph in served.graphs.items():
        write_onnx(graph, folder / f"{name}.onnx", TARGETS["cpu"])
        graphs[name] = OnnxGraph(folder / f"{name}.onnx", "CPUExecutionProvider")
    return served, graphs, folder


def test_graphs_match_pytorch_at_sizes_not_used_in_tracing(exported):
    served, graphs, _ = exported
    for name, graph in served.graphs.items():
        rows = parity(name, graph, Reference(graph), graphs[name], graph.tolerance, static=False)
        assert len({tuple(row["shape"]["source"]) for row in rows}) >= 4
        assert max(row["max_abs_error"] for row in rows) < 1e-4
    for sizes in ({"batch": 5, "source": 61}, {"batch": 1, "source": 2}):
        inputs = {key: tensor.numpy() for key, tensor in example_at(served.graphs["encode"], sizes).items()}
        for key, expected in served.graphs["encode"](**inputs).items():
            np.testing.assert_allclose(graphs["encode"](**inputs)[key], expected, atol=1e-5)


def test_the_example_request_in_a_bundles_description_is_accepted(exported):
    served, graphs, _ = exported
    runner = make_runner("translation", graphs, served.metadata)
    shown = re.search(r"`(\{.*\})`", runner.takes(served.metadata))[1].replace("text", '"abc"').replace(", ...", "")
    assert len(runner(json.loads(shown))["predictions"]) == 1


@pytest.mark.parametrize("beam", [1, 5])
def test_pytorch_and_the_bundle_find_the_same_translations(exported, beam):
    served, graphs, _ = exported
    texts = ["abc", "a", "xyz def ghi jkl", "ü.", "the quick brown fox", "abc"] * 3
    answers = []
    for runs in (served.graphs, graphs):
        runner = make_runner("translation", runs, served.metadata)
        runner.beam = beam
        answers.append(runner(texts))
    for one, other in zip(*answers, strict=True):
        assert one["target"] == other["target"]
        assert one["log_probability"] == pytest.approx(other["log_probability"], abs=1e-4)
        np.testing.assert_allclose(one["attention"], other["attention"], atol=1e-5)
    assert answers[1][0]["target"] == answers[1][5]["target"]


@pytest.mark.parametrize("beam", [1, 5])
def test_a_translation_has_the_log_probability_that_its_tokens_have_in_one_call(beam):
    task, batch = translator(), batch_of(*PAIRS)
    found = task.runner(batch, beam).search([[token for token in row if token != PAD] for row in batch.source.tolist()])
    for i, one in enumerate(found):
        target = torch.tensor([[BEGIN, *one.tokens, *[END] * one.ended]])
        alone = Batch(batch.source[i : i + 1], target)
        nll = F.cross_entropy(task(alone, target[:, :-1])[0], target[0, 1:], reduction="sum")
        assert one.log_probability == pytest.approx(-nll.item(), abs=1e-4)


def test_the_step_graph_never_predicts_padding_or_the_begin_token():
    step = translator().deployable(batch_of(*PAIRS)).graphs["step"]
    answers = step(**{name: tensor.numpy() for name, tensor in step.inputs.items()})
    likely = answers["log_probability"] > -np.inf
    assert not np.isin(answers["next_token"][likely], [PAD, BEGIN]).any()


def test_step_probabilities_are_normalised_over_the_known_vocabulary():
    """The network has more outputs than there are tokens; the extra logits mean nothing."""
    task = translator()
    with torch.no_grad():
        task.network.output.bias[SIZE:] = 5.0
    step = task.deployable(batch_of(*PAIRS)).graphs["step"]
    found = step(**{name: tensor.numpy() for name, tensor in step.inputs.items()})
    known = step.inputs
    memory = Memory(known["values"], known["keys"], known["source"] != PAD, known["state"][:, :, 0])
    with torch.no_grad():
        logits, _, _ = task.network.step(known["token"], known["state"], memory)
    expected = logits[..., :SIZE].log_softmax(2).gather(2, torch.from_numpy(found["next_token"]))
    np.testing.assert_allclose(found["log_probability"], expected, atol=1e-5)


class Ending:
    """A step that ends the translations of sources of two tokens and no others."""

    def __init__(self, step):
        self.step, self.shape, self.lengths = step, step.shape, []

    def __call__(self, source, **known):
        length = (source != PAD).sum(1)
        self.lengths.append(length.tolist())
        answer = self.step(source=source, **known)
        token = np.where(length == 2, END, 4)[:, None, None]
        return answer | {"next_token": np.broadcast_to(token, answer["next_token"].shape)}


def test_each_sentence_keeps_its_own_memory():
    served = translator(beam=1).deployable(batch_of(*PAIRS))
    step = Ending(served.graphs["step"])
    make_runner("translation", served.graphs | {"step": step}, served.metadata)(["a", "abc"])
    assert step.lengths[:2] == [[2, 4], [4]]


def test_a_request_is_searched_32_sentences_of_similar_length_at_a_time():
    served = translator(beam=1).deployable(batch_of(*PAIRS))
    step = Ending(served.graphs["step"])
    asked = {"instances": [{"data": text} for text in ("abc", "a")] * 20}
    make_runner("translation", served.graphs | {"step": step}, served.metadata)(asked)
    assert step.lengths[0] == [2] * 20 + [4] * 12


def test_a_bundle_searches_with_the_beam_and_length_penalty_of_its_task(monkeypatch):
    def search(*arguments):
        seen.append(arguments[2:4])
        return beam_search(*arguments)

    seen = []
    monkeypatch.setattr("dlref.runtime.runners.translation.beam_search", search)
    for penalty in (0.0, 0.3, 10.0):
        served = translator(beam=3, length_penalty=penalty).deployable(batch_of(*PAIRS))
        make_runner("translation", served.graphs, served.metadata)("ab")
    assert seen == [(3, 0.0), (3, 0.3), (3, 10.0)]


def test_translations_are_the_same_with_several_workers(exported):
    served, graphs, _ = exported
    runner = make_runner("translation", graphs, served.metadata)
    texts = ["abc", "a", "xyz def ghi jkl", "ü.", "the quick brown fox"] * 9
    alone = [one["target"] for one in runner(texts)]
    runner.workers = 3
    assert [one["target"] for one in runner(texts)] == alone


def test_a_translator_is_exported_after_an_lstm_of_fixed_size(tmp_path):
    """torch compares a loop with what it has compiled of earlier exports, and that had failed."""
    layer, shape = SUMMING["LSTM"]
    fixed = Graph(Summing(layer).eval(), {"x": torch.ones(shape)}, ["y"], {}, {})
    encode = translator().deployable(batch_of(*PAIRS)).graphs["encode"]
    for name, graph in {"fixed": fixed, "encode": encode}.items():
        write_onnx(graph, tmp_path / f"{name}.onnx", TARGETS["cpu"])
        feeds = {key: tensor.numpy() for key, tensor in graph.inputs.items()}
        answer = OnnxGraph(tmp_path / f"{name}.onnx", "CPUExecutionProvider")(**feeds)
        for output, expected in graph(**feeds).items():
            np.testing.assert_allclose(answer[output], expected, atol=1e-5)


def test_int8_quantises_the_step_graph_and_keeps_probabilities_finite(exported, tmp_path):
    served, _, folder = exported
    for name, graph in served.graphs.items():
        # Graphs with convolutions are quantised with calibration data, all others without.
        plan = Plan("int8", "MinMax") if is_calibrated(folder / f"{name}.onnx", TARGETS["x86-64"]) else Plan("int8")
        feeds = [{key: tensor.numpy() for key, tensor in graph.inputs.items()}]
        convert(folder / f"{name}.onnx", tmp_path / f"{name}.onnx", TARGETS["x86-64"], plan, feeds)
    assert is_quantised(tmp_path / "step.onnx")
    graphs = {name: OnnxGraph(tmp_path / f"{name}.onnx", "CPUExecutionProvider") for name in served.graphs}
    answer = make_runner("translation", graphs, served.metadata)("abc")
    assert np.isfinite(answer["log_probability"])


def test_int16_quantisation_of_recurrent_layers_is_refused_for_an_npu(tmp_path):
    graph, target = translator().deployable(batch_of(*PAIRS)).graphs["step"], TARGETS["qualcomm"]
    write_onnx(graph, tmp_path / "step.onnx", target)
    assert not is_calibrated(tmp_path / "step.onnx", target)
    with pytest.raises(UserError, match="step: recurrent layers stay float32"):
        convert(tmp_path / "step.onnx", tmp_path / "int16.onnx", target, Plan("int16"), [])


class Fixed:
    """A graph whose sizes are fixed, like one compiled for a device."""

    def __init__(self, graph, sizes):
        self.graph = graph
        self.shape = {name: [sizes.get(size, size) for size in shape] for name, shape in graph.shape.items()}

    def __call__(self, **inputs):
        assert {name: list(array.shape) for name, array in inputs.items()} == self.shape
        return self.graph(**inputs)


@pytest.mark.parametrize(
    ("output", "value"), [("log_probability", np.nan), ("log_probability", np.inf), ("attention", np.nan)]
)
def test_non_finite_outputs_are_refused(output, value, runner, monkeypatch):
    step = runner.step

    def broken(**inputs):
        answer = step(**inputs)
        array = answer[output].copy()
        array.flat[-1] = value  # a single element
        return answer | {output: array}

    broken.shape = step.shape
    monkeypatch.setattr(runner, "step", broken)
    with pytest.raises(UserError, match="probabilities or attention that are not finite"):
        runner("abc")


@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_are_padded_to_the_fixed_sizes_of_a_graph(batch):
    served = translator().deployable(batch_of(*PAIRS))
    free = make_runner("translation", served.graphs, served.metadata)
    sizes = {"batch": batch, "source": 8, "beam": 5}
    graphs = {name: Fixed(graph, sizes) for name, graph in served.graphs.items()}
    fixed = make_runner("translation", graphs, served.metadata)
    for one, other in zip(free(["abc", "d"]), fixed(["abc", "d"]), strict=True):
        assert one["target"] == other["target"]
        assert one["attention"].shape == other["attention"].shape
    with pytest.raises(UserError, match="9 tokens; expected at most 7"):
        fixed("abcdefghi")
    graphs["step"].shape = graphs["step"].shape | {"token": ["batch"]}
    with pytest.raises(UserError, match="expected inputs source and token of two axes"):
        make_runner("translation", graphs, served.metadata)
    fixed.beam = 6
    with pytest.raises(UserError, match="beam: 6; expected a whole number from 1 to 5"):
        fixed("abc")


# Requests


@pytest.fixture(scope="module")
def runner():
    torch.manual_seed(0)
    served = translator().deployable(batch_of(*PAIRS))
    return make_runner("translation", served.graphs, served.metadata)


def test_an_answer_holds_the_translation_its_tokens_and_attention(runner):
    answer = runner("abc")
    assert set(answer) >= {"target", "log_probability", "tokens", "source_tokens", "attention"}
    assert answer["attention"].shape == (len(answer["tokens"]), 4)
    np.testing.assert_allclose(answer["attention"].sum(1), 1, rtol=1e-5)
    assert answer["target"] == "".join(LETTERS["tokens"][token] for token in answer["tokens"])
    assert runner(["abc", "b"])[0]["target"] == answer["target"]
    # The untrained network never ends the translation, so it reaches the maximum length and is marked as not ended.
    assert answer["ended"] is False
    assert len(answer["tokens"]) == runner.longest_answer
    assert runner.size(runner.read("abc")) == 4 * runner.beam * runner.longest_answer  # attention during the search


def test_a_sagemaker_request_gets_a_sagemaker_response(runner, tmp_path):
    asked = {"data": "abc", "configuration": {"attention_matrix": "true"}}
    answer = runner({"instances": [{"data": "abc"}, asked]})
    plain, matrix = answer["predictions"]
    assert set(plain) == {"target"}
    assert set(matrix) == {"target", "matrix"}
    assert plain["target"] == matrix["target"] == runner("abc")["target"]
    np.testing.assert_allclose(np.sum(matrix["matrix"], axis=1), 1, rtol=1e-5)
    json.dumps(answer)
    line = runner({"source": "abc"})
    assert runner.forms["sagemaker"](line) == {"target": plain["target"]}
    assert runner.forms["sagemaker"](answer) == answer
    (tmp_path / "request.json").write_text(json.dumps({"instances": [{"data": "abc"}]}, indent=1))
    ((_, source),) = runner.inputs(str(tmp_path / "request.json"))
    assert runner(source)["predictions"] == [plain]


def test_a_path_stands_for_the_single_text_or_request_in_its_file(runner, tmp_path):
    path = tmp_path / "a.txt"
    for text in ("abc", "abc\n", "abc\r\n\n", '{"source":\n "abc"}\n'):
        path.write_text(text)
        assert runner(path)["target"] == runner("abc")["target"]
    path.write_text("abc\nbca\n")
    with pytest.raises(UserError, match=r"a\.txt: 2 inputs; expected one, several are given as a list"):
        runner(path)


def test_files_hold_a_text_or_a_request_on_each_line(runner, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text('abc\n\n{"source": "abc"}\nno {json}\n')
    names, sources = zip(*runner.inputs(str(path)), strict=True)
    assert names == tuple(f"{path}:{number}" for number in range(1, 5))
    first, empty, line, braces = runner.stream(sources)
    assert first["target"] == line["target"] == runner("abc")["target"]
    assert str(empty) == f"{path}:2: empty; expected a text"
    assert "target" in braces
    ((name, source),) = runner.inputs("no such file")
    assert name == "no such file"
    assert runner.read(source) == runner.read("no such file")
    ((_, request),) = runner.inputs('{"source": "abc"}')
    assert runner(request)["target"] == first["target"]
    for missing in ("none.txt", "gone/lines.jsonl"):
        ((_, source),) = runner.inputs(missing)
        with pytest.raises(UserError, match=f"{missing}: No such file"):
            runner(source)


@pytest.mark.parametrize("text", ["日本語", "😀👍🏽", "\x00", "a\u2028b", "<pad>", "</s>", "\\n", "a" * 39, "\u0308"])
def test_any_text_gets_a_translation(runner, text):
    answer = runner(text)
    assert isinstance(answer["target"], str)
    assert UNKNOWN in answer["source_tokens"] or text == "a" * 39
    json.dumps(answer["target"])


BAD = [
    ("", "input: empty; expected a text"),
    (" \n\t ", "input: empty"),
    ("a " * 5000, "input: 9999 tokens; expected at most 39"),
    ("a" * 40, "input: 40 tokens; expected at most 39"),
    ("\ud800", "input: half of a surrogate pair"),
    (3, "input: int; expected a text or a request"),
    (None, "input: NoneType"),
    (b"abc", "input: bytes"),
    ({}, "input: {}; expected an object with source, a text"),
    ({"source": 3}, "input: {'source': 3}"),
    ({"source": ""}, "input: source: empty"),
    ({"source": "a", "beam": 3}, "expected only source and configuration"),
    ({"source": "a", "configuration": []}, "expected only source and configuration"),
    ({"source": "a", "configuration": {"beam": 1}}, "expected only source and configuration of attention_matrix"),
    ({"source": "a", "configuration": {"attention_matrix": 3}}, "attention_matrix: '3'; expected true or false"),
    ({"instances": []}, "input: instances: expected a list"),
    ({"instances": {}}, "input: instances: expected a list"),
    ({"instances": "abc"}, "input: instances: expected a list"),
    ({"instances": ["abc"]}, "input: instances[0]: 'abc'; expected an object with data, a text"),
    ({"instances": [{"data": "a"}, {"source": "a"}]}, "instances[1]: "),
    ({"instances": [{"data": ["a"]}]}, "instances[0]: "),
    ({"instances": [{"data": "a" * 50}]}, "instances[0]: 50 tokens"),
    ({"instances": [None]}, "instances[0]: None"),
]


@pytest.mark.parametrize(("source", "complaint"), BAD, ids=range(len(BAD)))
def test_invalid_requests_are_refused_in_one_line_that_says_what_was_expected(runner, source, complaint):
    (answer,) = runner.stream([source])
    assert isinstance(answer, UserError)
    assert complaint in str(answer)
    assert "expected" in str(answer)
    assert len(str(answer).splitlines()) == 1


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b'{"source": 1}', b'{"a"\n: 1}'])
def test_files_without_a_valid_request_are_refused(runner, tmp_path, content):
    path = tmp_path / "request.json"
    path.write_bytes(content)
    answers = list(runner.stream(source for _, source in runner.inputs(str(path))))
    assert any(isinstance(answer, UserError) and str(answer).startswith(str(path)) for answer in answers)
    with pytest.raises(UserError, match="Is a directory"):
        runner(tmp_path)


def test_long_texts_are_truncated_if_the_model_says_so_and_marked_in_the_answer():
    served = translator(too_long="truncate").deployable(batch_of(*PAIRS))
    runner = make_runner("translation", served.graphs, served.metadata)
    answer = runner("ab" * 5000)
    assert answer["truncated"] is True
    assert answer["target"] == runner(("ab" * 20)[:39])["target"]
    assert "truncated" not in runner("ab")


@pytest.mark.parametrize("beam", [WIDEST + 1, 0, "2"])
def test_an_invalid_beam_is_refused(beam, runner, monkeypatch):
    monkeypatch.setattr(runner, "beam", beam)
    with pytest.raises(UserError, match=f"beam: {beam}; expected a whole number from 1 to 16"):
        runner("abc")


@pytest.mark.parametrize(
    "changes",
    [
        {"source": None},
        {"target": {"kind": "word", "tokens": []}},
        {"longest": 0},
        {"longest_answer": -1},
        {"longest_answer": 10**9},
        {"too_long": "shorten"},
        {"beam": "5"},
        {"beam": 0},
        {"length_penalty": 1e4},
        {"length_penalty": math.nan},
        {"length_penalty": -1.0},
        {"source": {"kind": "word", "tokens": [[]]}},
        {"source": {"kind": "word", "tokens": [*SPECIAL, "\u00c5", "\u00c5"]}},
        {"widest": None},
        {"length_penalty": None},
        {"target": {"kind": "byte"}},  # a tokeniser for reading only
    ],
)
def test_invalid_metadata_or_graphs_are_refused(changes):
    served = translator().deployable(batch_of(*PAIRS))
    with pytest.raises(UserError, match="expected"):
        make_runner("translation", served.graphs, dict(served.metadata) | changes)
    with pytest.raises(UserError, match="not translation"):
        make_runner("translation", {"encode": served.graphs["encode"]}, served.metadata)


@pytest.mark.parametrize(("name", "missing"), [("encode", "source"), ("step", "token"), ("step", "state")])
def test_graphs_without_an_input_of_the_search_are_refused(name, missing):
    served = translator().deployable(batch_of(*PAIRS))
    graph = Fixed(served.graphs[name], {})
    del graph.shape[missing]
    with pytest.raises(UserError, match="expected graphs with inputs source, token and state"):
        make_runner("translation", served.graphs | {name: graph}, served.metadata)


def test_a_vocabulary_smaller_than_the_graphs_output_is_refused():
    task = translator()
    torch.nn.init.constant_(task.network.output.bias[SIZE - 1], 100.0)  # predicts only the last token
    served = task.deployable(batch_of(*PAIRS))
    few = {"kind": "character", "tokens": LETTERS["tokens"][:-1]}
    runner = make_runner("translation", served.graphs, dict(served.metadata) | {"target": few})
    with pytest.raises(UserError, match=f"expected a target vocabulary of more than {SIZE - 1} tokens"):
        runner("abc")


def test_attention_of_a_single_text_is_drawn(runner):
    picture = runner.draw("abc", runner("abc"))
    assert np.asarray(picture.convert("L")).std() > 5
    with pytest.raises(UserError, match="a request with instances cannot be drawn"):
        runner.draw("abc", runner({"instances": [{"data": "abc"}]}))
    nothing = {"attention": np.zeros((0, 4)), "source_tokens": np.arange(4), "tokens": np.zeros(0, int)}
    with pytest.raises(UserError, match="no output tokens; expected at least one"):
        runner.draw("abc", nothing)


def test_attention_is_drawn_for_characters_without_a_glyph():
    assert heat_map(np.eye(2), ["\x02", "漢"], ["a", "b"]).size > (100, 100)  # warnings are errors in the tests


def test_evaluate_scores_a_runner_by_its_translations():
    task = translator(metric="exact_match")
    batch = batch_of(*PAIRS)
    runner = task.runner(batch, 2)
    found = [one["target"] for one in runner([source for source, _ in PAIRS])]
    right = batch._replace(references=[found[0], "no", found[2]])
    assert task.evaluate(runner, [right]) == pytest.approx(2 / 3)
    # Training batches have no texts; their references are decoded from tokens.
    tokens = {token: number for number, token in enumerate(LETTERS["tokens"])}
    written = [[BEGIN, *(tokens[c] for c in text), END] for text in found]
    length = max(map(len, written))
    target = torch.tensor([row + [PAD] * (length - len(row)) for row in written])
    assert task.evaluate(runner, [batch._replace(target=target, sources=(), references=())]) == 1


def test_a_translator_is_tested_on_synthetic_dates_as_its_runner_translates_them(tmp_path):
    data = SyntheticDates(train=64, val=16, test=16, tokenizer="character", vocabulary_size=128, batch_size=512)
    network = Seq2Seq(128, 64, **SIZES)
    task = Translator(network=network, optimizer=sgd, metric="exact_match")
    trainer = fit(tmp_path, task, data)
    (results,) = trainer.test(task, datamodule=data, verbose=False)
    assert len(task.translated) == 16
    runner = task.runner(next(iter(data.test_dataloader())), task.beam)
    texts, targets = ([side[i] for i in range(16)] for side in data.splits["test"].texts)
    found = [answer["target"] for answer in runner(texts)]
    assert [task.translated[i].text for i in range(16)] == found
    assert results["test/exact_match"] == pytest.approx(exact_match(found, targets))


def test_attention_is_drawn_with_a_row_for_each_target_token():
    axes = Figure().subplots()
    draw_attention(axes, np.eye(2, 3), ["a", "b", "c"], ["x", "y"])
    assert axes.images[0].get_array().tolist() == np.eye(2, 3).tolist()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y"]
