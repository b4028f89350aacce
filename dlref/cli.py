"""The front door: one config -> a run's folder. What train.py and export.py share.

A run's folder holds config.yaml, checkpoints/{best,last}.ckpt, metrics.csv, TensorBoard events, and after
a test test.json and figures/.
"""

import csv
import json
import logging
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dlref.runtime import UserError
from dlref.tasks.task import Task

# A config names classes, and a named class is code that runs: nothing else can be named.
ALLOWED_CLASS_PATHS = [
    "dlref.data",
    "dlref.models",
    "dlref.tasks",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
]
ALLOWED = ", ".join(ALLOWED_CLASS_PATHS)
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ALLOWED_CLASS_PATHS)

# Lightning calls a torch function that torch has renamed, once a batch of the progress bar.
warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
# A run may be moved; its best checkpoint is the one that lies in it.
warnings.filterwarnings("ignore", message="The dirpath has changed from")
# Lightning recommends another product of its makers at every start.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())


@dataclass
class Best:
    """Which checkpoint is the best one.

    Args:
        metric: a logged metric, such as val/accuracy.
        mode: whether more of it is better or less.
    """

    metric: str
    mode: Literal["min", "max"]


class Parser(LightningArgumentParser):
    """Errors are one line, raised instead of printed with a page of usage."""

    def error(self, message: str, ex: Exception | None = None):
        """Raise UserError with the parser's message on one readable line."""
        raise UserError(readable(message)) from ex


def readable(message: str) -> str:
    """What jsonargparse says over many lines and of its own insides, on one line and of the user's."""
    message = " ".join(message.split())
    for pattern, replacement in (
        (r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: (- )?", ""),
        (r" - Expected a <class 'NoneType'>", ""),
        (r" - Expected a path but \S+ either not accessible or invalid", ""),
        (r" Given value type: <class '[^']*'>", ""),
        (r" Given value: Namespace\(.*", ""),
        (r" - Importing", " Importing"),
        (r" Given value: NestedArg\(key='(.*?)', val=(.*)\)", r" (\1 = \2)"),
        (r" Given value:", "; got"),
        (r"<class '([^']*)'>", r"\1"),
        (r"Option ('[^']*') is not accepted", r"\1 is not an argument of its class; expected one that is"),
        (
            r"(Importing '\S+' is not allowed), denied by .* to allow it\.",
            rf"\1; expected a class of {ALLOWED}",
        ),
        (r'Parser key "([^"]*)":', r"\1:"),
        (r"Problem with given class_path '[^']*': ", ""),
        (r"typing\.Literal", "one of "),
    ):
        message = re.sub(pattern, replacement, message)
    return message


class TrainCLI(LightningCLI):
    """fit, validate, test and predict over one YAML file."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run needs beside a trainer, a task and data."""
        parser.add_argument("--best", type=Best, required=True, help="what makes a checkpoint the best one")
        parser.add_argument("--run", type=str | None, help="folder of the run (default: runs/NAME of NAME.yaml)")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace a run that is there")
        parser.add_argument("--final_test", type=bool, default=True, help="end a fit by testing its best checkpoint")
        parser.set_defaults({"trainer.num_sanity_val_steps": 0})

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder, and what of it this command may read or replace."""
        options = self.config[self.subcommand]
        self.run = run_folder(options)
        options.run = None  # a saved config names no folder: it is the one it lies in
        self.options, self.created = (
            options,
            [path for path in (self.run, *self.run.parents) if not path.exists()],
        )
        options.weights_only = True  # a checkpoint is data; never unpickle code from one
        if self.subcommand == "fit":
            if options.ckpt_path is None:
                make_way(self.run, options.overwrite)
            else:
                options.ckpt_path = str(checkpoint_of(self.run, options.ckpt_path))
            options.overwrite = False
        else:
            self.save_config_callback = None
            options.ckpt_path = str(checkpoint_of(self.run, options.ckpt_path))

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor refuses is the user's to mend."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            raise UserError(readable(str(error))) from error

    def instantiate_trainer(self, **kwargs) -> Trainer:
        """A trainer that writes into the run's folder, if this command trains."""
        quiet = self.options.trainer.enable_progress_bar is False
        checkpoints = ModelCheckpoint(
            dirpath=self.run / "checkpoints",
            filename="best",
            monitor=self.options.best.metric,
            mode=self.options.best.mode,
            save_last=True,
            enable_version_counter=False,
        )
        self.trainer_defaults["callbacks"] = [checkpoints] if quiet else [checkpoints, RichProgressBar()]
        if self.subcommand != "fit":
            return super().instantiate_trainer(logger=False, default_root_dir=self.run, **kwargs)
        loggers = [
            metrics_file(self.run, resuming=self.options.ckpt_path is not None),
            TensorBoardLogger(self.run, name="", version=""),
        ]
        return super().instantiate_trainer(logger=loggers, default_root_dir=self.run, **kwargs)

    def fit(self, **arguments) -> None:
        """Train, then test the best checkpoint unless told not to."""
        try:
            self.trainer.fit(**arguments)
        except UserError:
            if self.created and not (self.run / "checkpoints").exists():
                shutil.rmtree(self.created[-1])  # the loggers made it before the data was read
            raise
        if self.options.final_test and self.trainer.state.finished and not self.trainer.fast_dev_run:
            self.test(self.model, self.datamodule, ckpt_path=str(checkpoint_of(self.run, None)), weights_only=True)

    def test(self, model: Task, datamodule: LightningDataModule, **arguments) -> None:
        """Write test.json and the figures."""
        (results,) = self.trainer.test(model, datamodule, **arguments)
        if self.trainer.is_global_zero:
            write_json(self.run / "test.json", {k.removeprefix("test/"): v for k, v in results.items()})
            model.draw(self.run / "figures")
            if (self.run / "metrics.csv").is_file():
                from dlref.tasks.figures import curves

                curves(self.run / "figures" / "curves.png", self.run / "metrics.csv")
            print(f"test.json and figures are in {self.run}")

    def predict(self, **arguments) -> None:
        """Write one JSON line for each input to predictions.jsonl."""
        arguments["return_predictions"] = True
        batches = self.trainer.predict(**arguments)
        path = self.run / "predictions.jsonl"
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for rows in batches for row in rows))
        print(f"predictions are in {path}")


def train(arguments: list[str] | None = None) -> int:
    """`train.py`: 0, or 2 with one line on stderr when something given is wrong."""
    try:
        TrainCLI(
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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_folder(options) -> Path:
    """--run, or the folder that a run's own config.yaml lies in, or runs/NAME for configs/NAME.yaml."""
    if options.run:
        return Path(options.run)
    if not options.config:
        raise UserError("no --config and no --run; expected one of them to name the run")
    config = Path(str(options.config[-1]))
    return config.parent if config.name == "config.yaml" else Path("runs") / config.stem


def make_way(run: Path, overwrite: bool) -> None:
    """Refuse to train over an earlier run, or remove what belongs to it."""
    if not (run / "checkpoints").exists():
        return
    if not overwrite:
        raise UserError(
            f"{run} already holds a run; expected --run with another folder, --ckpt_path last to resume it, or "
            "--overwrite true to replace it"
        )
    for folder in ("checkpoints", "figures"):
        shutil.rmtree(run / folder, ignore_errors=True)
    for pattern in ("metrics.csv", "test.json", "predictions.jsonl", "events.out.tfevents.*"):
        for path in run.glob(pattern):
            path.unlink()


def checkpoint_of(run: Path, asked: str | None) -> Path:
    """The checkpoint asked for: a file, "last", or by default the run's best."""
    path = Path(asked) if asked not in (None, "best", "last") else run / "checkpoints" / f"{asked or 'best'}.ckpt"
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there; expected the folder of a run that was trained")
    return path


def metrics_file(run: Path, resuming: bool) -> CSVLogger:
    """The logger of metrics.csv. A fresh CSVLogger deletes the file; a resumed run keeps its rows."""
    path = run / "metrics.csv"
    earlier = []
    if resuming and path.is_file():
        with path.open(newline="") as file:
            earlier = list(csv.DictReader(file))
    logger = CSVLogger(run, name="", version="")
    if run.exists():
        with warnings.catch_warnings(action="ignore"):  # of the file being deleted: its rows are in `earlier`
            logger.experiment.metrics.extend(earlier)
        logger.save()
    return logger


def load_run(run: Path, overrides: list[str]) -> tuple[Task, LightningDataModule]:
    """The task with its best weights, and its data, from a run's folder; without a trainer.

    `overrides` are command-line arguments such as --data.init_args.root DIR. Raises UserError.
    """
    config, checkpoint = run / "config.yaml", checkpoint_of(run, None)
    if not config.is_file():
        raise UserError(f"{config}: not found; expected the folder of a run that train.py wrote")
    parser = Parser()
    parts = yaml.safe_load(config.read_text(encoding="utf-8"))
    for key, base in (("model", Task), ("data", LightningDataModule)):
        parser.add_subclass_arguments(base, key, fail_untyped=False, required=True)
        overrides = [f"--{key}", json.dumps(parts[key]), *overrides]
    built = parser.instantiate(parser.parse_args(overrides))
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    built.model.on_load_checkpoint(state)
    built.model.load_state_dict(state["state_dict"])
    return built.model.eval(), built.data


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: dict) -> None:
    """Write JSON for people and programs."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
