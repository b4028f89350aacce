"""DeepAR: D. Salinas, V. Flunkert and J. Gasthaus, "DeepAR: Probabilistic Forecasting with Autoregressive Recurrent
Networks", 2017.

One recurrent network for all series (section 3, figure 2): at each time it sees earlier values of its series, divided
by the series' scale, and what is known of that time, and answers the parameters of the distribution of the next value.
The inputs are GluonTS's: values at several lags where the paper has the last one, calendar features and age, the
logarithm of the scale, and an embedding of each category.

Legend of shapes: B series, T times, L lags, F features of a time, G categories, Y rows of the state (one a layer of a
GRU, two of an LSTM), D cells, P parameters of the distribution.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlref.models.recurrent import CELLS, RecurrentLayers


class DeepAR(nn.Module):
    """h_t = h(h_{t-1}, inputs_t) and theta_t = theta(h_t) (equation 1).

    Args:
        lags: L.
        features: F: calendar, age and dynamic features together.
        cardinality: for each of the G categories the number of its values.
        parameters: P, before they are brought to their domains.
        cell: what a layer is made of.
        num_layers: recurrent layers.
        num_cells: D.
        dropout: probability of dropping an output of a layer, between layers.
        embedding_dimension: length of a category's embedding; by default half of its values, 50 at most.

    Raises:
        ValueError: `cell` is none of those listed.
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
        """Return the parameters of each time, not yet in their domains, and the state after the last one.

        `lagged` are values divided by `scale`. A state of None is all zeros.
        """
        # Not unbind: without categories, torch.export would save a program that it cannot load.
        columns = range(categories.shape[1])
        embedded = [table(categories[:, i]) for table, i in zip(self.embeddings, columns, strict=True)]
        static = torch.cat([*embedded, scale.log()[:, None]], dim=1)
        static = static[:, None].expand(-1, lagged.shape[1], -1)
        outputs, after = self.rnn(torch.cat([lagged, features, static], dim=2), state)
        return self.head(outputs), after
