"""Muon with AdamW, and what a resumed run checks of its optimiser."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dlref.runtime import UserError
from dlref.runtime.errors import shortened

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: as steep at 0 as it can be, all of (0, 1] goes near 1
ITERATIONS = 5


def orthogonal(matrices: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """Each matrix with its singular values near 1, by Newton and Schulz' iteration (Jordan et al. 2024).

    In bfloat16, but on a CPU in float32: many only imitate bfloat16, and all are to find the same.
    """
    tall = matrices.size(1) > matrices.size(2)
    wide = matrices.mT if tall else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    wide = wide.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide


class Muon(Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), all matrices of one shape at once: fewer launches on a GPU.

    `torch.optim.Muon` takes them one by one, and in bfloat16 on a CPU too, where few have it.

    A step has the size of AdamW's (Liu et al. 2025, equation 4), so that one rate and one weight decay fit both.

    Args:
        params: matrices, or groups of them.
        lr: the rate.
        weight_decay: decoupled.
        momentum: Nesterov's.

    Raises:
        ValueError: a number below 0, or a parameter that is no matrix.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        if min(lr, weight_decay, momentum) < 0:
            raise ValueError(f"Muon: lr {lr}, weight_decay {weight_decay}, momentum {momentum}; expected 0 or more")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if any(parameter.ndim != 2 for group in self.param_groups for parameter in group["params"]):
            raise ValueError("Muon: a parameter that is no matrix; expected matrices alone")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self.move(parameters, group["lr"], group["weight_decay"], group["momentum"])
        return loss

    def move(self, parameters: list[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        """Matrices of one shape, by one step with Nesterov's momentum."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = orthogonal(torch.stack(torch._foreach_lerp(gradients, means, momentum)))
        size = 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        updates = updates.to(parameters[0].dtype, memory_format=torch.contiguous_format)
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-lr * size)


class MuonAdamW(Optimizer):
    """Muon for the hidden matrices, AdamW for all else, as its authors have it (Jordan et al. 2024).

    But for a GPT's queries, keys and values: they are one matrix here, as in GPT-2, where the authors take three.

    Args:
        params: groups; those with `hidden: True` are matrices between hidden layers.
        lr: of both.
        weight_decay: of both, where a group has none of its own.
        momentum: Muon's.
        betas: AdamW's.

    Raises:
        ValueError: no group is of hidden matrices, or a number is below 0.
    """

    def __init__(
        self,
        params: Iterable[dict],
        lr: float = 0.005,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ):
        groups = [dict(group) for group in params]
        muon = [group for group in groups if group.get("hidden")]
        if not muon:
            raise ValueError("MuonAdamW: no group is of hidden matrices; expected one, as LanguageModel makes it")
        known = {"lr": lr, "weight_decay": weight_decay}
        self.parts: dict[bool, Optimizer] = {True: Muon(muon, momentum=momentum, **known)}
        if others := [group for group in groups if not group.get("hidden")]:
            self.parts[False] = AdamW(others, betas=tuple(betas), fused=True, **known)
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both, over the groups and the state of this one, which a schedule and a checkpoint change."""
        for hidden, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if bool(group.get("hidden")) is hidden]
            part.state = self.state
        loss = self.parts[True].step(closure)  # which finds the gradients of both
        if False in self.parts:
            self.parts[False].step()
        return loss


def described(optimizer: Optimizer, schedule: LRScheduler | None) -> dict[str, object]:
    """What was asked for, whatever a schedule makes of it, and the schedule's class; plain values."""
    groups = optimizer.param_groups
    return {
        "class": type(optimizer).__name__,
        "numbers of parameters": [len(group["params"]) for group in groups],
        "lr": [float(group.get("initial_lr", group["lr"])) for group in groups],
        "weight_decay": [float(group.get("weight_decay", 0)) for group in groups],
        "lr_scheduler": schedule and type(schedule).__name__,
    }


def check_resumed(asked: dict[str, object], known: dict[str, object]) -> None:
    """Refuse to resume with an optimiser other than the checkpoint's: its old learning rate would silently win."""
    for what, value in asked.items():
        if value != known.get(what):
            raise UserError(
                f"optimizer: {what} {shortened(value)}, the checkpoint has {shortened(known.get(what))}; expected the "
                "optimizer, lr_scheduler and freeze of the run's config.yaml, or model.init_args.weights for a run "
                "that begins with its weights"
            )
