"""Common parts of the data modules for image classification.

Tasks receive batches `(images, targets)`. Images are uint8 (B, C, H, W) and not normalised: resizing and
normalising are part of the deployed model, so that training and deployment see the same pixels. Targets are int64
(B,), or multi-hot float32 (B, K) if an image may have several labels. After `setup`, `labels` holds the K class
names, `multi_label` tells which form the targets have, and `crop` is the share of a picture's shorter side that
evaluation keeps as a central square before resizing it to the size of a batch, or None if pictures are left whole.

Small data sets are kept on the training device (`small_images`), large ones stream from disk (`streamed_images`).
"""

from dlref.data.loader import SplitData


class ImageClassificationData(SplitData):
    """Images with their classes; a subclass fills `splits`."""

    labels: list[str]
    multi_label = False
    crop: float | None = None
