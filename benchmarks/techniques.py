"""What each technique of a training step gives, with beside without, on this machine.

The embedded configs by a bare loop, in turns; the progress bar and the intervals of logging under the Trainer. Steps
are those of an epoch but the first. Data on the device, static shapes and steps that wait for nothing are how every
config is, and have no row. There are no CUDA graphs: no GPU was at hand to show that they pay.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar
from rich.console import Console
from rich.progress import track
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from benchmarks.overhead import DEVICE, STEPS, bare_loop, made, options, under_trainer
from benchmarks.rows import TURNS, Row, Rows, in_turns
from dlref.models import ResNet
from dlref.tasks.averaging import Average

FUSED = "--model.init_args.optimizer.init_args.fused"
COMPILED, CHANNELS_LAST = "--model.init_args.compile_network", "--model.init_args.channels_last"


def pairs(title: str, config: str, beside: str, own: Callable[[], float], peer: Callable[[], float]) -> Rows:
    """Steps a second of two ways to train, in turns."""
    row = Row([], [], "steps/s", beside)
    for _ in track(range(TURNS), title, console=Console(stderr=True), transient=True):
        row.peer.append(1 / peer())
        row.own.append(1 / own())
    return {f"{title}, `{config}`": row}


def switch(title: str, argument: str, *configs: str) -> Rows:
    """An argument of the config, true beside false."""
    rows = {}
    for config in configs:
        own, peer = (
            lambda value=value, config=config: bare_loop(
                *made(config, (argument, value)), STEPS[config], options(config)
            )
            for value in ("true", "false")
        )
        rows |= pairs(title, config, "without", own, peer)
    return rows


def bfloat16() -> Rows:
    """Autocast."""
    rows = {}
    for config in ("gpt_python", "fcn_digit_scenes"):
        own, peer = (
            lambda precision=precision, config=config: bare_loop(
                *made(config), STEPS[config], options(config) | {"precision": precision}
            )
            for precision in ("bf16-mixed", "32-true")
        )
        rows |= pairs("bf16-mixed", config, "float32", own, peer)
    return rows


def around_a_step(title: str, beside: str, own: dict, peer: dict) -> Rows:
    """What a step of the smallest network gains under the Trainer."""
    config = "lenet5_digits"
    calls = [
        lambda changed=changed: under_trainer(
            *made(config), STEPS[config], options(config) | changed.get("options", {}), **changed.get("bar", {})
        )
        for changed in (own, peer)
    ]
    return pairs(title, config, beside, *calls)


def averaging() -> Rows:
    """One update of the average of ResNet-18's weights."""
    network = ResNet(18, 1000).to(DEVICE)
    theirs = AveragedModel(network, use_buffers=True, avg_fn=get_ema_avg_fn(0.999))
    own = Average(network, 0.999)
    calls = {"own": lambda: own.update_parameters(network), "peer": lambda: theirs.update_parameters(network)}
    seconds = in_turns("averaging", calls, DEVICE)
    for ours, other in zip(*(chain(m.module.parameters()) for m in (own, theirs)), strict=True):
        torch.testing.assert_close(ours, other)
    beside = f"{EMAWeightAveraging.__name__}'s, on this device"
    return {"an update of averaged weights, ResNet-18": Row(seconds["own"], seconds["peer"], "s", beside)}


BENCHMARKS = {
    "technique-fused": partial(switch, "fused optimiser", FUSED, "lenet5_digits", "deepar_synthetic", "seq2seq_dates"),
    "technique-channels-last": partial(switch, "channels_last", CHANNELS_LAST, "ssd_digit_scenes", "fcn_digit_scenes"),
    "technique-compile": partial(switch, "compiled in place", COMPILED, "lenet5_digits", "gpt_python"),
    "technique-bfloat16": bfloat16,
    "technique-averaging": averaging,
    "technique-progress-bar": partial(
        around_a_step, "dlref's progress bar", "RichProgressBar", {}, {"bar": {"bar": RichProgressBar}}
    ),
    "technique-logging": partial(
        around_a_step, "losses logged every tenth step", "every step", {}, {"options": {"log_every_n_steps": 1}}
    ),
}
