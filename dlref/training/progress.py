"""The progress bar of a run."""

import math
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

DRAWN, MOVED = 4, 2  # times a second at most; the bar also moves in logged steps and at the ends of epochs


class Progress(RichProgressBar):
    """Lightning's progress bar, at almost no cost to a step.

    Lightning's own bar reads the loss after every step, and so waits until the device has finished the step. A separate
    thread draws that bar a hundred times a second and holds up all other Python code meanwhile. This bar is drawn less
    often, and reads the loss, which tasks do not log to the bar, only as often as it is logged.
    """

    def __init__(self, **options: Any):
        super().__init__(refresh_rate=DRAWN, **options)
        self.due, self.shown, self.moved, self.stepped = True, {}, 0.0, 0

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        """Move the bar when the loss is due or an epoch ends, otherwise at most every half second."""
        self.due = trainer.global_step % max(1, trainer.log_every_n_steps) == 0 and trainer.global_step > self.stepped
        self.stepped = trainer.global_step  # the same for several batches whose gradients are accumulated
        now = time.monotonic()
        if self.due or trainer.is_last_batch or now - self.moved >= 1 / MOVED:
            super().on_train_batch_end(trainer, task, outputs, batch, index)
            self.moved = now
        self.due = True

    def on_train_epoch_end(self, trainer: Trainer, task: LightningModule) -> None:
        """Move the bar to the last batch: a run may end in the middle of an epoch."""
        self._update(self.train_progress_bar_id, trainer.fit_loop.batch_idx + 1)
        super().on_train_epoch_end(trainer, task)

    @property
    def total_train_batches(self) -> int | float:
        """Return the batches of this epoch. Lightning would take the steps left of `max_steps` for batches."""
        batches, added = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if self.trainer.max_steps < 0:
            return batches
        before = self.trainer.current_epoch * math.ceil(batches / added)
        return min(batches, (self.trainer.max_steps - before) * added)

    def _get_train_description(self, epoch: int) -> str:
        """Return the number of the epoch, without Lightning's "/-2" if the run has no number of epochs."""
        return super()._get_train_description(epoch).replace("/-2", "   ")

    def get_metrics(self, trainer: Trainer, task: LightningModule) -> dict[str, Any]:
        """Return the numbers beside the bar."""
        if self.due:
            self.shown = super().get_metrics(trainer, task)
            if trainer.training and task.train_loss is not None:
                self.shown["train/loss"] = task.train_loss.item()
        return self.shown
