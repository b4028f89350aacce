"""The gain of each technique of a training step on this machine.

Most rows compare two bare loops on embedded configs that alternate every few steps. An update of averaged weights and
steps of AdamW and Muon are measured alone. For the progress bar, logging interval, hook bookkeeping and profiler, the
rows give the time that the Trainer adds to a step of a bare loop; these two alternate every few steps as well. All
steps of an epoch except its first are timed. Data on the device, static shapes and steps that wait for nothing are part
of every config, and have no row. The gains from CUDA graphs and a compiled output layer are among the figures of a GPU.
"""

import os
import statistics
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.profilers import PassThroughProfiler
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from benchmarks.configs import roots
from benchmarks.overhead import PIECES, Clock, bare_steps, beside_a_bare_loop, made, options, piece, under_trainer
from benchmarks.rows import DEVICE, TURNS, Row, Rows, figures_in_turns, in_turns, run, watched
from dlref.models import LeNet5, ResNet
from dlref.tasks.averaging import Average
from dlref.tasks.optimizers import Muon
from dlref.tasks.task import Task
from dlref.training.devices import fast_steps

Loop = tuple[tuple[str, ...], dict]  # arguments of train.py, and changed options of its Trainer
FUSED = "--model.init_args.optimizer.init_args.fused"
PICTURES = ("lenet5_digits", "ssd_digit_scenes", "fcn_digit_scenes")
COMPILED, CHANNELS_LAST = "--model.init_args.compile_network", "--model.init_args.channels_last"


def pair(title: str, config: str, beside: str, own: Loop, peer: Loop) -> Rows:
    """Compare the steps per second of two bare loops that alternate every few steps."""
    steps, clocks = piece(config) * PIECES * (TURNS + 1), (Clock(), Clock())
    loops = [
        bare_steps(*made(config, (*roots(config), *arguments)), steps, options(config) | changed, clock)
        for (arguments, changed), clock in zip((own, peer), clocks, strict=True)
    ]
    for _ in watched(range(PIECES * (TURNS + 1)), f"{title}, {config}"):
        for loop in loops:
            for _ in range(piece(config)):
                next(loop)
    rates = (clock.rates(TURNS + 1)[1:] for clock in clocks)  # the first turn, which may compile, does not count
    return {f"{title}, `{config}`": Row(*rates, "steps/s", beside)}


def switch(title: str, argument: str, *configs: str) -> Rows:
    """Compare true with false for an argument of each config."""
    rows = {}
    for config in configs:
        rows |= pair(title, config, "without", ((argument, "true"), {}), ((argument, "false"), {}))
    return rows


def bfloat16() -> Rows:
    """Compare autocast in bfloat16 with float32."""
    rows = {}
    for config in ("gpt_python", "fcn_digit_scenes"):
        own, peer = (((), {"precision": precision}) for precision in ("bf16-mixed", "32-true"))
        rows |= pair("bf16-mixed", config, "float32", own, peer)
    return rows


def added(**named) -> float:
    """Return the seconds that the Trainer, changed by the arguments, adds to a short step of a bare loop."""
    short, named = ("--data.init_args.batch_size", "32"), {"changed": {"log_every_n_steps": 30}} | named
    rates = zip(*beside_a_bare_loop("lenet5_digits", 3, PIECES, short, **named), strict=True)
    return statistics.median([1 / trainer - 1 / bare for trainer, bare in rates][1:])  # the first does not count


def around_a_step(title: str, beside: str, **other) -> Rows:
    """Compare what the Trainer adds to a step of the smallest network with what it adds when changed by `other`."""
    seconds = figures_in_turns(title, {"own": added, "peer": partial(added, **other)})
    return {f"{title}: added to a step of LeNet-5, 32 digits": Row(seconds["own"], seconds["peer"], "s", beside)}


def as_a_module(*arguments, **named) -> float:
    """Train under the Trainer with torch's own setattr, which searches parameters and modules for each hook's name."""
    with mock.patch.object(Task, "__setattr__", torch.nn.Module.__setattr__):
        return under_trainer(*arguments, **named)


def averaging() -> Rows:
    """Time one update of the average of ResNet-18's weights."""
    network = ResNet(18, 1000).to(DEVICE)
    averages = {
        "peer": AveragedModel(network, use_buffers=True, avg_fn=get_ema_avg_fn(0.999)),
        "own": Average(network, 0.999, torch.device(DEVICE)),
    }
    averages["own"].updates = 10**6  # the bias is long corrected: both weigh new values equally
    calls = {name: partial(average.update_parameters, network) for name, average in averages.items()}
    seconds = in_turns("averaging", calls)
    for parameter in network.parameters():
        parameter.data += 1
    for call in calls.values():
        call()
    for ours, theirs in zip(*(average.module.parameters() for average in averages.values()), strict=True):
        torch.testing.assert_close(ours, theirs)
    beside = "Lightning's EMAWeightAveraging"
    return {"an update of averaged weights, ResNet-18": Row(seconds["own"], seconds["peer"], "s", beside)}


def searching() -> Rows:
    """Compare steps of AdamW on a CPU, for LeNet-5, with steps that look for a GPU, as under Lightning."""
    parameters = list(LeNet5().parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def steps(prepare: Callable[[], object]) -> None:
        prepare()
        for _ in range(500):
            optimizer.step()

    as_lightning = partial(os.environ.__setitem__, "PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    calls = {"peer": partial(steps, as_lightning), "own": partial(steps, partial(fast_steps, torch.device("cpu")))}
    seconds = in_turns("searching", calls, "cpu")
    return {
        "500 steps of AdamW without a search for GPUs, LeNet-5": Row(
            seconds["own"], seconds["peer"], "s", "with the search"
        )
    }


def muon() -> Rows:
    """Time a step for the matrices of twelve layers, shaped as in GPT-2 small but a quarter as wide."""
    shapes = [(192, 576), (192, 192), (192, 768), (768, 192)] * 12
    sides = {
        "own": Muon,
        "one by one": lambda matrices, lr: Muon([{"params": [matrix]} for matrix in matrices], lr),
        "torch.optim.Muon, in bfloat16": partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
    }
    steps, found = {}, {}
    for side, optimizer in sides.items():
        torch.manual_seed(0)
        found[side] = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        for matrix in found[side]:
            matrix.grad = torch.randn_like(matrix)
        steps[side] = optimizer(found[side], lr=0.01).step
        steps[side]()
        for ours, theirs in zip(found["own"], found[side], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # torch iterates in bfloat16
    seconds = in_turns("Muon", steps)
    return {
        f"a step of Muon, 48 matrices, beside {side}": Row(seconds["own"], seconds[side], "s", side)
        for side in list(sides)[1:]
    }


BENCHMARKS = {
    "technique-fused": partial(switch, "fused optimiser", FUSED, "lenet5_digits", "deepar_synthetic", "seq2seq_dates"),
    "technique-channels-last": partial(switch, "channels_last", CHANNELS_LAST, *PICTURES),
    "technique-compile": partial(switch, "compiled in place", COMPILED, "lenet5_digits", "gpt_python"),
    "technique-bfloat16": bfloat16,
    "technique-averaging": averaging,
    "technique-searching": searching,
    "technique-muon": muon,
    "technique-progress-bar": partial(around_a_step, "dlref's progress bar", "RichProgressBar", bar=RichProgressBar),
    "technique-profiler": partial(around_a_step, "no profiler", "PassThroughProfiler", profiler=PassThroughProfiler),
    "technique-hooks": partial(
        around_a_step, "hook names stored without torch's search", "torch.nn.Module.__setattr__", trainer=as_a_module
    ),
    "technique-logging": partial(
        around_a_step, "losses logged every thirtieth step", "every step", changed={"log_every_n_steps": 1}
    ),
}


if __name__ == "__main__":
    run(BENCHMARKS)
