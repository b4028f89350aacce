"""Reliable training: intact checkpoints, SIGTERM, non-finite losses, one fit per folder, overfitting three batches.

The modules of `tests/faults` repeat these tests many times and for all families; docs/reliability.md has the results.
"""

import csv
import errno
import json
import multiprocessing
import os
import signal
import subprocess
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from filelock import FileLock
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

import dlref.cli
from dlref.cli import train
from dlref.data.loader import Shuffled, StepSampler, TrainLoader
from dlref.runtime import UserError
from dlref.tasks import ImageClassifier
from dlref.training.checkpoints import BestCheckpoint, Interrupted, Last, SealedCheckpointIO
from dlref.training.finite import StopOnNonFiniteLoss
from dlref.training.run_folder import Claim, checkpoint_of, metrics_file, run_folder, write_text
from dlref.training.seal import SIZE, HashingWriter, damage, seal_of, write_sealed
from dlref.training.sigterm import EndAtSigterm
from dlref.training.weights import read
from tests.faults import families
from tests.faults.devices import arguments, furthest, losses
from tests.faults.families import differing, equal, fit_words, state_of, write_text_file

pytestmark = pytest.mark.usefixtures("elsewhere")
DIGITS = str(ROOT / "configs" / "lenet5_digits.yaml")
STOPPING = "lightning.pytorch.callbacks.EarlyStopping"
SAVING = "lightning.pytorch.callbacks.ModelCheckpoint"
SHARDED = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": {"data_parallel_size": 2}}
SHORT = {"trainer.max_epochs": "2", "trainer.limit_train_batches": "6", "trainer.enable_progress_bar": "false"}


def fit(**options):
    options = SHORT | {"final_test": "false"} | {key.replace("__", "."): str(value) for key, value in options.items()}
    return train(["fit", "--config", DIGITS, *(word for key, value in options.items() for word in (f"--{key}", value))])


@pytest.fixture
def during(monkeypatch):
    """Return a function that makes the following fits run an action in a hook."""

    def when(hook, action):
        monkeypatch.setattr(dlref.cli, "Preflight", families.during(hook, action))

    return when


# Seals


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "last.ckpt"
    write_sealed({"weights": torch.arange(1000.0)}, path)
    return path


def test_torch_load_reads_a_sealed_file(sealed):
    assert damage(sealed) is None
    assert len(seal_of(sealed)) == SIZE
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(sealed, weights_only=True, **options)["weights"], torch.arange(1000.0))


def test_a_flipped_bit_in_a_sealed_file_is_detected(sealed):
    whole = sealed.read_bytes()
    for place in range(0, len(whole) - SIZE, 97):
        sealed.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert damage(sealed) == "its hash does not match"
    with pytest.raises(UserError, match=r"last.ckpt: damaged \(its hash does not match\)"):
        read(sealed)


@pytest.mark.parametrize("kept", [0, 1, 100, -1, -SIZE, -SIZE + 1])
def test_a_truncated_sealed_file_is_detected(kept, sealed):
    whole = sealed.read_bytes()[:kept]
    sealed.write_bytes(whole)
    assert damage(sealed) == f"cut off after {len(whole)} bytes"


def test_a_sealed_file_takes_its_name_only_once_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    path, synced = tmp_path / "last.ckpt", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((path.exists(), os.fstat(number).st_size)))
    write_sealed({"weights": torch.arange(9.0)}, path)
    assert synced[0] == (False, path.stat().st_size)


def test_a_file_saved_without_a_seal_is_read(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "theirs.pt")
    assert torch.equal(read(tmp_path / "theirs.pt")["weight"], torch.ones(3))
    (tmp_path / "seal.pt").write_bytes(b"\ndlref sha256 ")
    with pytest.raises(UserError, match="unreadable"):
        read(tmp_path / "seal.pt")


class Full(BytesIO):
    """A file on a disk with room for 1000 bytes."""

    name = "last.ckpt.part"

    def write(self, data):
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_an_error_unrelated_to_the_disk_is_raised_unchanged_while_saving(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        write_sealed({"step": 1}, tmp_path / "last.ckpt")
    assert not any(tmp_path.iterdir())


def test_the_writer_keeps_the_no_space_error_that_torch_replaces_with_its_own():
    hashed = HashingWriter(Full())
    with pytest.raises(RuntimeError):
        torch.save({"weights": torch.ones(10_000)}, hashed)
    assert (hashed.error.errno, hashed.error.filename) == (errno.ENOSPC, "last.ckpt.part")


def test_a_full_disk_is_reported_as_no_space_instead_of_by_torchs_error(tmp_path, monkeypatch):
    def full(_, writer):
        with pytest.raises(OSError, match="No space left"):
            writer.write(bytes(2000))
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises(OSError, match="No space left") as error:
        write_sealed({}, tmp_path / "last.ckpt")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "last.ckpt.part")


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_partial_file(sealed, monkeypatch):
    before = sealed.read_bytes()
    monkeypatch.setattr(HashingWriter, "write", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_sealed({"weights": torch.ones(10_000)}, sealed, sealed.with_name("previous.ckpt"))
    assert sealed.read_bytes() == before
    assert [path.name for path in sealed.parent.iterdir()] == ["last.ckpt"]


def refuse(hashed, data):
    hashed.error = OSError(errno.ENOSPC, "No space left on device")
    raise hashed.error


def test_previous_ckpt_is_used_if_last_ckpt_is_damaged_or_missing(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    write_sealed({"step": 1}, last)
    write_sealed({"step": 2}, last, previous)
    assert checkpoint_of(tmp_path, "last") == last
    assert read(previous) == {"step": 1}
    last.write_bytes(last.read_bytes()[:-50])
    assert checkpoint_of(tmp_path, "last") == previous
    whole = previous.read_bytes()
    previous.write_bytes(whole[:-50])
    assert checkpoint_of(tmp_path, "last") == last  # so that the error names last.ckpt
    previous.write_bytes(whole)
    last.unlink()
    assert checkpoint_of(tmp_path, "last") == previous
    first, second = capsys.readouterr().err.splitlines()
    assert "last.ckpt: cut off after" in first
    assert "last.ckpt: not found; using previous.ckpt, the intact checkpoint before it" in second


@pytest.mark.parametrize("path", ["outside", "run/../outside", "run/link/own", "local://{}/outside", "run"])
def test_no_checkpoint_outside_the_runs_folder_is_removed(path, tmp_path, monkeypatch):
    """A loaded checkpoint contains the paths that the config's callbacks remove."""
    monkeypatch.chdir(tmp_path)
    for name in ("outside/own", "run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run/link").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="expected a file in the run's folder"):
        SealedCheckpointIO(Path("run"), None).remove_checkpoint(path.format(tmp_path))
    assert (tmp_path / "outside/own").exists()


def test_a_callbacks_checkpoint_is_removed_if_the_run_has_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for epoch in range(2):
        (tmp_path / f"run/checkpoints/{epoch}.ckpt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"run/checkpoints/{epoch}.ckpt").touch()
    SealedCheckpointIO(Path("../run"), None).remove_checkpoint("../run/checkpoints/0.ckpt")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["1.ckpt"]


# When last.ckpt is written


@pytest.fixture
def saving(monkeypatch):
    """A `Last` that saves every ten minutes, its trainer, the clock, and the times at which it saved."""
    now, saved = [1000.0], []
    monkeypatch.setattr("dlref.training.checkpoints.time.monotonic", lambda: now[0])
    trainer = SimpleNamespace(
        global_step=3,
        max_steps=-1,
        should_stop=False,
        world_size=1,
        loggers=[],
        is_last_batch=False,
        fit_loop=SimpleNamespace(
            _can_stop_early=True, _data_fetcher=None, epoch_loop=SimpleNamespace(_should_check_val_fx=lambda _: False)
        ),
        strategy=SimpleNamespace(broadcast=lambda x: x, reduce_boolean_decision=lambda x, all: x),
        save_checkpoint=lambda path, weights_only: saved.append(now[0]),
    )
    last = Last(minutes=10)
    last.path, last.saved, last.step = "last.ckpt", now[0], 3
    return last, trainer, now, saved


def test_the_interval_counts_from_one_checkpoint_to_the_next(saving):
    last, trainer, now, saved = saving
    for seconds in (599, 600, 1199, 1200):
        now[0] = 1000.0 + seconds
        if last.due(trainer):
            last.save(trainer)
    assert saved == [1600.0, 2200.0]


def test_last_ckpt_is_not_saved_between_a_step_and_its_validation(saving):
    last, trainer, now, saved = saving
    trainer.fit_loop.epoch_loop._should_check_val_fx = lambda _: trainer.global_step == 4
    for step in (4, 5):
        now[0], trainer.global_step = 2000.0 + step, step
        last.on_train_batch_end(trainer, None, None, None, step - 1)
    assert saved == [2005.0]


def test_the_last_step_of_a_fit_is_saved_in_an_epoch_without_validation(saving):
    """In other epochs, validation would follow this batch, and the save would follow the validation."""
    last, trainer, _, saved = saving
    trainer.global_step = trainer.max_steps = 4
    last.on_train_batch_end(trainer, None, None, None, 3)
    assert saved == [1000.0]


def test_sigterm_in_the_last_step_of_an_epoch_without_validation_ends_the_fit_there(saving):
    last, trainer, _, saved = saving
    last.kept, trainer.global_step, trainer.is_last_batch = 3, 4, True
    last.on_sigterm()
    last.on_train_epoch_end(trainer, None)
    assert saved == [1000.0]
    for ends in (lambda: last.on_train_batch_start(trainer, None, None, 0), lambda: last.on_train_end(trainer, None)):
        with pytest.raises(Interrupted, match=r"last\.ckpt is at step 4"):
            ends()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resuming_with_another_seed_or_without_weight_averaging_is_refused(capsys):
    short = {"trainer.limit_train_batches": 2, "final_test": "false", "model.init_args.lr_scheduler": "null"}
    average = {"trainer.callbacks+": "dlref.tasks.EMA"}
    assert fit(**short, **average, run="mine", seed_everything=5) == 0
    on = short | {"run": "mine", "ckpt_path": "last", "trainer.max_epochs": 9}
    assert fit(**on, **average, seed_everything=6) == 2
    assert "seed_everything: 6, the checkpoint has 5; expected the same" in capsys.readouterr().err
    assert fit(**on, seed_everything=5) == 2
    assert "trainer.callbacks: no weight averaging" in capsys.readouterr().err


def test_after_a_complete_epoch_a_resumed_run_starts_at_the_first_batch(monkeypatch, tmp_path):
    monkeypatch.setattr("dlref.training.checkpoints.listen", lambda *_: None)
    last, told = Last(minutes=10), []
    last.taken = last.batches = 6
    trainer = SimpleNamespace(
        num_training_batches=6,
        val_check_batch=6,
        check_val_every_n_epoch=1,
        global_step=6,
        should_stop=False,
        fit_loop=SimpleNamespace(restarted_on_epoch_end=False, epoch_loop=SimpleNamespace(restarted_on_last=False)),
        accumulate_grad_batches=1,
        default_root_dir=tmp_path,
        train_dataloader=SimpleNamespace(load_state_dict=told.append, sampler=StepSampler(Shuffled(6, 1))),
    )
    last.on_train_start(trainer, None)
    assert told == [{"taken": 0}]
    for last.batches in (12, 3):  # batch 6 was half an epoch or the end of two: schedules count steps
        with pytest.raises(UserError, match=f"the checkpoint is at batch 6 of {last.batches}, but an epoch now has 6"):
            last.on_train_start(trainer, None)


# SIGTERM


def test_a_run_stopped_by_sigterm_resumes_to_identical_results(during, tmp_path, capsys):
    assert fit(run="whole") == 0
    before = signal.getsignal(signal.SIGTERM)
    during("on_train_batch_start", lambda self, trainer, *_: trainer.global_step == 7 and tell())
    assert fit(run="told") == os.EX_TEMPFAIL
    assert signal.getsignal(signal.SIGTERM) is before
    assert "last.ckpt is at step 8; --ckpt_path last resumes from there" in capsys.readouterr().err
    assert fit(run="told", ckpt_path="last") == 0
    assert equal(state_of(tmp_path / "told"), state_of(tmp_path / "whole"))
    assert (tmp_path / "told/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def tell():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_to_a_run_and_its_workers_saves_the_step(during, tmp_path):
    """`timeout`, systemd and SLURM send it to all processes."""

    def tell_all(self, trainer, *_):
        if trainer.global_step == 3:
            everyone = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
            assert len(everyone) > 2
            subprocess.run(["kill", "-TERM", *map(str, everyone)], check=True)

    during("on_train_batch_start", tell_all)
    assert train(fit_words("semantic segmentation", tmp_path / "told")) == os.EX_TEMPFAIL
    assert state_of(tmp_path / "told")["global_step"] == 4


@pytest.mark.parametrize("step", [1, 7])  # before the first checkpoint, and after it
def test_an_error_after_sigterm_is_taken_for_its_result(step, during, capsys):
    """SIGTERM to all processes of a run ends a compiler, too."""
    steps = [step]

    def fail(self, trainer, *_):
        if trainer.global_step in steps:
            steps.clear()
            tell()
            raise RuntimeError("the compiler was terminated")

    during("on_train_batch_start", fail)
    assert fit(run="told") == os.EX_TEMPFAIL
    assert capsys.readouterr().err.endswith("stopped by SIGTERM in a step that failed: the compiler was terminated\n")
    assert fit(run="told", **({"ckpt_path": "last"} if step == 7 else {})) == 0


def test_an_error_without_sigterm_or_with_several_processes_is_raised_unchanged():
    last = Last(minutes=10)
    for received, processes in ((False, 1), (True, 2)):
        last.sigterm_received = received
        with pytest.raises(RuntimeError, match="own"), last.excusing_errors(SimpleNamespace(world_size=processes)):
            raise RuntimeError("own")


def test_sigterm_during_validation_takes_effect_at_its_end(during, tmp_path):
    during("on_validation_batch_start", lambda self, trainer, *_: trainer.global_step == 6 and tell())
    assert fit(run="told") == os.EX_TEMPFAIL
    assert state_of(tmp_path / "told")["global_step"] == 6
    assert "0.1" in (tmp_path / "told/metrics.csv").read_text().splitlines()[-1]  # the validation metrics


@pytest.mark.parametrize("step", ["validation_step", "test_step"])  # in the sanity check, in the final test
def test_sigterm_in_the_sanity_check_or_final_test_ends_a_fit_at_once(step, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ImageClassifier, step, lambda *_: tell())
    assert fit(run="told", final_test="true") == os.EX_TEMPFAIL
    assert capsys.readouterr().err.endswith("stopped by SIGTERM\n")
    assert (tmp_path / "told").exists() == (step == "test_step")
    assert not (tmp_path / "told/test.json").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_validate_test_and_predict_at_once(tmp_path, monkeypatch, capsys):
    assert fit(run="mine", trainer__max_epochs=1, trainer__limit_train_batches=1) == 0
    for command, step in (("validate", "validation_step"), ("test", "test_step"), ("predict", "predict_step")):
        monkeypatch.setattr(ImageClassifier, step, lambda *_: tell())
        assert train([command, "--config", "mine/config.yaml"]) == os.EX_TEMPFAIL
        assert capsys.readouterr().err.endswith("stopped by SIGTERM\n")


def test_the_loop_for_spot_instances_goes_on_after_sigterm_at_any_time_and_ends_after_errors(tmp_path):
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    loop = page.partition("```bash\n")[2].partition("```")[0]
    (tmp_path / "python").write_text('echo "$@" >> starts; exit $(sed -n "$(wc -l < starts)p" statuses)')
    (tmp_path / "python").chmod(0o755)
    for statuses, starts in (("143 75 0 2", 3), ("75 2 0", 2), ("1 0", 1)):  # 143: a shell's for SIGTERM's default
        (tmp_path / "starts").unlink(missing_ok=True)
        (tmp_path / "statuses").write_text(statuses.replace(" ", "\n"))
        subprocess.run(["bash", "-c", f"PATH=.:$PATH; {loop}"], cwd=tmp_path, check=False)
        assert len((tmp_path / "starts").read_text().splitlines()) == starts


def test_sigterm_is_passed_on_to_the_processes_of_other_devices(monkeypatch):
    killed = []
    launcher = SimpleNamespace(kill=killed.append)
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), received_sigterm=False)
    monkeypatch.setattr("dlref.training.sigterm.listen", lambda handler: handler(signal.SIGTERM, None))
    with pytest.raises(SIGTERMException):
        EndAtSigterm().on_test_start(trainer, None)
    assert killed == [signal.SIGTERM]


def test_a_validation_ends_at_a_sigterm_that_lightning_received_unless_a_fit_saves_after_it():
    trainer = SimpleNamespace(received_sigterm=True, state=SimpleNamespace(fn="validate"))
    with pytest.raises(SIGTERMException):
        EndAtSigterm().on_validation_start(trainer, None)
    trainer.state.fn = "fit"
    EndAtSigterm().on_validation_start(trainer, None)


def test_sigterm_while_loaders_start_leaves_the_earlier_run_unchanged(tmp_path, monkeypatch):
    """Without a sanity check, Lightning's handler receives the signal and only records it."""
    assert fit(run="mine", trainer__limit_train_batches=1) == 0
    earlier = (tmp_path / "mine/metrics.csv").read_bytes()
    begin = TrainLoader.__iter__
    monkeypatch.setattr(TrainLoader, "__iter__", lambda self: tell() or begin(self))
    again = {"overwrite": True, "trainer__num_sanity_val_steps": 0, "model__init_args__lr_scheduler": "null"}
    assert fit(run="mine", **again) == os.EX_TEMPFAIL
    assert (tmp_path / "mine/metrics.csv").read_bytes() == earlier
    assert (tmp_path / "mine/checkpoints/best.ckpt").is_file()


def test_errors_for_a_lost_process_or_worker_are_reported_in_one_line(monkeypatch, capsys):
    """Other errors of torch are raised unchanged."""
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    for error in (RuntimeError(gloo), dist.DistBackendError("NCCL error: ncclRemoteError: a peer has gone")):
        monkeypatch.setattr(dlref.cli, "TrainCLI", raising(error))
        assert train([]) == 2
        assert capsys.readouterr().err == "error: another process has ended; its own error says why\n"
    for what in ("(pid 7) is killed by signal: Killed. ", "(pid(s) 7, 8) exited unexpectedly"):
        monkeypatch.setattr(dlref.cli, "TrainCLI", raising(RuntimeError(f"DataLoader worker {what}")))
        assert train([]) == 2
        assert "expected data.init_args.num_workers processes to fit into memory\n" in capsys.readouterr().err
    others = (
        "CUDA out of memory",
        "cannot read igloo.jpg",
        "[/gloo/transport/tcp/device.cc:84] unable to find address",
    )
    for error in (*map(RuntimeError, others), dist.DistNetworkError("address already in use")):
        monkeypatch.setattr(dlref.cli, "TrainCLI", raising(error))
        with pytest.raises(RuntimeError):
            train([])


def raising(error):
    def raise_it(*_):
        raise error

    return raise_it


# These use mixed images and averaged weights; two workers; accumulated gradients and dropout.
UNLIKE = ("image classification", "semantic segmentation", "language modelling")
OTHERS = ("object detection", "forecasting", "translation")


@pytest.mark.parametrize("families", [UNLIKE, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_identical_results(families, command):
    done = command("-m", "tests.faults.resume", "--kills", "1", *families)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 equal") == len(families)


def test_a_damaged_last_ckpt_does_not_replace_an_intact_previous_ckpt(tmp_path):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    write_sealed({"step": 1}, previous)
    last.write_bytes(b"damaged")
    sealed = SealedCheckpointIO(tmp_path, previous)
    sealed.save_checkpoint({"step": 2}, last)
    assert read(previous)["step"] == 1
    sealed.save_checkpoint({"step": 3}, last)
    assert (read(previous)["step"], read(last)["step"]) == (2, 3)


@pytest.mark.parametrize("others", [True, False])
def test_sigterm_in_one_process_stops_all_processes(others):
    last = Last(minutes=10)
    last.sigterm_received = True
    strategy = SimpleNamespace(reduce_boolean_decision=lambda told, all: told and (others or not all))
    assert last.agreed(SimpleNamespace(strategy=strategy))


# Non-finite losses and full disks


def test_a_non_finite_loss_ends_the_run_and_saves_its_batch(during, tmp_path, capsys):
    seen = {}

    def spoil(self, trainer, task, batch, batch_idx):
        seen[trainer.current_epoch, batch_idx] = batch
        if (trainer.current_epoch, batch_idx) == (1, 2):
            with torch.no_grad():
                task.network.f6.weight.fill_(torch.nan)

    during("on_train_batch_start", spoil)
    assert fit(run="mine") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "train/loss is not finite in step 9 (epoch 1, batch 2, learning rate 0.00" in error[0]
    assert "mine/not_finite.pt" in error[0]
    kept = read(tmp_path / "mine" / "not_finite.pt")
    assert all(map(torch.equal, kept["inputs"], seen[1, 2]))  # with its augmentation
    assert state_of(tmp_path / "mine")["global_step"] == 6
    assert torch.isfinite(state_of(tmp_path / "mine")["state_dict"]["network.f6.weight"]).all()


def test_losses_are_checked_only_at_the_logging_interval_and_before_checkpoints(monkeypatch):
    looks = []
    monkeypatch.setattr(
        StopOnNonFiniteLoss, "look", lambda self, trainer: looks.append(trainer.global_step) or self.seen.clear()
    )
    assert fit(trainer__limit_train_batches=8, trainer__log_every_n_steps=3, trainer__max_epochs=1) == 0
    assert looks == [3, 6, 8, 8, 8]  # at the last batch, and before best.ckpt and last.ckpt


def test_no_process_saves_a_checkpoint_after_a_non_finite_loss(tmp_path):
    finite = StopOnNonFiniteLoss()
    finite.on_train_start(None, None)
    where = {"step": 1, "epoch": 0, "batch": 0, "learning_rate": 0.1}
    finite.seen.append((torch.tensor(torch.nan), where))
    waited = []
    strategy = SimpleNamespace(barrier=waited.append)
    second = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=False, strategy=strategy)
    with pytest.raises(UserError, match="not finite in step 1"):
        finite.on_save_checkpoint(second, None, {})
    assert waited == ["not_finite.pt"]  # for the first process, which saves the batch


def test_the_last_of_several_configs_names_the_run():
    assert run_folder(SimpleNamespace(run=None, config=["configs/a.yaml", "mine/b.yaml"])) == Path("runs/b")


def test_a_run_without_a_name_is_refused():
    with pytest.raises(UserError, match="no --config and no --run; expected one of them to name the run"):
        run_folder(SimpleNamespace(run=None, config=None))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results/of/test.json"  # in folders that are made
    write_text(path, "before")
    monkeypatch.setattr("os.replace", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_running_out_of_space_ends_in_a_one_line_error(number, monkeypatch, capsys):
    """The disk is full, the user's quota is used up, or the file system's limit on file size is reached."""
    monkeypatch.setattr(dlref.cli, "TrainCLI", raising(OSError(number, os.strerror(number), "last.ckpt")))
    assert train([]) == 2
    expected = f"error: last.ckpt: {os.strerror(number)}; expected free space; earlier checkpoints are intact\n"
    assert capsys.readouterr().err == expected


def test_other_disk_errors_are_not_reported_as_lack_of_space(monkeypatch):
    monkeypatch.setattr(dlref.cli, "TrainCLI", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        train([])


def test_a_leftover_not_finite_pt_does_not_count_as_a_run_and_is_removed(tmp_path):
    run = tmp_path / "mine"
    claim = Claim(run, resume=False, overwrite=False)
    (run / "not_finite.pt").write_bytes(b"a batch")
    claim.commit()
    claim.lock.release()
    again = Claim(run, resume=False, overwrite=False)  # not refused
    again.commit()
    again.lock.release()
    assert not (run / "not_finite.pt").exists()  # it belonged to the earlier fit


def test_no_process_waits_for_a_first_process_that_cannot_save_the_batch(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StopOnNonFiniteLoss, "keep", full)
    finite, waited = StopOnNonFiniteLoss(), []
    finite.on_train_start(None, None)
    finite.seen.append((torch.tensor(torch.nan), {"step": 1}))
    strategy = SimpleNamespace(barrier=waited.append)
    with pytest.raises(OSError, match="No space left"):
        finite.look(SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True, strategy=strategy))
    assert waited == ["not_finite.pt"]


def test_debug_overfits_three_batches_and_writes_nothing(tmp_path, capsys):
    assert train(["fit", "--config", DIGITS, "--debug", "true", "--trainer.enable_progress_bar", "false"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("debug: ")]
    first, last = (float(line.split()[i].strip(",")) for i in (2, 4))
    assert last < 0.3 * first, line
    assert line.endswith("3 batches 100 times")
    assert list(tmp_path.iterdir()) == []


# Several fits, several processes


def test_resuming_with_another_optimiser_is_refused(tmp_path, capsys):
    assert fit(run="mine") == 0
    before = (tmp_path / "mine/config.yaml").read_text()
    for key, value, complaint in (
        ("freeze", "c1", "numbers of parameters [8], the checkpoint has [10]"),
        ("decay_vectors", "false", "numbers of parameters [5, 5], the checkpoint has [10]"),
        ("optimizer__init_args__lr", 0.5, "lr [0.5], the checkpoint has [0.01]"),
        ("optimizer__init_args__weight_decay", 0.5, "weight_decay [0.5], the checkpoint has [0.01]"),
        ("optimizer__init_args__betas", "[0.5, 0.9]", "betas [(0.5, 0.9)], the checkpoint has [(0.9, 0.999)]"),
        ("optimizer", "torch.optim.Adam", "class Adam, the checkpoint has AdamW"),
    ):
        given = {f"model__init_args__{key}": value}
        assert fit(run="mine", ckpt_path="last", trainer__max_epochs=2, **given) == 2
        assert f"optimizer: {complaint}; expected the optimizer, lr_scheduler and freeze of" in capsys.readouterr().err
        assert (tmp_path / "mine/config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("first", "then", "complaint"),
    [
        (
            {"max_epochs": 2},
            {"max_epochs": 1},
            "max_epochs: 1, the checkpoint has 2; expected at least as many",
        ),
        ({"max_steps": 3}, {"max_steps": 2}, "max_steps: 2, the checkpoint has 3; expected at least as many"),
        ({"max_steps": 3}, {"max_steps": 3}, "seed_everything: 5, the checkpoint has 0"),
        ({"max_epochs": 2}, {"max_epochs": 2}, "seed_everything: 5, the checkpoint has 0"),
    ],
)
def test_resuming_a_run_that_has_no_step_left_does_not_change_its_config(first, then, complaint, tmp_path, capsys):
    """Lightning skips the training, and with it the checks at its start."""
    assert fit(run="mine", **{f"trainer__{key}": value for key, value in first.items()}) == 0
    before = (tmp_path / "mine/config.yaml").read_text()
    capsys.readouterr()
    longer = {f"trainer__{key}": value for key, value in then.items()}
    assert fit(run="mine", ckpt_path="last", seed_everything=5, **longer) == 2
    assert complaint in capsys.readouterr().err
    assert (tmp_path / "mine/config.yaml").read_text() == before


def test_resuming_with_another_freeze_of_as_many_parameters_is_refused(capsys):
    assert fit(run="mine", model__init_args__freeze="c3") == 0
    assert fit(run="mine", model__init_args__freeze="c1", ckpt_path="last", trainer__max_epochs=2) == 2
    told = "frozen parameters ['c1.weight', 'c1.bias'], the checkpoint has ['c3.weight', 'c3.bias']; expected"
    assert told in capsys.readouterr().err


def test_resuming_with_another_length_or_setting_of_a_schedule_that_would_keep_its_own_is_refused(capsys):
    cosine = {"model__init_args__lr_scheduler": "torch.optim.lr_scheduler.CosineAnnealingLR"}
    assert fit(run="mine", trainer__max_epochs=2, **cosine) == 0
    lowest = {"model__init_args__lr_scheduler.init_args.eta_min": 0.1}
    for more, told in (({"trainer__max_epochs": 3}, "T_max 18"), ({"trainer__max_epochs": 2} | lowest, "eta_min 0.1")):
        assert fit(run="mine", ckpt_path="last", **cosine, **more) == 2
        assert f"optimizer: lr_scheduler's {told}, the checkpoint has " in capsys.readouterr().err


def test_slurm_requeueing_is_off_and_a_checkpoint_it_left_is_refused(during, tmp_path, monkeypatch, capsys):
    names = {
        "NTASKS": 1,
        "JOB_NAME": "train",
        "NODELIST": "localhost",
        "NNODES": 1,
        "PROCID": 0,
        "LOCALID": 0,
        "JOB_ID": 1,
    }
    for name, value in (names | {"NODEID": 0}).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    seen = []
    during("on_train_start", lambda self, trainer, *_: seen.append(trainer._accelerator_connector.cluster_environment))
    assert fit(run="mine") == 0
    (environment,) = seen
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun in a SLURM job
    assert fit(run="more") == 0
    assert isinstance(seen[1], TorchElasticEnvironment)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    (tmp_path / "mine/hpc_ckpt_1.ckpt").touch()
    assert train(["test", "--config", "mine/config.yaml"]) == 2
    assert "hpc_ckpt_1.ckpt: Lightning would load it unasked under SLURM" in capsys.readouterr().err


def test_more_processes_of_torchrun_than_work_together_are_refused(tmp_path, monkeypatch, capsys):
    """Each would work alone with all of the data, and the first one's run would pass for that of all."""
    for name, value in {"TORCHELASTIC_RUN_ID": 1, "WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    assert fit(run="mine") == 2
    assert "torchrun started 2 processes, of which 1 would work; expected trainer.devices" in capsys.readouterr().err
    assert fit(run="mine", **{"trainer.devices": 3, "trainer.strategy": "ddp"}) == 2
    assert "does not match the world size (2)." in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fit(run="mine") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(["test", "--config", "mine/config.yaml"]) == 2
    assert "torchrun started 2 processes, of which 1 would work" in capsys.readouterr().err


def test_two_fits_cannot_write_to_the_same_folder(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    with FileLock(tmp_path / "mine" / ".lock"):
        assert fit(run="mine") == 2
        assert fit(run="mine", overwrite="true") == 2
    assert capsys.readouterr().err.count("mine: another fit is writing there; expected --run with another folder") == 2
    assert fit(run="mine") == 0
    assert fit(run="mine", overwrite="true") == 0  # the lock has been released


def test_a_second_fit_started_during_the_first_is_refused(during, tmp_path, capsys):
    statuses = []

    def start_another(self, trainer, *_):
        if not statuses:
            statuses.append(None)
            statuses[0] = fit(run="mine", overwrite="true")

    during("on_train_start", start_another)
    assert fit(run="mine") == 0
    assert statuses == [2]
    assert "another fit is writing there" in capsys.readouterr().err
    assert state_of(tmp_path / "mine")["global_step"] == 12


def test_training_with_two_processes_gives_the_losses_of_one(command, tmp_path):
    write_text_file(tmp_path)
    assert train([str(word) for word in arguments("language modelling", tmp_path / "one", 1)]) == 0
    done = command("train.py", *arguments("language modelling", tmp_path / "two", 2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr  # Lightning's advice about scores that are already over all devices
    assert len(losses(tmp_path / "one")) == 8
    assert furthest(losses(tmp_path / "one"), losses(tmp_path / "two")) < 1e-4
    assert state_of(tmp_path / "two")["global_step"] == 8


# Found in review


def test_a_run_stopped_by_sigterm_in_its_last_step_is_tested_when_resumed(during, tmp_path):
    during("on_train_batch_start", lambda self, trainer, *_: trainer.global_step == 11 and tell())
    assert fit(run="mine") == os.EX_TEMPFAIL
    assert fit(run="mine", ckpt_path="last", final_test="true") == 0
    assert (tmp_path / "mine" / "test.json").is_file()
    assert (tmp_path / "mine" / "figures").is_dir()


def test_sigterm_before_the_first_step_leaves_the_earlier_run_unchanged(during, tmp_path):
    assert fit(run="mine") == 0
    before = state_of(tmp_path / "mine")
    during("on_sanity_check_start", lambda *_: tell())
    assert fit(run="mine", overwrite="true", seed_everything=1) == os.EX_TEMPFAIL
    assert equal(state_of(tmp_path / "mine"), before)


def test_files_set_aside_by_a_killed_fit_are_restored(tmp_path, capsys):
    assert fit(run="mine") == 0
    before = state_of(tmp_path / "mine")
    aside = tmp_path / "mine" / ".earlier.1"
    aside.mkdir()
    for name in ("checkpoints", "config.yaml", "metrics.csv"):
        (tmp_path / "mine" / name).rename(aside / name)
    (tmp_path / "mine" / "metrics.csv").touch()
    (tmp_path / "mine" / "test.json").touch()  # the fit was killed before setting it aside
    assert fit(run="mine") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert equal(state_of(tmp_path / "mine"), before)
    assert not aside.exists()
    assert (tmp_path / "mine" / "test.json").exists()
    assert (tmp_path / "mine" / "metrics.csv").stat().st_size


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_stopped_in_an_epoch_without_validation_resumes_to_identical_results(epoch, during, tmp_path):
    options = {"trainer__check_val_every_n_epoch": 2, "trainer__max_epochs": 3}
    assert fit(run="whole", **options) == 0
    assert state_of(tmp_path / "whole")["global_step"] == 18
    during("on_train_batch_start", lambda self, trainer, *_: trainer.global_step == 6 * epoch + 3 and tell())
    assert fit(run="told", **options) == os.EX_TEMPFAIL
    during("on_train_start", lambda *_: None)
    assert fit(run="told", ckpt_path="last", **options) == 0
    assert equal(state_of(tmp_path / "told"), state_of(tmp_path / "whole"))


@pytest.mark.parametrize("step", [5, 6, 7])  # the sixth is the last of an epoch without validation
def test_a_run_of_a_number_of_steps_resumes_to_identical_results(step, during, tmp_path):
    """After a complete epoch, Lightning would go on in the same epoch."""
    options = {"trainer__check_val_every_n_epoch": 2, "trainer__max_epochs": -1, "trainer__max_steps": 18}
    assert fit(run="whole", **options) == 0
    during("on_train_batch_start", lambda self, trainer, *_: trainer.global_step == step - 1 and tell())
    assert fit(run="told", **options) == os.EX_TEMPFAIL
    assert state_of(tmp_path / "told")["global_step"] == step
    during("on_train_start", lambda *_: None)
    assert fit(run="told", ckpt_path="last", **options) == 0
    assert differing(tmp_path / "told", tmp_path / "whole") == []


@pytest.mark.parametrize(("interval", "steps"), [(6, 4), (4, 8), (4, 11)])
def test_a_run_that_ends_between_validations_saves_its_last_step(interval, steps, tmp_path):
    """Step 8 is the second of an epoch, whose validation follows the fourth."""
    assert fit(run="mine", trainer__max_steps=steps, trainer__max_epochs=2, trainer__val_check_interval=interval) == 0
    assert state_of(tmp_path / "mine")["global_step"] == steps


def test_a_run_that_early_stopping_ends_after_its_minimum_does_so_when_resumed(during, tmp_path):
    stopping = {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "val/accuracy"}
    stopping |= {"trainer.callbacks.mode": "max", "trainer.callbacks.stopping_threshold": -1}  # at once
    options = stopping | {"trainer.min_steps": 10, "trainer.max_epochs": 3}
    assert fit(run="whole", **options) == 0
    assert state_of(tmp_path / "whole")["global_step"] == 10
    during("on_train_batch_start", lambda self, trainer, *_: trainer.global_step == 7 and tell())
    assert fit(run="told", **options) == os.EX_TEMPFAIL
    during("on_train_start", lambda *_: None)
    assert fit(run="told", ckpt_path="last", **options) == 0
    assert state_of(tmp_path / "told")["global_step"] == 10


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("least", "step"), [({"trainer.min_epochs": 2}, 12), ({"trainer.min_steps": 8}, 8)])
@pytest.mark.parametrize("checkpoint", ["last", "mine/checkpoints/best.ckpt"])
def test_a_run_ended_by_early_stopping_after_its_minimum_can_be_continued(least, step, checkpoint, tmp_path):
    stopping = {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "val/accuracy"}
    stopping |= {"trainer.callbacks.mode": "max", "trainer.callbacks.stopping_threshold": -1}
    kept = {"best.mode": "min", "run": "mine", "trainer.max_epochs": 3}
    assert fit(**kept, **least, **stopping) == 0
    assert state_of(tmp_path / "mine")["global_step"] == step
    assert fit(**kept, ckpt_path=checkpoint) == 0
    assert state_of(tmp_path / "mine")["global_step"] == 18


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("interval", "least", "validated"), [(6, 8, [5, 7, 11, 17]), (4, 12, [3, 9, 11, 15])], ids=["within", "at the end"]
)
def test_a_run_that_is_continued_in_the_epoch_it_was_stopped_in_logs_each_step_once(
    interval, least, validated, tmp_path, capsys
):
    """The stop brings about a validation that the interval does not: after it, Lightning would log step 8 as 7.

    At the end of an epoch, it would train one more batch there.
    """
    stopping = {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "val/accuracy", "trainer.min_steps": least}
    stopping |= {"trainer.callbacks.mode": "max", "trainer.callbacks.stopping_threshold": -1}
    kept = {"run": "mine", "trainer.max_epochs": 3, "trainer.log_every_n_steps": 1}
    kept |= {"trainer.val_check_interval": interval}
    assert fit(**kept, **stopping) == 0
    rates = {"trainer.callbacks+": "lightning.pytorch.callbacks.LearningRateMonitor"}  # logs before all other callbacks
    assert fit(**kept, ckpt_path="last", **rates, **{"trainer.callbacks.logging_interval": "step"}) == 0
    logged = families.rows(tmp_path / "mine")
    (rate,) = (name for name in logged[0] if name.startswith("lr-"))
    for column, steps in (("train/loss", range(18)), ("val/accuracy", validated), (rate, range(least, 18))):
        assert [int(row["step"]) for row in logged if row[column]] == list(steps)
    assert ("the last steps were not validated" in capsys.readouterr().err) == (validated[-1] < 17)


def test_validation_between_two_optimiser_steps_is_refused(capsys):
    assert fit(trainer__accumulate_grad_batches=4, trainer__val_check_interval=3) == 2
    assert "validation every 3 batches, an optimiser step every 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainer.val_check_interval": "00:00:10:00"}, "trainer.val_check_interval: a time; expected a number"),
        (
            {"trainer.check_val_every_n_epoch": "null", "trainer.val_check_interval": 8},
            "check_val_every_n_epoch: null, with epochs of 6 batches, an optimiser step every 4; expected a multiple",
        ),
        ({"trainer.limit_val_batches": 0.00001}, "limit_val_batches"),
        ({"trainer.max_epochs": -1, "trainer.max_time": "00:00:10:00"}, "expected trainer.max_epochs or max_steps"),
        ({"trainer.precision": "bf16-true"}, "trainer.precision: bf16-true; expected 32-true, or bf16-mixed"),
        ({"trainer.precision": "64-true"}, "trainer.precision: 64-true; expected 32-true, or bf16-mixed"),
        ({"trainer.limit_test_batches": 0, "final_test": "true"}, "limit_test_batches: 0; expected more, or --final"),
        ({"trainer.limit_train_batches": 0}, "trainer.limit_train_batches: 0; expected more"),
        ({"trainer.accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches: 0; expected more"),
        ({"trainer.max_epochs": 0}, "trainer.max_epochs: 0; expected more"),
        ({"trainer.overfit_batches": 2}, "trainer.overfit_batches: 2; expected none, see --debug"),
        ({"trainer.val_check_interval": 1000}, "error: trainer: `val_check_interval` (1000) must be less than"),
        (
            {"model.init_args.lr_scheduler": "torch.optim.lr_scheduler.ExponentialLR"},
            "ExponentialLR: its first argument after the optimiser is gamma; expected the number of steps",
        ),
        (
            {"trainer.callbacks+": "dlref.tasks.EMA", "trainer.callbacks.update_every_n_steps": 0},
            "update_every_n_steps 0; expected 1 or more",
        ),
        ({"run": "a" * 300}, "File name too long; expected a folder to write to"),
        (
            {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "val_loss"},
            "EarlyStopping: monitor 'val_loss' is not logged in validation; expected one of val/accuracy",
        ),
        (
            {
                "trainer.callbacks+": STOPPING,
                "trainer.callbacks.monitor": "val/loss",
                "trainer.callbacks.check_on_train_epoch_end": "true",
            },
            "EarlyStopping: check_on_train_epoch_end true, a resumed run has no metrics at that time; expected false",
        ),
        (
            {
                "trainer.callbacks+": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
                "trainer.callbacks.scheduling": '{"1": 4}',
                "trainer.accumulate_grad_batches": 1,
            },
            "GradientAccumulationScheduler: a resumed run would train differently; expected none",
        ),
        (
            {
                "trainer.callbacks+": "lightning.pytorch.callbacks.StochasticWeightAveraging",
                "trainer.callbacks.swa_lrs": 0.1,
            },
            "StochasticWeightAveraging: a resumed run would train differently; expected none",
        ),
        ({"trainer.callbacks+": "lightning.pytorch.callbacks.BatchSizeFinder"}, "BatchSizeFinder: a resumed run"),
        (
            {
                "trainer.callbacks+": "lightning.pytorch.callbacks.ModelPruning",
                "trainer.callbacks.pruning_fn": "l1_unstructured",
            },
            "ModelPruning: a resumed run would train differently; expected none",
        ),
        (
            {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "train/loss"},
            "EarlyStopping: monitor train/loss, which a resumed run may not have logged yet; expected a metric of",
        ),
        (
            {
                "trainer.callbacks+": SAVING,
                "trainer.callbacks.filename": "best",
            },
            "filename best: the run itself writes best, last, previous.ckpt; expected another name",
        ),
        (
            {"trainer.callbacks+": SAVING, "trainer.callbacks.save_on_exception": "true"},
            "ModelCheckpoint: save_on_exception, which can save between two optimiser steps; expected none",
        ),
        (
            {"trainer.callbacks+": SAVING, "trainer.callbacks.train_time_interval": "00:00:10:00"},
            "ModelCheckpoint: train_time_interval, which can save between two optimiser steps; expected none",
        ),
        (
            {"trainer.callbacks+": SAVING, "trainer.callbacks.every_n_train_steps": 2},
            "ModelCheckpoint: every_n_train_steps, which can save between two optimiser steps; expected none",
        ),
        ({"best.metric": "train/loss"}, "best.metric 'train/loss' is not logged in validation; expected one of"),
        (
            {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "step"},
            "EarlyStopping: monitor 'step' is not logged in validation; expected one of",
        ),
        (
            {"trainer.callbacks+": SAVING, "trainer.callbacks.monitor": "val/nope"},
            "ModelCheckpoint: monitor 'val/nope' is not logged in validation; expected one of val/accuracy",
        ),
        (
            {"trainer.callbacks": '["dlref.tasks.EMA", "lightning.pytorch.callbacks.EMAWeightAveraging"]'},
            "EMA, EMAWeightAveraging; expected one average of the weights",
        ),
        (
            {"model.init_args.optimizer": "torch.optim.LBFGS"},
            "LBFGS with trainer.accumulate_grad_batches 4; expected 1",
        ),
        (
            {
                "model.init_args.optimizer": "torch.optim.LBFGS",
                "model.init_args.channels_last": "true",
                "trainer.accumulate_grad_batches": 1,
            },
            "LBFGS with model.init_args.channels_last true; expected false",
        ),
        (
            {"model.init_args.optimizer": "torch.optim.SparseAdam"},
            "SparseAdam: it takes sparse gradients only, and these are dense; expected Adam",
        ),
        ({"model.init_args.optimizer.init_args.foreach": "true"}, "optimizer or lr_scheduler: `fused` and `foreach`"),
        ({"trainer.use_distributed_sampler": "true"}, "trainer.use_distributed_sampler: true; expected false"),
        ({"data.init_args.batch_size": "null"}, "batch_size: null; expected a value"),
        ({"model.init_args.label_smoothing": "null"}, "label_smoothing: null; expected a value"),
        ({"trainer.barebones": "true"}, "trainer.barebones: true; expected false"),
        ({"trainer.gradient_clip_val": -1}, "trainer.gradient_clip_val: -1; expected 0 or more"),
        ({"trainer.max_time": "00:00:00:00"}, "no step was trained; expected more time, trainer.max_time"),
        ({"trainer.accumulate_grad_batches": -2}, "trainer.accumulate_grad_batches: -2; expected more"),
        ({"trainer.check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch: 0; expected more"),
        ({"trainer.val_check_interval": 0}, "trainer.val_check_interval: 0; expected more"),
        ({"trainer.limit_test_batches": 0.01, "final_test": "true"}, "trainer.limit_test_batches: 0.01 of "),
        ({"trainer.devices": -1}, "`devices` selected with `CPUAccelerator` should be an int > 0"),
        ({"seed_everything": -1}, "seed_everything: -1; expected 0 to 4294967295"),
        ({"trainer.strategy": "ddp_fork"}, "trainer.strategy: ddp_fork; expected ddp, which starts new processes"),
        ({"trainer.strategy": "ddp_spawn_find_unused_parameters_true"}, "expected ddp, which starts new processes"),
        (
            {
                "trainer.strategy": "lightning.pytorch.strategies.DDPStrategy",
                "trainer.strategy.start_method": "spawn",
            },
            "trainer.strategy: spawn; expected ddp, which starts new processes",
        ),
        (
            {"trainer.strategy": json.dumps(SHARDED), "trainer.callbacks+": "dlref.tasks.EMA", "final_test": "true"},
            f"{SHARDED['class_path']} with dlref.tasks.ImageClassifier, dlref.tasks.EMA, --final_test true, "
            "save_distributed_checkpoint true; expected a task that shards its network",
        ),
    ],
)
def test_unsupported_training_options_are_refused_in_one_line(options, words, tmp_path, capsys):
    assert fit(**{"trainer.accumulate_grad_batches": 4} | options) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in error
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_ones_own_can_monitor_the_step(tmp_path):
    own = {"trainer.callbacks+": SAVING, "trainer.callbacks.monitor": "step", "trainer.callbacks.mode": "max"}
    assert fit(run="mine", **own) == 0
    assert len(list((tmp_path / "mine/checkpoints").glob("epoch=*.ckpt"))) == 1


def test_early_stopping_on_an_unknown_metric_is_one_line_without_a_sanity_check_too(capsys):
    stopping = {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "val/nope"}
    assert fit(**stopping, **{"trainer.num_sanity_val_steps": 0}) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "Early stopping conditioned on metric `val/nope` which is not available" in error


def test_a_run_with_early_stopping_can_be_resumed(tmp_path):
    """Lightning would check again at the end of the epoch, when a resumed run has no metric."""
    stopping = {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "val/loss"}
    assert fit(run="mine", trainer__max_epochs=1, **stopping) == 0
    assert fit(run="mine", trainer__max_epochs=2, ckpt_path="last", **stopping) == 0
    assert state_of(tmp_path / "mine")["global_step"] == 12


def test_a_run_ended_by_early_stopping_can_be_resumed_with_more_patience(tmp_path):
    stopping = {"trainer.callbacks+": STOPPING, "trainer.callbacks.monitor": "val/loss"}
    stopping |= {"trainer.callbacks.min_delta": 1000}
    assert fit(run="mine", trainer__max_epochs=9, **stopping, **{"trainer.callbacks.patience": 1}) == 0
    assert state_of(tmp_path / "mine")["global_step"] == 12
    assert (
        fit(run="mine", trainer__max_epochs=9, ckpt_path="last", **stopping, **{"trainer.callbacks.patience": 4}) == 0
    )
    assert state_of(tmp_path / "mine")["global_step"] == 30


def test_resuming_from_best_ckpt_keeps_best_ckpt_without_a_new_validation(tmp_path, capsys):
    assert fit(run="mine", trainer__max_epochs=1) == 0
    best = (tmp_path / "mine/checkpoints/best.ckpt").read_bytes()
    further = {"trainer__max_epochs": 2, "trainer__check_val_every_n_epoch": 3}
    assert fit(run="mine", ckpt_path="best", **further) == 0
    assert "before its first validation" not in capsys.readouterr().err
    assert (tmp_path / "mine/checkpoints/best.ckpt").read_bytes() == best


def test_a_resumed_run_replaces_best_ckpt_only_by_a_better_one(tmp_path):
    """Also if its folder has moved."""
    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=lambda found, **_: found))
    earlier, resumed = (BestCheckpoint(tmp_path / name, "val/accuracy", "max") for name in ("earlier", "moved"))
    earlier.best_model_score = torch.tensor(0.9)
    resumed.load_state_dict(earlier.state_dict())
    found = [bool(resumed.check_monitor_top_k(trainer, torch.tensor(score))) for score in (0.5, 0.95)]
    assert found == [False, True]


def test_replacing_a_run_keeps_config_yaml_readable_for_the_fits_other_processes(tmp_path):
    (tmp_path / "config.yaml").write_text("best: null")
    claim = Claim(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "config.yaml").read_text() == "best: null"
    (tmp_path / "config.yaml").write_text("another")
    claim.roll_back()
    assert (tmp_path / "config.yaml").read_text() == "best: null"


def test_a_linked_config_is_restored_as_a_link_and_its_target_unchanged(tmp_path):
    (tmp_path / "shared.yaml").write_text("best: null")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").symlink_to(tmp_path / "shared.yaml")
    claim = Claim(tmp_path / "run", resume=False, overwrite=True)
    (tmp_path / "run/config.yaml").write_text("another")
    claim.roll_back()
    assert (tmp_path / "run/config.yaml").is_symlink()
    assert (tmp_path / "shared.yaml").read_text() == "best: null"


def test_of_the_files_set_aside_by_a_killed_fit_checkpoints_are_restored_last(tmp_path, monkeypatch):
    """If this fit is killed meanwhile, the next one restores the rest, unless there are checkpoints."""
    run, rename, moved = tmp_path / "mine", Path.rename, []
    (run / ".earlier.1" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv", "test.json"):
        (run / ".earlier.1" / name).touch()
    (run / ".lock").touch()
    monkeypatch.setattr(Path, "rename", lambda self, place: moved.append(self.name) or rename(self, place))
    Claim(run, resume=True, overwrite=False).roll_back()
    assert sorted(moved) == ["checkpoints", "config.yaml", "metrics.csv", "test.json"]
    assert moved[-1] == "checkpoints"


def test_a_full_disk_while_copying_the_config_leaves_the_run_unchanged(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("best: null")
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("shutil.copy", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        Claim(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "config.yaml").read_text() == "best: null"
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"config.yaml", "checkpoints"}


def test_a_run_stopped_before_its_first_validation_copies_last_ckpt_to_best_ckpt(during, tmp_path, capsys):
    during("on_train_batch_end", lambda self, trainer, *_: setattr(trainer, "should_stop", trainer.global_step == 4))
    assert fit(run="mine", trainer__check_val_every_n_epoch=5) == 0
    assert state_of(tmp_path / "mine")["global_step"] == 4
    assert "training ended before its first validation: best.ckpt is a copy of last.ckpt" in capsys.readouterr().err


def test_a_run_with_its_own_model_checkpoint_callback_can_be_trained_and_tested(tmp_path):
    """Even if the callback monitors the same metric as best.ckpt."""
    callback = {"trainer.callbacks+": "lightning.pytorch.callbacks.ModelCheckpoint", "trainer.callbacks.mode": "max"}
    assert fit(run="mine", **callback, **{"trainer.callbacks.monitor": "val/accuracy"}) == 0
    assert len(list((tmp_path / "mine").rglob("*.ckpt"))) > 3
    assert train(["test", "--config", "mine/config.yaml"]) == 0


def test_resuming_from_another_runs_checkpoint_does_not_replace_a_run(tmp_path, capsys):
    for name in ("theirs", "mine"):
        assert fit(run=name) == 0
    before = state_of(tmp_path / "mine")
    capsys.readouterr()
    assert fit(run="mine", ckpt_path="theirs/checkpoints/last.ckpt", trainer__max_epochs=3) == 2
    assert "mine already holds a run" in capsys.readouterr().err
    assert equal(state_of(tmp_path / "mine"), before)
    assert fit(run="new", ckpt_path="theirs/checkpoints/last.ckpt", trainer__max_epochs=3) == 0
    assert state_of(tmp_path / "new")["global_step"] == 18


def test_a_users_config_yaml_is_not_replaced_unless_a_killed_fit_left_a_lock(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    written = f"# Mine.\n{Path(DIGITS).read_text()}"
    (tmp_path / "mine/config.yaml").write_text(written)
    for _ in range(2):  # the first attempt leaves no trace of a fit
        assert train(["fit", "--config", "mine/config.yaml"]) == 2
        assert "mine already holds a run (config.yaml); expected --run with another folder" in capsys.readouterr().err
        assert (tmp_path / "mine/config.yaml").read_text() == written
    (tmp_path / "mine/.lock").touch()  # as left by a fit that was killed before training
    assert fit(run="mine", best__metric="none") == 2
    assert fit(run="mine") == 0


def test_a_run_whose_checkpoints_folder_is_a_symlink_can_be_resumed(tmp_path):
    assert fit(run="mine") == 0
    (tmp_path / "mine/checkpoints").rename(tmp_path / "disk")
    (tmp_path / "mine/checkpoints").symlink_to(tmp_path / "disk")
    assert fit(run="mine", ckpt_path="last", trainer__max_epochs=3) == 0
    assert state_of(tmp_path / "mine")["global_step"] == 18
    (tmp_path / "disk/epoch=1.ckpt").touch()  # written by a config's own ModelCheckpoint
    SealedCheckpointIO(tmp_path / "mine", None).remove_checkpoint(tmp_path / "mine/checkpoints/epoch=1.ckpt")
    assert not (tmp_path / "disk/epoch=1.ckpt").exists()


def test_resuming_within_an_epoch_of_another_length_is_refused(during, capsys):
    during("on_train_batch_start", lambda self, trainer, *_: trainer.global_step == 2 and tell())
    assert fit(run="mine") == os.EX_TEMPFAIL
    assert fit(run="mine", ckpt_path="last", trainer__limit_train_batches=5) == 2
    assert "the checkpoint is at batch 3 of 6, but an epoch now has 5" in capsys.readouterr().err


def test_resuming_with_another_batch_size_is_refused_also_if_epochs_have_as_many_batches(tmp_path, capsys):
    write_text_file(tmp_path)
    words = [str(word) for word in arguments("language modelling", tmp_path / "mine", 1)]
    assert train(words) == 0
    words += ["--ckpt_path", "last", "--trainer.max_epochs", "3"]
    assert train([*words, "--data.init_args.batch_size", "8"]) == 2
    expected = "batch_size times devices: 8, the checkpoint has 4; expected the same batch size and devices"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("averaged", [False, True])
def test_resuming_with_another_network_is_refused(averaged, tmp_path, capsys):
    own = {"run": "mine"} | ({"trainer__callbacks+": "dlref.tasks.EMA"} if averaged else {})
    assert fit(**own) == 0
    before = (tmp_path / "mine/config.yaml").read_bytes()
    network = "model__init_args__network"
    other = {network: "dlref.models.CifarResNet", f"{network}__init_args__depth": 20}
    other[f"{network}__init_args__in_channels"] = 1
    assert fit(**own, **other, ckpt_path="last", trainer__max_epochs=3) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "Missing key(s)" in told
    assert told.endswith("expected the network of the checkpoint's run")
    assert (tmp_path / "mine/config.yaml").read_bytes() == before


def test_resuming_with_another_schedule_or_gradient_accumulation_is_refused(capsys):
    assert fit(run="mine") == 0
    capsys.readouterr()
    more = {"run": "mine", "ckpt_path": "last", "trainer__max_epochs": 3}
    assert fit(**more, trainer__accumulate_grad_batches=2) == 2
    assert "trainer.accumulate_grad_batches: 2, the checkpoint has 1; expected the same" in capsys.readouterr().err
    for other, told in (("null", "None"), ("torch.optim.lr_scheduler.CosineAnnealingLR", "CosineAnnealingLR")):
        assert fit(**more, model__init_args__lr_scheduler=other) == 2
        assert f"optimizer: lr_scheduler {told}, the checkpoint has WarmupCosine" in capsys.readouterr().err
    assert fit(**more) == 0


@pytest.mark.parametrize("torn", ["1", "1,", "1,8", "1,x,,,", "1,6,,0.3\r\n1,7,,0.2\r\n"])
def test_a_resumed_run_keeps_only_the_complete_rows_of_earlier_steps(torn, tmp_path):
    """A killed process may have torn the last row, or logged later steps, which the resumed run repeats."""
    whole = "epoch,step,train/loss,val/loss\r\n0,0,0.9,\r\n0,5,,0.5\r\n"
    (tmp_path / "metrics.csv").write_text(whole + torn, newline="")
    metrics_file(tmp_path, before=6)
    with open(tmp_path / "metrics.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert kept == list(csv.DictReader(whole.splitlines()))


def test_incomplete_or_foreign_checkpoints_are_refused(tmp_path, capsys):
    assert fit(run="mine") == 0
    kept = torch.load(tmp_path / "mine/checkpoints/last.ckpt", weights_only=True)
    for others in (
        {"loops": {}},
        {"loops": {"fit_loop": {"state_dict": {"combined_loader": [{"taken": "x"}]}}}},
        {"callbacks": {}},
        {"callbacks": {"Last": {"batches": 6}}},
        {"optimizer": None},
    ):
        torch.save({**kept, **others}, tmp_path / "mine/other.ckpt")
        assert fit(run="mine", ckpt_path="mine/other.ckpt", trainer__max_epochs=3) == 2
        assert capsys.readouterr().err.endswith("for a new run that starts from the weights\n")


def test_a_nan_found_at_validation_saves_the_batch_that_caused_it(during, tmp_path):
    seen = []

    def spoil(self, trainer, task, batch, batch_idx):
        if batch_idx == 1:
            seen.append(batch)
            with torch.no_grad():
                task.network.f6.weight.fill_(torch.nan)

    during("on_train_batch_start", spoil)
    assert fit(run="mine", trainer__val_check_interval=3, trainer__log_every_n_steps=50) == 2
    assert all(map(torch.equal, read(tmp_path / "mine" / "not_finite.pt")["inputs"], seen[0]))
