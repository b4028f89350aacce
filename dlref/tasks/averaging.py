"""The exponential moving average of the weights, on the device that trains."""

from itertools import chain

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dlref.tasks.task import Task


class Average(AveragedModel):
    """torch's, but all weights at once and without a look at how often there was an update, which waits for the device.

    Args:
        model: what is averaged, buffers too.
        decay: share of the average that stays in an update.
        device: of the average.
    """

    begun = False  # whether there was an update; the first one takes the weights as they are

    def __init__(self, model: nn.Module, decay: float, device: torch.device):
        super().__init__(model, device=device, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of now. What is no fraction, such as a count of batches, is taken as it is."""
        pairs = self.beside(model)
        fractions = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*fractions, strict=True)), 1 - self.decay if self.begun else 1.0)
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)
        self.n_averaged += 1
        self.begun = True

    def beside(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """What is averaged, and what it is now. A task has more buffers once it knows its data."""
        now = named(model)
        return [(average, now[name]) for name, average in named(self.module).items()]


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}


class EMA(EMAWeightAveraging):
    """Lightning's average of the weights, which validation, test and export see, in updates that wait for nothing.

    In Lightning's own, each update asks the device how many there were before, and takes a call for every weight.

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
            self._average_model = Average(task, self.decay, task.device)

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """A checkpoint's average has been read by now."""
        self._average_model.begun = bool(self._average_model.n_averaged > 0)

    @torch.no_grad()
    def _swap_models(self, task: Task) -> None:
        for average, now in self._average_model.beside(task):
            kept = average.clone()
            average.copy_(now)
            now.copy_(kept)

    @torch.no_grad()
    def _copy_average_to_current(self, task: Task) -> None:
        for average, now in self._average_model.beside(task):
            now.copy_(average)
