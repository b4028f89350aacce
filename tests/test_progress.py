"""The progress bar: when it moves, and what it shows."""

import io
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from dlref.cli import build
from dlref.training import progress
from dlref.training.progress import MOVED, Progress

DIGITS = Path(__file__).parents[1] / "configs" / "lenet5_digits.yaml"


class Seen(Callback):
    """Notes after each batch how far the bar is and the loss beside it; after each validation, what it shows."""

    def __init__(self, bar: Progress):
        self.bar, self.far, self.losses, self.shown, self.after = bar, [], [], [], []

    def on_train_batch_end(self, trainer, task, *_):
        self.far.append(int(self.bar.progress._tasks[self.bar.train_progress_bar_id].completed))
        self.losses.append(task.train_loss.item())
        self.shown.append(self.bar.shown.get("train/loss"))

    def on_validation_end(self, trainer, task):
        if not trainer.sanity_checking:
            values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self.after.append((self.bar.get_metrics(trainer, task), values))


@pytest.fixture
def clock(monkeypatch):
    """Return a function that sets the seconds from one look at the clock to the next."""

    def ticking(seconds: float) -> None:
        times = itertools.count(1)
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: seconds * next(times)))

    return ticking


def fit(tmp_path, logger=True, **options) -> Seen:
    task, data = build(DIGITS, [])
    bar = Progress(console_kwargs={"file": io.StringIO(), "force_terminal": True})
    seen = Seen(bar)
    logger = CSVLogger(tmp_path) if logger else False
    options = {"max_epochs": 2, "limit_train_batches": 7, "limit_val_batches": 2, "log_every_n_steps": 3} | options
    quiet = {"enable_checkpointing": False, "enable_model_summary": False, "use_distributed_sampler": False}
    trainer = Trainer(accelerator="cpu", callbacks=[bar, seen], logger=logger, **quiet, **options)
    trainer.fit(task, datamodule=data)
    return seen


def test_the_bar_moves_at_logged_steps_and_at_the_end_of_an_epoch(tmp_path, clock):
    clock(0)
    assert fit(tmp_path).far == [0, 0, 3, 3, 3, 6, 7, 0, 2, 2, 2, 5, 5, 7]


def test_between_logged_steps_the_bar_moves_every_half_second(tmp_path, clock):
    clock(1 / MOVED)
    assert fit(tmp_path).far == 2 * [1, 2, 3, 4, 5, 6, 7]
    clock(0.5 / MOVED)
    assert fit(tmp_path, log_every_n_steps=50, max_epochs=1).far == [0, 2, 2, 4, 4, 6, 7]


def test_the_loss_beside_the_bar_is_that_of_the_last_logged_step(tmp_path, clock):
    clock(1 / MOVED)
    seen = fit(tmp_path, max_epochs=1)
    assert seen.shown[2:] == [seen.losses[i] for i in (2, 2, 2, 5, 5)]


def test_the_loss_is_read_once_a_step_of_several_batches(tmp_path, clock):
    clock(1 / MOVED)
    seen = fit(tmp_path, log_every_n_steps=1, accumulate_grad_batches=2, limit_train_batches=6, max_epochs=1)
    assert seen.shown[1:] == [seen.losses[i] for i in (1, 1, 3, 3, 5)]


def test_the_bar_ends_at_the_last_batch_of_a_run_that_ends_in_an_epoch(tmp_path, clock):
    clock(0)
    (bar,) = (one for one in fit(tmp_path, max_steps=5).bar.progress.tasks if "Epoch" in one.description)
    assert (bar.completed, bar.total) == (5, 5)


@pytest.mark.parametrize(("steps", "last"), [(3, (6, 6, "Epoch 0")), (4, (7, 7, "Epoch 0")), (6, (4, 4, "Epoch 1"))])
def test_the_bar_counts_batches_and_no_epochs_if_only_the_number_of_steps_is_known(steps, last, tmp_path):
    seen = fit(tmp_path, max_epochs=-1, max_steps=steps, accumulate_grad_batches=2)
    *_, bar = (one for one in seen.bar.progress.tasks if "Epoch" in one.description)
    assert (bar.completed, bar.total, bar.description.split("]")[-1].rstrip()) == last


def test_after_each_validation_the_bar_shows_its_metrics(tmp_path):
    seen = fit(tmp_path)
    for shown, values in seen.after:
        assert "train/loss" not in shown
        assert shown["val/accuracy"] == pytest.approx(values["val/accuracy"], abs=1e-3)
    assert seen.after[0][1] != seen.after[1][1]


def test_the_bar_works_without_a_logger_and_without_a_logging_interval(tmp_path):
    assert fit(tmp_path, logger=False, log_every_n_steps=0, max_epochs=1).far == [1, 2, 3, 4, 5, 6, 7]
