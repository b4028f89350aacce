"""Hidden activations for LeNet-5, AlexNet, GoogLeNet and the ResNets, selected by name.

`docs/plot_activations.py` plots them all. Each works element by element and so keeps its input's shape. Softmax
is plotted with them but cannot be selected: it normalises over the units of a layer (Bridle, 1990), which suits
an output layer but not a hidden one. The losses and runners apply it to the networks' logits.

Legend of shapes: `...` any shape.
"""

from functools import reduce
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Step(nn.Module):
    """The threshold unit: 1 where x > 0, else 0 (McCulloch & Pitts, 1943; Rosenblatt, 1958).

    Its gradient is zero everywhere, so the layers below it cannot learn by gradient descent. It is included to
    show this.
    """

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return 0 or 1 for each element, with the dtype and shape of `x`."""
        # Not (x > 0).to(x.dtype): a comparison is not differentiable, so backward would fail instead of giving zeros.
        return torch.sign(torch.relu(x))


class Maxout(nn.Module):
    """The maximum of k learned affine functions of x: max_j (a_j x + b_j) (Goodfellow et al., 2013, section 3).

    The paper's unit takes the maximum of k affine maps of the whole layer below, z_j = w_j · v + c_j, which needs
    k times the weights. Here the k maps share one direction, the unit's own pre-activation x = w · v + c, and
    differ only in slope and offset. All units share the k slopes and offsets, like the single slope of `nn.PReLU`.
    The result is the learned convex, piecewise-linear activation of the paper's figure 1.

    Args:
        pieces: k, the number of linear pieces.
    """

    def __init__(self, pieces: int = 2) -> None:
        super().__init__()
        # Start from tangents of a smooth ReLU (the parabola (x + 1)² / 4 between -1 and 1), so that each piece is the
        # maximum somewhere and learns. The smallest slope is not 0, so that the gradient is nonzero for every input.
        # With k = 2 this is a leaky ReLU, raised by less than 0.01.
        slopes = torch.linspace(0.01, 1, pieces)
        self.weight = nn.Parameter(slopes)
        self.bias = nn.Parameter(slopes * (1 - slopes))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return max_j (a_j x + b_j), in the shape of `x`."""
        # Pairwise, not over a stacked dimension, which would lose the channels-last layout.
        return reduce(torch.maximum, [a * x + b for a, b in zip(self.weight, self.bias, strict=True)])


# No module works in place, so the caller's tensor is not modified. torch.compile saves the memory by fusion anyway.
ACTIVATIONS = {
    "identity": nn.Identity,
    "step": Step,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,  # Nair & Hinton, 2010
    "leaky_relu": nn.LeakyReLU,  # Maas et al., 2013: slope 0.01 below zero
    "prelu": nn.PReLU,  # He et al., 2015, equation 1: the slope is learned, starting at 0.25
    "elu": nn.ELU,  # Clevert et al., 2016
    "silu": nn.SiLU,  # x sigmoid(x): Elfwing et al., 2018; "swish" in Ramachandran et al., 2017
    "maxout": Maxout,
}
ActivationName = Literal[tuple(ACTIVATIONS)]


def make_activation(name: ActivationName) -> nn.Module:
    """Return a new activation module, with its own parameters if it has any.

    Raises:
        ValueError: `name` is not an `ActivationName`.
    """
    if name == "softmax":
        raise ValueError("softmax is for the output only: it normalises over a layer's units; see ActivationName")
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()
