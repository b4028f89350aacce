"""The exponential moving average of the weights, on the training device."""

from itertools import chain

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dlref.tasks.task import Task


class Average(AveragedModel):
    """PyTorch's average, but updated in one call and without reading the number of updates from the device.

    Args:
        model: the model to average, including its buffers.
        decay: weight of the previous average in an update, in the limit of many updates.
        device: device of the average.
    """

    updates = 0  # number of updates so far, on the host

    def __init__(self, model: nn.Module, decay: float, device: torch.device):
        super().__init__(model, device=device, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the current weights. Integers, such as a count of batches, are copied."""
        pairs = self.beside(model)
        fractions = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*fractions, strict=True)), 1 - self.kept())
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)
        self.n_averaged += 1
        self.updates += 1

    def kept(self) -> float:
        """Return the decay with bias correction: 0 at the first update, `decay` in the limit.

        Each of n updates is thus weighted by `decay` to the power of its age, divided by the sum of these weights, as
        in Adam's bias correction (Kingma and Ba 2015, section 3). Without it, the initial weights would make up 61% of
        the average after 500 updates with a decay of 0.999.
        """
        return self.decay * (1 - self.decay**self.updates) / (1 - self.decay ** (self.updates + 1))

    def beside(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of averaged and current tensors. A task has more buffers once it knows its data."""
        now = named(model)
        return [(average, now[name]) for name, average in named(self.module).items()]


def named(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}


class EMA(EMAWeightAveraging):
    """An exponential moving average of the weights, used in validation, test and export.

    It differs from Lightning's callback in three ways. Lightning reads the number of updates from the device and makes
    one call per weight in each update. It does not correct the bias towards the initial weights. And it restores the
    current weights before the task's own `on_validation_epoch_end`, which may still use the network to sample a text.

    Args:
        decay: weight of the previous average in an update, in the limit of many updates (`Average.kept`).
        update_every_n_steps: number of steps from one update to the next.

    Raises:
        ValueError: `decay` is not from 0 to below 1, or `update_every_n_steps` is below 1.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1):
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}; expected 0 to below 1")
        if update_every_n_steps < 1:
            raise ValueError(f"update_every_n_steps {update_every_n_steps}; expected 1 or more")
        super().__init__(decay=decay, update_every_n_steps=update_every_n_steps)
        self.decay = decay

    def setup(self, trainer: Trainer, task: Task, stage: str) -> None:
        """Create the average. Its initial values have no influence, because the bias is corrected."""
        if stage == "fit":
            self._average_model = Average(task, self.decay, task.device)

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """Restore the number of updates; the average of a checkpoint has been loaded by now."""
        self._average_model.updates = int(self._average_model.n_averaged)

    def on_validation_epoch_end(self, trainer: Trainer, task: Task) -> None:
        """Keep the average in place, as the task may still use the network."""

    def on_validation_end(self, trainer: Trainer, task: Task) -> None:
        """Restore the weights that are being trained."""
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
