"""The exponential moving average of the weights, on the device that trains."""

from itertools import chain

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dlref.tasks.task import Task


class Average(AveragedModel):
    """torch's, but all weights at once and without a look at how often there was an update, which waits for the device.

    Args:
        model: what is averaged, buffers too.
        decay: share of the average that stays in an update.
    """

    begun = False  # whether there was an update; the first one takes the weights as they are

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of now. What is no fraction, such as a count of batches, is taken as it is."""
        both = [list(chain(module.parameters(), module.buffers())) for module in (self.module, model)]
        pairs = [(average, now.detach()) for average, now in zip(*both, strict=True)]
        fractions = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*fractions, strict=True)), 1 - self.decay if self.begun else 1.0)
        for average, now in pairs:
            if not average.is_floating_point():
                average.copy_(now)
        self.n_averaged += 1
        self.begun = True


class EMA(EMAWeightAveraging):
    """Lightning's average of the weights, which validation, test and export see, without its detour over the CPU.

    Lightning's own is made before the network moves to the GPU and stays behind: with every update, all weights are
    copied to the CPU, one by one, and the GPU waits.

    Args:
        decay: share of the average that stays in an update.
        update_every_n_steps: steps from one update to the next.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1):
        super().__init__(decay=decay, update_every_n_steps=update_every_n_steps)
        self.decay = decay

    def setup(self, trainer: Trainer, task: Task, stage: str) -> None:
        """Begin with the weights as they are."""
        if stage == "fit":
            self._average_model = Average(task, self.decay)

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """Follow the network to its device; a checkpoint's average has been read by now."""
        self._average_model.to(task.device)
        self._average_model.begun = bool(self._average_model.n_averaged > 0)
