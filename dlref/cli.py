"""Fit, validate, test or predict, from one YAML config and a run's folder.

Shared by train.py and export.py. A run's folder holds config.yaml, checkpoints/{best,last}.ckpt, metrics.csv,
TensorBoard events and, after a test, test.json and figures/.
"""

import json
import logging
import math
import os
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from dlref.config import (
    Parser,
    check_evaluation,
    check_fit,
    check_parts,
    check_sharding,
    check_trainer,
    enums_as_text,
    no_other_configs,
    readable,
)
from dlref.runtime import UserError
from dlref.runtime.errors import FULL, one_line
from dlref.runtime.runner import plain
from dlref.tasks.task import Task
from dlref.training.checkpoints import BestCheckpoint, Interrupted, Last, SealedCheckpointIO, make_resumable
from dlref.training.debug import PRESET, Overfit
from dlref.training.devices import check_started, fast_steps, lost_another, warn_of_slow_bfloat16
from dlref.training.finite import StopOnNonFiniteLoss
from dlref.training.preflight import Preflight
from dlref.training.profile import PRESET as PROFILE
from dlref.training.profile import StepProfile, Unprofiled
from dlref.training.progress import Progress
from dlref.training.run_folder import (
    Claim,
    check_writable,
    checkpoint_of,
    metrics_file,
    run_folder,
    write_text,
    written_pictures,
)
from dlref.training.sigterm import EndAtSigterm
from dlref.training.summary import NetworkSummary
from dlref.training.weights import read_checkpoint

# Lightning's progress bar calls a deprecated torch function for each batch.
warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
# Tasks log such short epochs at their end.
warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
# Lightning advises to reduce scores over the devices: those that tasks log at the end of an epoch are so already.
warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
# Lightning recommends another product of its makers at every start.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())

# Errors of constructors that a user can fix.
REFUSALS = (ValueError, TypeError, RuntimeError, ModuleNotFoundError, MisconfigurationException)


@dataclass
class Best:
    """How the best checkpoint is chosen.

    Args:
        metric: a logged metric, such as val/accuracy.
        mode: whether the largest (max) or the smallest (min) value is the best.
    """

    metric: str
    mode: Literal["min", "max"]


class TrainCLI(LightningCLI):
    """The commands fit, validate, test and predict, configured by one YAML file."""

    def __init__(self, arguments: list[str] | None):
        self.typed = sys.argv[1:] if arguments is None else arguments
        super().__init__(
            Task,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"description": __doc__.splitlines()[0]},
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Return only the subcommand typed first, if any: building a parser of all Trainer options for each is slow."""
        known = super().subcommands()
        return {name: known[name] for name in known if [name] == self.typed[:1]} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run besides its trainer, task and data."""
        switch: dict[str, Any] = {"type": bool, "nargs": "?", "const": True, "default": False}
        parser.add_argument("--best", type=Best, required=True, help="metric and mode that choose best.ckpt")
        parser.add_argument("--run", type=str | None, help="folder of the run (default: runs/NAME for NAME.yaml)")
        parser.add_argument("--overwrite", **switch, help="replace an existing run")
        parser.add_argument("--final_test", type=bool, default=True, help="test the best checkpoint after a fit")
        parser.add_argument("--checkpoint_minutes", type=float, default=10.0, help="minutes between saves of last.ckpt")
        parser.add_argument("--debug", **switch, help="overfit three batches, and write nothing")
        parser.add_argument("--profile", **switch, help="train a few steps and show where the time goes")
        # The data modules share batches out between devices themselves.
        parser.set_defaults({"trainer.num_sanity_val_steps": 1, "trainer.use_distributed_sampler": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """Parse the arguments and determine the run's folder and the checkpoint that it begins with.

        The saved config holds neither: a run's folder may be moved, and its config describes a run from scratch.
        """
        try:
            super().parse_arguments(parser, args)
        except RecursionError:
            raise UserError("config: nested too deeply, or contains itself; expected YAML") from None
        command = self.config.subcommand
        self.options = options = self.config[command]
        check_parts(options)
        enums_as_text(options)
        check_trainer(options.trainer)
        if not 0 <= options.seed_everything < 2**32:  # a bool is a number, too
            raise UserError(f"seed_everything: {options.seed_everything}; expected 0 to {2**32 - 1}")
        self.records = False
        if command == "fit":
            self.settle_fit()
        else:
            check_evaluation(options)
        self.run, self.overwrite = run_folder(options), options.overwrite
        if command in ("test", "predict"):
            check_writable(self.run)
        self.settle_checkpoint(command)
        if options.debug:
            vars(options.trainer).update(PRESET)
        if not self.records:
            self.save_config_callback = None
        options.run, options.ckpt_path, options.overwrite = None, None, False
        options.weights_only = True  # a checkpoint is data; never unpickle code from one

    def settle_fit(self) -> None:
        """Check the options of a fit; find out if it writes files. Raises UserError."""
        options = self.options
        check_fit(options)
        self.records = not (options.debug or options.trainer.fast_dev_run)
        if options.profile:
            self.prepare_profile()
        check_sharding(options, self.records)
        if self.records and options.final_test and options.trainer.limit_test_batches == 0:
            raise UserError("trainer.limit_test_batches: 0; expected more, or --final_test false")

    def settle_checkpoint(self, command: str) -> None:
        """Find the checkpoint to resume from, with its step and optimiser, or the one to evaluate. Raises UserError."""
        asked, fits = self.options.ckpt_path, command == "fit"
        resumes = fits and asked is not None
        taken = SLURMEnvironment.detect() and not resumes
        if taken and (path := next(self.run.glob("hpc_ckpt_*.ckpt"), None)):
            raise UserError(f"{path}: Lightning would load it unasked under SLURM; expected it in another folder")
        self.checkpoint = checkpoint_of(self.run, asked) if resumes or not fits else None
        self.step, self.resumed = 0, None
        if resumes:
            checkpoint = read_checkpoint(self.checkpoint)
            self.step, self.resumed = checkpoint["global_step"], checkpoint["optimizer"]

    def prepare_profile(self) -> None:
        """Set the options of a profile: a short run in a folder of its own. Raises UserError."""
        options = self.options
        others = {
            "--debug": options.debug,
            "--ckpt_path": options.ckpt_path,
            "trainer.fast_dev_run": options.trainer.fast_dev_run,
            "trainer.profiler": options.trainer.profiler,
        }
        given = ", ".join(name for name, value in others.items() if value)
        if given:
            raise UserError(f"--profile with {given}; expected one without the other")
        options.run = options.run or f"{run_folder(options)}-profile"
        options.final_test = False
        vars(options.trainer).update(PROFILE)

    def instantiate_classes(self) -> None:
        """Build everything. Raises UserError for errors of constructors, which the user can fix."""
        try:
            super().instantiate_classes()
        except REFUSALS as error:
            raise UserError(readable(str(error))) from error
        self.datamodule.repeat_first_epoch = self.options.debug
        if self.subcommand != "fit":
            self.model.restore(self.checkpoint)
        else:
            self.model.optimizer_resumed = self.resumed

    def instantiate_trainer(self, **kwargs) -> Trainer:
        """Build a trainer that writes into the run's folder, or one that writes nothing at all."""
        given = self.options.trainer
        self.trainer_defaults["callbacks"] = [
            EndAtSigterm(),
            *([Progress()] if given.enable_progress_bar is not False else []),
            *([NetworkSummary()] if given.enable_model_summary is not False else []),
        ]
        kwargs |= {"default_root_dir": self.run, "plugins": [], "enable_model_summary": False}  # not Lightning's
        # When SLURM requeues a job, Lightning would write a checkpoint that it later prefers to all others.
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            kwargs["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        trainer = self.recording_trainer(**kwargs) if self.records else self.plain_trainer(**kwargs)
        fast_steps(trainer.strategy.root_device)
        return trainer

    def plain_trainer(self, **kwargs) -> Trainer:
        """Build a trainer that writes nothing."""
        if self.options.debug:
            self.trainer_defaults["callbacks"] += [Overfit()]
        given = self.config_init[self.subcommand].trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        kwargs["callbacks"] = [one for one in given if not isinstance(one, Checkpoint)]  # they write files
        built = super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)
        check_started(built)
        return built

    def recording_trainer(self, **kwargs) -> Trainer:
        """Claim the run's folder for this process, and build a trainer that writes into it."""
        places = map(os.path.realpath, (self.run, self.run / "checkpoints"))  # checkpoints may lie on another disk
        own = self.checkpoint is not None and os.path.dirname(os.path.realpath(self.checkpoint)) in places
        self.claim = Claim(self.run, resume=own, overwrite=self.overwrite)
        try:
            return self.claimed_trainer(**kwargs)
        except BaseException:
            self.claim.roll_back()
            raise

    def claimed_trainer(self, **kwargs) -> Trainer:
        """Build a trainer that writes into the claimed folder."""
        best = self.options.best
        kwargs["plugins"] += [SealedCheckpointIO(self.run, self.checkpoint)]
        self.last = Last(self.options.checkpoint_minutes)
        self.trainer_defaults["callbacks"] += [
            StopOnNonFiniteLoss(),
            BestCheckpoint(self.run / "checkpoints", best.metric, best.mode),
            self.last,  # after BestCheckpoint: last.ckpt records the best score
            Preflight(best.metric, self.claim, self.options.final_test),
        ]
        if self.options.profile:
            kwargs["profiler"] = StepProfile(self.run, self.options.checkpoint_minutes)
        elif self.options.trainer.profiler is None:
            kwargs["profiler"] = Unprofiled()
        loggers = [
            metrics_file(self.run, before=self.step),
            TensorBoardLogger(self.run, name="", version="", purge_step=self.step or None),
        ]
        built = super().instantiate_trainer(logger=loggers, **kwargs)
        check_started(built)
        make_resumable(built)
        warn_of_slow_bfloat16(built)
        if self.options.profile:
            built.profiler.trainer = built
        return built

    def fit(self, model: Task, datamodule: LightningDataModule, **arguments) -> None:
        """Train, then test the best checkpoint unless --final_test is false."""
        if self.checkpoint:
            arguments["ckpt_path"] = self.checkpoint
            model.weights = None  # the checkpoint's weights replace them
        if not self.records:
            self.trainer.fit(model, datamodule=datamodule, **arguments)
            return
        with self.claim:
            with self.last.excusing_errors(self.trainer):
                self.trainer.fit(model, datamodule=datamodule, **arguments)
            if not self.trainer.global_step:
                raise UserError("no step was trained; expected more time, trainer.max_time")
            self.last.find_place(self.trainer)  # a complete run that is resumed has no first batch to check it
            self.claim.commit()  # nor to commit it
            if self.options.final_test and self.trainer.state.finished:
                # Only the weights: restoring callbacks too would overwrite EMA's average with its current weights.
                model.restore(checkpoint_of(self.run, None))
                self.test(model, datamodule)

    def validate(self, model: Task, datamodule: LightningDataModule, **arguments) -> None:
        """Print the validation metrics."""
        if not self.trainer.validate(model, datamodule=datamodule, verbose=arguments["verbose"]):
            raise UserError(
                "nothing to validate on; expected a validation split, and trainer.limit_val_batches above 0"
            )

    def test(self, model: Task, datamodule: LightningDataModule, **arguments) -> None:
        """Write test.json and the figures."""
        results = self.trainer.test(model, datamodule=datamodule)
        if not results:
            raise UserError("nothing to test on; expected a test split, and trainer.limit_test_batches above 0")
        if not self.trainer.is_global_zero:
            return
        found = {key.removeprefix("test/"): value for key, value in results[0].items()}
        values = {key: value if math.isfinite(value) else None for key, value in found.items()}  # JSON has no NaN
        write_text(self.run / "test.json", json.dumps(values, indent=2) + "\n")
        print(f"test.json is in {self.run}")
        if self.trainer.world_size > 1:
            words = "run test without torchrun, with --trainer.devices 1"
            print(f"no figures: each device saw only a part of the data; {words}")
            return
        model.draw(self.run / "figures")
        if (self.run / "metrics.csv").is_file():
            from dlref.tasks.figures import curves

            curves(self.run / "figures" / "curves.png", self.run / "metrics.csv")
        print(f"figures are in {self.run / 'figures'}")

    def predict(self, model: Task, datamodule: LightningDataModule, **arguments) -> None:
        """Write one JSON line for each input to predictions.jsonl, and predictions that are pictures beside it."""
        if self.trainer.world_size > 1:
            words = "expected --trainer.devices 1, without torchrun"
            raise UserError(f"predict on {self.trainer.world_size} devices; {words}")
        batches = self.trainer.predict(model, datamodule=datamodule, return_predictions=True)
        answers, names = [answer for batch in batches or [] for answer in batch], datamodule.sources()
        if len(answers) < len(names):
            words = "expected no trainer.limit_predict_batches"
            raise UserError(f"answers for {len(answers)} of {len(names)} inputs; {words}")
        rows = [{"input": name, **plain(answer)} for name, answer in zip(names, answers, strict=True)]
        path, pictures = self.run / "predictions.jsonl", self.run / "predictions"
        drawn = model.picture(answers[0]) is not None
        with written_pictures(pictures, names, map(model.picture, answers)) if drawn else nullcontext():  # both or none
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"predictions are in {path}" + f", pictures in {pictures}" * drawn)


def train(arguments: list[str] | None = None) -> int:
    """Run `train.py`; return 0, 2 with one line on stderr if the input is wrong, or 75 if stopped by SIGTERM."""
    try:
        TrainCLI(arguments)
    except (Interrupted, SIGTERMException) as reason:
        print(f"stopped by SIGTERM{reason}", file=sys.stderr)  # outside of training, `reason` has no message
        # 75 is os.EX_TEMPFAIL, which Windows lacks. Only a machine's first process returns it: Lightning kills that
        # process, whatever it is doing, once another one has ended with a status other than 0.
        return 0 if int(os.environ.get("LOCAL_RANK", 0)) else 75
    except Exception as error:
        if (line := mendable(error)) is None:
            raise
        sys.stderr.write(f"error: {line}\n")  # at once: other processes may write the same line
        return 2
    return 0


def mendable(error: Exception) -> str | None:
    """Return one line for an error that a user can fix, or None for an error of another kind."""
    match error:
        case UserError() | MisconfigurationException() | ModuleNotFoundError():  # a callback's package is missing
            return one_line(error)
        case OSError() if error.errno in FULL:
            where = error.filename or "the run's folder"
            return f"{where}: {error.strerror}; expected free space; earlier checkpoints are intact"
        case ValueError() if "`val_check_interval`" in str(error):  # Lightning's error for an interval that is too long
            return f"trainer: {one_line(error)}"
        case ValueError() if "does not match the world size" in str(error):  # of torchrun
            return f"trainer: {one_line(error)}"
        case RuntimeError() if "in loading state_dict" in str(error):  # of a checkpoint to resume from
            return str(UserError(f"{one_line(error)}; expected the network of the checkpoint's run"))
        case RuntimeError() if str(error).startswith("Early stopping conditioned on"):  # no sanity check was made
            return one_line(error)
        case RuntimeError() if lost_another(error):
            return "another process has ended; its own error says why"
        case RuntimeError() if str(error).startswith("DataLoader worker (pid"):  # mostly for want of memory
            return f"{one_line(error)}; expected data.init_args.num_workers processes to fit into memory"
    return None


def load_run(run: Path, overrides: list[str]) -> tuple[Task, LightningDataModule]:
    """Return the task with its best weights, and its data, from a run's folder, without a trainer.

    `overrides` are command-line arguments such as --data.init_args.root DIR. Raises UserError.
    """
    checkpoint = checkpoint_of(run, None)
    task, data = build(run / "config.yaml", overrides)
    task.restore(checkpoint)
    return task.eval(), data


def build(config: Path, overrides: list[str]) -> tuple[Task, LightningDataModule]:
    """Build the task and the data of a config, untrained and with no data read. Raises UserError."""
    try:
        parts = yaml.safe_load(config.read_text(encoding="utf-8"))
        arguments = [word for key in ("model", "data") for word in (f"--{key}", json.dumps(parts[key]))]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{config}: {one_line(error)}; expected the config of a run, or one of configs/") from None
    parser = Parser()
    parser.add_subclass_arguments(Task, "model", fail_untyped=False, required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=True)
    try:
        with no_other_configs():
            options = parser.parse_args([*arguments, *overrides])
        check_parts(options)
        built = parser.instantiate(options)
    except REFUSALS as error:
        raise UserError(readable(str(error))) from error
    return built.model, built.data
