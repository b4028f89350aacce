"""The hidden activations that LeNet-5, AlexNet, GoogLeNet and the ResNets can be built with: one name, one module.

`docs/plot_activations.py` draws them all. Each squashes (or bends) one unit's pre-activation, element by
element, so it keeps its input's shape. Softmax is drawn with them but is not one of them: it compares the
units of a layer with each other (Bridle, 1990), which is what an output wants and a hidden layer does not,
and the losses and runners apply it to the networks' logits.

Legend of shapes: `...` any shape.
"""

from functools import reduce
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Step(nn.Module):
    """The threshold unit: 1 where x > 0, else 0 (McCulloch & Pitts, 1943; Rosenblatt, 1958).

    Its gradient is zero everywhere, so nothing below it learns by gradient descent: that is its place in
    the gallery.
    """

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return 0 or 1 in the type of `x`, in its shape."""
        # Not (x > 0).to(x.dtype): that leaves the graph, and backward would fail where it should give zeros.
        return torch.sign(torch.relu(x))


class Maxout(nn.Module):
    """The greatest of k learned lines of x: max_j (a_j x + b_j) (Goodfellow et al., 2013, section 3).

    The paper's unit takes the greatest of k linear maps of the whole layer below, z_j = w_j · v + c_j, with
    k times the weights. Here the maps share one direction, the unit's own pre-activation x = w · v + c, and
    differ in slope and offset only; the k slopes and offsets are shared over all units, like `nn.PReLU`'s
    single slope. What remains is the paper's figure 1: a learned convex, piecewise-linear activation.

    Args:
        pieces: k, the number of lines.
    """

    def __init__(self, pieces: int = 2) -> None:
        super().__init__()
        # Tangents of a smooth ReLU (the parabola (x + 1)² / 4 between -1 and 1), so that every line is the
        # greatest somewhere and learns. The least slope is not 0, so that no input stops the gradient; with
        # k = 2 this is leaky ReLU, raised by less than 0.01.
        slopes = torch.linspace(0.01, 1, pieces)
        self.weight = nn.Parameter(slopes)
        self.bias = nn.Parameter(slopes * (1 - slopes))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return max_j (a_j x + b_j), in the shape of `x`."""
        # Pairwise, not over a stacked dimension: that would lose the channels-last layout.
        return reduce(torch.maximum, [a * x + b for a, b in zip(self.weight, self.bias, strict=True)])


# No module works in place: a caller's tensor stays as it was, and torch.compile fuses the saving back in.
ACTIVATIONS = {
    "identity": nn.Identity,
    "step": Step,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,  # Nair & Hinton, 2010
    "leaky_relu": nn.LeakyReLU,  # Maas et al., 2013: slope 0.01 below zero
    "prelu": nn.PReLU,  # He et al., 2015, equation 1: that slope is learned, from 0.25
    "elu": nn.ELU,  # Clevert et al., 2016
    "silu": nn.SiLU,  # x sigmoid(x): Elfwing et al., 2018; "swish" in Ramachandran et al., 2017
    "maxout": Maxout,
}
ActivationName = Literal[tuple(ACTIVATIONS)]


def make_activation(name: ActivationName) -> nn.Module:
    """Return a new module, with its own parameters if it has any, that keeps its input's shape.

    Raises:
        ValueError: `name` is not an `ActivationName`.
    """
    if name == "softmax":
        raise ValueError("softmax is for the output only: it makes a layer's units compete; see ActivationName")
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()
