"""Listings of pictures and the boxes of their objects, and the checks that all formats share.

The readers are in `voc_boxes`, `coco_boxes` and `sagemaker_boxes`. Each returns a `BoxListing` and opens a picture only
to read its size. Boxes are x1 y1 x2 y2 in pixels of the picture as `read_image` returns it, with its EXIF orientation
applied. If `classes` is given, a reader checks the labels against them: validation and test pictures are read with the
class names of the training pictures.

A box must have an area and lie within its picture; it may touch the border. Any other box is an error, unless
`on_bad_box` specifies otherwise:

    "error"  refuse it
    "clip"   clip it to the picture, and leave it out if no area remains
    "skip"   leave it out

Every other mistake is an error, whatever the value of `on_bad_box`.

N boxes in a picture, K classes.
"""

import math
import os
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dlref.data.files import picture_size
from dlref.data.images import show_progress
from dlref.runtime.errors import UserError


class Picture(NamedTuple):
    """An image file and its objects.

    Attributes:
        path: the image file.
        boxes: x1 y1 x2 y2 in pixels, float32 (N, 4); N may be 0.
        labels: class ids, int64 (N,).
        ignored: bool (N,), objects that are neither right nor wrong in evaluation: COCO's crowds and VOC's difficult
            objects.
    """

    path: str
    boxes: Tensor
    labels: Tensor
    ignored: Tensor


class BoxListing(NamedTuple):
    """Pictures in the order of their source.

    Attributes:
        pictures: the pictures, including those without objects.
        classes: K class names.
    """

    pictures: list[Picture]
    classes: list[str]

    @property
    def images(self) -> list[str]:
        """The paths of the pictures."""
        return [picture.path for picture in self.pictures]

    def take(self, places: list[int]) -> "BoxListing":
        """Return a listing of the pictures at these places."""
        return self._replace(pictures=[self.pictures[i] for i in places])


OnBadBox = Literal["error", "clip", "skip"]
Box = tuple[float, float, float, float]


class Found(NamedTuple):
    """An object as read from its source: its place there, its class by name or id, its box, whether it is ignored."""

    where: str
    label: Hashable
    box: Box
    ignored: bool = False


class Record(NamedTuple):
    """A picture as read from its source: its place there, the path, width and height if declared, and its objects."""

    where: str
    path: str
    size: tuple[float | None, float | None]
    objects: list[Found]


def to_listing(
    source: str | Path, records: list[Record], ids: dict[Hashable, int], classes: list[str], on_bad_box: OnBadBox
) -> BoxListing:
    """Check each record against its picture and the classes, and warn about boxes that were clipped or skipped.

    `ids` maps each label to its class id.
    """
    if on_bad_box not in get_args(OnBadBox):
        raise UserError(f"on_bad_box: {shorten(on_bad_box)}; expected one of {', '.join(get_args(OnBadBox))}")
    pictures, mended, seen = [], Counter(), {}
    for record in show_progress(records, "Checking boxes"):
        path = os.path.normpath(record.path)
        if path in seen:
            raise UserError(f"{record.where}: {record.path} again, after {seen[path]}; expected each picture once")
        seen[path] = record.where
        pictures.append(_check_picture(record, ids, on_bad_box, mended))
    if mended:
        what = ", ".join(f"{count} {how}" for how, count in mended.items())
        rank_zero_warn(f"{source}: boxes that stick out of their picture or have no area: {what}")
    return BoxListing(pictures, classes)


def _check_picture(record: Record, ids: dict[Hashable, int], on_bad_box: OnBadBox, mended: Counter) -> Picture:
    try:
        size = picture_size(record.path)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
    if any(given is not None and given != true for given, true in zip(record.size, size, strict=True)):
        given = " x ".join(shorten(side).removesuffix(".0") for side in record.size)  # VOC's sizes are read as floats
        true = f"{size[0]} x {size[1]}, as {record.path} has when shown"
        raise UserError(f"{record.where}: size {given}; expected {true}")
    # Check boxes in float32, as they are returned: a sliver may then have no area, and float64 rounding cannot push a
    # box out of its picture.
    rounded = torch.tensor([found.box for found in record.objects], dtype=torch.float32).tolist()
    boxes, labels, ignored = [], [], []
    for found, box in zip(record.objects, rounded, strict=True):
        if found.label not in ids:
            raise UserError(f"{found.where}: class {shorten(found.label)}; expected one of {shorten(list(ids))}")
        fitted = _fit(box, size, found, on_bad_box, mended)
        if fitted is not None:
            boxes.append(fitted)
            labels.append(ids[found.label])
            ignored.append(found.ignored)
    return Picture(
        record.path,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(ignored, dtype=torch.bool),
    )


def _fit(box: Box, size: tuple[int, int], found: Found, on_bad_box: OnBadBox, mended: Counter) -> Box | None:
    """Return a valid box unchanged; return a bad box clipped to the picture, or None to leave it out."""
    x1, y1, x2, y2 = box
    width, height = size
    if 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:
        return box
    finite, has_area = all(map(math.isfinite, box)), x1 < x2 and y1 < y2
    if on_bad_box == "error":
        what = f"{found.where}: box {', '.join(f'{value:.10g}' for value in found.box)}"
        if not finite:
            raise UserError(f"{what}: not finite; expected four numbers")
        if not has_area:
            raise UserError(f"{what}: no area; expected its second corner below and to the right of its first")
        raise UserError(f"{what}: outside the picture; expected it within 0, 0, {width}, {height}")
    if on_bad_box == "clip" and finite and has_area:
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if x1 < x2 and y1 < y2:
            mended["clipped"] += 1
            return x1, y1, x2, y2
    mended["skipped"] += 1
    return None


# Common to the JSON formats


def objects_in(holder: dict[str, Any], name: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a list, each with its place for error messages. Raises UserError."""
    values = holder.get(name)
    if not isinstance(values, list):
        raise UserError(f"{where}: {name} {shorten(values)}; expected a list")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name}[{i}]: {shorten(value)}; expected an object")
    return [(f"{where}: {name}[{i}]", value) for i, value in enumerate(values)]


def whole(entry: dict[str, Any], name: str, where: str) -> int:
    """Return an integer field of an object. Raises UserError."""
    value = entry.get(name)
    if type(value) is not int:  # not isinstance: True is an int too
        raise UserError(f"{where}: {name} {shorten(value)}; expected a whole number")
    return value


def is_number(value: Any) -> bool:
    """Return whether a value is a number; a bool is not."""
    return type(value) in (int, float)


def declared_size(entry: dict[str, Any], where: str) -> tuple[float | None, float | None]:
    """Return the width and height declared by an object, None for each that is missing. Raises UserError."""
    for name in ("width", "height"):
        if name in entry and not is_number(entry[name]):
            raise UserError(f"{where}: {name} {shorten(entry[name])}; expected a number of pixels")
    return entry.get("width"), entry.get("height")


def corners(x: float, y: float, width: float, height: float) -> Box:
    """Return x1 y1 x2 y2 of a box given by its upper left corner and its size."""
    try:
        x, y, width, height = float(x), float(y), float(width), float(height)
    except OverflowError:  # an integer too large for a float
        x = y = width = height = math.inf
    return x, y, x + width, y + height
