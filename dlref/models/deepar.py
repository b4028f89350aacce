"""DeepAR: D. Salinas, V. Flunkert and J. Gasthaus, "DeepAR: Probabilistic Forecasting with Autoregressive Recurrent
Networks", 2017.

One recurrent network serves all series (section 3, figure 2). At each time step it reads earlier values of the series,
divided by the series' scale, and the covariates of the step, and outputs the parameters of the distribution of the
value at that step. The inputs are those of GluonTS: values at several lags (the paper uses only the last value),
calendar features and age, the logarithm of the scale, and an embedding of each category.

Legend of shapes: B series, T time steps, L lags, F features per time step, G categories, Y rows of the state (one per
layer of a GRU, two per layer of an LSTM), D cells, P parameters of the distribution.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlref.models.precision import without_autocast
from dlref.models.recurrent import CELLS, RecurrentLayers


class DeepAR(nn.Module):
    """h_t = h(h_{t-1}, inputs_t) and theta_t = theta(h_t) (equation 1).

    Args:
        lags: L.
        features: F: calendar, age, static and dynamic features together.
        cardinality: number of values of each of the G categories.
        parameters: P, number of parameters of the distribution.
        cell: type of the recurrent layers.
        num_layers: number of recurrent layers.
        num_cells: D.
        dropout: dropout probability of the outputs of each layer except the last.
        embedding_dimension: size of each category's embedding; by default half the number of its values, at most 50.

    Raises:
        ValueError: `cell` is not one of those listed.
    """

    class_layers = ("embeddings", "head")

    def __init__(
        self,
        lags: int,
        features: int,
        cardinality: list[int] | None = None,
        parameters: int = 3,
        cell: Literal["lstm", "gru"] = "lstm",
        num_layers: int = 2,
        num_cells: int = 40,
        dropout: float = 0.1,
        embedding_dimension: int | None = None,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"no cell {cell!r}: expected {', '.join(CELLS)}")
        cardinality = cardinality or []
        self.embeddings = nn.ModuleList(
            nn.Embedding(values, embedding_dimension or min(50, (values + 1) // 2)) for values in cardinality
        )
        static = sum(table.embedding_dim for table in self.embeddings) + 1
        self.rnn = RecurrentLayers(cell, lags + features + static, num_cells, num_layers, dropout=dropout)
        self.head = nn.Linear(num_cells, parameters)

    def forward(
        self,
        lagged: Float[Tensor, "B T L"],
        features: Float[Tensor, "B T F"],
        categories: Int[Tensor, "B G"],
        scale: Float[Tensor, "B"],
        state: Float[Tensor, "Y B D"] | None = None,
    ) -> tuple[Float[Tensor, "B T P"], Float[Tensor, "Y B D"]]:
        """Return the raw parameters at each time step, not yet mapped to their domains, and the state after the last.

        `lagged` holds values divided by `scale`. `state=None` stands for all zeros.
        """
        # Not unbind: if there are no categories, torch.export would save a program that it cannot load.
        columns = range(categories.shape[1])
        embedded = [table(categories[:, i]) for table, i in zip(self.embeddings, columns, strict=True)]
        static = torch.cat([*embedded, scale.log()[:, None]], dim=1)
        static = static[:, None].expand(-1, lagged.shape[1], -1)
        outputs, after = self.rnn(torch.cat([lagged, features, static], dim=2), state)
        with without_autocast(outputs):  # bfloat16 would round a location to steps of up to 0.8% of the series' level
            return self.head(outputs.to(self.head.weight.dtype)), after
