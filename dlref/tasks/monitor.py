"""A callback that reports common problems of training in one line each, by named rules.

The rules are those of Amazon SageMaker Debugger, with its default thresholds where a constant says so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Literal

import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from dlref.tasks.task import Task
from dlref.training.devices import scaler_of, scales_itself

VANISHED = 1e-7  # times the weights' norm; Debugger compares the gradient itself with this number
EXPLODED = 1e4  # times the weights' norm; the largest ratio of the untrained networks here is ResNet-50's, 400
LAYER = 0.5  # share of a layer's units, or of its outputs (Debugger's threshold_layer)
ENOUGH = 32  # values of a unit in a batch; with fewer, a unit that is seldom active is often 0 throughout
# Distance from a bound, as a share of the range of tanh or sigmoid: closer, the slope is below 0.2% of its maximum. In
# LeNet-5, 0.3 of the outputs are that close.
NEAR = 0.0005
LOOKS = 10  # without a lower loss (Debugger's num_steps)
LOWER = 0.001  # share by which a loss must be lower to count as lower (Debugger's diff_percent)
VALIDATIONS = 3  # in a row; one alone may be chance
HIGHER = 0.1  # share of the validation loss (Debugger's ratio_threshold)


@dataclass
class Seen:
    """The measurements that the rules judge.

    Attributes:
        gradients: for each parameter, the norms of its gradient and of its weights at the last look.
        silent: for each ReLU, the share of its units that were 0 for the whole batch of the last look.
        saturated: for each tanh or sigmoid, the share of its outputs close to a bound at the last look.
        losses: the mean training loss between successive looks.
        validations: for each validation, the mean training loss since the previous one, and the validation loss.
    """

    gradients: dict[str, tuple[float, float]] = field(default_factory=dict)
    silent: dict[str, float] = field(default_factory=dict)
    saturated: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[float, float]] = field(default_factory=list)


# Rules: each returns what is wrong, or None


def vanishing_gradient(seen: Seen) -> str | None:
    """A gradient too small to change the weights. Exactly 0 does not count: then no example reached the layer, as in a
    detector's head for object sizes that the batch does not have.
    """
    ratios = {name: norm / size for name, (norm, size) in seen.gradients.items() if 0 < norm < VANISHED * size}
    return of_gradient(seen, min(ratios, key=ratios.get), min(ratios.values())) if ratios else None


def exploding_gradient(seen: Seen) -> str | None:
    """A gradient that would overwrite the weights, or is NaN. Norms of weights below 1, such as 0, count as 1."""
    ratios = {name: norm / max(size, 1) for name, (norm, size) in seen.gradients.items()}
    ratios = {name: math.inf if math.isnan(ratio) else ratio for name, ratio in ratios.items()}
    name = max(ratios, key=ratios.get, default=None)
    return of_gradient(seen, name, ratios[name]) if name and ratios[name] > EXPLODED else None


def of_gradient(seen: Seen, name: str, ratio: float) -> str:
    """Return the message about a gradient."""
    return f"{name}: gradient norm {seen.gradients[name][0]:.1e}, {ratio:.1e} times the weights'"


def dead_relu(seen: Seen) -> str | None:
    """A layer in which most units are 0 for every example, so that no gradient passes through them."""
    name = max(seen.silent, key=seen.silent.get, default=None)
    if name is None or seen.silent[name] <= LAYER:
        return None
    return f"{name}: {seen.silent[name]:.0%} of the units are 0 for the whole batch"


def saturated_activation(seen: Seen) -> str | None:
    """A layer in which most outputs are so close to a bound that hardly any gradient passes through."""
    name = max(seen.saturated, key=seen.saturated.get, default=None)
    if name is None or seen.saturated[name] <= LAYER:
        return None
    return f"{name}: {seen.saturated[name]:.0%} of the outputs are at a bound"


def loss_not_decreasing(seen: Seen) -> str | None:
    """None of the last `LOOKS` looks had a loss clearly below the lowest loss before."""
    before, recent = seen.losses[:-LOOKS], seen.losses[-LOOKS:]
    if not before or min(recent) < min(before) - LOWER * abs(min(before)):
        return None
    return f"training loss {min(recent):.4g} at best in {LOOKS} looks, {min(before):.4g} before"


def overfitting(seen: Seen) -> str | None:
    """The validation loss is clearly above its lowest, `VALIDATIONS` times in a row, while the training loss fell.

    The margin is relative to the mean absolute validation loss: the lowest negative log-likelihood can be 0.
    """
    before, recent = seen.validations[:-VALIDATIONS], seen.validations[-VALIDATIONS:]
    if not before:
        return None
    fitted, lowest = min(before, key=lambda losses: losses[1])
    margin = HIGHER * fmean(abs(loss) for _, loss in seen.validations)
    training, validation = recent[-1]
    if training >= fitted or any(loss <= lowest + margin for _, loss in recent):
        return None
    return (
        f"validation loss {validation:.4g}, {lowest:.4g} at its lowest; training loss {training:.4g}, {fitted:.4g} then"
    )


RULES: dict[str, Callable[[Seen], str | None]] = {
    rule.__name__: rule
    for rule in (
        vanishing_gradient,
        exploding_gradient,
        dead_relu,
        saturated_activation,
        loss_not_decreasing,
        overfitting,
    )
}
Rule = Literal[tuple(RULES)]


class Monitor(Callback):
    """Prints one line when a rule starts to hold, and optionally ends the run.

        python train.py fit --config configs/lenet5_digits.yaml
            --trainer.callbacks+ dlref.tasks.Monitor --trainer.callbacks.stop "[exploding_gradient]"

        monitor: step 350: exploding_gradient: network.f6.weight: gradient norm 1.2e+05, 3.1e+04 times the weights'

    A rule is reported once, and again only after it has ceased to hold. Gradients are measured before clipping, and
    only for weights, as a bias before a batch norm has none. Activations are measured in the modules `nn.ReLU`,
    `nn.ReLU6`, `nn.Tanh` and `nn.Sigmoid`, not in functions, in the gates of recurrent layers or inside a compiled
    network. Units are on axis 1, or on the last axis of (B, T, D). Losses are those of all steps; `loss_not_decreasing`
    also holds for a network that has converged. `overfitting` needs a validation that logs `val/loss`. With several
    devices, the gradients and activations of the first are judged. A resumed run starts its windows anew.

    A run is ended as by early stopping: after a last validation (unless `check_val_every_n_epoch` skips it in that
    epoch), with its checkpoints and the final test, and not before `min_epochs` and `min_steps`.

    Args:
        every: number of steps from one look at gradients and activations to the next; losses are averaged over them. A
            look waits for the device; the steps in between do not.
        stop: rules that end the run.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, every: int = 50, stop: Sequence[Rule] = ()):
        if every < 1:
            raise ValueError(f"every: {every}; expected 1 or more")
        self.every, self.stop = every, set(stop)
        self.handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, task: Task) -> None:
        """Forget earlier looks."""
        self.seen, self.firing = Seen(), set()
        self.measured: dict[tuple[str, str], Tensor] = {}  # (kind, name) -> a number on the device
        self.since_look, self.since_validation = MeanOfLosses(), MeanOfLosses()
        self.looks = trainer.global_step // self.every
        if task.compile_network and trainer.is_global_zero:
            print("monitor: dead_relu and saturated_activation see nothing inside of a compiled network")

    def on_train_batch_start(self, trainer: Trainer, task: Task, batch, batch_index: int) -> None:
        """Register hooks on the activations, if the step is looked at."""
        if self._due(trainer) and not task.compile_network:
            for name, module in task.named_modules():
                for kinds, kind, share in LISTENED:
                    if isinstance(module, kinds):
                        hook = partial(self._hear, kind, name, share)
                        self.handles.append(module.register_forward_hook(hook))

    def on_before_optimizer_step(self, trainer: Trainer, task: Task, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradients, if the step is looked at."""
        if self._due(trainer):
            scaler = scaler_of(trainer)
            scale = scaler.get_scale() if scaler and scales_itself(optimizer) else 1
            for name, parameter in task.named_parameters():
                if parameter.ndim > 1 and parameter.grad is not None:
                    self.measured["gradient", name] = _whole(torch.linalg.vector_norm(parameter.grad)) / scale
                    self.measured["weight", name] = _whole(torch.linalg.vector_norm(parameter.detach()))

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs, batch, batch_index: int) -> None:
        """Add the loss; if the step was looked at, apply the rules."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.since_look.add(task.train_loss)
        self.since_validation.add(task.train_loss)
        looks = trainer.global_step // self.every
        if looks > self.looks:  # only after the last of the batches that accumulate gradients
            self.looks = looks
            self._look(scaled=scaler_of(trainer) is not None)
            self._judge(trainer)

    def on_validation_end(self, trainer: Trainer, task: Task) -> None:
        """Judge the training and validation losses."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn == "fit" and not trainer.sanity_checking and loss is not None:
            self.seen.validations.append((self.since_validation.take(), float(loss)))
            self._judge(trainer)

    def _due(self, trainer: Trainer) -> bool:
        return (trainer.global_step + 1) // self.every > self.looks

    def _hear(self, kind: str, name: str, share: Callable, module: nn.Module, inputs, output: Tensor) -> None:
        part, key = share(module, output.detach()), (kind, name)
        if part is not None:  # the worst of all calls, as one module may serve several layers
            self.measured[key] = torch.maximum(part, self.measured.get(key, part))

    def _look(self, scaled: bool) -> None:
        """Fetch all measurements at once."""
        numbers = torch.stack([number.float() for number in self.measured.values()]).tolist() if self.measured else []
        kinds = {kind: {} for kind in ("gradient", "weight", "silent", "saturated")}
        for (kind, name), number in zip(self.measured, numbers, strict=True):
            kinds[kind][name] = number
        gradients = {name: (norm, kinds["weight"][name]) for name, norm in kinds["gradient"].items()}
        if scaled:  # a scaler skips the steps in which its scale was too large
            gradients = {name: norms for name, norms in gradients.items() if math.isfinite(norms[0])}
        self.seen.gradients, self.seen.silent, self.seen.saturated = gradients, kinds["silent"], kinds["saturated"]
        self.seen.losses.append(self.since_look.take())
        self.measured.clear()

    def _judge(self, trainer: Trainer) -> None:
        """Report rules that start to hold; the first device decides for all whether the run ends."""
        if trainer.is_global_zero:
            wrong = {name: words for name, rule in RULES.items() if (words := rule(self.seen)) is not None}
            for name, words in wrong.items():
                if name not in self.firing:
                    end = "; the run ends" if name in self.stop else ""
                    print(f"monitor: step {trainer.global_step}: {name}: {words}{end}")
            self.firing = set(wrong)
        ends = trainer.strategy.broadcast(bool(self.firing & self.stop))
        trainer.should_stop = trainer.should_stop or ends


class MeanOfLosses:
    """The mean of losses, accumulated on their device."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, loss: Tensor) -> None:
        """Add a loss without waiting for the device."""
        self.total, self.count = self.total + loss, self.count + 1

    def take(self) -> float:
        """Return the mean of the losses since the last call."""
        mean = float(self.total) / max(self.count, 1)
        self.total, self.count = 0.0, 0
        return mean


def silent_units(relu: nn.Module, output: Tensor) -> Tensor | None:
    """Return the share of units that are 0 throughout a batch, or None if the batch is too small to tell."""
    unit = 2 if output.ndim == 3 else 1
    if output.ndim < 2 or output.numel() < ENOUGH * output.shape[unit]:
        return None
    others = [axis for axis in range(output.ndim) if axis != unit]
    return (output.amax(others) <= 0).float().mean()


def _whole(number: Tensor) -> Tensor:
    """Return the whole value of a number computed from sharded weights."""
    return number.full_tensor() if isinstance(number, DTensor) else number


def saturated_outputs(squashing: nn.Module, output: Tensor) -> Tensor:
    """Return the share of outputs closer to a bound than `NEAR` of the range."""
    lowest = -1 if isinstance(squashing, nn.Tanh) else 0
    from_bound = torch.minimum(output - lowest, 1 - output)
    return (from_bound < NEAR * (1 - lowest)).float().mean()


# Module classes, name of the measurement, and the function that measures an output.
LISTENED = (
    ((nn.ReLU, nn.ReLU6), "silent", silent_units),
    ((nn.Tanh, nn.Sigmoid), "saturated", saturated_outputs),
)
