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
        decay: share of the average that stays in an update, after many of them.
        device: of the average.
    """

    updates = 0  # so far, on the host

    def __init__(self, model: nn.Module, decay: float, device: torch.device):
        super().__init__(model, device=device, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of now. What is no fraction, such as a count of batches, is taken as it is."""
        pairs = self.beside(model)
        fractions = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*fractions, strict=True)), 1 - self.kept())
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)
        self.n_averaged += 1
        self.updates += 1

    def kept(self) -> float:
        """Decay with bias correction: 0 at the first update, `decay` in the limit.

        So each of n updates weighs `decay` to the power of its age, over the sum of these: Adam's correction of the
        bias (Kingma and Ba 2015, section 3). Without it the first weights would be 61% of the average after 500
        updates with a decay of 0.999.
        """
        return self.decay * (1 - self.decay**self.updates) / (1 - self.decay ** (self.updates + 1))

    def beside(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """What is averaged, and what it is now. A task has more buffers once it knows its data."""
        now = named(model)
        return [(average, now[name]) for name, average in named(self.module).items()]


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}


class EMA(EMAWeightAveraging):
    """An average of the weights, which validation, test and export see.

    Lightning's callback but for three things. In its own, each update asks the device how many there were before, and
    takes a call for every weight; the first weights weigh as much as all that would have come before them; and it ends
    before a task's own end of a validation, which may still ask the network, as for a sample of text.

    Args:
        decay: share of the average that stays in an update, after many of them (`Average.kept`).
        update_every_n_steps: steps from one update to the next.

    Raises:
        ValueError: `decay` is not from 0 to below 1, or `update_every_n_steps` below 1.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1):
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}; expected 0 to below 1")
        if update_every_n_steps < 1:
            raise ValueError(f"update_every_n_steps {update_every_n_steps}; expected 1 or more")
        super().__init__(decay=decay, update_every_n_steps=update_every_n_steps)
        self.decay = decay

    def setup(self, trainer: Trainer, task: Task, stage: str) -> None:
        """Create the average. What it starts from has no weight, for the bias is corrected."""
        if stage == "fit":
            self._average_model = Average(task, self.decay, task.device)

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """A checkpoint's average has been read by now."""
        self._average_model.updates = int(self._average_model.n_averaged)

    def on_validation_epoch_end(self, trainer: Trainer, task: Task) -> None:
        """The average stays: the task may still use the network."""

    def on_validation_end(self, trainer: Trainer, task: Task) -> None:
        """Put the weights that train back."""
        super().on_validation_epoch_end(trainer, task)

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
