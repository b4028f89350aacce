"""Scenes of real handwritten digits whose boxes and masks are exact, for detection and for segmentation.

Scanned digits are drawn on textured backgrounds: no file is needed, and nothing is annotated by hand. Pixels are
integers throughout, so that a seed gives the same bytes on every machine (with the same version of Pillow).

N scenes with at most M digits, S the side of a scene; a pool of D digits. All lengths are in pixels. Internally, a
scene is (S, S, 3), as in Pillow.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

EMPTY = 0.05  # share of the scenes without a digit
SCALES = 0.15, 0.45  # smallest and largest side of a digit's 8 × 8 frame, as shares of the scene's side
OVERLAP = 0.3  # maximum overlap of two boxes, as a share of the smaller one's area
TRIES = 20  # places tried for a digit before it is left out
CONTRAST = 75, 115  # difference in luma, out of 255, between a digit and its background
OPAQUE = 128  # the opacity, out of 255, from which a pixel belongs to a digit
INKS = 6  # colours tried for a digit
ALIKE = 120  # sum of the three channels' differences below which two colours are hard to tell apart
TEXTURE = ((3, 44), (7, 22), (24, 14))  # cells of noise along a side, amplitude
GRAIN = 8  # amplitude of the noise of single pixels, which covers digits, too
STROKES = 6  # maximum number of strokes of clutter in a scene
LUMA = np.array([77, 150, 29])  # weights of red, green and blue, out of 256: ITU-R BT.601

Box = tuple[int, int, int, int]


class Scenes(NamedTuple):
    """Scenes with their digits in the order of drawing: a later digit covers an earlier one.

    A box is tight around all pixels of its digit, including those that a later digit covers; x2 and y2 are
    exclusive, so columns 10 to 19 are x1 = 10, x2 = 20.
    """

    images: Tensor  # uint8 (N, 3, S, S)
    boxes: Tensor  # float32 (N, M, 4), x1 y1 x2 y2 in pixels, zeros beyond the count
    labels: Tensor  # int64 (N, M), 0 to 9; -1 beyond the count
    masks: Tensor  # uint8 (N, S, S), 0 background, digit d as d + 1


def make_scenes(digits: Tensor, labels: Tensor, count: int, size: int, seed: int, most: int = 8) -> Scenes:
    """Draw scenes with digits from a pool. For one seed, a larger `count` only adds scenes at the end.

    Args:
        digits: the pool, uint8 (D, 8, 8), with high values for ink.
        labels: the classes of the digits in the pool, int64 (D,).
        count: scenes to draw.
        size: side of a scene in pixels, at least 16; digits are easy to read from 64 on.
        seed: seed of everything drawn at random.
        most: maximum number of digits in a scene.
    """
    # RandomState, as NumPy never changes its numbers; the global generators of NumPy and torch belong to the caller.
    rng = np.random.RandomState(seed)
    pool, classes = digits.numpy(force=True), labels.numpy(force=True)
    images = np.empty((count, size, size, 3), np.uint8)
    masks = np.zeros((count, size, size), np.uint8)
    boxes = np.zeros((count, most, 4), np.float32)
    found = np.full((count, most), -1, np.int64)
    for i in range(count):
        scene = _background(rng, size)
        drawn = _draw_digits(rng, pool, classes, scene, masks[i], _how_many(rng, most))
        images[i] = (scene + _noise(rng, size, size, GRAIN)).clip(0, 255)
        for j, (box, label) in enumerate(drawn):
            boxes[i, j], found[i, j] = box, label
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Scenes(*map(torch.from_numpy, (planes, boxes, found, masks)))


def below(rng: np.random.RandomState, stop: int) -> int:
    """Draw an integer from 0 to `stop` - 1."""
    return int(rng.randint(stop, dtype=np.int64))  # the default type, and with it the numbers, differ on Windows


def _how_many(rng: np.random.RandomState, most: int) -> int:
    empty = rng.random_sample() < EMPTY
    return 0 if empty or not most else 1 + below(rng, most)


def _background(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Draw a colour with noise at several scales and strokes over it, int16 (S, S, 3)."""
    scene = 35 + rng.randint(186, size=3, dtype=np.int64).astype(np.int16) + _strokes(rng, size)
    for cells, amplitude in TEXTURE:
        scene += _noise(rng, size, cells, amplitude)
    return scene.clip(0, 255)


def _noise(rng: np.random.RandomState, size: int, cells: int, amplitude: int) -> np.ndarray:
    """Draw colours on a grid of `cells` × `cells` and interpolate between them, int16 (S, S, 3)."""
    grid = Image.fromarray(rng.randint(256, size=(cells, cells, 3), dtype=np.uint8))
    smooth = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
    return (smooth - 128) * np.int16(amplitude) >> 7


def _strokes(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Draw bent strokes as differences of colour, int16 (S, S, 3), so that ink alone does not reveal a digit."""
    sheet = Image.new("RGB", (2 * size, 2 * size), (128, 128, 128))  # halved below, which smooths the edges
    pen = ImageDraw.Draw(sheet)
    for _ in range(below(rng, STROKES + 1)):
        start, bends = rng.random_sample((1, 2)), rng.random_sample((3, 2)) - 0.5
        path = (start + np.cumsum(bends * 0.6, 0)) * 2 * size
        colour = tuple(int(level) for level in 128 - 60 + rng.randint(121, size=3, dtype=np.int64))
        width = max(1, round(rng.uniform(0.01, 0.05) * 2 * size))
        pen.line([(int(x), int(y)) for x, y in path], colour, width, joint="curve")
    return np.asarray(sheet.reduce(2)).astype(np.int16) - 128


def _draw_digits(
    rng: np.random.RandomState, pool: np.ndarray, classes: np.ndarray, scene: np.ndarray, mask: np.ndarray, wanted: int
) -> list[tuple[Box, int]]:
    """Draw up to `wanted` digits into a scene (S, S, 3) and its mask (S, S); return their boxes and classes."""
    drawn: list[tuple[Box, int]] = []
    for _ in range(wanted):
        chosen = below(rng, len(pool))
        opacity = _opacity(pool[chosen], rng.uniform(*SCALES) * len(scene))
        place = _place(rng, opacity, len(scene), [other for other, _ in drawn])
        if place is None:
            continue
        (x, y), box = place
        window = slice(y, y + opacity.shape[0]), slice(x, x + opacity.shape[1])
        _blend(rng, scene[window], opacity)
        mask[window][opacity >= OPAQUE] = classes[chosen] + 1
        drawn.append((box, int(classes[chosen])))
    return drawn


def _opacity(digit: np.ndarray, side: float) -> np.ndarray:
    """Enlarge a digit, uint8 (8, 8), to about `side` pixels; return the opacities of its visible part."""
    framed = np.pad(digit, 1)  # most digits touch the frame and would look cut off there
    enlarged = max(len(framed), round(side * len(framed) / len(digit)))
    smooth = np.asarray(Image.fromarray(framed).resize((enlarged, enlarged), Image.Resampling.BICUBIC))
    # Make edges steeper than in the enlarged scan, in which half of a digit would be a blur that belongs to nothing.
    opacity = ((smooth.astype(np.int16) - OPAQUE) * 2 + OPAQUE).clip(0, 255)
    x1, y1, x2, y2 = _extent(opacity > 0)
    return opacity[y1:y2, x1:x2]


def _extent(inside: np.ndarray) -> Box:
    """Return the tight box around the true values of (H, W)."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _place(
    rng: np.random.RandomState, opacity: np.ndarray, size: int, taken: list[Box]
) -> tuple[tuple[int, int], Box] | None:
    """Find a place inside the scene with little overlap: return x, y of the opacities and the digit's box, or None."""
    height, width = opacity.shape
    x1, y1, x2, y2 = _extent(opacity >= OPAQUE)
    for _ in range(TRIES):
        x, y = below(rng, size - width + 1), below(rng, size - height + 1)
        box = x + x1, y + y1, x + x2, y + y2
        if all(_overlap(box, other) <= OVERLAP for other in taken):
            return (x, y), box
    return None


def _overlap(a: Box, b: Box) -> float:
    """Return the area common to two boxes as a share of the smaller one's area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return max(0, width) * max(0, height) / smaller


def _blend(rng: np.random.RandomState, behind: np.ndarray, opacity: np.ndarray) -> None:
    """Paint opacities (H, W) in one contrasting colour over `behind`, part of a scene, int16 (H, W, 3), in place."""
    luma = int((behind[opacity >= OPAQUE] @ LUMA).sum()) / (256 * int((opacity >= OPAQUE).sum()))
    inks = [_contrasting(rng, luma) for _ in range(INKS)]
    # The ink must also differ from its surroundings: overlapping digits of one colour would merge.
    nearby = behind[::2, ::2]
    ink = min(inks, key=lambda ink: int((np.abs(nearby - ink).sum(-1) < ALIKE).sum()))
    behind += ((ink - behind) * opacity[..., None].astype(np.int32) // 255).astype(np.int16)


def _contrasting(rng: np.random.RandomState, luma: float) -> np.ndarray:
    """Draw a colour, int16 (3,), whose luma is far from `luma`, 0 to 255."""
    room = {1: 255 - luma, -1: luma}
    signs = [sign for sign in room if room[sign] >= CONTRAST[0] + 10]  # near 0 and 255 all colours are black or white
    sign = signs[below(rng, len(signs))]
    target = luma + sign * min(rng.uniform(*CONTRAST), room[sign] - 10)
    colour = rng.randint(256, size=3, dtype=np.int64)
    now = int(colour @ LUMA) / 256
    # Mix with white or black until the luma is right: this keeps the hue.
    mixed = colour + (255 - colour) * ((target - now) / (255 - now)) if now < target else colour * (target / now)
    return np.rint(mixed).astype(np.int16)
