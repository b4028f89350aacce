"""A heat map of attention: where each token of an answer looked."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 26  # pixels
FONT = 14
INK = (8, 48, 107)


def heat_map(weights: np.ndarray, source: list[str], target: list[str]) -> Image.Image:
    """A picture of weights (T, S) from 0 to 1: a row for each token of the target, a column for each of the source."""
    font = ImageFont.load_default(FONT)
    left = max([CELL, *(int(font.getlength(name)) + 12 for name in target)])
    top = max([CELL, *(int(font.getlength(name)) + 12 for name in source)])
    shade = 1 - weights[..., None] * (1 - np.array(INK) / 255)
    cells = Image.fromarray((255 * shade).round().astype(np.uint8))
    picture = Image.new("RGB", (left + CELL * len(source) + 1, top + CELL * len(target) + 1), "white")
    if target:
        picture.paste(cells.resize((CELL * len(source), CELL * len(target)), Image.Resampling.NEAREST), (left, top))
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(target):
        pen.text((left - 6, top + CELL * (row + 0.5)), name, "black", font, anchor="rm")
    for column, name in enumerate(source):
        upright = Image.new("RGB", (top, CELL), "white")
        ImageDraw.Draw(upright).text((6, CELL / 2), name, "black", font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (left + CELL * column, 0))
    for i in range(max(len(source), len(target)) + 1):
        for start, end in (
            ((left + CELL * i, top), (left + CELL * i, picture.height)),
            ((left, top + CELL * i), (picture.width, top + CELL * i)),
        ):
            pen.line([start, end], (225, 225, 225))
    return picture
