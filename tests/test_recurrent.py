"""Recurrent layers: equality with torch's own, and cuDNN's requirements, checked without a GPU."""

import pytest
import torch
from torch import nn

from dlref.models import DeepAR, Seq2Seq
from dlref.models.recurrent import CELLS, RecurrentLayers
from dlref.models.seq2seq import Bidirectional

TOKENS = torch.arange(27) * 5 % 8 + 1
SOURCE, LENGTHS, TARGET = TOKENS[:15].reshape(3, 5), torch.tensor([5, 3, 1]), TOKENS[15:].reshape(3, 4)


@pytest.mark.parametrize("cell", CELLS)
def test_stacked_layers_match_torchs_layer_of_the_same_depth(cell):
    mine, own = RecurrentLayers(cell, 3, 4, 2), CELLS[cell](3, 4, 2, batch_first=True)
    own.load_state_dict(
        {name.replace("_l0", f"_l{i}"): value for i in (0, 1) for name, value in mine.layers[i].state_dict().items()}
    )
    inputs, before = torch.randn(2, 7, 3), torch.randn(mine.rows, 2, 4)
    outputs, after = mine(inputs, before)
    expected, last = own(inputs, (before[::2], before[1::2]) if cell == "lstm" else before)
    torch.testing.assert_close(outputs, expected)
    if cell == "lstm":
        last = torch.stack(last, dim=1).flatten(0, 1)
    torch.testing.assert_close(after, last)
    torch.testing.assert_close(mine(inputs)[0], mine(inputs, torch.zeros_like(before))[0])


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_applies_only_between_layers(cell):
    """With a dropout of 1, the second layer receives zeros and the first its whole input."""
    layers, inputs = RecurrentLayers(cell, 3, 4, 2, dropout=1.0).train(), torch.randn(2, 7, 3)
    outputs, after = layers(inputs)
    torch.testing.assert_close(outputs, layers.layers[1](torch.zeros(2, 7, 4))[0])
    of_first = layers.layers[0](inputs)[0][:, -1]
    torch.testing.assert_close(after[0], of_first)
    both, lengths = Bidirectional(cell, 3, 4, 2, residual=False, dropout=1.0).train(), torch.tensor([7, 4])
    there = torch.arange(7) < lengths[:, None]
    one, other = (both(torch.randn(2, 7, 3), lengths, there)[0] for _ in range(2))
    torch.testing.assert_close(one, other)  # the output depends only on the lengths
    given = []
    both.ahead[0].register_forward_pre_hook(lambda layer, arguments: given.append(arguments[0]))
    both(inputs, lengths, there)
    assert torch.equal(given[0], inputs)


def states_given(network: nn.Module) -> list[torch.Tensor]:
    """Return a list that is filled with every initial state given to the network's recurrent layers."""
    given = []

    def note(layer, arguments):
        for tensor in arguments[1:]:
            given.extend(tensor if isinstance(tensor, tuple) else [tensor])

    for module in network.modules():
        if isinstance(module, nn.RNNBase):
            module.register_forward_pre_hook(note)
    return given


@pytest.mark.parametrize("input_feeding", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_states_are_contiguous_as_cudnn_requires(cell, num_layers, input_feeding):
    """cuDNN refuses states that are not contiguous."""
    network = Seq2Seq(9, 9, cell, num_layers, 6, 4, input_feeding=input_feeding)
    given = states_given(network)
    network(SOURCE, LENGTHS, TARGET)
    memory = network.encode(SOURCE, LENGTHS)
    _, after, _ = network.step(TARGET[:, :2], memory.state[:, :, None].repeat(1, 1, 2, 1), memory)
    network.step(TARGET[:, 2:], after, memory)
    states = [state for state in given if state is not None]
    assert len(states) > num_layers
    assert all(state.is_contiguous() for state in states)


@pytest.mark.parametrize("cell", CELLS)
def test_torchs_recurrent_layers_have_no_dropout_of_their_own(cell):
    """cuDNN would set up a dropout state, and synchronise, after each seed."""
    for network in (DeepAR(4, 2, cell=cell), Seq2Seq(9, 9, cell, 2, 6, 4)):
        layers = [module for module in network.modules() if isinstance(module, nn.RNNBase)]
        assert layers
        assert all(layer.dropout == 0 for layer in layers)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_layers_stay_float32_under_autocast(cell):
    """Autocast on a GPU would run them in float16 without loss scaling, and some CPUs lack bfloat16."""
    network = Seq2Seq(9, 9, cell, 2, 6, 4).eval()
    seen = []
    for module in network.modules():
        if isinstance(module, nn.RNNBase):
            module.register_forward_hook(lambda layer, given, answer: seen.append((given[0].dtype, answer[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(SOURCE, LENGTHS, TARGET)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), network(SOURCE, LENGTHS, TARGET), atol=0.02, rtol=0.02)
