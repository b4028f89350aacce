"""Base class for pictures with boxes or masks: worker processes decode them, and the device changes their colours."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dlref.data.augment import photometric
from dlref.data.loader import SplitData

MEAN = (123, 117, 104)  # of ImageNet, in levels: fills the area around a zoomed-out picture or one smaller than a crop


class AnnotatedPictures(SplitData):
    """Pictures with boxes or masks, decoded one by one; a subclass fills `splits` with data sets that have `names`.

    The constructor of a subclass sets `photometric`.
    """

    labels: Sequence[str] = ()
    photometric: bool
    decoded_singly = True

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Any]:
        """Change brightness and colours of training batches, on the device."""
        images, targets = batch
        if self.photometric and self.trainer is not None and self.trainer.training:
            images = photometric(images)
        return images, targets

    def sources(self) -> list[str]:
        """Return the path or the number of each test picture, in order."""
        return self.splits["test"].names
