"""The --debug preset, the first check of a network that does not learn: can it overfit three batches?"""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

BATCHES, PASSES = 3, 100
PRESET = {
    "limit_train_batches": BATCHES,
    "max_epochs": PASSES,
    "max_steps": -1,
    "max_time": None,
    "limit_val_batches": 0,
    "accumulate_grad_batches": 1,
    "callbacks": None,  # callbacks may need a validation
    "detect_anomaly": True,  # names the operation whose gradient is NaN
}


class Overfit(Callback):
    """Print how far the loss of the same few batches falls."""

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Clear the losses of the fit."""
        self.losses = []

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep each loss, on the device."""
        self.losses.append(task.train_loss)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        """Print the mean loss of the first pass and of the last one."""
        batches = int(trainer.num_training_batches)
        first, last = (float(sum(part) / len(part)) for part in (self.losses[:batches], self.losses[-batches:]))
        print(f"debug: train/loss {first:.4g} -> {last:.4g}, {batches} batches {len(self.losses) // batches} times")
