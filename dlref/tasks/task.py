"""What every task shares: optimiser and schedule, transfer, what is remembered of the data, the contract."""

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
from dlref.runtime.errors import one_line
from dlref.tasks.deployable import Deployable
from dlref.tasks.losses import MeanLoss, or_one
from dlref.tasks.optimizers import check_resumed, described
from dlref.training.devices import is_distributed, scaler_of, scales_itself
from dlref.training.facts import check_rows, merge_facts
from dlref.training.weights import freeze, load_weights, read_checkpoint


class Task(LightningModule):
    """A thin layer around a network: the subclass adds the loss, the metrics and what is deployed.

    Args:
        network: from `dlref.models`.
        optimizer: built from the parameter groups; no default, so that the config says everything.
        lr_scheduler: built from the optimiser and the run's number of steps, stepped once a step.
        weights: start from these: a .safetensors or .pt state dict, or the folder of a run.
        freeze: regular expression; parameters of the network whose names match it from their start stay
            as they are, and norm layers all frozen keep their statistics.
        decay_vectors: False spares biases and norms (every parameter with one axis) from weight decay.
        compile_network: `torch.compile` the network in place. `graphs` also records as CUDA graphs what it launches:
            for small networks, whose kernels are done sooner than launched.
    """

    # Attributes of the data module that belong to the model (class names, a vocabulary): recorded with the
    # weights, and checked against those of any data the model meets later.
    fact_names: tuple[str, ...] = ()
    # Those that index a layer, and which one: row i of an embedding means entry i, so a run's weights fit no others.
    row_facts: ClassVar[dict[str, str]] = {}
    # What the network has to have beside `forward`.
    needs: tuple[str, ...] = ()
    # The metric by which an exported bundle is compared with this task: a key of test.json.
    metric: str
    train_loss: Tensor | None = None  # of the last step; a run that goes on has none before its first
    # The optimiser of the config, as `described` has it, and that of the run that is resumed.
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
        """As nn.Module's, but for Lightning's note of the hook it is in: forty times a step, and never a parameter."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # What a subclass answers

    def deployable(self, batch) -> Deployable:
        """The graphs that leave for the edge; example inputs come from `batch`, one of validation data."""
        raise NotImplementedError

    def evaluate(self, runner, batches: Iterable) -> float:
        """`metric` over `batches` of any split, answered by a runner of this task's kind.

        Over training batches it calibrates a quantiser: the inputs of the graphs are recorded, the score is not used.
        """
        raise NotImplementedError

    def degradation(self, reference: float, score: float) -> float:
        """Points by which a `score` of `metric` is worse than a `reference`; less than 0 where it is better.

        Hundredths of what the metric can be, here 1; of the reference where it has no bound.
        """
        return 100 * (reference - score)

    def shown(self, batch_index: int, size: int, most: int) -> list[int]:
        """Rows of a test batch to keep for a figure of `most` samples, spread over the split: neighbours look alike.

        Args:
            size: of the batch.
        """
        batches = self.trainer.num_test_batches[0]
        rows = min(size, sum(i * batches // most == batch_index for i in range(most)))
        return [i * size // rows for i in range(rows)]

    def draw(self, folder: Path) -> None:
        """Write the figures of the last test into `folder`."""

    def picture(self, answer: dict):
        """An answer of `predict` as a picture (PIL), where it is one."""

    def check(self) -> None:
        """Raise UserError where the network and the facts of the data do not fit together."""

    @contextmanager
    def probing(self, what: str, expected: str) -> Iterator[None]:
        """Try `what` on the network, in evaluation mode: none of its statistics sees it.

        Raises UserError where the network refuses it, with what was `expected`.
        """
        modes = [(module, module.training) for module in self.network.modules()]
        try:
            with torch.no_grad():
                self.network.eval()
                yield
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise UserError(f"network refuses {what} ({one_line(error)}); {expected}") from error
        finally:
            for module, training in modes:  # one that is kept in evaluation mode stays there
                module.training = training

    @property
    def network_device(self) -> torch.device:
        """Where the network is; in `setup` that is not yet `device`, where Lightning will move it."""
        return next(self.network.parameters()).device

    # What the data said of itself

    def take_facts(self, datamodule) -> None:
        """Take the facts of the data, or check them against those that came with the checkpoint."""
        self.remember({name: getattr(datamodule, name) for name in self.fact_names})

    def remember(self, facts: dict[str, object]) -> None:
        """Raises UserError where `facts` contradict what is known."""
        merge_facts(self.facts, facts)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep the facts beside the weights, and what optimiser was asked for."""
        checkpoint["facts"], checkpoint["optimizer"] = self.facts, self.optimizer_asked

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Hold a checkpoint's facts against those already known."""
        self.remember(checkpoint["facts"])

    def restore(self, path: Path) -> None:
        """Take weights and facts from a checkpoint. Raises UserError where they are not of this task."""
        checkpoint = read_checkpoint(path)
        self.on_load_checkpoint(checkpoint)
        try:
            self.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path}: {one_line(error)}; expected weights of this network") from None

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Once data and devices are known: facts, transfer, freezing, compilation."""
        if without := [name for name in self.needs if getattr(self.network, name, None) is None]:
            raise UserError(
                f"network {type(self.network).__name__} has no {', '.join(without)}; expected what "
                f"{type(self).__name__}'s docstring says"
            )
        self.take_facts(self.trainer.datamodule)
        first, self.prepared = not self.prepared, True
        if first:  # not again in the test that ends a fit: it would run a compiled network at another size
            self.check()
        if stage == "fit":
            if self.compile_network == "graphs" and (batches := self.trainer.accumulate_grad_batches) != 1:
                # Each graph writes its gradients where those of the batch before lie.
                raise UserError(
                    f"compile_network graphs with trainer.accumulate_grad_batches {batches}; expected 1, or "
                    "model.init_args.compile_network true"
                )
            self.transfer()
        if first and self.compile_network:
            # In place: rebinding would put `_orig_mod.` into every checkpoint key.
            self.network.compile(mode="reduce-overhead" if self.compile_network == "graphs" else None)

    def transfer(self) -> None:
        """Begin with the weights that are asked for, some of which stay as they are. Raises UserError."""
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
        """As Lightning's, but `train/...` values only in the steps that are logged and in the last of an epoch.

        In the steps between Lightning would spend the time of a small layer on a value that nobody reads.
        """
        if not name.startswith("train/") or self.logs_now():
            super().log(name, value, *arguments, **options)

    def logs_now(self) -> bool:
        """Whether the step is one of those that are logged."""
        due = (self.trainer.global_step + 1) % max(1, self.trainer.log_every_n_steps) == 0
        return due or self.trainer.is_last_batch or self.trainer.should_stop

    def on_train_batch_end(self, outputs, batch, batch_index: int) -> None:
        """A run that a callback ends here is logged to its last step."""
        if self.trainer.should_stop:
            self.log("train/loss", self.train_loss)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """As Lightning's, which refuses fused optimisers under any mixed precision: bf16 has no scale to undo first."""
        plugin, norm = self.trainer.precision_plugin, gradient_clip_algorithm or "norm"
        if gradient_clip_val and scales_itself(optimizer) and isinstance(plugin, MixedPrecision):
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, GradClipAlgorithmType(norm))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def log_train_loss(self, loss: Tensor, count: Tensor | int, **parts: Tensor) -> Tensor:
        """Log the mean `train/loss` of all devices' shares of a batch, and return what makes its gradient.

        Args:
            loss: a mean over `count` things of this device's share; of no things, a sum. DDP averages the devices'
                gradients: as it is, a thing would count for less on a device that has more of them.
            parts: of the loss, logged beside it by their names; means over as many.
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
            self.log(f"train/{name}", value)  # not to the bar: Lightning would fetch it after every step
        return loss

    def log_eval_loss(self, stage: str, loss: Tensor, count: Tensor | int) -> None:
        """Log the loss of an evaluation: the mean over all that counts, however it is shared out into batches.

        Args:
            stage: val or test.
            loss: a mean over `count` things; of no things, a sum.
        """
        self.mean_loss.update(loss, count)
        self.log(f"{stage}/loss", self.mean_loss)

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[dict]:
        """What the optimiser is built from: those with weight decay, and those without."""
        if self.decay_vectors:
            return [{"params": parameters}]
        return [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def configure_optimizers(self):
        """The config's optimiser over the parameters that train, and its schedule stepped once a step.

        Raises UserError.
        """
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if not parameters:
            raise UserError(f"freeze {self.freeze_pattern!r} leaves no parameter to train")
        steps = 0 if self.lr_scheduler is None else self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise UserError("lr_scheduler without an end of the run; expected trainer.max_epochs or max_steps")
        try:
            optimizer = self.optimizer(self.parameter_groups(parameters))
            scheduler = None if self.lr_scheduler is None else self.lr_scheduler(optimizer, int(steps))
        except ValueError as error:  # a rate below zero, two rates too few, ...
            raise UserError(f"optimizer or lr_scheduler: {one_line(error)}") from error
        self.optimizer_asked = described(optimizer, scheduler)
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
