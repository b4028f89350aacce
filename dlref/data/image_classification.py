"""Common parts of the data modules for image classification.

Tasks receive batches `(images, targets)`. Images are uint8 (B, C, H, W) and not normalised: resizing and
normalising are part of the deployed model, so that training and deployment see the same pixels. Targets are int64
(B,), or multi-hot float32 (B, K) if an image may have several labels. After `setup`, `labels` holds the K class
names, `multi_label` tells which form the targets have, and `crop` is the share of a picture's shorter side that
evaluation keeps as a central square before resizing it to the size of a batch, or None if pictures are left whole.

Small data sets are kept on the training device (`small_images`), large ones stream from disk (`streamed_images`).
"""

from pathlib import Path

import torch
from torch import Tensor

from dlref.data.files import check_class_ids
from dlref.data.loader import SplitData
from dlref.runtime.errors import UserError


class ImageClassificationData(SplitData):
    """Images with their classes; a subclass fills `splits`."""

    labels: list[str]
    multi_label = False
    crop: float | None = None


def check_targets(where: str | Path, targets: Tensor, images: int, classes: int, multi_label: bool) -> None:
    """Raise UserError unless these are the targets of so many images: class ids, or multi-hot rows."""
    kind, shape = (torch.float32, [images, classes]) if multi_label else (torch.int64, [images])
    if not isinstance(targets, Tensor) or targets.dtype != kind or list(targets.shape) != shape:
        found = f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        words = "as the data is multi_label" if multi_label else "class ids, as the data is not multi_label"
        raise UserError(f"{where}: targets are {found}; expected {kind} {shape}, {words}")
    if not multi_label:
        check_class_ids(where, targets.cpu().numpy(), classes)
    elif not ((targets == 0) | (targets == 1)).all():
        raise UserError(f"{where}: targets from {targets.min():g} to {targets.max():g}; expected 0 or 1 for each class")
