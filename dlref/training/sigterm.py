"""SIGTERM where there is nothing to keep: the process ends at once."""

import signal
import threading

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


def listen(handler) -> None:
    """Give SIGTERM to a handler until Lightning puts the earlier one back. Only the main thread can."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


class EndAtSigterm(Callback):
    """Take the place of Lightning's handler, but in training that `Last` keeps.

    Lightning's waits within the signal for the other processes, while they may wait for this one somewhere else.
    """

    def listen(self, trainer: Trainer) -> None:
        """End at SIGTERM, with the processes that this one started. One may have come already: Lightning notes it."""
        if trainer.received_sigterm:
            raise SIGTERMException

        def end(*_: object) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise SIGTERMException

        listen(end)

    def on_sanity_check_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Before the first step."""
        self.listen(trainer)

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Where nothing is kept; else `Last` listens next."""
        self.listen(trainer)

    def on_validation_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Of a validation that is no part of a fit."""
        if trainer.state.fn == "validate":
            self.listen(trainer)

    def on_test_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Of the test that ends a fit, too."""
        self.listen(trainer)

    def on_predict_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Nothing is written before the end."""
        self.listen(trainer)
