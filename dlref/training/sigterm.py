"""SIGTERM where there is nothing to keep: the process ends at once, and those that it started."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def ends_at_sigterm(trainer: Trainer) -> Iterator[None]:
    """Also while the processes of the other devices start, which would outlive this one."""
    before = signal.getsignal(signal.SIGTERM)
    end_at_sigterm(trainer)
    try:
        yield
    finally:
        listen(before)


def end_at_sigterm(trainer: Trainer) -> None:
    """From here on SIGTERM raises SIGTERMException, here and in the processes that this one started."""

    def end(*_: object) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        raise SIGTERMException

    listen(end)


def listen(handler) -> None:
    """Let a handler have SIGTERM; other threads cannot say who has."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


class EndAtSigterm(Callback):
    """Take the place of Lightning's handler outside of training.

    That one waits for the other processes within the signal, while they may wait for this one somewhere else.
    """

    def on_sanity_check_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Before the first step."""
        end_at_sigterm(trainer)

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Where nothing is kept; else `Last` listens."""
        end_at_sigterm(trainer)

    def on_validation_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Of a validation that is no part of a fit."""
        if trainer.state.fn == "validate":
            end_at_sigterm(trainer)

    def on_test_start(self, trainer: Trainer, task: LightningModule) -> None:
        """The test that ends a fit, too."""
        end_at_sigterm(trainer)

    def on_predict_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Nothing is written before the end."""
        end_at_sigterm(trainer)
