"""A heat map of attention: where each token of an answer looked. Needs matplotlib, which a device need not have."""

import numpy as np
from PIL import Image

from dlref.runtime.errors import UserError

CELL = 0.28  # inches


def heat_map(weights: np.ndarray, source: list[str], target: list[str]) -> Image.Image:
    """A picture of weights (T, S) from 0 to 1: a row for each token of the target, a column for each of the source.

    Raises UserError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("attention is drawn by matplotlib; expected it to be installed") from None
    figure = Figure(figsize=(2 + CELL * len(source), 1.5 + CELL * len(target)), dpi=110, layout="constrained")
    draw_attention(figure.subplots(), weights, source, target)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def draw_attention(axes, weights: np.ndarray, source: list[str], target: list[str]) -> None:
    """The same, into axes of matplotlib."""
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), list(map(literal, source)), rotation=90, fontsize=8)
    axes.set_yticks(range(len(target)), list(map(literal, target)), fontsize=8)


def literal(token: str) -> str:
    """A token as it is, with nothing that matplotlib takes for mathematics, or leaves out of a legend."""
    text = token.strip().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
