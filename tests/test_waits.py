"""No training step waits for the GPU: checked by fake CUDA tensors without a GPU, and by torch on a GPU."""

import csv
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dlref.cli import build
from dlref.data.loader import sent
from dlref.tasks import EMA
from dlref.training.checkpoints import Last
from dlref.training.devices import fast_steps
from dlref.training.finite import StopOnNonFiniteLoss
from dlref.training.progress import Progress

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = {  # one config of each family, with little data since a CPU may have to emulate bfloat16
    "lenet5_digits": [
        *("--data.init_args.batch_size", "32"),  # 33 steps an epoch
        *("--data.init_args.flip", "true", "--data.init_args.cutout", "4"),
    ],
    "ssd_digit_scenes": [
        *("--data.init_args.train", "40", "--data.init_args.held_out", "2", "--data.init_args.batch_size", "2"),
        *("--data.init_args.photometric", "true", "--data.init_args.crop", "true"),
    ],
    "fcn_digit_scenes": [
        *("--data.init_args.train", "40", "--data.init_args.held_out", "2", "--data.init_args.batch_size", "2"),
    ],
    "deepar_synthetic": ["--data.init_args.count", "8"],
    "seq2seq_dates": [],
    "gpt_python": [
        *("--data.init_args.tokenizer", "byte"),
        *("--data.init_args.batch_size", "2", "--data.init_args.context_length", "32"),
        *("--model.init_args.network.init_args.n_layer", "1", "--model.init_args.network.init_args.n_embd", "48"),
    ],
}


class Slow(TorchDispatchMode):
    """Collect the copies between devices for which the host waits, and what a GPU computes in float64."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        """Run an operation; record it if it is a blocking copy between devices, or its result float64 on a GPU."""
        answer = operation(*arguments, **(options or {}))
        tensors = [t for t in tree_leaves((arguments, options, answer)) if isinstance(t, torch.Tensor)]
        apart = len({tensor.device.type for tensor in tensors}) > 1
        asked = (options or {}).get("non_blocking") or any(a is True for a in arguments[2:])
        if apart and "copy" in str(operation) and not asked:
            self.found.append(str(operation))
        # A GPU is slow in float64, and an Apple GPU does not have it.
        if any(t.dtype is torch.float64 and t.is_cuda for t in tree_leaves(answer) if isinstance(t, torch.Tensor)):
            self.found.append(f"{operation}: float64")
        return answer


def faked(mode: FakeTensorMode, thing: nn.Module) -> None:
    """Replace parameters and buffers by fake tensors on a GPU that need not exist."""
    for module in thing.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = mode.from_tensor(tensor).to("cuda").detach().requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("config", SMALL)
def test_a_training_step_has_no_blocking_copy_and_no_float64(config, unchecked):
    task, data = build(CONFIGS / f"{config}.yaml", SMALL[config])
    data.prepare_data()
    data.setup("fit")
    stage = {"training": True, "sanity_checking": False, "global_step": 0, "log_every_n_steps": 1}
    device = SimpleNamespace(root_device=torch.device("cuda"))
    task.trainer = data.trainer = SimpleNamespace(datamodule=data, strategy=device, world_size=1, **stage)
    task.log = lambda *arguments, **options: None
    task.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.backends.cudnn.flags(enabled=False):
        faked(mode, task)
        batch = tree_map(lambda t: mode.from_tensor(t).to("cuda") if isinstance(t, torch.Tensor) else t, batch)
        with Slow() as slow:
            loss = task.train().training_step(data.on_after_batch_transfer(batch, 0), 0)
    assert loss.device.type == "cuda"
    assert not slow.found


def test_blocking_copies_and_float64_are_detected():
    with FakeTensorMode(), Slow() as slow:
        there = torch.zeros(3, device="cuda")
        torch.zeros(3, dtype=torch.float64).float().to("cuda", non_blocking=True)
        assert not slow.found
        there.cpu()
        torch.tensor([1.0, 2.0], device="cuda")
        assert len(slow.found) == 2
        there.double()
        assert len(slow.found) == 3


@pytest.mark.parametrize(("device", "non_blocking"), [("cuda", True), ("mps", False)])
def test_only_an_apple_gpu_is_waited_for_when_a_batch_is_sent(device, non_blocking):
    tensor = Mock()
    sent(tensor, torch.device(device))
    tensor.to.assert_called_once_with(torch.device(device), non_blocking=non_blocking)


class Strict(Callback):
    """Make waiting for the GPU an error in and between steps that are not logged, except the first, which compile."""

    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        torch.cuda.set_sync_debug_mode("default" if trainer.global_step % LOGGED == 0 else self.mode(trainer))

    def on_train_batch_start(self, trainer, task, batch, index):
        torch.cuda.set_sync_debug_mode(self.mode(trainer))

    def mode(self, trainer):
        return "error" if 2 <= trainer.global_step < STEPS - 1 else "default"


LOGGED, STEPS = 4, 12


def trained(config, folder, callbacks, **options):
    """Train a config's task for some steps with all features that a config may request; return task and trainer."""
    seed_everything(0, verbose=False)
    task, data = build(CONFIGS / f"{config}.yaml", SMALL[config])
    trainer = Trainer(
        devices=1,
        max_epochs=1,
        gradient_clip_val=1,
        precision="bf16-mixed",
        logger=False,
        callbacks=[*callbacks, EMA(0.5), StopOnNonFiniteLoss(), Last(10), Progress()],
        default_root_dir=folder,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    try:
        trainer.fit(task, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default") if torch.cuda.is_available() else None
    assert task.train_loss.isfinite()
    return task, trainer


@pytest.mark.parametrize("config", SMALL)
def test_validation_and_training_end_use_averaged_weights_with_fused_steps_in_bfloat16(config, tmp_path, unchecked):
    seen = {}
    keep = LambdaCallback(
        on_train_batch_end=lambda trainer, task, *_: seen.setdefault("now", first(task)),
        on_validation_batch_start=lambda trainer, task, *_: seen.update(averaged=first(task)),
    )
    options = {"accelerator": "cpu", "limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    task, trainer = trained(config, tmp_path, [keep], **options)
    assert trainer.global_step == 2
    assert not torch.equal(seen["now"], seen["averaged"])  # validation uses the averaged weights
    torch.testing.assert_close(first(task), seen["averaged"])  # and so does the task after training


def first(task) -> torch.Tensor:
    return next(task.network.parameters()).detach().clone()


@pytest.mark.gpu
@pytest.mark.parametrize("config", SMALL)
def test_training_on_a_gpu_does_not_wait_for_it(config, tmp_path, unchecked):
    options = {"limit_train_batches": STEPS, "limit_val_batches": 0, "log_every_n_steps": LOGGED}
    _, trainer = trained(config, tmp_path, [Strict()], accelerator="gpu", **options)
    assert trainer.global_step == STEPS


class Asked(Progress):
    """Counts how often the bar requests its metrics."""

    times = 0

    def get_metrics(self, trainer, task):
        self.times += self.due
        return super().get_metrics(trainer, task)


class Losses(Callback):
    """Keeps the loss of every step, on its device."""

    def on_train_start(self, trainer, task):
        self.seen = []

    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        self.seen.append(task.train_loss)


class Values(TorchDispatchMode):
    """Counts how often a tensor's value is read."""

    asked = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        """Run an operation."""
        self.asked += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*arguments, **(options or {}))


def test_losses_are_read_and_logged_only_at_the_logging_interval(tmp_path, unchecked, capsys):
    seed_everything(0, verbose=False)
    task, data = build(CONFIGS / "lenet5_digits.yaml", SMALL["lenet5_digits"])
    bar, losses, log = Asked(), Losses(), CSVLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=40,
        limit_val_batches=0,
        log_every_n_steps=10,
        logger=log,
        callbacks=[bar, losses],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with Values() as values:
        trainer.fit(task, datamodule=data)
    assert bar.times < 10  # four times in 40 steps, and by Lightning at the ends of epochs
    assert values.asked < 30  # by bar and loggers
    with open(log.experiment.metrics_file_path, newline="") as file:
        rows = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
    assert [step for step, _ in rows] == [9, 19, 29, 39]
    assert [loss for _, loss in rows] == pytest.approx([losses.seen[step].item() for step, _ in rows], rel=1e-5)


def test_an_optimiser_step_on_a_cpu_does_not_look_for_a_gpu(monkeypatch):
    found = []
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as importing Lightning does
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found.append("look") or 0)
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    assert bool(found) == torch.backends.cuda.is_built()  # torch without CUDA never looks
    found.clear()
    fast_steps(torch.device("cpu"))
    optimizer.step()
    assert not found


def test_recording_the_current_hook_does_not_search_the_tasks_parameters(monkeypatch, unchecked):
    """Lightning sets the current hook before and after each hook, about forty times a step."""
    task, data = build(CONFIGS / "lenet5_digits.yaml", SMALL["lenet5_digits"])
    searched, noted, of_torch = [], set(), nn.Module.__setattr__

    def search(module, name, value):
        searched.append(name)
        of_torch(module, name, value)

    def log(name, value, **options):
        noted.add(task._current_fx_name)

    monkeypatch.setattr(nn.Module, "__setattr__", search)
    monkeypatch.setattr(task, "log", log)
    callback = LambdaCallback(on_train_batch_end=lambda trainer, task, *_: task.log("val/one", 1))
    Trainer(accelerator="cpu", fast_dev_run=4, callbacks=[callback], logger=False).fit(task, datamodule=data)
    assert "_current_fx_name" not in searched
    assert {"training_step", "validation_step", "on_train_batch_end"} <= noted


@pytest.mark.parametrize(("ends", "steps"), [(15, [9, 14]), (None, [9, 19, 29, 32])])
def test_each_logged_loss_is_that_of_its_step(ends, steps, tmp_path, unchecked):
    """Also if a callback ends the run, and at the end of an epoch for callbacks that monitor train/loss."""
    seed_everything(0, verbose=False)
    task, data = build(CONFIGS / "lenet5_digits.yaml", SMALL["lenet5_digits"])

    def end(trainer, *_):
        trainer.should_stop = trainer.global_step == ends

    losses, log = Losses(), CSVLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        min_epochs=0,
        limit_val_batches=0,
        log_every_n_steps=10,
        logger=log,
        callbacks=[losses, LambdaCallback(on_train_batch_end=end)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(task, datamodule=data)
    with open(log.experiment.metrics_file_path, newline="") as file:
        rows = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
    assert trainer.callback_metrics["train/loss"] == losses.seen[-1]
    assert [loss for _, loss in rows] == pytest.approx([losses.seen[step].item() for step, _ in rows], rel=1e-5)
    assert {step for step, _ in rows} <= set(steps)
    assert {9, 14 if ends else 29} <= {step for step, _ in rows}
