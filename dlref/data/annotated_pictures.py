"""The loaders of pictures with boxes or masks, decoded by worker processes, their colours changed on the device."""

from typing import Any

from torch import Tensor

from dlref.data.augment import photometric
from dlref.data.loader import SplitData

MEAN = (123, 117, 104)  # of ImageNet, in levels: what surrounds a picture that is zoomed out, or smaller than a crop


class AnnotatedPictures(SplitData):
    """Pictures with boxes or masks, decoded one by one; a subclass fills `splits`.

    A subclass sets what its constructor takes: batch_size, num_workers, photometric.
    """

    labels: list[str]
    photometric: bool
    decoded_singly = True

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Any]:
        """Change the light of training batches, on the device."""
        images, targets = batch
        if self.photometric and self.trainer is not None and self.trainer.training:
            images = photometric(images)
        return images, targets
