"""The last checks of a fit before its first step."""

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from dlref.runtime import UserError
from dlref.training.run_folder import Claim


class Preflight(Callback):
    """Check the fit between the sanity check and the first step; from that step on it is no longer refused."""

    def __init__(self, metric: str, claim: Claim, tests: bool):
        self.metric, self.claim, self.tests = metric, claim, tests

    def on_sanity_check_end(self, trainer: Trainer, task: LightningModule) -> None:
        """Check that validation logs the monitored metrics, now rather than after an epoch. Raises UserError."""
        # `val/METRIC` and `test/METRIC` belong to the contract: export reports its score under that name.
        name = type(task).__name__
        monitored = [("best.metric", self.metric), (f"{name}: metric", f"val/{getattr(task, 'metric', None)}")]
        for one in trainer.callbacks:
            if isinstance(one, EarlyStopping) and one.strict:
                monitored.append(("EarlyStopping: monitor", one.monitor))
            own = one.monitor if isinstance(one, ModelCheckpoint) else None
            if own and not own.startswith("train/") and own not in ("step", "epoch"):
                monitored.append(("ModelCheckpoint: monitor", own))
        for what, metric in monitored:
            if metric not in trainer.callback_metrics:
                logged = ", ".join(sorted(trainer.callback_metrics))
                raise UserError(f"{what} {metric!r} is not logged in validation; expected one of {logged}")

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Check that there is a validation split to choose best.ckpt on, and a batch to test. Raises UserError."""
        # A run that is resumed in an epoch without validation has not loaded that split yet.
        loaded = trainer.val_dataloaders is not None
        if not trainer.enable_validation or (loaded and not sum(trainer.num_val_batches)):
            words = "expected a validation split, and trainer.limit_val_batches above 0"
            raise UserError(f"nothing to validate on, so best.ckpt cannot be chosen; {words}")
        if self.tests:
            count, share = len(trainer.datamodule.test_dataloader()), trainer.limit_test_batches
            if isinstance(share, float) and share * count < 1:
                raise UserError(
                    f"trainer.limit_test_batches: {share} of {count}; expected one batch or more, or --final_test false"
                )

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, batch, batch_idx: int) -> None:
        """Commit the run, as its first batch exists."""
        self.claim.commit()
