"""The base of all tasks: optimiser and schedule, transfer learning, facts of the data, the contract with export."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dlref.runtime import UserError
from dlref.runtime.errors import one_line, shortened
from dlref.tasks.deployable import Deployable
from dlref.tasks.losses import MeanLoss, or_one
from dlref.tasks.optimizers import check_resumed, check_usable, described
from dlref.training.devices import is_distributed, scaler_of, scales_itself
from dlref.training.facts import check_rows
from dlref.training.weights import freeze, load_weights, read_checkpoint

UNLIKE = 0.01  # relative difference between two calls that rounding does not explain: TF32 gives 0.001 in a ResNet-152
PROBED = 13  # series or sentences of a trial call: hardly any other axis has this size, so exchanged axes show


class Task(LightningModule):
    """A thin layer around a network: a subclass adds the loss, the metrics and the exported graphs.

    Args:
        network: network from `dlref.models`.
        optimizer: built from the parameter groups; has no default, so that the config specifies everything.
        lr_scheduler: built from the optimiser and the run's number of steps, stepped after every optimiser step.
        weights: initial weights: a .safetensors or .pt state dict, or the folder of a run.
        freeze: regular expression; network parameters whose names match it from their start are frozen, and
            norm layers whose parameters are all frozen keep their statistics.
        decay_vectors: whether to apply weight decay to biases and norms (parameters with one axis), too.
        compile_network: `torch.compile` the network in place. `graphs` also records its kernels as CUDA graphs, for
            small networks, whose kernels take longer to launch than to run.
    """

    # Attributes of the data module that belong to the model (class names, a vocabulary): recorded with the
    # weights, and checked against those of any data the model meets later.
    fact_names: tuple[str, ...] = ()
    # Facts that index the rows of a layer, and its name: row i of an embedding stands for entry i, so a run's weights
    # do not fit other facts.
    row_facts: ClassVar[dict[str, str]] = {}
    # Attributes that the network must have besides `forward`.
    needs: tuple[str, ...] = ()
    # The metric by which an exported bundle is compared with this task: a key of test.json, logged in validation, too.
    metric: str
    train_loss: Tensor | None = None  # of the last step; a resumed run starts without one
    # The config's optimiser, as returned by `described`, and that of the run that is resumed.
    optimizer_asked: dict[str, object] | None = None
    optimizer_resumed: dict[str, object] | None = None

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable], Optimizer],
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        weights: str | None = None,
        freeze: str | None = None,
        decay_vectors: bool = True,
        compile_network: bool | Literal["graphs"] = False,
    ):
        super().__init__()
        self.network = network
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.weights, self.freeze_pattern = weights, freeze
        self.decay_vectors, self.compile_network = decay_vectors, compile_network
        self.mean_loss = MeanLoss()
        self.facts: dict[str, object] = {}
        self.prepared = False

    def __setattr__(self, name: str, value) -> None:
        """Bypass `nn.Module` for Lightning's name of the current hook: set forty times a step, never a parameter."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # To be defined by a subclass

    def deployable(self, batch) -> Deployable:
        """Return the graphs to export, with example inputs from `batch`, a batch of validation data."""
        raise NotImplementedError

    def evaluate(self, runner, batches: Iterable) -> float:
        """Return `metric` of the predictions of a runner of this task's kind over `batches` of any split.

        Training batches calibrate a quantiser: the inputs of the graphs are recorded, the score is not used.
        """
        raise NotImplementedError

    def degradation(self, reference: float, score: float) -> float:
        """Return by how many points a `score` of `metric` is worse than a `reference`; negative if it is better.

        Points are hundredths of the largest possible value, here 1, or of the reference if the metric has no bound.
        """
        return 100 * (reference - score)

    def shown(self, batch_index: int, size: int, most: int) -> list[int]:
        """Return rows of a test batch to keep for a figure of `most` samples, spread over the split for variety.

        Args:
            size: size of the batch.
        """
        batches = self.trainer.num_test_batches[0]
        rows = min(size, sum(i * batches // most == batch_index for i in range(most)))
        return [i * size // rows for i in range(rows)]

    def draw(self, folder: Path) -> None:
        """Write the figures of the last test into `folder`."""

    def picture(self, answer: dict):
        """Return a prediction as a picture (PIL), if it can be one."""

    def check(self) -> None:
        """Raise UserError if the network and the facts of the data do not fit together."""

    @contextmanager
    def probing(self, what: str, expected: str) -> Iterator[None]:
        """Try `what` on the network, in evaluation mode, so that its statistics do not change.

        Raises UserError if the network rejects it, with what was `expected`.
        """
        modes = [(module, module.training) for module in self.network.modules()]
        try:
            with torch.no_grad():
                self.network.eval()
                yield
        except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"network rejects {what} ({one_line(error)}); {expected}") from error
        finally:
            for module, training in modes:  # a module kept in evaluation mode stays there
                module.training = training

    @property
    def network_device(self) -> torch.device:
        """The network's current device; in `setup`, Lightning has not yet moved it to `device`."""
        return next(self.network.parameters()).device

    # Facts of the data

    def take_facts(self, datamodule) -> None:
        """Take the facts of the data, or check them against those that came with the checkpoint. Raises UserError."""
        for name in self.fact_names:
            value = getattr(datamodule, name, self)  # not None, which is a fact
            if value is self or not is_plain(value):
                found = "none" if value is self else shortened(value)
                raise UserError(f"{name} of the data: {found}; expected plain values of Python, kept in checkpoints")
            self.remember({name: value})

    def remember(self, facts: dict[str, object]) -> None:
        """Add `facts` to the known facts. Raises UserError if they contradict each other."""
        for name, value in facts.items():
            if (known := self.facts.setdefault(name, value)) != value:
                raise UserError(
                    f"{name} of the data and of the checkpoint differ: {shortened(value)} and {shortened(known)}; "
                    "expected the same, in the same order"
                )

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Store the facts with the weights, and the description of the optimiser."""
        checkpoint["facts"], checkpoint["optimizer"] = self.facts, self.optimizer_asked

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Check a checkpoint's facts against those already known."""
        self.remember(checkpoint["facts"])

    def restore(self, path: Path) -> None:
        """Load weights and facts from a checkpoint. Raises UserError if they do not fit this task."""
        checkpoint = read_checkpoint(path)
        self.on_load_checkpoint(checkpoint)
        try:
            self.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path}: {one_line(error)}; expected weights of this network") from None

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Take facts, load and freeze weights, and compile, once data and devices are known."""
        if without := [name for name in self.needs if getattr(self.network, name, None) is None]:
            raise UserError(
                f"network {type(self.network).__name__} has no {', '.join(without)}; expected a network as "
                f"{type(self).__name__}'s docstring describes it"
            )
        self.take_facts(self.trainer.datamodule)
        first, self.prepared = not self.prepared, True
        if first:  # not again in the test after a fit: it would run a compiled network at another size
            self.check()
        if stage == "fit":
            if self.compile_network == "graphs" and (batches := self.trainer.accumulate_grad_batches) != 1:
                # Each graph overwrites the gradients of the previous batch.
                raise UserError(
                    f"compile_network graphs with trainer.accumulate_grad_batches {batches}; expected 1, or "
                    "model.init_args.compile_network true"
                )
            self.transfer()
        if first and self.compile_network:
            # In place: rebinding would put `_orig_mod.` into every checkpoint key.
            self.network.compile(mode="reduce-overhead" if self.compile_network == "graphs" else None)

    def transfer(self) -> None:
        """Load the weights that the config specifies, and freeze parameters. Raises UserError."""
        if self.weights:
            path = Path(self.weights)
            check_rows(self.row_facts, self.facts, path, fresh=load_weights(self.network, path))
        if self.freeze_pattern:
            freeze(self.network, self.freeze_pattern)

    def on_train_start(self) -> None:
        """Log at least once an epoch, however few steps it has."""
        if math.isfinite(batches := self.trainer.num_training_batches):
            steps = max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))
            self.trainer.log_every_n_steps = min(self.trainer.log_every_n_steps, steps)

    def log(self, name: str, value, *arguments, **options) -> None:
        """Log like Lightning, but `train/...` values only in the steps that are logged and in the last of an epoch.

        In the steps between, Lightning would spend as much time as a small layer takes on a value that nobody reads.
        """
        if not name.startswith("train/") or self.logs_now():
            super().log(name, value, *arguments, **options)

    def logs_now(self) -> bool:
        """Return whether the current step is logged."""
        due = (self.trainer.global_step + 1) % max(1, self.trainer.log_every_n_steps) == 0
        return due or self.trainer.is_last_batch or self.trainer.should_stop

    def on_train_batch_end(self, outputs, batch, batch_index: int) -> None:
        """Log the last step of a run that a callback ends here."""
        if self.trainer.should_stop:
            self.log("train/loss", self.train_loss)

    def optimizer_zero_grad(self, epoch: int, batch_index: int, optimizer) -> None:
        """Drop the gradients without the label for profilers that torch sets around it in each step."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip like Lightning, but allow fused optimisers in mixed precision: bf16 has no scale to undo first."""
        if not gradient_clip_val:
            return
        plugin, norm = self.trainer.precision_plugin, gradient_clip_algorithm or "norm"
        if scales_itself(optimizer) and isinstance(plugin, MixedPrecision):
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, GradClipAlgorithmType(norm))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def log_train_loss(self, loss: Tensor, count: Tensor | int, **parts: Tensor) -> Tensor:
        """Log the mean `train/loss` over all devices' shares of a batch, and return the loss to differentiate.

        Args:
            loss: mean over the `count` items of this device's share, or a sum if there are none. DDP averages the
                devices' gradients, so without rescaling, an item would count less on a device that has more of them.
            parts: parts of the loss, logged by their names; means over the same items.
        """
        values = {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}
        if is_distributed():
            count = count * torch.ones_like(values["loss"])
            sums = torch.stack([count, *(value * or_one(count) for value in values.values())])
            torch.distributed.all_reduce(sums)
            everywhere = or_one(sums[0])
            values = dict(zip(values, sums[1:] / everywhere, strict=True))
            loss = loss * (or_one(count) * torch.distributed.get_world_size() / everywhere)
        self.train_loss = values["loss"]
        for name, value in values.items():
            self.log(f"train/{name}", value)  # not in the bar, for which Lightning would fetch it in every step
        return loss

    def log_eval_loss(self, stage: str, loss: Tensor, count: Tensor | int) -> None:
        """Log the loss of an evaluation: the mean over all items, however they are divided into batches.

        Args:
            stage: val or test.
            loss: mean over `count` items, or a sum if there are none.
        """
        self.mean_loss.update(loss, count)
        self.log(f"{stage}/loss", self.mean_loss)

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[dict]:
        """Return the groups that the optimiser is built from: with weight decay, and without."""
        if self.decay_vectors:
            return [{"params": parameters}]
        return [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def configure_optimizers(self):
        """Build the config's optimiser over the trainable parameters, and its schedule, stepped after every step.

        Raises UserError.
        """
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if not parameters:
            raise UserError(f"freeze {self.freeze_pattern!r} leaves no parameter to train")
        steps = 0 if self.lr_scheduler is None else self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise UserError("lr_scheduler needs a run of known length; expected trainer.max_epochs or max_steps")
        try:
            optimizer = self.optimizer(self.parameter_groups(parameters))
            scheduler = None if self.lr_scheduler is None else self.lr_scheduler(optimizer, int(steps))
        except (ValueError, RuntimeError, KeyError) as error:  # a negative learning rate, fused with foreach, ...
            raise UserError(f"optimizer or lr_scheduler: {one_line(error)}") from error
        check_usable(optimizer, parameters, self.trainer.accumulate_grad_batches)
        frozen = [name for name, parameter in self.network.named_parameters() if not parameter.requires_grad]
        self.optimizer_asked = described(optimizer, scheduler, frozen)
        if self.optimizer_resumed is not None:
            check_resumed(self.optimizer_asked, self.optimizer_resumed)
        if scales_itself(optimizer) and self.trainer.gradient_clip_val and scaler_of(self.trainer):
            raise UserError(
                "a fused optimizer with trainer.gradient_clip_val and 16-mixed; expected bf16-mixed, or "
                "model.init_args.optimizer.init_args.fused to be false"
            )
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def increase(reference: float, score: float) -> float:
    """Return by how many percent of a `reference` a `score` is above it; infinite for one from 0."""
    if not reference:
        return math.inf if score else 0.0
    return 100 * (score / reference - 1)


def is_plain(value: object) -> bool:
    """Return whether a checkpoint can hold a value: numpy's texts and numbers would make it unreadable."""
    if isinstance(value, dict):
        return all(is_plain(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def unlike(one: Tensor, other: Tensor) -> bool:
    """Return whether the outputs of two calls, of one shape, differ by more than rounding explains."""
    return bool((one.float() - other.float()).norm() > UNLIKE * other.float().norm())
