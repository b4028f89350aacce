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
    """Replace Lightning's handler of SIGTERM, except in training that `Last` saves.

    Lightning's waits within the signal for the other processes, while they may wait for this one somewhere else.
    """

    def listen(self, trainer: Trainer, task: LightningModule) -> None:
        """End at SIGTERM, with the processes that this one started. One may have come already: Lightning notes it."""
        if trainer.received_sigterm:
            raise SIGTERMException

        def end(*_: object) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise SIGTERMException

        listen(end)

    # In training `Last` listens next, where something is kept; the test may be the one that ends a fit.
    on_sanity_check_start = on_train_start = on_test_start = on_predict_start = listen

    def on_validation_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Of a validation that is no part of a fit."""
        if trainer.state.fn == "validate":
            self.listen(trainer, task)
