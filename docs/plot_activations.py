"""Draw every activation of `dlref.models.activations` with its derivative.

python docs/plot_activations.py    # writes docs/images/activations.png
"""

from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from dlref.models.activations import ActivationName, Maxout, make_activation

IMAGE = Path(__file__).parent / "images" / "activations.png"
INK, VALUE, SLOPE, FRAME = "#222222", "#1f5fa8", "#d1652a", "#d8d8d8"
DASHES = (0, (4, 2))
NOTES = {
    "identity": "x",
    "step": "1 if x > 0, else 0",
    "sigmoid": "1 / (1 + exp(-x))",
    "tanh": "2 sigmoid(2x) - 1",
    "relu": "max(0, x)",
    "leaky_relu": "max(0.01x, x)",
    "prelu": "max(ax, x), a learned from 0.25",
    "elu": "x, below zero exp(x) - 1",
    "silu": "x sigmoid(x), also called swish",
    "maxout": "the maximum of 3 learned lines",
    "softmax": "output only; of the logits (x, 0)",
}


class Softmax(nn.Module):
    """Softmax of the logits (x, 0): the first of its two probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        """Return exp(x) / (exp(x) + 1) for each x."""
        return torch.softmax(torch.stack([x, torch.zeros_like(x)]), dim=0)[0]


def trained_maxout() -> Maxout:
    """Return a maxout of three lines as training may find them; an untrained maxout looks like leaky ReLU."""
    maxout = Maxout(pieces=3)
    maxout.load_state_dict({"weight": torch.tensor([-0.6, 0.3, 1.1]), "bias": torch.tensor([-1.0, 0.2, -0.9])})
    return maxout


def draw(ax: Axes, name: str, activation: nn.Module) -> None:
    """Draw one panel: the activation and its derivative, computed by autograd."""
    x = torch.linspace(-4, 4, 1600, requires_grad=True)
    y = activation(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    ax.axhline(0, color=FRAME, linewidth=0.8, zorder=0)
    ax.axvline(0, color=FRAME, linewidth=0.8, zorder=0)
    ax.plot(x.detach(), slope, color=SLOPE, linewidth=1.6, linestyle=DASHES, label="derivative", zorder=3)
    ax.plot(x.detach(), y.detach(), color=VALUE, linewidth=2, label="value")
    ax.set_title(name, loc="left", fontsize=12, fontweight="bold", color=INK, pad=20)
    ax.text(0, 1.04, NOTES[name], transform=ax.transAxes, fontsize=9, color="#666666")
    ax.set(xlim=(-4, 4), ylim=(-1.5, 2.5), xticks=range(-4, 5, 2), yticks=range(-1, 3))
    ax.tick_params(labelsize=8, length=0, colors="#666666")
    ax.spines[:].set_color(FRAME)


def main() -> None:
    """Draw the figure."""
    gallery = {name: make_activation(name) for name in get_args(ActivationName)}
    gallery |= {"maxout": trained_maxout(), "softmax": Softmax()}
    figure, axes = plt.subplots(3, 4, figsize=(11, 8.2), sharex=True, sharey=True, layout="constrained")
    figure.get_layout_engine().set(hspace=0.08, wspace=0.04, h_pad=0.08)
    *panels, legend = axes.flat
    for ax, (name, activation) in zip(panels, gallery.items(), strict=True):
        draw(ax, name, activation)
    panels[7].tick_params(labelbottom=True)  # nothing is drawn below it
    legend.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    legend.legend(handles[::-1], labels[::-1], loc="center", frameon=False, fontsize=11)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=120)


if __name__ == "__main__":
    main()
