"""Training under Lightning's Trainer, as in `train.py fit`, compared with a bare PyTorch loop.

Each family is measured with its embedded config, image classification and forecasting also with two configs each on
real data. Both loops have the same network, data, augmentation, optimiser, schedule and clipping, from the same seeds,
in one process. The Trainer has the callbacks and loggers of `train.py fit`, without the config's own callbacks such as
EMA, and draws its progress bar; the bare loop does only what the mathematics requires. The two alternate every few
steps, because the speed of a machine changes within seconds by more than the difference to be measured. All steps of an
epoch except its first are timed, without the time between epochs. 0.952 times the steps of a bare loop are an overhead
of 5%. Steps of less than 25 ms show what the Trainer adds, about 1 ms; in most longer steps the spread of the turns
hides it.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich import reconfigure

from benchmarks.configs import CONFIGS, read, roots
from benchmarks.rows import DEVICE, TURNS, Row, Rows, finish, run
from dlref.cli import build
from dlref.tasks.task import Task
from dlref.training.checkpoints import Last
from dlref.training.devices import fast_steps
from dlref.training.finite import StopOnNonFiniteLoss
from dlref.training.profile import Unprofiled
from dlref.training.progress import Progress
from dlref.training.sigterm import EndAtSigterm

WARMUP = 3  # steps before the clock starts
PIECES = 6  # of a turn; after each of them the other loop continues
STEPS = {  # steps of a turn, which then takes a few seconds
    "lenet5_digits": 180,
    "lenet5_fashion_mnist": 80,
    "resnet20_cifar10": 20,
    "ssd_digit_scenes": 12,
    "fcn_digit_scenes": 20,
    "deepar_synthetic": 240,
    "deepar_exchange_rate": 160,
    "deepar_m4_hourly": 20,
    "seq2seq_dates": 80,
    "gpt_python": 12,
}
FEWER = dict.fromkeys(("ssd_digit_scenes", "fcn_digit_scenes"), ("--data.init_args.train", "400"))  # enough to time
# Options taken from a config's trainer:
KEPT = ("precision", "gradient_clip_val", "accumulate_grad_batches", "log_every_n_steps", "benchmark")


class Clock(Callback):
    """Measures the seconds from the end of one step to the end of the next of the same epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs, batch, batch_index: int) -> None:
        """Read the clock once the device has finished."""
        finish()
        if batch_index:
            self.seconds.append(time.perf_counter() - self.before)
        self.start()

    def start(self) -> None:
        """Mark the beginning of the next step."""
        self.before = time.perf_counter()

    def mean(self) -> float:
        """Return the seconds of a step after the warm-up."""
        return statistics.mean(self.seconds[WARMUP:])

    def rates(self, turns: int) -> list[float]:
        """Return the steps per second in each of `turns` parts."""
        size = len(self.seconds) // turns
        return [size / sum(self.seconds[i * size : (i + 1) * size]) for i in range(turns)]


class InTurns(Clock):
    """A clock that lets another loop make the same number of steps after each piece of the Trainer's."""

    def __init__(self, other: Iterator[None], piece: int) -> None:
        super().__init__()
        self.other, self.piece, self.steps = other, piece, 0

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs, batch, batch_index: int) -> None:
        """Read the clock. The bar is locked while the other loop runs, so it is drawn only in the Trainer's time."""
        super().on_train_batch_end(trainer, task, outputs, batch, batch_index)
        self.steps += 1
        if self.steps % self.piece == 0:
            with trainer.progress_bar_callback.progress.live._lock:
                for _ in range(self.piece):
                    next(self.other)
            self.start()


def options(config: str) -> dict:
    """Return the options of a config's Trainer that affect a step."""
    trainer = read(config)["trainer"]
    return {name: trainer[name] for name in KEPT if name in trainer}


def under_trainer(
    task: Task,
    data: LightningDataModule,
    steps: int,
    options: dict,
    bar: type = Progress,
    profiler: type = Unprofiled,
    clock: Callback | None = None,
) -> float:
    """Return the seconds of a training step under the Trainer, set up as in `train.py fit`, according to a clock."""
    clock = clock or Clock()
    fast_steps(torch.device(DEVICE))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        trainer = Trainer(
            max_steps=WARMUP + steps,
            limit_val_batches=0,
            logger=[CSVLogger(folder), TensorBoardLogger(folder)],
            callbacks=[
                EndAtSigterm(),
                bar(console_kwargs={"file": nowhere, "force_terminal": True}),
                StopOnNonFiniteLoss(),
                ModelCheckpoint(folder, "best", None, save_on_train_epoch_end=False),
                Last(minutes=10),
                clock,
            ],
            default_root_dir=folder,
            enable_model_summary=False,
            use_distributed_sampler=False,
            devices=1,
            profiler=profiler(),
            **options,
        )
        trainer.fit(task, datamodule=data)
        reconfigure()  # the bar replaced the global console by its own
    return clock.mean()


def batches(data: LightningDataModule) -> Iterator[tuple[int, Any]]:
    """Yield the number and the augmented batch, one epoch after the other."""
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader):
            batch = data.transfer_batch_to_device(batch, data.trainer.strategy.root_device, 0)
            yield number, data.on_after_batch_transfer(batch, 0)


def bare_steps(task: Task, data: LightningDataModule, steps: int, options: dict, clock: Clock) -> Iterator[None]:
    """Train without Lightning, step by step, without end; the schedule is made for `steps` steps."""
    if options.get("accumulate_grad_batches", 1) != 1:
        raise ValueError("accumulate_grad_batches: the bare loop steps after each batch")
    fast_steps(torch.device(DEVICE))
    strategy = SimpleNamespace(root_device=torch.device(DEVICE))
    trained = SimpleNamespace(datamodule=data, strategy=strategy, training=True, sanity_checking=False, world_size=1)
    trained.accumulate_grad_batches = 1
    task.trainer = data.trainer = trained
    task.log = lambda *arguments, **named: None
    data.prepare_data()
    data.setup("fit")
    task.to(DEVICE).setup("fit")
    parameters = [p for p in task.network.parameters() if p.requires_grad]
    optimizer = task.optimizer(task.parameter_groups(parameters))
    schedule = task.lr_scheduler(optimizer, steps)
    half = options.get("precision") == "bf16-mixed"
    task.train()
    for number, batch in batches(data):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = task.training_step(batch, number)
        loss.backward()
        if limit := options.get("gradient_clip_val"):
            torch.nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        clock.on_train_batch_end(None, task, None, batch, number)
        yield
        clock.start()


def made(config: str, overrides: tuple[str, ...] = ()) -> tuple[Task, LightningDataModule]:
    """Return a config's task and data, with the same seed each time."""
    seed_everything(0, verbose=False)
    return build(CONFIGS / f"{config}.yaml", [*FEWER.get(config, ()), *overrides])


def piece(config: str) -> int:
    """Return the number of steps after which another loop continues."""
    return max(1, STEPS[config] // PIECES)


def beside_a_bare_loop(
    config: str,
    turns: int,
    parts: int,
    overrides: tuple[str, ...] = (),
    trainer: Callable = under_trainer,
    changed: dict | None = None,
    **named,
) -> tuple[list[float], list[float]]:
    """Return the steps per second of the Trainer and of a bare loop, in each of `parts` parts.

    `overrides` are arguments of `train.py` for both; `changed` overrides options of the Trainer.
    """
    steps, said, clock = piece(config) * PIECES * turns, options(config), Clock()
    overrides = (*roots(config), *overrides)
    bare = bare_steps(*made(config, overrides), steps, said, clock)
    in_turns = InTurns(bare, piece(config))
    trainer(*made(config, overrides), steps - WARMUP, said | (changed or {}), clock=in_turns, **named)
    return in_turns.rates(parts), clock.rates(parts)


def overhead(config: str) -> Rows:
    """Compare the Trainer with a bare loop for one config."""
    own, peer = (rates[1:] for rates in beside_a_bare_loop(config, TURNS + 1, TURNS + 1))  # the first does not count
    row = Row(own, peer, "steps/s", "a bare loop", ">= 0.952")
    return {f"training under the Trainer, `{config}`": row}


BENCHMARKS = {f"overhead-{config.replace('_', '-')}": partial(overhead, config) for config in STEPS}


if __name__ == "__main__":
    run(BENCHMARKS)
