"""The profile of training steps: parts that add up, the bottleneck of a run, a readable trace."""

import gzip
import json
import statistics
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from lightning.pytorch.profilers import Profiler
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import dlref.cli
import dlref.training.profile
from dlref.cli import train
from dlref.data.loader import SeededBatches
from dlref.training.finite import StopOnNonFiniteLoss
from dlref.training.profile import COUNTED, FETCH, WARM_UP, StepProfile, covered, part_of, total
from dlref.training.profile_report import ADVICE, PARTS, Findings, bound

pytestmark = pytest.mark.usefixtures("elsewhere")
DIGITS = str(ROOT / "configs" / "lenet5_digits.yaml")
EMA = ("--trainer.callbacks+", "lightning.pytorch.callbacks.EMAWeightAveraging")


@pytest.fixture
def profiles(monkeypatch):
    """The profilers of the following fits, which also record when each batch is requested."""
    made = []

    class Noted(StepProfile):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.asked = []
            made.append(self)

        def start(self, action_name):
            if action_name == FETCH:
                self.asked.append(time.perf_counter())
            super().start(action_name)

    monkeypatch.setattr(dlref.cli, "StepProfile", Noted)
    return made


def fit(*arguments):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    return train(["fit", "--config", DIGITS, *quiet, *arguments])


def profile(*arguments):
    return fit("--profile", *arguments)


# A run


def test_the_parts_of_a_step_add_up_to_its_time(profiles, tmp_path, capsys):
    assert profile("--data.init_args.batch_size", "16", *EMA) == 0  # an epoch of 67 batches: no validation in between
    (made,) = profiles
    run, findings = tmp_path / "runs" / "lenet5_digits-profile", made.findings()
    assert (made.asked[WARM_UP + COUNTED] - made.asked[WARM_UP]) == pytest.approx(sum(findings.steps), rel=0.02)
    assert len(findings.steps) == COUNTED
    assert sum(findings.parts.values()) * COUNTED == pytest.approx(sum(findings.steps))
    assert min(findings.parts.values()) > 0
    assert findings.epoch == 67
    assert findings.checkpoints == pytest.approx(
        2 + 67 * statistics.fmean(findings.free) / 600
    )  # best.ckpt and last.ckpt
    assert findings.busy is None
    assert "log" not in vars(made.trainer.lightning_module)  # Lightning's own method is restored

    report, printed = (run / "profile.md").read_text(), capsys.readouterr().out
    for name in (*PARTS, "step", "checkpoint"):
        assert f"| {name} | " in report
        assert f"│ {name} " in printed
    assert ADVICE[findings.bound] in report
    assert ADVICE[findings.bound] in printed
    assert "runs/lenet5_digits-profile/profile.md" in printed

    trace = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))["traceEvents"]
    labels = [event["name"] for event in trace if event.get("cat") == "user_annotation"]
    assert {"data", "forward", "backward", "optimiser", "callbacks", "logging"} <= set(labels)
    assert labels.count("forward") == labels.count("backward") == dlref.training.profile.TRACED

    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "metrics.csv").is_file()
    assert not (run / "test.json").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["profile"]
    assert profile() == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(("every", "validations"), [(1, 1.0), (4, 0.25), (None, 2.0)])
def test_checkpoints_per_epoch_count_validations_and_elapsed_minutes(every, validations):
    steps = [{"forward": 1.0}] * (WARM_UP + COUNTED)
    trainer = SimpleNamespace(num_training_batches=60, accumulate_grad_batches=2, check_val_every_n_epoch=every)
    trainer.val_check_batch = 60 if every else 30  # without a number of epochs, batches are counted across epochs
    made = SimpleNamespace(steps=steps, free=0, saves=[], minutes=1, trainer=trainer, _busy=lambda mean: None)
    assert StepProfile.findings(made).checkpoints == pytest.approx(2 * validations + 30 / 60)


def test_on_a_gpu_step_times_come_from_the_first_half_and_parts_from_the_second():
    times = [9.0] * WARM_UP + [1.0] * (COUNTED // 2) + [3.0] * (COUNTED // 2) + [9.0]
    trainer = SimpleNamespace(num_training_batches=60, accumulate_grad_batches=1, check_val_every_n_epoch=1)
    trainer.val_check_batch = 60
    made = SimpleNamespace(free=COUNTED // 2, saves=[1.0, 2.0, 9.0], minutes=1, trainer=trainer)
    made._busy = lambda mean: mean
    made.steps = [{"data": time / 4, "forward": time * 3 / 4, "checkpoint": 7.0} for time in times]
    found = StepProfile.findings(made)
    assert (found.free, found.steps) == ([1.0] * (COUNTED // 2), [3.0] * (COUNTED // 2))
    assert {name: seconds for name, seconds in found.parts.items() if seconds} == {"data": 0.75, "forward": 2.25}
    assert (found.checkpoint, found.checkpoints, found.epoch, found.busy) == (2.0, 2 + 60 * 1 / 60, 60, 1.0)


def test_the_share_of_a_step_for_which_a_gpu_computes_counts_its_kernels_only():
    def event(start, end, device=DeviceType.CUDA, annotation=False):
        time_range = SimpleNamespace(start=start, end=end)  # in microseconds
        return SimpleNamespace(time_range=time_range, device_type=device, is_user_annotation=annotation)

    events = [event(0, 20_000), event(10_000, 30_000), event(40_000, 50_000)]
    events += [event(0, 90_000, DeviceType.CPU), event(0, 90_000, annotation=True)]
    made = SimpleNamespace(cuda=True, traced=5, tracer=SimpleNamespace(events=lambda: events))
    assert StepProfile._busy(made, 0.01) == pytest.approx(0.04 / 5 / 0.01)
    assert StepProfile._busy(made, 0.001) == 1
    assert StepProfile._busy(SimpleNamespace(cuda=False, traced=5), 0.01) is None


def test_a_slow_loader_is_reported_as_the_bottleneck(profiles, monkeypatch, tmp_path):
    make = SeededBatches.__getitem__
    monkeypatch.setattr(SeededBatches, "__getitem__", lambda self, step: time.sleep(0.03) or make(self, step))
    assert profile("--run", "mine") == 0
    findings = profiles[0].findings()
    assert findings.bound == "data"
    assert findings.parts["data"] > 0.03
    assert ADVICE["data"] in (tmp_path / "mine" / "profile.md").read_text()


def test_a_slow_callback_is_the_bottleneck_and_validation_does_not_count_in_a_step(profiles, monkeypatch):
    end = StopOnNonFiniteLoss.on_train_batch_end
    monkeypatch.setattr(dlref.training.profile, "COUNTED", 20)
    monkeypatch.setitem(dlref.training.profile.PRESET, "max_steps", WARM_UP + 21)
    monkeypatch.setattr(
        StopOnNonFiniteLoss, "on_train_batch_end", lambda *arguments: time.sleep(0.03) or end(*arguments)
    )
    monkeypatch.setattr(StopOnNonFiniteLoss, "on_validation_batch_end", lambda *arguments: time.sleep(0.25))
    assert profile("--run", "mine", "--trainer.accumulate_grad_batches", "2", "--data.init_args.batch_size", "64") == 0
    findings = profiles[0].findings()
    assert findings.bound == "callbacks"
    assert findings.parts["callbacks"] > 0.06  # of two batches
    assert max(findings.steps) < 0.45  # validation takes 0.5
    assert findings.epoch == 8


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_no_step_in_the_first_half_waits_for_the_gpu(device, profiles, monkeypatch):
    waits = Counter()
    monkeypatch.setattr(getattr(torch, device), "synchronize", lambda: waits.update([len(profiles[0].steps)]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended")
    monkeypatch.setattr(dlref.training.profile, "ON_CUDA", {ProfilerActivity.CPU})
    monkeypatch.setattr(StepProfile, "device", lambda self: device)
    assert profile("--run", "mine", "--data.init_args.batch_size", "16") == 0
    half = WARM_UP + COUNTED // 2
    free, parts = ([waits[step] for step in steps] for steps in (range(WARM_UP, half - 1), range(half, half + 20)))
    assert not any(free)
    assert waits[WARM_UP - 1] == waits[half - 1] == 1  # for kernels launched before
    assert min(parts) > 8
    findings = profiles[0].findings()
    assert len(findings.free) == len(findings.steps) == COUNTED // 2
    assert "waits for the GPU" in findings.lines()[0]
    assert ("The GPU is busy" in findings.lines()[0]) == (device == "cuda")  # the trace shows only CUDA's kernels


@pytest.mark.gpu
def test_on_a_gpu_steps_are_also_timed_without_waiting(profiles):
    assert profile("--run", "mine", "--trainer.accelerator", "gpu", "--data.init_args.batch_size", "16") == 0
    findings = profiles[0].findings()
    assert len(findings.free) == len(findings.steps) == COUNTED // 2
    assert 0 < findings.busy <= 1


def test_a_run_that_is_too_short_for_a_profile_ends_in_an_error(monkeypatch, capsys):
    monkeypatch.setattr(dlref.training.profile, "WARM_UP", 100)
    assert profile("--run", "mine") == 2
    assert "error: the run ended after 56 steps; expected more than 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "value"),
    [
        ("--debug", "true"),
        ("--ckpt_path", "last"),
        ("--trainer.fast_dev_run", "true"),
        ("--trainer.profiler", "simple"),
    ],
)
def test_profile_cannot_be_combined_with_conflicting_options(other, value, tmp_path, capsys):
    assert profile(other, value) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error == f"error: --profile with {other.replace('--trainer', 'trainer')}; expected one without the other"
    assert list(tmp_path.iterdir()) == []


# Runs without a profile


def test_without_a_profiler_no_call_is_wrapped(monkeypatch):
    def wrap(*_):
        raise AssertionError("a call was wrapped")

    monkeypatch.setattr(Profiler, "profile", wrap)
    assert fit("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--final_test", "false") == 0


def test_one_of_lightnings_profilers_can_be_used(caplog):
    short = ["--trainer.limit_train_batches", "3", "--final_test", "false"]
    assert fit("--trainer.max_epochs", "1", "--trainer.profiler", "simple", *short) == 0
    assert "FIT Profiler Report" in caplog.text


# With a fake clock


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(dlref.training.profile, "time", made)
    return made


def test_nested_actions_do_not_count_towards_the_enclosing_part(clock, tmp_path):
    profiler = StepProfile(tmp_path, 10)
    inside = {
        "[LightningModule]Task.optimizer_step": 4,  # the following actions are nested in it
        "[Strategy]Single.training_step": 8,
        "[Logging]log": 16,
    }

    def during(actions):
        (action, seconds), *others = actions
        with profiler.profile(action):
            clock.now += seconds
            if others:
                during(others)
            clock.now += seconds

    with profiler.profile("run_training_epoch"):
        clock.now += 1000  # before the first step
        for _ in range(2):
            during([(FETCH, 1)])
            with profiler.profile("[Strategy]Single.batch_to_device"):
                clock.now += 1
            during(inside.items())
            during([("[Callback]EMA.on_train_batch_end", 32), ("save_checkpoint", 1000)])
            clock.now += 64
        during([("[LightningModule]Task.on_validation_model_eval", 1000), ("[Callback]EMA.on_validation_start", 1000)])
        clock.now += 1000
    step = {"data": 3, "optimiser": 8, "forward": 16, "logging": 32, "callbacks": 64, "loop": 64}
    assert profiler.steps == [step | {"checkpoint": 2000}] * 2
    assert total(profiler.steps[0]) == sum(step.values())
    assert profiler.saves == [2000, 2000]


@pytest.mark.parametrize(
    ("action", "part"),
    [
        ("[Strategy]SingleDeviceStrategy.backward", "backward"),
        ("[Callback]Monitor.on_before_optimizer_step", "callbacks"),
        ("[Callback]Progress.on_train_batch_end", "logging"),
        ("[Callback]EMAWeightAveraging.on_save_checkpoint", "checkpoint"),
        ("[LightningModule]ImageClassifier.on_before_zero_grad", None),
    ],
)
def test_part_of_assigns_each_profiler_action_to_its_part(action, part):
    assert part_of(action, ("[Callback]Progress.",)) == part


@pytest.mark.parametrize(
    ("shares", "busy", "what"),
    [
        ({}, None, "arithmetic"),
        ({}, 0.9, "arithmetic"),
        ({}, 0.5, "launches"),
        ({"data": 0.15}, None, "arithmetic"),
        ({"data": 0.25}, 0.5, "data"),
        ({"callbacks": 0.2, "logging": 0.15, "loop": 0.05}, 0.5, "callbacks"),
        ({"callbacks": 0.05, "logging": 0.25, "loop": 0.05}, None, "logging"),
        ({"callbacks": 0.05, "logging": 0.05, "loop": 0.25}, None, "loop"),
        ({"checkpoint": 0.15}, None, "checkpoint"),
        ({"checkpoint": 0.15, "data": 0.25}, None, "data"),
        ({"checkpoint": 0.35, "data": 0.25}, None, "checkpoint"),
    ],
)
def test_bound_names_the_bottleneck_of_a_run(shares, busy, what):
    assert bound(dict.fromkeys((*PARTS, "checkpoint"), 0.0) | shares, busy) == what


def test_the_report_gives_times_in_milliseconds_and_shares_of_a_step(capsys):
    parts = dict.fromkeys(PARTS, 0.0) | {"data": 0.001, "forward": 0.004, "backward": 0.005}
    findings = Findings(parts, [0.01, 0.012], [0.003, 0.004, 0.008], 2.0, checkpoints=2.5, epoch=1000, busy=0.6)
    text = findings.markdown(["Where."])
    for line in (
        "| data | 1.000 | 10.0% |\n| forward | 4.000 | 40.0% |",
        "| step | 10.000 | 100.0% |\n| checkpoint | 5.000 | 100.0% |",
        "A step takes 5 ms on average, 4 ms in the median, over 3 steps. In the table a step takes 11 ms: ",
        " The GPU is busy for 60% of a step. A checkpoint takes 2 s. At most 2.5 are written in an epoch of 1000 ",
        f"\n\n{ADVICE['checkpoint']}\n\nWhere.\n",
    ):
        assert line in text
    findings.print(["Where."])
    printed = capsys.readouterr().out
    assert ["│", "backward", "│", "5.000", "│", "50.0%", "│"] in map(str.split, printed.splitlines())
    assert ADVICE["checkpoint"] in printed
    plain = Findings(parts, [0.01], [0.01], 0.0, checkpoints=0.0, epoch=1, busy=None).lines()
    assert plain[0].startswith("A step takes 10 ms on average, 10 ms in the median, over 1 steps. A checkpoint takes")
    assert plain[1] == ADVICE["arithmetic"]


def test_overlapping_kernels_are_counted_once():
    assert covered([(0, 4), (5, 6), (1, 2), (3, 5.5), (8, 9)]) == 7
    assert covered([]) == 0
