"""Stacked recurrent layers for DeepAR and Seq2Seq.

Legend of shapes: B sequences, T time steps, I inputs, D hidden units, Y rows of the state: one per layer of a GRU, two
per layer of an LSTM (hidden state and cell state).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlref.models.precision import without_autocast

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentLayers(nn.Module):
    """Stacked recurrent layers, each of which processes all time steps in one call.

    Each layer is a module of its own. In a single module with several layers, cuDNN's dropout between layers would
    rebuild its generator's state after each seeding, which happens for every batch, and wait for it.

    Args:
        cell: lstm or gru.
        inputs: I.
        size: D.
        num_layers: number of layers.
        residual: add a layer's input, before dropout, to its output, from the second layer on (Wu et al. 2016, section
            3.1).
        dropout: dropout probability of the outputs of each layer except the last.
    """

    def __init__(
        self, cell: str, inputs: int, size: int, num_layers: int, residual: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [inputs] + [size] * (num_layers - 1)
        self.layers = nn.ModuleList(CELLS[cell](width, size, batch_first=True) for width in sizes)
        self.rows = num_layers * (2 if cell == "lstm" else 1)
        self.residual, self.dropout = residual, nn.Dropout(dropout)

    def forward(
        self, inputs: Float[Tensor, "B T I"], state: Float[Tensor, "Y B D"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "Y B D"]]:
        """Return the last layer's outputs and the state after the last step. `state=None` stands for all zeros."""
        outputs, after = inputs, []
        before = [None] * len(self.layers) if state is None else state.chunk(len(self.layers))
        for i, (layer, rows) in enumerate(zip(self.layers, before, strict=True)):
            below = self.dropout(outputs) if i else outputs
            above, last = run_layer(layer, below, rows)
            outputs = above + outputs if i and self.residual else above
            after.append(last)
        return outputs, torch.cat(after)


def run_layer(layer: nn.Module, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a layer from a state of one row, or two for an LSTM; None stands for zeros.

    The layer runs in the precision of its weights even under autocast. On a GPU, autocast would cast it to float16 even
    if bfloat16 was requested, and on a CPU without AVX-512, oneDNN has no LSTM in bfloat16.
    """
    lstm, precision = isinstance(layer, nn.LSTM), layer.weight_ih_l0.dtype
    before = None if state is None else state.to(precision)
    if lstm and before is not None:
        before = before[:1], before[1:]
    with without_autocast(inputs):
        outputs, after = layer(inputs.to(precision), before)
    return outputs, torch.cat(after) if lstm else after
