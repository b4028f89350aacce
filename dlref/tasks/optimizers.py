"""Optimisers that torch has in parts."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Muon for the hidden matrices, AdamW for all else, as its authors have it (Jordan et al. 2024).

    Muon's step has the size of AdamW's (Liu et al. 2025, equation 4), so that one rate and one weight decay fit both.

    Args:
        params: groups; those with `hidden: True` are matrices between hidden layers.
        lr: of both.
        weight_decay: of both, where a group has none of its own.
        momentum: Muon's.
        betas: AdamW's.
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
        self.parts: dict[bool, Optimizer] = {
            True: Muon(muon, momentum=momentum, adjust_lr_fn="match_rms_adamw", **known)
        }
        if others := [group for group in groups if not group.get("hidden")]:
            self.parts[False] = AdamW(others, betas=tuple(betas), fused=True, **known)
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both, over the groups and the state of this one, which a schedule and a checkpoint change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for hidden, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if bool(group.get("hidden")) is hidden]
            part.state = self.state
            part.step()
        return loss
