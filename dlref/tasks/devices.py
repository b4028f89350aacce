"""What several devices need to evaluate one network."""

import torch
from lightning import Callback, Trainer
from torch.nn.parallel import DistributedDataParallel

from dlref.tasks.task import Task


class Alike(Callback):
    """Let devices evaluate shares of different lengths, all by the first one's statistics.

    DDP sends the buffers of the first device to the others before every batch, in evaluation too, and waits for ever
    where one of them has no batch left. Once is enough: what is kept of batch norm is the first device's.
    """

    def on_validation_start(self, trainer: Trainer, task: Task) -> None:
        """Send them now, and not before each batch."""
        if isinstance(trainer.model, DistributedDataParallel):
            for buffer in task.buffers():
                torch.distributed.broadcast(buffer, 0)
            trainer.model.require_forward_param_sync = False

    def on_validation_end(self, trainer: Trainer, task: Task) -> None:
        """Training goes on as DDP has it."""
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.require_forward_param_sync = True
