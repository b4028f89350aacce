"""Learning-rate schedules as functions of progress, stepped once an optimiser step.

Each is built from the optimiser and the run's number of steps, so that a config states shares of the run
("divide by ten at a half and at three quarters") and stays right when `--trainer.max_epochs` changes, for a run that
goes on for longer, too. `CosineAnnealingLR` of `torch.optim.lr_scheduler` fits the same place: its second argument is
the number of steps. But a checkpoint holds that number, and a run that goes on for longer has a rate of 0 then.

`Steps` and `WarmupCosine` raise ValueError for what is no share of the run.
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
    """A schedule that is a function of the step, and of the run's length as it is now."""

    def load_state_dict(self, state: dict) -> None:
        """Go on at a step. Raises UserError for the state of a schedule of another kind."""
        if "lr_lambdas" not in state:
            raise UserError(f"the checkpoint is not of {type(self).__name__}; expected the schedule of its config.yaml")
        super().load_state_dict(state)


class Steps(RunSchedule):
    """Multiply the rate by `gamma` at each of `milestones`, shares of the run (He et al. 2015: 1/2, 3/4).

    Before, it rises linearly over the first `warmup` share.
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
    """Fall to 0 as a power of the share of the run that is left (Chen et al. 2017, DeepLab, section 4.1.2: 0.9)."""

    def __init__(self, optimizer: Optimizer, total_steps: int, power: float = 1.0):
        super().__init__(optimizer, lambda step: max(1 - step / total_steps, 0.0) ** power)


class WarmupCosine(RunSchedule):
    """Rise linearly over the first `warmup` share of the run, then fall along half a cosine to `final`.

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
