"""The checkpoint that a run goes on from: when it is written, and how."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from dlref.tasks.seal import write_sealed
from dlref.tasks.task import Task


class Interrupted(Exception):
    """The process was told to end, and the run can go on from `path`."""

    def __init__(self, path: Path, step: int):
        super().__init__(f"told to end: {path} is of step {step}; --ckpt_path last goes on from there")


class SealedCheckpointIO(TorchCheckpointIO):
    """Lightning's way of writing checkpoints, sealed; of last.ckpt the one before it stays, as previous.ckpt.

    Args:
        whole: checkpoints known to be whole, which are worth keeping when another takes their place.
    """

    def __init__(self, whole: set[Path]):
        self.whole = whole

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one; called in the first process only."""
        path = Path(path)
        worth_keeping = path.name == "last.ckpt" and path in self.whole and path.exists()
        write_sealed(checkpoint, path, path.with_name("previous.ckpt") if worth_keeping else None)
        self.whole.add(path)


class Last(Checkpoint):
    """Keep last.ckpt: after each validation, every few minutes in between, and when the process is told to end.

    A step after which validation comes is not kept by itself: a run that went on from there would do without it.

    Args:
        path: of the file.
        minutes: between two of them.
    """

    def __init__(self, path: Path, minutes: float):
        self.path, self.minutes = path, minutes
        self.told = self.ending = False
        self.step, self.taken = 0, 0

    def hear(self, *_: Any) -> None:
        """SIGTERM: what a spot instance gets two minutes before it ends."""
        self.told = True

    def on_load_checkpoint(self, trainer: Trainer, task: Task, checkpoint: dict[str, Any]) -> None:
        """Where in its epoch the run was."""
        for loader in checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", []):
            self.taken = loader["taken"]

    def on_train_start(self, trainer: Trainer, task: Task) -> None:
        """Go on in the epoch, and listen to SIGTERM: Lightning's own answer ends a run without keeping it."""
        # Lightning forgets where it was once the number of steps has been asked for, as schedules do.
        trainer.train_dataloader.load_state_dict({"taken": self.taken % trainer.num_training_batches})
        self.saved, self.step = time.monotonic(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.hear)  # Lightning puts the earlier one back

    def on_train_batch_start(self, trainer: Trainer, task: Task, batch: Any, batch_idx: int) -> None:
        """End here rather than in the step before: its losses are logged by now."""
        if self.ending:
            raise Interrupted(self.path, self.step)

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Between two steps of the optimiser; gradients that add up are in no checkpoint."""
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        if not stepped or validates_next(trainer, batch_idx):
            return
        self.ending = trainer.strategy.reduce_boolean_decision(self.told, all=False)
        if self.ending or self.due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, task: Task) -> None:
        """After the best one, which `last` knows of."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.save(trainer)
        if trainer.strategy.reduce_boolean_decision(self.told, all=False):
            raise Interrupted(self.path, self.step)

    def due(self, trainer: Trainer) -> bool:
        """Whether the minutes are over by the first process' clock. Several ask it now and then: each time all wait."""
        if trainer.world_size > 1 and trainer.global_step % trainer.log_every_n_steps:
            return False
        return trainer.strategy.broadcast(time.monotonic() - self.saved >= 60 * self.minutes)

    def save(self, trainer: Trainer) -> None:
        """Write it, and what was logged so far."""
        trainer.save_checkpoint(self.path, weights_only=False)
        for logger in trainer.loggers:
            logger.save()
        self.saved = time.monotonic()


def validates_next(trainer: Trainer, batch_idx: int) -> bool:
    """Whether validation may follow this batch."""
    every = trainer.val_check_batch
    return trainer.is_last_batch or any((i + 1) % every == 0 for i in (batch_idx, trainer.fit_loop.total_batch_idx))
