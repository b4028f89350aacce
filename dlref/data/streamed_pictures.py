"""The loaders of pictures with boxes or masks, which worker processes decode and the device puts in another light."""

from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dlref.data.augment import photometric


class StreamedPictures(LightningDataModule):
    """Loaders over `splits`, which `setup` of a subclass fills: "train", "val" and "test".

    A subclass sets what its constructor takes: batch_size, num_workers, photometric.
    """

    labels: list[str]
    batch_size: int
    num_workers: int
    photometric: bool
    splits: dict[str, Dataset]

    def loader(self, split: str, **options: Any) -> DataLoader:
        """The batches of a split."""
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        options = {"batch_size": self.batch_size, **workers, **options}
        return DataLoader(self.splits[split], pin_memory=torch.cuda.is_available(), **options)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, all of one size."""
        # A last, smaller batch would be another shape for torch.compile and for CUDA graphs.
        return self.loader("train", shuffle=True, drop_last=len(self.splits["train"]) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Every validation picture once, in order."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        """Every test picture once, in order."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test pictures."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Any]:
        """Change the light of training batches, on the device."""
        images, targets = batch
        if self.photometric and self.trainer is not None and self.trainer.training:
            images = photometric(images)
        return images, targets
