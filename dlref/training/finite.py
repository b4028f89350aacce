"""Stop a run whose loss is NaN or infinite, and save the batch for inspection."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device

from dlref.runtime import UserError
from dlref.training.seal import write_sealed


class StopOnNonFiniteLoss(Callback):
    """End a run whose loss is NaN or infinite, and save the first offending batch.

    Reading the loss waits for the device, so it is checked only as often as losses are logged, and before anything is
    saved. The batch (the first device's share) is not kept in memory but rebuilt, and saved as not_finite.pt in the
    run's folder.
    """

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Clear the unchecked losses."""
        self.seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss on its device, with the number of its batch."""
        where = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        self.seen.append((task.train_loss, where))
        if trainer.is_last_batch or len(self.seen) >= trainer.log_every_n_steps:
            self.look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, task: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the losses: no checkpoint may be written after a step whose loss is not finite."""
        self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        """Raise UserError if a loss since the last check is not finite."""
        seen, self.seen = self.seen, []
        finite = torch.stack([loss for loss, _ in seen]).isfinite().tolist() if seen else []
        if all(finite):
            return
        where, path = seen[finite.index(False)][1], Path(trainer.default_root_dir) / "not_finite.pt"
        try:
            if trainer.is_global_zero:
                self.keep(trainer, where, path)
        finally:
            trainer.strategy.barrier("not_finite.pt")  # if the others ended, so would the process that writes
        raise UserError(
            "train/loss is not finite in step {step} (epoch {epoch}, batch {batch}, learning rate {learning_rate:g}); "
            "expected a number; try a lower lr or trainer.gradient_clip_val; ".format(**where)
            + f"the batch is in {path}"
        )

    def keep(self, trainer: Trainer, where: dict[str, Any], path: Path) -> None:
        """Rebuild the offending batch on the CPU and save it, so that it can be inspected without a GPU."""
        stage, trainer.training = trainer.state.stage, True  # in validation it would not be augmented
        batch = trainer.strategy.batch_to_device(trainer.train_dataloader.batch(where["batch"]))
        trainer.state.stage = stage
        batch = move_data_to_device(batch, "cpu")
        write_sealed({**where, "inputs": batch._asdict() if hasattr(batch, "_asdict") else batch}, path)
