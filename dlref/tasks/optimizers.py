"""Muon with AdamW, and the checks of a config's and a resumed run's optimiser."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import LBFGS, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from dlref.runtime import UserError
from dlref.runtime.errors import shortened

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: as steep as possible at 0, while all of (0, 1] approaches 1
ITERATIONS = 5
# Entries of a parameter group that are no settings of their own, or do not change what a step computes.
NO_SETTINGS = {"params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable"}


def orthogonal(matrices: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """Bring the singular values of each matrix near 1 by the Newton-Schulz iteration (Jordan et al. 2024).

    It runs in bfloat16, but on CPUs in float32: many only emulate bfloat16, and all should give the same result.
    """
    tall = matrices.size(1) > matrices.size(2)
    wide = matrices.mT if tall else matrices
    wide = wide / torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    wide = wide.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide


class Muon(Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024), for all matrices of one shape at once: fewer launches on a GPU.

    `torch.optim.Muon` processes matrices one by one, and in bfloat16 on CPUs, too, few of which support it.

    Steps have the size of AdamW's (Liu et al. 2025, equation 4), so that one rate and one weight decay suit both.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: Nesterov momentum.

    Raises:
        ValueError: a number is below 0, or a parameter is not a matrix.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        if min(lr, weight_decay, momentum) < 0:
            raise ValueError(f"Muon: lr {lr}, weight_decay {weight_decay}, momentum {momentum}; expected 0 or more")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if any(parameter.ndim != 2 for group in self.param_groups for parameter in group["params"]):
            raise ValueError("Muon: a parameter that is not a matrix; expected only matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step for all groups."""
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
        """Update matrices of one shape by one step with Nesterov momentum."""
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
    """Muon for the hidden matrices and AdamW for all other parameters, as its authors do (Jordan et al. 2024).

    The queries, keys and values of a GPT are one matrix here, as in GPT-2; the authors use three.

    Args:
        params: groups; those with `hidden: True` are matrices between hidden layers.
        lr: learning rate of both.
        weight_decay: weight decay of both, for groups without one of their own.
        momentum: momentum of Muon.
        betas: betas of AdamW.

    Raises:
        ValueError: there is no group of hidden matrices, or a number is below 0.
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
            raise ValueError("MuonAdamW: no group of hidden matrices; expected one, as LanguageModel creates it")
        known = {"lr": lr, "weight_decay": weight_decay}
        self.parts: dict[bool, Optimizer] = {True: Muon(muon, momentum=momentum, **known)}
        if others := [group for group in groups if not group.get("hidden")]:
            self.parts[False] = AdamW(others, betas=tuple(betas), fused=True, **known)
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step of both, with this optimiser's groups and state, which schedule and checkpoint change."""
        for hidden, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if bool(group.get("hidden")) is hidden]
            part.state = self.state
        loss = self.parts[True].step(closure)  # the closure computes the gradients of both
        if False in self.parts:
            self.parts[False].step()
        return loss


def check_usable(optimizer: Optimizer, parameters: Iterable[Tensor], batches: int) -> None:
    """Refuse an optimiser of torch that would fail in the first step, or with steps of several `batches`."""
    if isinstance(optimizer, SparseAdam):
        raise UserError("SparseAdam: it takes sparse gradients only, and these are dense; expected Adam")
    if isinstance(optimizer, LBFGS):
        if batches != 1:  # each of its evaluations would add its gradients to those before
            raise UserError(f"LBFGS with trainer.accumulate_grad_batches {batches}; expected 1")
        if not all(parameter.is_contiguous() for parameter in parameters):  # it flattens gradients without a copy
            raise UserError("LBFGS with model.init_args.channels_last true; expected false")


def described(optimizer: Optimizer, schedule: LRScheduler | None, frozen: list[str]) -> dict[str, object]:
    """Return the settings of optimiser and schedule before the first step, as plain values.

    `frozen` names the parameters that are not trained. The settings of this project's schedules are not among the
    values: a checkpoint does not restore them.
    """
    groups = optimizer.param_groups
    settings = {name for group in groups for name in group} - NO_SETTINGS
    state = {} if schedule is None else schedule.state_dict()
    numbers = {name: value for name, value in state.items() if name[0] != "_" and isinstance(value, int | float)}
    return {
        "class": type(optimizer).__name__,
        "numbers of parameters": [len(group["params"]) for group in groups],
        "frozen parameters": frozen,
        "lr": [float(group.get("initial_lr", group["lr"])) for group in groups],
        **{name: [group.get(name) for group in groups] for name in sorted(settings)},
        "lr_scheduler": schedule and type(schedule).__name__,
        **{f"lr_scheduler's {name}": value for name, value in numbers.items()},
    }


def check_resumed(asked: dict[str, object], known: dict[str, object]) -> None:
    """Refuse to resume with an optimiser other than the checkpoint's, whose settings would silently win."""
    for what, value in asked.items():
        if value != known.get(what, value):
            raise UserError(
                f"optimizer: {what} {shortened(value)}, the checkpoint has {shortened(known.get(what))}; expected the "
                "optimizer, lr_scheduler and freeze of the run's config.yaml (and its length, unless the schedule is "
                "of dlref.tasks), or model.init_args.weights for a run that begins with its weights"
            )
