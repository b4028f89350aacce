"""The stop at a loss that is no number, with what is needed to see why."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device

from dlref.runtime import UserError
from dlref.training.seal import write_sealed


class StopOnNonFiniteLoss(Callback):
    """End a run whose loss is NaN or infinite, and keep the first batch of which it was.

    A look at the loss waits for the device, so one is taken only now and then: as often as losses are logged, and
    before anything is kept. The batch is made once more, the first device's share of it; it need not have stayed in
    memory. It goes to not_finite.pt in the run's folder.
    """

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Clear the losses not looked at yet."""
        self.losses: list[torch.Tensor] = []
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss where it is, and of which batch it was."""
        self.losses.append(task.train_loss)
        self.seen.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "batch": batch_idx,
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            }
        )
        if trainer.is_last_batch or len(self.seen) >= trainer.log_every_n_steps:
            self.look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, task: LightningModule, checkpoint: dict[str, Any]) -> None:
        """No checkpoint is written after a step whose loss was no number."""
        self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        """Raise UserError where a loss since the last look was no number."""
        finite = torch.stack(self.losses).isfinite().tolist() if self.losses else []
        seen, self.losses, self.seen = self.seen, [], []
        if all(finite):
            return
        where, path = seen[finite.index(False)], Path(trainer.default_root_dir) / "not_finite.pt"
        try:
            if trainer.is_global_zero:
                self.keep(trainer, where, path)
        finally:
            trainer.strategy.barrier("not_finite.pt")  # the others' end would end the one that writes
        raise UserError(
            "train/loss is not finite in step {step} (epoch {epoch}, batch {batch}, learning rate {learning_rate:g}); "
            "expected a number; try a lower lr or trainer.gradient_clip_val; ".format(**where)
            + f"the batch is in {path}"
        )

    def keep(self, trainer: Trainer, where: dict[str, Any], path: Path) -> None:
        """Rebuild the offending batch on the CPU and save it, so that it can be inspected without a GPU."""
        stage, trainer.training = trainer.state.stage, True  # validation would not augment
        batch = trainer.strategy.batch_to_device(trainer.train_dataloader.batch(where["batch"]))
        trainer.state.stage = stage
        batch = move_data_to_device(batch, "cpu")
        write_sealed({**where, "inputs": batch._asdict() if hasattr(batch, "_asdict") else batch}, path)
