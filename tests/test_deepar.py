"""DeepAR's network: continued states, parameter counts, and equations written out."""

import pytest
import torch
from torch.nn import functional as F

from dlref.models import DeepAR


def inputs(batch=3, times=7, lags=4, features=2, cardinality=(5, 3)):
    categories = torch.stack([torch.randint(0, values, (batch,)) for values in cardinality], dim=1)
    return torch.randn(batch, times, lags), torch.randn(batch, times, features), categories, torch.rand(batch) + 0.5


@pytest.mark.parametrize(("cell", "layers"), [("lstm", 4), ("gru", 2)])
def test_continuing_from_a_state_gives_the_outputs_of_a_single_call(cell, layers):
    """The first four times at once, then time by time as in sampling."""
    network = DeepAR(4, 2, [5, 3], cell=cell).eval()
    lagged, features, categories, scale = inputs()
    with torch.no_grad():
        whole, last = network(lagged, features, categories, scale)
        state, parts = None, []
        for time in ((0, 4), (4, 5), (5, 6), (6, 7)):
            part, state = network(lagged[:, slice(*time)], features[:, slice(*time)], categories, scale, state)
            parts.append(part)
    assert whole.shape == (3, 7, 3)
    assert last.shape == (layers, 3, 40)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_one_layer_follows_the_equations_of_an_lstm():
    network = DeepAR(2, 1, [4], num_layers=1, num_cells=5, embedding_dimension=3).eval()
    lagged, features, categories, scale = inputs(1, 3, 2, 1, (4,))
    h = c = torch.zeros(5)
    rnn, expected = network.rnn.layers[0], []
    for t in range(3):
        static = torch.cat([network.embeddings[0].weight[categories[0, 0]], scale[:1].log()])
        x = torch.cat([lagged[0, t], features[0, t], static])
        gates = rnn.weight_ih_l0 @ x + rnn.bias_ih_l0 + rnn.weight_hh_l0 @ h + rnn.bias_hh_l0
        i, f, g, o = gates.split(5)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        expected.append(F.linear(h, network.head.weight, network.head.bias))
    found, _ = network(lagged, features, categories, scale)
    torch.testing.assert_close(found[0], torch.stack(expected))


def test_parameter_count_is_the_sum_of_the_parts():
    """Two layers of 40 cells over 40 lags, 5 features, 10 categories embedded in 5 and the scale; 3 parameters."""
    network = DeepAR(40, 5, [10])
    wide = 40 + 5 + 5 + 1
    layers = 4 * 40 * (wide + 40 + 2) + 4 * 40 * (40 + 40 + 2)
    assert sum(p.numel() for p in network.parameters()) == 10 * 5 + layers + 40 * 3 + 3


def test_a_network_without_categories_works_and_depends_on_the_scale():
    network = DeepAR(4, 2).eval()
    lagged, features, _, scale = inputs()
    none = torch.zeros(3, 0, dtype=torch.long)
    one, _ = network(lagged, features, none, scale)
    other, _ = network(lagged, features, none, scale * 10)
    assert one.shape == (3, 7, 3)
    assert not torch.allclose(one, other)


def test_dropout_is_applied_by_the_recurrent_layers():
    assert DeepAR(4, 2, dropout=0.4).rnn.dropout.p == 0.4


def test_the_distributions_parameters_stay_float32_under_autocast():
    network = DeepAR(2, 3, cell="gru", num_layers=1, num_cells=4).eval()
    given = torch.rand(2, 5, 2), torch.rand(2, 5, 3), torch.zeros(2, 0, dtype=torch.long), torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        raw, _ = network(*given)
    assert torch.equal(raw, network(*given)[0])


def test_an_unknown_cell_is_refused(unchecked):
    with pytest.raises(ValueError, match="no cell 'rnn': expected lstm, gru"):
        DeepAR(4, 2, cell="rnn")
