"""The checkpoints of a run: when and how best.ckpt and last.ckpt, from which a run resumes, are written."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from dlref.runtime import UserError
from dlref.runtime.errors import one_line, shortened
from dlref.training.seal import replacing, write_sealed
from dlref.training.sigterm import listen

# Callbacks that lose their state when a run resumes, or that train with settings found in no config.
UNRESUMED = (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)


class Interrupted(Exception):
    """The process was stopped by SIGTERM, and the run can resume from `path`."""

    def __init__(self, path: Path, step: int):
        super().__init__(f": {path} is at step {step}; --ckpt_path last resumes from there")


class SealedCheckpointIO(TorchCheckpointIO):
    """Write checkpoints as Lightning does, but sealed; keep the last.ckpt before the current one as previous.ckpt.

    Args:
        run: the folder of the run.
        known: a checkpoint known to be intact. Only an intact last.ckpt is kept when a new one replaces it.
    """

    def __init__(self, run: Path, known: Path | None):
        self.run, self.whole = run.resolve(), {known and known.resolve()}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; called in the first process only."""
        path = Path(path).resolve()
        worth_keeping = path.name == "last.ckpt" and path in self.whole and path.exists()
        write_sealed(checkpoint, path, path.with_name("previous.ckpt") if worth_keeping else None)
        self.whole.add(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file in the run's folder. Raises UserError for others: a checkpoint can name any file as best."""
        place = Path(path).resolve()
        disk = (self.run / "checkpoints").resolve()  # may be a link to another disk
        if self.run not in place.parents and disk not in place.parents:
            raise UserError(f"the checkpoint would delete {path}; expected a file in the run's folder")
        super().remove_checkpoint(place)


class BestCheckpoint(ModelCheckpoint):
    """Write best.ckpt after each validation that improves the metric; keep the newest until the metric is a number.

    Args:
        folder: folder of the run's checkpoints.
        metric: a logged metric, such as val/accuracy.
        mode: min or max.
    """

    def __init__(self, folder: Path, metric: str, mode: str):
        super().__init__(folder, "best", metric, mode=mode, save_on_train_epoch_end=False, enable_version_counter=False)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best score for the best.ckpt in this folder: the run may have moved."""
        path, score = self.format_checkpoint_name({}), state["best_model_score"]
        here = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
        super().load_state_dict(state | here | {"best_k_models": {} if score is None else {path: score}})

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether to keep this checkpoint. Any score beats NaN, the score of a split with nothing to count."""
        better = super().check_monitor_top_k(trainer, current)
        if current is None:
            return better
        unscored = not all(score.isfinite() for score in self.best_k_models.values())
        if not current.isfinite():
            rank_zero_warn(f"{self.monitor} is {current.item()}; expected a number, to choose best.ckpt by")
            better = not self.best_k_models
        return trainer.strategy.reduce_boolean_decision(bool(better or unscored))

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Forget the best score if best.ckpt is missing: lost, or set aside because the checkpoint is another run's."""
        super().on_train_start(trainer, task)
        if not trainer.strategy.broadcast(Path(self.format_checkpoint_name({})).is_file()):
            self.best_k_models = {}


class Last(Checkpoint):
    """Write last.ckpt: after validation, at the end of an epoch without one, every few minutes, and when a fit ends.

    A step followed by validation is saved only after it: a run resumed from before would skip that validation. If a
    fit ends before its first validation, best.ckpt is a copy of last.ckpt.

    Args:
        minutes: time between two saves.
    """

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.sigterm_received = self.ending = self.validated = False
        self.stopping = False  # whether early stopping had ended the resumed run, which still had min_steps to reach
        self.scored = 0  # step of the last validation, or at which this fit began
        self.taken, self.batches = 0, None  # batches taken and batches per epoch, in the resumed checkpoint
        self.size = self.accumulated = self.seed = None  # batch size of all devices, batches per step, seed, likewise

    def on_sigterm(self, *_: Any) -> None:
        """Record a SIGTERM, which a spot instance receives two minutes before it ends."""
        self.sigterm_received = True

    @contextmanager
    def excusing_errors(self, trainer: Trainer) -> Iterator[None]:
        """After a SIGTERM to a fit of one process, raise its exception in place of torch's errors.

        SIGTERM may have ended other processes that the step needs, too, such as compilers. Of several processes that
        train, one would leave the others waiting.
        """
        try:
            yield
        except RuntimeError as error:
            if self.sigterm_received and trainer.world_size == 1:
                raise SIGTERMException(f" in a step that failed: {shortened(one_line(error))}") from error
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the batches per epoch and per optimiser step, their size, whether the run was validated, its seed."""
        known = {"batches": self.batches, "accumulated": self.accumulated, "size": self.size}
        return known | {"validated": self.validated, "seed": self.seed}

    def on_save_checkpoint(self, trainer: Trainer, task: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record whether early stopping has ended the run although its min_steps or min_epochs are not reached."""
        loop = trainer.fit_loop
        epochs = loop.epoch_progress.current.started - (not trainer.is_last_batch)
        reached = epochs >= (loop.min_epochs or 0) and trainer.global_step >= (loop.min_steps or 0)
        checkpoint["callbacks"][self.state_key]["stopping"] = trainer.should_stop and not reached

    def on_load_checkpoint(self, trainer: Trainer, task: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the run's position in its epoch. Raises UserError."""
        if "averaging_state" in checkpoint and not any(isinstance(one, WeightAveraging) for one in trainer.callbacks):
            raise UserError(
                "trainer.callbacks: no weight averaging, but the checkpoint holds averaged weights; expected the "
                "callbacks of the run's config.yaml, or model.init_args.weights for a new run that starts from them"
            )
        try:
            loaders = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
            self.taken = sum(int(loader["taken"]) for loader in loaders)
            known = checkpoint["callbacks"][self.state_key]
            self.batches, self.accumulated = int(known["batches"]), int(known["accumulated"])
            self.validated, self.seed = bool(known["validated"]), int(known["seed"])
            self.stopping = bool(known.get("stopping"))
            self.size = int(known["size"]) if "size" in known else None  # earlier checkpoints do not have it
            epochs = int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["started"])
            for one in trainer.callbacks:
                if isinstance(one, EarlyStopping) and one.state_key in checkpoint["callbacks"]:
                    state = checkpoint["callbacks"][one.state_key]
                    self.stopping = self.stopping and one.patience <= state["patience"]
                    state["patience"] = one.patience  # the config's, not the earlier one
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"loops and callbacks: {one_line(repr(error))}; expected a checkpoint that train.py of this version "
                "wrote, or model.init_args.weights for a new run that starts from the weights"
            ) from None
        for name, trained in (("max_epochs", epochs), ("max_steps", checkpoint["global_step"])):
            most = getattr(trainer, name)
            # Lightning would skip the training, and with it the checks below, and config.yaml would name a shorter run.
            if most is not None and 0 <= most < trained:
                raise UserError(f"trainer.{name}: {most}, the checkpoint has {trained}; expected at least as many")

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Find the position in the epoch, and handle SIGTERM: save and end between two steps."""
        check_interval(trainer)
        self.find_place(trainer)
        self.scored = trainer.global_step
        leave_finished_epoch(trainer.fit_loop)
        if self.stopping and any(isinstance(one, EarlyStopping) for one in trainer.callbacks):
            trainer.should_stop = True
        number_step(trainer)
        self.path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        self.validated = self.validated and self.path.with_name("best.ckpt").is_file()  # not if of another run
        self.saved, self.step = time.monotonic(), trainer.global_step
        self.kept = self.step
        listen(self.on_sigterm)  # Lightning restores the earlier handler

    def find_place(self, trainer: Trainer) -> None:
        """Begin after the batches that the checkpoint's run took. Raises UserError if its steps were different."""
        batches, added = trainer.num_training_batches, trainer.accumulate_grad_batches
        sampler = trainer.train_dataloader.sampler
        size, seed = sampler.order.batch_size, sampler.run
        if self.batches not in (None, batches):  # also at an epoch's end: a schedule counts steps
            raise UserError(
                f"the checkpoint is at batch {self.taken} of {self.batches}, but an epoch now has {batches}; expected "
                "the same data, batch size and devices"
            )
        if self.size not in (None, size):  # where an epoch has a fixed number of batches
            raise UserError(
                f"batch_size times devices: {size}, the checkpoint has {self.size}; expected the same batch size and "
                "devices"
            )
        if self.accumulated not in (None, added):
            raise UserError(
                f"trainer.accumulate_grad_batches: {added}, the checkpoint has {self.accumulated}; expected the same, "
                "because schedules count steps"
            )
        if self.seed not in (None, seed):
            raise UserError(
                f"seed_everything: {seed}, the checkpoint has {self.seed}; expected the same, so that the run "
                "continues as if it had not stopped"
            )
        self.batches, self.size, self.accumulated, self.seed = batches, size, added, seed
        # Lightning loses the position when a schedule asks for the number of steps.
        trainer.train_dataloader.load_state_dict({"taken": self.taken % batches})

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, batch: Any, batch_idx: int) -> None:
        """End here rather than after the previous step, so that its losses are logged."""
        if self.ending:
            raise Interrupted(self.path, self.kept)

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a save is due, only between two optimiser steps: accumulated gradients are in no checkpoint."""
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        stops = ends_here(trainer)
        if not (stepped or stops):
            return
        ending = self.agreed(trainer)
        if (stops or ending or self.due(trainer)) and not validates_next(trainer):
            self.ending = ending
            self.save(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, task: LightningModule) -> None:
        """Record the validation before best.ckpt is written, which stores this state too."""
        self.validated = self.validated or not trainer.sanity_checking
        self.scored = trainer.global_step

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        """Save after best.ckpt is written: last.ckpt records the best score."""
        if trainer.sanity_checking:
            return
        self.save(trainer)
        if self.agreed(trainer):
            raise Interrupted(self.path, self.kept)

    def on_train_epoch_end(self, trainer: Trainer, task: LightningModule) -> None:
        """Save at the end of an epoch without validation."""
        if trainer.is_last_batch and trainer.global_step > self.kept:
            self.save(trainer)
            self.ending = self.agreed(trainer)

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        """End after a SIGTERM in the last step; without any validation, make the last checkpoint the best.

        Print a line if the last steps were not validated.
        """
        if self.ending:
            raise Interrupted(self.path, self.kept)
        if trainer.is_global_zero and not self.validated and self.path.is_file():
            with replacing(self.path.with_name("best.ckpt")) as part:
                shutil.copy(self.path, part)
            print("training ended before its first validation: best.ckpt is a copy of last.ckpt", file=sys.stderr)
        elif trainer.is_global_zero and trainer.global_step > self.scored:
            where = f"best.ckpt is of an earlier step than last.ckpt ({trainer.global_step})"
            print(f"the last steps were not validated: {where}", file=sys.stderr)
        trainer.strategy.barrier("best.ckpt")

    def agreed(self, trainer: Trainer) -> bool:
        """Return whether any of the processes has received SIGTERM."""
        return trainer.strategy.reduce_boolean_decision(self.sigterm_received, all=False)

    def due(self, trainer: Trainer) -> bool:
        """Return whether a save is due by the first process's clock. Several processes check rarely: all must wait."""
        if trainer.world_size > 1 and trainer.global_step % max(1, trainer.log_every_n_steps):
            return False
        return trainer.strategy.broadcast(time.monotonic() - self.saved >= 60 * self.minutes)

    def save(self, trainer: Trainer) -> None:
        """Write last.ckpt and the logs so far."""
        trainer.save_checkpoint(self.path, weights_only=False)
        for logger in trainer.loggers:
            logger.save()
        self.saved, self.kept = time.monotonic(), trainer.global_step


def check_interval(trainer: Trainer) -> None:
    """Raise UserError if a validation could fall between batches whose gradients are accumulated."""
    batches, every, added = trainer.num_training_batches, trainer.val_check_batch, trainer.accumulate_grad_batches
    if every is None:
        raise UserError("trainer.val_check_interval: a time; expected a number of batches, or a share of an epoch")
    through = trainer.check_val_every_n_epoch is None  # across epochs, whose last step may have fewer batches
    words = f"an optimiser step every {added}; expected a multiple, because a checkpoint has no accumulated gradients"
    if every % added and (through or every < batches):
        raise UserError(f"trainer.val_check_interval: validation every {every} batches, {words}")
    if through and batches % added:
        raise UserError(f"trainer.check_val_every_n_epoch: null, with epochs of {batches} batches, {words}")


def make_resumable(trainer: Trainer) -> None:
    """Refuse callbacks that would change a resumed run, and make early stopping check only after validation."""
    averages = [type(one).__name__ for one in trainer.callbacks if isinstance(one, WeightAveraging)]
    if len(averages) > 1:
        raise UserError(f"trainer.callbacks: {', '.join(averages)}; expected one average of the weights")
    for callback in trainer.callbacks:
        if isinstance(callback, UNRESUMED):
            raise UserError(f"{type(callback).__name__}: a resumed run would train differently; expected none")
        if isinstance(callback, ModelCheckpoint):
            check_saves(callback, trainer.accumulate_grad_batches)
        if isinstance(callback, EarlyStopping):
            if callback.monitor.startswith("train/"):
                words = "which a resumed run may not have logged yet; expected a metric of validation"
                raise UserError(f"EarlyStopping: monitor {callback.monitor}, {words}")
            if callback._check_on_train_epoch_end:
                words = "a resumed run has no metrics at that time; expected false"
                raise UserError(f"EarlyStopping: check_on_train_epoch_end true, {words}")
            callback._check_on_train_epoch_end = False  # after validation, before its checkpoint, and not again


def check_saves(callback: ModelCheckpoint, batches: int) -> None:
    """Refuse a callback that can save between two optimiser steps, of `batches` each: such a run resumes elsewhere."""
    accumulated = batches > 1
    for name, given in (
        ("save_on_exception", callback.save_on_exception),
        ("train_time_interval", accumulated and callback._train_time_interval is not None),
        ("every_n_train_steps", accumulated and callback._every_n_train_steps > 0),
    ):
        if given:
            words = "which can save between two optimiser steps; expected none, see --checkpoint_minutes"
            raise UserError(f"ModelCheckpoint: {name}, {words}")


def leave_finished_epoch(loop: _FitLoop) -> None:
    """Begin the next epoch if the checkpoint is from the end of one, and no validation would follow there now.

    Lightning would train one more batch in the old epoch: with `max_steps`, or after a validation at its end that only
    a stop or other settings brought about.
    """
    if not loop.epoch_loop.restarted_on_last:
        return
    validated = loop.restarted_mid_epoch and loop.epoch_loop._num_ready_batches_reached() and not validates_again(loop)
    if validated:
        loop.epoch_progress.increment_processed()
    if validated or loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        loop.epoch_loop.restarting = False


def ends_here(trainer: Trainer) -> bool:
    """Return whether a fit ends with this batch."""
    stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
    return trainer.global_step == trainer.max_steps or stopped


def number_step(trainer: Trainer) -> None:
    """Correct the number of the next step in the logs after a validation that a stop, not the interval, brought about.

    Lightning counts the step before a validation when it resumes at one, and would not take this step for such.
    """
    loop = trainer.fit_loop
    if loop.epoch_loop.restarted_on_last and not validates_again(loop):
        loop.epoch_loop._batches_that_stepped = trainer.global_step


def validates_again(loop: _FitLoop) -> bool:
    """Return whether a resumed fit begins at a validation, which Lightning then skips."""
    return loop.epoch_loop.restarting and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def validates_next(trainer: Trainer) -> bool:
    """Return whether this batch is followed by a validation, or by the end of its epoch."""
    loop = trainer.fit_loop
    return trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
