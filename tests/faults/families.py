"""A config of each family, reduced to seconds but with all randomness switched on; and runs in separate processes."""

import argparse
import contextlib
import csv
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import dlref.cli
from dlref.cli import train

ROOT = Path(__file__).parents[2]
AVERAGE = '{"class_path": "dlref.tasks.EMA", "init_args": {"decay": 0.9}}'
# Among them: two steps per step of the optimiser, dropout in the network, two worker processes that read the data.
FAMILIES = {
    "image classification": (
        "lenet5_digits",
        {
            "trainer.callbacks+": AVERAGE,
            "model.init_args.mixup": 0.2,
            "model.init_args.lr_scheduler": '{"class_path": "dlref.tasks.WarmupCosine", "init_args": {"warmup": 0.2}}',
            "data.init_args.pad_crop": 1,
            "data.init_args.cutout": 2,
            "trainer.limit_train_batches": 6,
        },
    ),
    "object detection": (
        "ssd_digit_scenes",
        {
            "data.init_args": '{"train": 26, "held_out": 4, "batch_size": 4, "photometric": true, "crop": true}',
            "model.init_args.network.init_args.size": 96,
            "model.init_args.preprocess.init_args.size": 96,
        },
    ),
    "semantic segmentation": (
        "fcn_digit_scenes",
        {
            "data.init_args": '{"train": 26, "held_out": 4, "batch_size": 4, "image_size": 32, "photometric": true, '
            '"num_workers": 2}',
            "model.init_args.network.init_args.depth": 20,
        },
    ),
    "forecasting": (
        "deepar_synthetic",
        {
            "data.init_args.count": 6,
            "data.init_args.length": 700,
            "data.init_args.batches": 6,
            "data.init_args.batch_size": 8,
            "model.init_args.network.init_args.num_cells": 8,
            "model.init_args.network.init_args.dropout": 0.2,
            "trainer.check_val_every_n_epoch": 2,
            "trainer.max_steps": 18,
        },
    ),
    "translation": (
        "seq2seq_dates",
        {
            "data.init_args": '{"train": 100, "val": 8, "test": 8, "tokenizer": "character", "vocabulary_size": 128, '
            '"batch_size": 300, "longest": 64}',
            "trainer.limit_train_batches": 6,
            "model.init_args.network.init_args.hidden_size": 16,
            "model.init_args.network.init_args.dropout": 0.2,
            "model.init_args.scheduled_sampling": 0.3,
        },
    ),
    "language modelling": (
        "gpt_python",
        {
            "data": '{"class_path": "dlref.data.TextFiles", "init_args": {"train": "text.txt", "tokenizer": "byte", '
            '"context_length": 32, "batch_size": 2, "batches": 6}}',
            "model.init_args.network.init_args": '{"vocabulary": 260, "context_length": 32, "n_layer": 1, "n_head": 2, '
            '"n_embd": 16, "positions": "rotary", "dropout": 0.2}',
            "trainer.accumulate_grad_batches": 2,
        },
    ),
}
QUIET = {
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "trainer.log_every_n_steps": 1,
}


def known_family(name: str) -> str:
    """Return a name given on a command line if it is that of a family."""
    if name not in FAMILIES:
        raise argparse.ArgumentTypeError(f"{name}; expected one of {', '.join(FAMILIES)}")
    return name


def words(options: dict[str, object]) -> list[str]:
    """Return options as command-line arguments."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def fit_words(family: str, run: Path, **more: object) -> list[str]:
    """Return the arguments of a fit of a family over three epochs."""
    config, options = FAMILIES[family]
    options = {**options, **QUIET, "trainer.log_every_n_steps": 1, "trainer.max_epochs": 3, "run": run}
    options |= {"final_test": "false", **more}
    return ["fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), *words(options)]


def write_text_file(folder: Path) -> None:
    """Write the text that the language model reads."""
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(300)))


def in_a_process(arguments: list[str], folder: Path, before: Callable[[], None] = lambda: None) -> int:
    """Run `train.py` in a copy of this process; return its exit status, or minus the signal that ended it.

    The process is forked because starting Python would take long; its output goes to a file.
    """
    child = os.fork()
    if child == 0:
        status = 70
        with contextlib.suppress(BaseException), (folder / "output.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(folder)
            sys.argv = ["train.py"]
            before()
            try:
                status = train(arguments)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state_of(run: Path, name: str = "last") -> dict:
    """Return the final state of a run: weights, averaged weights, optimiser and schedule."""
    kept = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    names = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
    return {name: kept[name] for name in names if name in kept}


def equal(one: object, other: object) -> bool:
    """Return whether two states are identical to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def rows(run: Path) -> list[dict[str, str]]:
    """Return the sorted rows of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: (int(row["step"]), str(row)))


def differing(run: Path, whole: Path) -> list[str]:
    """Return the names of the results in which two runs differ."""
    found = []
    for name in ("last", "best"):
        one, other = state_of(run, name), state_of(whole, name)
        found += [f"{key} of {name}" for key in other if not equal(one.get(key), other[key])]
    return found + ["metrics.csv"] * (rows(run) != rows(whole))


def at(hook: str, number: int, given: signal.Signals) -> None:
    """Make fits of this process send themselves a signal when `hook` is called for the `number`th time."""
    calls = Counter()

    def count(*_: object) -> None:
        calls[hook] += 1
        if calls[hook] == number:
            os.kill(os.getpid(), given)

    dlref.cli.Preflight = during(hook, count)


def during(hook: str, action: Callable[..., None]) -> type[dlref.cli.Preflight]:
    """Return a fit's callback class with an additional action in one of its hooks."""
    own = getattr(dlref.cli.Preflight, hook)

    def both(*arguments: object) -> None:
        own(*arguments)
        action(*arguments)

    return type("Preflight", (dlref.cli.Preflight,), {hook: both})
