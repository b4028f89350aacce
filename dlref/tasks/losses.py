"""Mean losses, accumulated over batches and devices."""

import torch
from torch import Tensor
from torchmetrics import Metric


def or_one(count: Tensor) -> Tensor:
    """Return `count` to divide by, or 1 if it is 0. A sum of weights may be a fraction."""
    return torch.where(count > 0, count, 1)


class MeanLoss(Metric):
    """The mean of a loss over all batches and devices. torchmetrics' own would lose the loss of a batch of count 0."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("both", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, loss: Tensor, count: Tensor | int) -> None:
        """Add a batch."""
        count = count * torch.ones_like(loss)
        self.both += torch.stack([loss.detach() * or_one(count), count])

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.both[0] / or_one(self.both[1])
