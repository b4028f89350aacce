"""Learning-rate schedules as functions of progress, stepped after every optimiser step.

Each is built from the optimiser and the run's number of steps, so that a config specifies shares of the run
("divide by ten at a half and at three quarters") and stays correct when `--trainer.max_epochs` changes, even for a run
that is resumed for longer. `CosineAnnealingLR` of `torch.optim.lr_scheduler` can be used in the same way, as its second
argument is the number of steps. But a checkpoint restores that number, so such a run cannot be resumed for longer.

`Steps` and `WarmupCosine` raise ValueError for shares that are not from 0 to 1, `Polynomial` for a power below 0.
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dlref.runtime import UserError


def check_shares(**shares: list[float]) -> None:
    """Raise ValueError unless every value is a share from 0 to 1."""
    for name, values in shares.items():
        for value in values:
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value}; expected a share of the run, 0 to 1")


class RunSchedule(LambdaLR):
    """A schedule that is a function of the step and of the current length of the run."""

    def load_state_dict(self, state: dict) -> None:
        """Restore the step. Raises UserError for the state of another kind of schedule."""
        if "lr_lambdas" not in state:
            raise UserError(f"the checkpoint is not of {type(self).__name__}; expected the schedule of its config.yaml")
        super().load_state_dict(state)


class Steps(RunSchedule):
    """Multiply the learning rate by `gamma` at each of `milestones`, shares of the run (He et al. 2015: 1/2, 3/4).

    Before that, it rises linearly over the first `warmup` share of the run.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, milestones: list[float], gamma: float = 0.1, warmup: float = 0.0
    ):
        check_shares(warmup=[warmup], milestones=milestones)
        rise = warmup * total_steps

        def factor(step: int) -> float:
            return min((step + 1) / (rise + 1), 1.0) * gamma ** sum(step >= m * total_steps for m in milestones)

        super().__init__(optimizer, factor)


class Polynomial(RunSchedule):
    """Decay to 0 as a power of the remaining share of the run (Chen et al. 2017, DeepLab, section 4.1.2: 0.9)."""

    def __init__(self, optimizer: Optimizer, total_steps: int, power: float = 1.0):
        if power < 0:
            raise ValueError(f"power {power}; expected 0 or more")
        super().__init__(optimizer, lambda step: max(1 - step / total_steps, 0.0) ** power)


class WarmupCosine(RunSchedule):
    """Rise linearly over the first `warmup` share of the run, then decay along half a cosine to `final`.

    `final` is a share of the peak rate (Loshchilov and Hutter 2017, eq. 5, one period).
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0):
        check_shares(warmup=[warmup], final=[final])
        rise = warmup * total_steps

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / (rise + 1)
            progress = min((step - rise) / max(total_steps - rise, 1), 1.0)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
