"""Heat maps of attention: where each output token looked. Needs matplotlib, which is optional on a device."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from dlref.runtime.errors import UserError

CELL = 0.28  # inches


def heat_map(weights: np.ndarray, source: list[str], target: list[str]) -> Image.Image:
    """Return a picture of weights (T, S) from 0 to 1: a row for each target token, a column for each source token.

    Raises UserError if `target` is empty or matplotlib is not installed.
    """
    if not target:
        raise UserError("no output tokens; expected at least one, to draw its attention")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("attention is drawn by matplotlib; expected it to be installed") from None
    figure = Figure(figsize=(2 + CELL * len(source), 1.5 + CELL * len(target)), dpi=110, layout="constrained")
    draw_attention(figure.subplots(), weights, source, target)
    canvas = FigureCanvasAgg(figure)
    with boxes_for_missing_glyphs():
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def draw_attention(axes, weights: np.ndarray, source: list[str], target: list[str]) -> None:
    """Draw the same heat map into matplotlib axes."""
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), list(map(literal, source)), rotation=90, fontsize=8)
    axes.set_yticks(range(len(target)), list(map(literal, target)), fontsize=8)


@contextmanager
def boxes_for_missing_glyphs() -> Iterator[None]:
    """Draw characters that the font lacks as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def literal(token: str) -> str:
    """Escape a token so that matplotlib neither reads it as mathematics nor leaves it out of a legend."""
    text = token.strip().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
