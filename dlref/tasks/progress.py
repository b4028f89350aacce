"""The progress bar of a run."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's bar, which a step neither waits nor works for.

    Lightning's own asks the device for the loss after every step, and so waits for all that the step has set off; a
    thread of its own draws it a hundred times a second. This one asks as often as losses are logged, and is drawn ten
    times a second.
    """

    def __init__(self, **options: Any):
        super().__init__(refresh_rate=10, **options)
        self.due, self.shown = True, {}

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        """Go on."""
        self.due = trainer.global_step % max(1, trainer.log_every_n_steps) == 0
        super().on_train_batch_end(trainer, task, outputs, batch, index)
        self.due = True

    def get_metrics(self, trainer: Trainer, task: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        if self.due:
            self.shown = super().get_metrics(trainer, task)
        return self.shown
