"""Seq2Seq's network: steps against a single call, invariance to padding, and equations written out."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dlref.models import Seq2Seq
from dlref.models.recurrent import RecurrentLayers
from dlref.models.seq2seq import Attention, Bidirectional, Memory
from dlref.runtime.text import PAD

ENCODERS = ("bidirectional", "unidirectional", "convolutional")
ATTENTION = ("mlp", "dot", "general", "none")


def network(**options):
    sizes = {"hidden_size": 8, "embedding_size": 8, "dropout": 0.0}
    return Seq2Seq(11, 13, **sizes | options).eval()


def sentences(lengths=(5, 3, 1), target=6):
    source = torch.randint(4, 11, (len(lengths), max(lengths)))
    for row, length in zip(source, lengths, strict=True):
        row[length:] = PAD
    return source, torch.tensor(lengths), torch.randint(4, 13, (len(lengths), target))


@pytest.mark.parametrize(
    ("encoder", "attention", "cell"),
    [*product(ENCODERS, ATTENTION, ["lstm"]), *product(ENCODERS[:1], ATTENTION, ["gru"])],
)
@pytest.mark.parametrize("input_feeding", [False, True])
def test_decoding_step_by_step_matches_a_single_call(encoder, attention, cell, input_feeding):
    choices = {"encoder": encoder, "attention": attention, "cell": cell, "input_feeding": input_feeding}
    model = network(**choices, num_layers=2, residual=True)
    source, lengths, target = sentences()
    with torch.no_grad():
        whole = model(source, lengths, target)
        memory = model.encode(source, lengths)
        state, parts = memory.state[:, :, None], []
        for token in target.split(1, dim=1):
            logits, state, weights = model.step(token, state, memory)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert weights.shape == (3, 1, 5)


@pytest.mark.parametrize("input_feeding", [False, True])
def test_hypotheses_of_a_sentence_do_not_affect_each_other(input_feeding):
    model = network(input_feeding=input_feeding)
    source, lengths, target = sentences()
    memory = model.encode(source, lengths)
    state = torch.randn(len(memory.state), 3, 4, 8)
    together, after, _ = model.step(target[:, :4], state, memory)
    for k in range(4):
        alone, one, _ = model.step(target[:, k : k + 1], state[:, :, k : k + 1], memory)
        torch.testing.assert_close(alone[:, 0], together[:, k])
        torch.testing.assert_close(one[:, :, 0], after[:, :, k])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    ("attention", "initial"),
    [*product(ATTENTION, ["last", "avg"]), *product(ATTENTION[:3], ["zero"])],
)
def test_padding_changes_nothing(encoder, attention, initial):
    """A sentence alone and in a padded batch agrees within 1e-5, and the padding's content does not matter."""
    model = network(encoder=encoder, attention=attention, initial=initial, num_layers=2)
    source, lengths, target = sentences()
    with torch.no_grad():
        padded = model(source, lengths, target)
        garbage = source.clone()
        garbage[1, 3:], garbage[2, 1:] = 7, 9
        torch.testing.assert_close(model(garbage, lengths, target), padded, atol=1e-6, rtol=0)
        for i, length in enumerate(lengths):
            alone = model(source[i : i + 1, :length], lengths[i : i + 1], target[i : i + 1])
            torch.testing.assert_close(alone[0], padded[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ATTENTION[:3])
def test_attention_sums_to_one_over_real_tokens_only(attention):
    model = network(attention=attention)
    source, lengths, target = sentences()
    memory = model.encode(source, lengths)
    _, _, weights = model.step(target[:, :2], memory.state[:, :, None].repeat(1, 1, 2, 1), memory)
    torch.testing.assert_close(weights.sum(2), torch.ones(3, 2))
    for row, length in zip(weights, lengths, strict=True):
        assert (row[:, :length] > 0).all()
        assert (row[:, length:] == 0).all()


def test_attention_scores_follow_the_equations_of_the_papers():
    torch.manual_seed(1)
    query, values = torch.randn(1, 1, 4), torch.randn(1, 3, 4)
    for score in ATTENTION[:3]:
        attention = Attention(score, 4)
        memory = Memory(values, attention.key(values), torch.ones(1, 3, dtype=torch.bool), values[None, :, 0])
        expected = []
        for annotation in values[0]:
            if score == "mlp":
                inside = attention.query.weight @ query[0, 0] + attention.key.weight @ annotation + attention.key.bias
                expected.append(attention.score.weight[0] @ inside.tanh())
            elif score == "general":
                expected.append(query[0, 0] @ (attention.key.weight @ annotation))
            else:
                expected.append(query[0, 0] @ annotation)
        weights = torch.stack(expected).softmax(0)
        context, found = attention(query, memory)
        torch.testing.assert_close(found[0, 0], weights)
        torch.testing.assert_close(context[0, 0], weights @ values[0])


@pytest.mark.parametrize("layers", [RecurrentLayers, Bidirectional])
def test_dropout_does_not_apply_to_residual_connections(layers):
    """If the upper layers are zero, the output is that of the first layer, in training as well."""
    stack = layers("gru", 4, 8, 3, residual=True, dropout=0.5).train()
    for name, parameter in stack.named_parameters():
        if ".0." not in name:
            nn.init.zeros_(parameter)
    inputs, lengths = torch.randn(2, 5, 4), torch.tensor([5, 5])
    rest = (lengths, torch.ones(2, 5, dtype=torch.bool)) if layers is Bidirectional else ()
    outputs, _ = stack(inputs, *rest)
    expected, _ = stack.eval()(inputs, *rest)
    assert expected.abs().min() > 0
    torch.testing.assert_close(outputs, expected)


def test_dropout_is_applied_to_the_attentional_vector():
    model = network(dropout=0.5)
    source, lengths, _ = sentences()
    memory = model.encode(source, lengths)
    one, other = (model.train()._attend(torch.ones(3, 1, 8), memory)[0] for _ in range(2))
    assert (one == 0).any()
    assert not torch.equal(one, other)


@pytest.mark.parametrize("input_feeding", [False, True])
def test_dropout_is_applied_to_source_and_target_embeddings(input_feeding):
    model = network(input_feeding=input_feeding)
    source, lengths, target = sentences()
    dropped = []
    model.dropout.register_forward_pre_hook(lambda layer, arguments: dropped.append(arguments[0]))
    memory = model.encode(source, lengths)
    assert torch.equal(dropped.pop(), model.embed_source(source))
    model.decode(target, memory)
    assert torch.equal(dropped[0], model.embed_target(target))
    dropped.clear()
    model.step(target[:, :2], memory.state[:, :, None].repeat(1, 1, 2, 1), memory)
    assert torch.equal(dropped[0], model.embed_target(target[:, :2]))
    model.dropout.p = 1.0  # the dropped embeddings are those the encoder uses
    model.train()
    one, other = (model.encode(torch.randint(4, 11, source.shape), lengths).values for _ in range(2))
    assert torch.equal(one, other)


def test_dropout_in_the_convolutional_encoder_spares_the_residual():
    model = network(encoder="convolutional", num_layers=2)
    source, lengths, _ = sentences((4, 4))
    block = model.encoder.train()
    block.dropout.p = 1.0
    for layer in block.layers:
        nn.init.zeros_(layer.bias)
    inputs = model.embed_source(source)
    outputs, _ = block(inputs, lengths, torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(outputs, block.project(inputs) * 0.5)


@pytest.mark.parametrize(("cell", "rows"), [("lstm", 4), ("gru", 2)])
def test_the_initial_decoder_state_is_a_tanh_layer_of_the_last_annotations(cell, rows):
    model = network(cell=cell, num_layers=2)
    nn.init.normal_(model.bridge.weight, std=3.0)
    source, lengths, _ = sentences()
    mask = torch.arange(source.shape[1]) < lengths[:, None]
    _, last = model.encoder(model.embed_source(source), lengths, mask)
    flat = F.linear(last, model.bridge.weight, model.bridge.bias).tanh()
    expected = torch.stack([flat[:, 8 * row : 8 * row + 8] for row in range(rows)])
    torch.testing.assert_close(model.encode(source, lengths).state, expected)


def test_initial_embeddings_have_a_norm_of_about_one():
    model = Seq2Seq(400, 300, hidden_size=8, embedding_size=64)
    for table in (model.embed_source, model.embed_target):
        assert table.weight.std().item() == pytest.approx(1 / 8, rel=0.03)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_bidirectional_encoder_matches_torchs_with_packed_sequences(cell):
    ours = Bidirectional(cell, 6, 8, 2, residual=False, dropout=0.0)
    theirs = (nn.LSTM if cell == "lstm" else nn.GRU)(6, 4, 2, batch_first=True, bidirectional=True)
    for i in range(2):
        for name, parameter in ours.ahead[i].named_parameters():
            getattr(theirs, name.replace("l0", f"l{i}")).data.copy_(parameter)
        for name, parameter in ours.back[i].named_parameters():
            getattr(theirs, name.replace("l0", f"l{i}") + "_reverse").data.copy_(parameter)
    inputs, lengths = torch.randn(3, 5, 6), torch.tensor([5, 3, 1])
    there = torch.arange(5) < lengths[:, None]
    outputs, last = ours(inputs, lengths, there)
    packed, state = theirs(pack_padded_sequence(inputs, lengths, batch_first=True))
    expected, _ = pad_packed_sequence(packed, batch_first=True)
    torch.testing.assert_close(outputs.where(there[..., None], 0), expected)
    hidden = state[0] if cell == "lstm" else state
    torch.testing.assert_close(last, torch.cat([hidden[-2], hidden[-1]], dim=1))


def test_the_bidirectional_encoder_returns_the_last_annotation_of_each_direction():
    encoder = Bidirectional("gru", 8, 8, 2, residual=True, dropout=0.0)
    inputs, lengths = torch.randn(3, 5, 8), torch.tensor([5, 3, 1])
    outputs, last = encoder(inputs, lengths, torch.arange(5) < lengths[:, None])
    ends = outputs[torch.arange(3), lengths - 1]
    torch.testing.assert_close(last, torch.cat([ends[:, :4], outputs[:, 0, 4:]], dim=1))


def test_the_convolutional_encoder_follows_gehrings_block():
    model = network(encoder="convolutional", num_layers=1)
    source, lengths, _ = sentences((4,))
    block, inputs = model.encoder, model.embed_source(source)
    x = block.project(inputs)
    a, b = block.layers[0](x.transpose(1, 2)).transpose(1, 2).chunk(2, dim=2)
    torch.testing.assert_close(model.encode(source, lengths).values, (x + a * b.sigmoid()) * 0.5**0.5)


def test_parameter_count_is_the_sum_of_the_parts():
    """A bidirectional encoder of 2 × 4 cells, a decoder of 8 with input feeding, mlp attention, tied output."""

    def layer(inputs, size):
        return 4 * size * (inputs + size + 2)

    expected = 11 * 8 + 13 * 8 + 2 * layer(8, 4) + layer(8 + 8, 8)
    expected += (8 * 16 + 16) + (8 * 8 + 8) + 8 * 8 + 8 + 16 * 8 + 13
    model = network(input_feeding=True, tied=True)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.output.weight is model.embed_target.weight


def test_without_attention_the_decoder_depends_only_on_the_initial_state():
    """As in Sutskever et al.: the same initial state gives the same outputs for any source annotations."""
    model = network(attention="none", initial="last")
    source, lengths, target = sentences()
    memory = model.encode(source, lengths)
    other = memory._replace(values=torch.randn_like(memory.values), keys=torch.randn_like(memory.keys))
    torch.testing.assert_close(model.decode(target, memory), model.decode(target, other))


def test_input_feeding_passes_on_the_last_attentional_vector():
    model = network(input_feeding=True)
    source, lengths, target = sentences()
    memory = model.encode(source, lengths)
    logits, state, _ = model.step(target[:, :1], memory.state[:, :, None], memory)
    torch.testing.assert_close(F.linear(state[-1, :, 0], model.output.weight, model.output.bias), logits[:, 0])
    fed = state.clone()
    fed[-1] += 1
    one, *_ = model.step(target[:, 1:2], state, memory)
    other, *_ = model.step(target[:, 1:2], fed, memory)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "rnn"}, "no cell 'rnn': expected lstm, gru"),
        ({"encoder": "cnn"}, "no encoder 'cnn'"),
        ({"attention": "luong"}, "no attention 'luong'"),
        ({"initial": "first"}, "no initial 'first'"),
        ({"attention": "none", "initial": "zero"}, "initial zero with attention none"),
        ({"tied": True, "embedding_size": 4}, "embedding_size 4 with tied: expected hidden_size, 8"),
        ({"hidden_size": 7, "embedding_size": 7}, "expected an even number"),
    ],
)
def test_invalid_options_are_refused(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
