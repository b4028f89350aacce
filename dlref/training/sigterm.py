"""Handle SIGTERM when there is nothing to save: the process ends at once."""

import signal
import threading

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


def listen(handler) -> None:
    """Handle SIGTERM with `handler` until Lightning restores the earlier one. Only the main thread can do that."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


class EndAtSigterm(Callback):
    """Replace Lightning's handler of SIGTERM, except in training that `Last` saves.

    Lightning's waits for the other processes inside the signal handler. They may be waiting for this one elsewhere,
    where it cannot arrive before the handler returns, so none would end.
    """

    def listen(self, trainer: Trainer, task: LightningModule) -> None:
        """End at SIGTERM, also one that Lightning has already received, with the processes that this one started."""
        if trainer.received_sigterm:
            raise SIGTERMException

        def end(*_: object) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise SIGTERMException

        listen(end)

    # In training that is saved, `Last` sets its handler next. The test may be the final test of a fit.
    on_sanity_check_start = on_train_start = on_test_start = on_predict_start = listen

    def on_validation_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Handle SIGTERM in a validation that is not part of a fit."""
        if trainer.state.fn == "validate":
            self.listen(trainer, task)
