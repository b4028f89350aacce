"""Profile where the time of a step goes: a short run, timed part by part, with a trace of its last steps."""

import gc
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from dlref.runtime import UserError
from dlref.runtime.machine import processor
from dlref.training.profile_report import PARTS, Findings
from dlref.training.run_folder import write_text

WARM_UP, COUNTED, TRACED = 10, 40, 5  # steps; the first compile, tune and fill caches
PRESET = {
    "max_steps": WARM_UP + COUNTED + TRACED + 1,  # one more: the final checkpoint is not in the trace
    "max_epochs": WARM_UP + COUNTED + TRACED + 1,  # enough for epochs of one step
    "max_time": None,
    "limit_val_batches": 2,  # checkpoints follow validation as in any run
}

ON_CPU, ON_CUDA = {ProfilerActivity.CPU}, {ProfilerActivity.CPU, ProfilerActivity.CUDA}  # what a trace shows
FETCH = "[_TrainingEpochLoop].train_dataloader_next"
# Endings of Lightning's action names, and the part that each belongs to. Other actions belong to their caller's part.
ENDINGS = {
    "train_dataloader_next": "data",
    "batch_to_device": "data",
    ".on_after_batch_transfer": "data",
    ".training_step": "forward",
    ".backward": "backward",
    ".optimizer_step": "optimiser",
    ".configure_gradient_clipping": "optimiser",
    ".optimizer_zero_grad": "optimiser",
    ".lr_scheduler_step": "optimiser",
    "save_checkpoint": "checkpoint",
    "run_training_epoch": "loop",
    "run_training_batch": "loop",
}


@cache
def part_of(action: str, bars: tuple[str, ...] = ()) -> str | None:
    """Return the part that an action of Lightning's belongs to, or None for the part of its caller.

    Args:
        action: Lightning's name for it, such as `[Strategy]SingleDeviceStrategy.backward`.
        bars: the prefixes of the actions of progress bars.
    """
    if action.startswith(("[Logging]", *bars)):
        return "logging"
    for ending, part in ENDINGS.items():
        if action.endswith(ending):
            return part
    return "callbacks" if action.startswith("[Callback]") else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length that (start, end) spans cover together; kernels of several streams overlap."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Unprofiled(PassThroughProfiler):
    """A profiler that does nothing. Lightning's own runs a generator around each of some sixty calls in a step."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:
        """Return a context manager that does nothing."""
        return self.nothing


class StepProfile(Profiler):
    """Time the parts of each step. A part's time excludes the parts nested in it, so they add up to the step's time.

    A step ends when the next one asks for its data. Validation and the work between epochs belong to no step.

    On a GPU, calls only launch work. In the first half of the counted steps nothing waits for this work, so the steps
    take as long as in a normal run. In the second half each part waits at its end for the work that it launched.

    Args:
        run: folder of the report and the trace.
        minutes: time between two checkpoints within an epoch.

    Attributes:
        trainer: must be set before training starts.
    """

    trainer: Trainer

    def __init__(self, run: Path, minutes: float):
        super().__init__()
        self.run, self.minutes = run, minutes
        self.steps: list[dict[str, float]] = []  # seconds by part
        self.saves: list[float] = []
        self.step = defaultdict(float)  # the current one
        self.inside, self.stepped = False, False  # inside a step; its optimiser has stepped
        self.stack: list[tuple[str, Any]] = []  # the open parts, with their labels in the trace
        self.last = self.save_began = 0.0
        self.tracer, self.traced, self.tracing = None, 0, False
        self.cuda, self.synchronize, self.free, self.bars, self.replaced = False, None, 0, (), []

    # Called by Lightning

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Prepare once devices and loggers are known. Logging is wrapped: Lightning has no action for it."""
        super().setup(stage, local_rank, log_dir)
        device = self.device()
        self.cuda, self.free = device == "cuda", 0 if device == "cpu" else COUNTED // 2
        self.synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device)
        bars = [callback for callback in self.trainer.callbacks if isinstance(callback, ProgressBar)]
        self.bars = tuple(f"[Callback]{bar.state_key}." for bar in bars)
        for logger in self.trainer.loggers:
            self._time_logging(logger, "log_metrics")
            self._time_logging(logger, "save")
        self._time_logging(self.trainer.lightning_module, "log")

    def start(self, action_name: str) -> None:
        """Begin an action, and possibly another part with it."""
        if action_name == FETCH:
            self._next_batch()
        elif ".on_validation" in action_name:
            self._pause()
        if action_name == "save_checkpoint":
            self._wait()  # work launched before is not the checkpoint's
        part = part_of(action_name, self.bars) or self._current()
        self._border(part != self._current())
        label = None
        if self.tracing and part != self._current():
            label = record_function(part)
            label.__enter__()
        self.stack.append((part, label))
        if action_name == "save_checkpoint":
            self.save_began = self.last

    def stop(self, action_name: str) -> None:
        """End the action that began last."""
        part, label = self.stack[-1]
        if action_name == "run_training_epoch":
            self._pause()
        before = self.stack[-2][0] if len(self.stack) > 1 else "loop"
        self._border(part != before)
        self.stack.pop()
        if label is not None:
            label.__exit__(None, None, None)
        if action_name == "save_checkpoint":
            self.saves.append(self.last - self.save_began)
        self.stepped |= action_name.startswith("[LightningModule]") and action_name.endswith(".optimizer_step")

    def describe(self) -> None:
        """Write and print the report. Raises UserError if the run was too short for one."""
        for owner, name in self.replaced:
            delattr(owner, name)
        self.replaced.clear()
        if not self.trainer.is_global_zero:
            return
        if len(self.steps) <= WARM_UP + self.free:
            raise UserError(
                f"the run ended after {len(self.steps)} steps; expected more than {WARM_UP + self.free}, because the "
                "first are not timed"
            )
        findings = self.findings()
        if self.tracer is not None:
            self.tracer.export_chrome_trace(str(self.run / "trace.json.gz"))
        where = self._where()
        write_text(self.run / "profile.md", findings.markdown(where))
        findings.print([*where, f"All of this is in {self.run / 'profile.md'}."])

    # Steps

    def device(self) -> str:
        """Return the type of the device: calls only launch a GPU's work, which must be waited for."""
        return self.trainer.strategy.root_device.type

    def _current(self) -> str:
        return self.stack[-1][0] if self.stack else "loop"

    def _wait(self) -> None:
        if self.synchronize is not None:
            self.synchronize()

    def _border(self, of_a_part: bool) -> None:
        """Add the time since the last border to the current part."""
        if of_a_part and WARM_UP + self.free <= len(self.steps) < WARM_UP + COUNTED:
            self._wait()
        now = time.perf_counter()
        if self.inside:
            self.step[self._current()] += now - self.last
        self.last = now

    def _next_batch(self) -> None:
        """Begin a step, unless this is another batch of the current one, which accumulates gradients."""
        if self.inside and self.stepped and len(self.steps) + 1 in (WARM_UP, WARM_UP + self.free):
            self._wait()  # work launched before belongs to earlier steps
        self._border(False)
        self._finish()
        if len(self.steps) == WARM_UP - 1:
            gc.collect()  # now: it takes a quarter of a second, which would count towards an arbitrary part
        if self.tracer is None and len(self.steps) == WARM_UP + COUNTED:
            self._start_trace()
        elif self.tracing and self.traced == TRACED:
            self._stop_trace()
        self.inside, self.last = True, time.perf_counter()

    def _pause(self) -> None:
        """End the step; the work that follows belongs to no step."""
        if not self.inside:
            return
        self._wait()
        self._border(False)
        self._finish()
        self.inside = False
        if self.tracing:
            self._stop_trace()

    def _finish(self) -> None:
        if self.stepped:
            self.steps.append(dict(self.step))
            self.traced += self.tracing
            self.step.clear()
        self.stepped = False

    def _time_logging(self, owner: Any, name: str) -> None:
        """Count calls of one object's method as logging until the report is written."""
        method = getattr(owner, name)

        @wraps(method)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.profile(f"[Logging]{name}"):
                return method(*arguments, **options)

        setattr(owner, name, timed)
        self.replaced.append((owner, name))

    # The trace

    def _start_trace(self) -> None:
        self._wait()
        if not self.cuda:
            os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # silences the complaint that there is no GPU
        self.tracer = torch.profiler.profile(activities=ON_CUDA if self.cuda else ON_CPU, acc_events=True)
        self.tracer.start()
        self.tracing = True

    def _stop_trace(self) -> None:
        self._wait()
        self.tracing = False
        self.tracer.stop()

    def _busy(self, step: float) -> float | None:
        """Return the share of an untraced step for which the GPU computes: tracing slows steps, but not kernels."""
        if not (self.cuda and self.traced):
            return None
        kernels = [e for e in self.tracer.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        microseconds = covered((e.time_range.start, e.time_range.end) for e in kernels)
        return min(1.0, microseconds / 1e6 / self.traced / step)

    # The report

    def findings(self) -> Findings:
        """Return the findings of the profile."""
        half = WARM_UP + self.free
        counted = self.steps[half : WARM_UP + COUNTED]
        parts = {name: statistics.fmean(step.get(name, 0.0) for step in counted) for name in PARTS}
        steps, free = ([total(step) for step in these] for these in (counted, self.steps[WARM_UP:half]))
        free = free or steps
        batches = self.trainer.num_training_batches
        epoch = math.ceil(batches / self.trainer.accumulate_grad_batches)
        validations = batches / self.trainer.val_check_batch / (self.trainer.check_val_every_n_epoch or 1)
        mean = statistics.fmean(free)
        return Findings(
            parts=parts,
            steps=steps,
            free=free,
            checkpoint=statistics.median(self.saves) if self.saves else 0.0,
            checkpoints=2 * validations + epoch * mean / max(60 * self.minutes, mean),
            epoch=epoch,
            busy=self._busy(mean),
        )

    def _where(self) -> list[str]:
        """Describe the machine, the versions and the trace file."""
        cards = f"{torch.cuda.get_device_name()}; " if self.cuda else ""
        versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {version('lightning')}"
        precision, threads = self.trainer.precision, torch.get_num_threads()
        lines = [f"{cards}{processor()}, {threads} threads; {precision}; {versions}."]
        if self.tracer is not None:
            lines.append(f"{self.run / 'trace.json.gz'} has {self.traced} steps; open it in https://ui.perfetto.dev.")
        return lines


def total(step: dict[str, float]) -> float:
    """Return the seconds of a step, without a checkpoint written in it."""
    return sum(seconds for part, seconds in step.items() if part != "checkpoint")
