"""What all data modules for image classification share.

What passes to a task: batches `(images, targets)`, images uint8 (B, C, H, W) and not normalised, for resizing
and normalising are part of the deployed model and what trains is what ships; targets int64 (B,), or multi-hot
float32 (B, K) where an image may have several labels. After `setup`, `labels` holds the K class names and
`multi_label` says which form the targets have, and `crop` how evaluation cuts a picture before it is resized to
the size of a batch: the share of its shorter side that a central square keeps, or None for a picture left whole.

Small sets live on the training device (`small_images`), large ones stream from disk (`streamed_images`).
"""

from collections import Counter
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset

from dlref.data.files import first_of
from dlref.data.images import FORMATS
from dlref.data.listings import Listing, read_folder
from dlref.data.loader import SplitData


class ImageClassificationData(SplitData):
    """Images with their classes; a subclass fills `splits`."""

    labels: list[str]
    multi_label = False
    crop: float | None = None

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        self.splits: dict[str, Dataset] = {}


def list_folder(folder: Path, classes: list[str] | None = None) -> Listing:
    """List class folders, and warn once of the files in them that are no images."""
    listing, others = read_folder(folder, classes)
    if others:
        kinds = Counter(Path(other).suffix.lower() or "without an ending" for other in others).most_common()
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds)
        rank_zero_warn(f"{folder}: left out, as no {FORMATS}: {counted}: {first_of(others)}")
    return listing
