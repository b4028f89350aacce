"""What grows how: `python -m benchmarks.scaling` (with the extra [train]).

Each sweep makes one thing larger (the batch, a side of the pictures, the context, the number of series, the width of a
network, ...) and keeps everything else as it is. Measured are the seconds of a training step, the middle of several
turns in which every size has its own, and memory. Both are set beside what follows on paper. docs/scaling.json has all
that was measured, docs/images/scaling.png and scaling-memory.png are drawn from it, and the tables of docs/scaling.md
stand between two comments; `--draw` makes pictures and tables anew without measuring.

Memory on a CPU is what autograd keeps from the forward pass until the backward pass: the bytes of all storages that
come by `torch.autograd.graph.saved_tensors_hooks`, each counted once however many operations keep it or a view of it,
without the network's own parameters and buffers, which do not grow with a batch. The count is exact: the same in each
run. The peak of resident memory is not: it has the libraries in it, what the allocator does not give back, and buffers
of single operations. On a GPU memory is the peak that a step takes beyond what stood there before it
(`torch.cuda.max_memory_allocated`), gradients and workspaces included, for that is what runs out.
"""

import argparse
import json
import math
import platform
import re
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import in_turns
from dlref.data.synthetic_series import make_series
from dlref.data.windows import SeriesStore, Window, Windows
from dlref.export.measure import processor
from dlref.models import GPT, DeepAR, FCNCifarResNet, ResNet, Seq2Seq
from dlref.runtime.calendar import Frequency
from dlref.tasks import Forecaster, StudentT
from dlref.tasks.cross_entropy import linear_cross_entropy
from dlref.tasks.semantic_segmentation import pixel_loss
from dlref.tasks.task import freeze

DOCS = Path(__file__).parents[1] / "docs"
TURNS = 7
COLOURS = ("#1d4ed8", "#c2410c")
MARKS = ("<!-- measured -->", "<!-- /measured -->")
HORIZON = 24  # hours that DeepAR forecasts
Law = Callable[[int], float]  # a size -> how much it costs on paper, up to a factor


@dataclass
class Case:
    """A training step of one size.

    Attributes:
        network: what learns.
        loss: forward pass and loss.
        optimizer: takes a step too, where there is one.
        stands: counts bytes that stand between the steps, where these are in question instead of what a step keeps.
    """

    network: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    stands: Callable[[], int] | None = None

    def step(self) -> None:
        """Forward, loss, backward."""
        self.network.zero_grad()
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()


@dataclass
class Line:
    """One way to do what a sweep makes larger.

    Attributes:
        name: in the legend; empty where a sweep has one line.
        case: size -> its step.
        exponents: of time and of memory for large sizes, on paper; None: not looked at.
        time: the law of time on paper, where these sizes are not large enough for a power.
        memory: that of memory.
    """

    name: str
    case: Callable[[int], Case]
    exponents: tuple[float | None, float | None]
    time: Law | None = None
    memory: Law | None = None

    def on_paper(self, sizes: list[int], places: list[float]) -> list[list[float] | None]:
        """What time and memory cost; a power of the place on the axis where nothing else was given."""
        found: list[list[float] | None] = []
        for law, power in zip((self.time, self.memory), self.exponents, strict=True):
            if law:
                found.append([law(size) for size in sizes])
            else:
                found.append(None if power is None else [place**power for place in places])
        return found


@dataclass
class Sweep:
    """One thing that grows.

    Attributes:
        title: what is trained.
        axis: what grows.
        sizes: of it, from small to large.
        paper: what grows how, in words.
        lines: ways to do it.
        place: size -> where it stands on the axis, where that is something else.
    """

    title: str
    axis: str
    sizes: list[int]
    paper: str
    lines: list[Line]
    place: Callable[[int], float] = float


# What is measured


def kept(case: Case) -> int:
    """Bytes that autograd keeps for the backward pass, but for parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in chain(case.network.parameters(), case.network.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the same storage, which so lives as long as the loss; no cycle through the graph

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.loss()
    del loss
    return sum(found.values())


def peak(case: Case) -> int:
    """Bytes that a step takes on a GPU at its height, beyond what stood there before."""
    case.network.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory(case: Case, device: str) -> int:
    """Bytes that a case is about."""
    if case.stands is not None:
        case.step()  # gradients and an optimiser's moments are there after the first
        return case.stands()
    return peak(case) if device == "cuda" else kept(case)


def measured(sweep: Sweep, title: str, device: str, turns: int = TURNS) -> dict:
    """All figures of a sweep, as they are kept."""
    cases = {line.name: [line.case(size) for size in sweep.sizes] for line in sweep.lines}
    calls = {
        (line.name, size): case.step
        for line in sweep.lines
        if line.exponents[0] is not None
        for size, case in zip(sweep.sizes, cases[line.name], strict=True)
    }
    seconds = in_turns(title, calls, device, turns)
    places = [sweep.place(size) for size in sweep.sizes]
    lines = {}
    for line in sweep.lines:
        time, room = line.on_paper(sweep.sizes, places)
        lines[line.name] = {
            "exponents": line.exponents,
            "seconds": time and [rounded(seconds[line.name, size]) for size in sweep.sizes],
            "bytes": [memory(case, device) for case in cases[line.name]],
            "paper_time": time,
            "paper_memory": room,
        }
    return {"title": sweep.title, "axis": sweep.axis, "paper": sweep.paper, "sizes": places, "lines": lines}


def rounded(seconds: list[float]) -> list[float]:
    """To the microsecond."""
    return [round(second, 6) for second in seconds]


def slope(sizes: list[float], values: list[float]) -> float:
    """The exponent of the power through the upper half of the sizes: least squares over the logarithms."""
    half = len(sizes) // 2
    xs, ys = ([math.log(max(v, 1e-12)) for v in part[half:]] for part in (sizes, values))
    middle, height = statistics.mean(xs), statistics.mean(ys)
    return sum((x - middle) * (y - height) for x, y in zip(xs, ys, strict=True)) / sum((x - middle) ** 2 for x in xs)


def tensors_bytes(tensors) -> int:
    """Of several tensors, one after the other."""
    return sum(t.numel() * t.element_size() for t in tensors)


# Pictures


def images(network: nn.Module, batch: int, side: int, device: str, channels_last: bool = False) -> Case:
    """A classifier on random pictures."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device, memory_format=order)
    pixels = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=order)
    classes = torch.zeros(batch, dtype=torch.long, device=device)
    return Case(network, lambda: F.cross_entropy(network(pixels), classes))


def masks(batch: int, side: int, device: str) -> Case:
    """The network of configs/fcn_digit_scenes.yaml on random pictures."""
    network = FCNCifarResNet(20, 11, output_stride=2).to(device, memory_format=torch.channels_last)
    pixels = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(batch, side, side, dtype=torch.uint8, device=device)
    return Case(network, lambda: pixel_loss(network(pixels), targets, None))


def forward_flops(depth: int, side: int) -> float:
    """Operations of a ResNet's forward pass on one picture, in thousand millions; nothing is computed."""
    with torch.device("meta"):
        network, pixels = ResNet(depth), torch.randn(1, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        network(pixels)
    return counter.get_total_flops() / 1e9


def map_bytes(depth: int, side: int) -> float:
    """What a ResNet keeps of one picture: two maps a convolution, its output and that after norm and activation."""
    with torch.device("meta"):
        network, pixels = ResNet(depth), torch.randn(1, 3, side, side)
    sizes: list[int] = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    network(pixels)
    return 8 * sum(sizes)


# Language


def gpt_flops(tokens: int, context: int, layers: int, width: int, vocabulary: int) -> int:
    """Operations of a training step: 6 a parameter and token, and 12 L E T a token for the attention.

    Chowdhery et al., "PaLM", 2022, appendix B. The output layer is a matrix of the N parameters; reading a token's
    embedding is not a product, but is the same matrix here.
    """
    parameters = 12 * layers * width**2 + vocabulary * width
    return tokens * (6 * parameters + 12 * layers * width * context)


def gpt_bytes(
    tokens: int, context: int, layers: int, width: int, vocabulary: int, whole: bool = False, written_out: bool = False
) -> int:
    """What a GPT keeps of a batch: about 20 numbers of the width a token and layer; the rest depends on how.

    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, have 17 with
    dropout, without rotary positions and norms of queries and keys. Beside these `whole` logits, or else the gradient
    of the output layer; the attention's weights in each head of 64 where it is `written_out`.
    """
    weights = layers * (width // 64) * context * tokens * written_out
    return 4 * (20 * layers * width * tokens + vocabulary * (tokens if whole else width) + weights)


def gpt(
    batch: int,
    context: int,
    device: str,
    layers: int = 3,
    width: int = 192,
    vocabulary: int = 4096,
    whole: bool = False,
    written_out: bool = False,
) -> Case:
    """A GPT as configs/gpt_python.yaml has it, on random tokens.

    Args:
        batch: texts.
        context: tokens of each.
        device: where it runs.
        layers: of the network.
        width: of the network; heads are 64 wide.
        vocabulary: its tokens.
        whole: all logits at once, instead of the task's loss in parts.
        written_out: attention by its products, all weights at once, instead of one kernel.
    """
    network = GPT(vocabulary, context, layers, width // 64, width, "rotary", bias=False, qk_norm=True).to(device)
    tokens = torch.randint(vocabulary, (batch, context + 1), device=device)
    after = tokens[:, 1:].flatten()

    def loss() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext():
            hidden = network(tokens[:, :-1])[0]
        if whole:
            return F.cross_entropy(network.logits(hidden).flatten(0, 1), after)
        return linear_cross_entropy(hidden.flatten(0, 1), network.output, after)

    return Case(network, loss)


def with_adam(case: Case) -> Case:
    """The same with AdamW, and the bytes of weights, gradients and moments."""
    optimizer = torch.optim.AdamW(case.network.parameters(), fused=True)

    def stands() -> int:
        own = list(case.network.parameters())
        moments = (t for state in optimizer.state.values() for name, t in state.items() if name != "step")
        return tensors_bytes(chain(own, (p.grad for p in own), moments))

    return replace(case, optimizer=optimizer, stands=stands)


# Translation


def seq2seq(batch: int, length: int, device: str, attention: str, width: int = 128) -> Case:
    """Sentences that are all of one length, on both sides."""
    network = Seq2Seq(4096, 4096, hidden_size=width, embedding_size=width, attention=attention, dropout=0.0).to(device)
    source, target = torch.randint(4, 4096, (2, batch, length), device=device)
    lengths = torch.full((batch,), length, device=device)

    def loss() -> Tensor:
        return F.cross_entropy(network(source, lengths, target).flatten(0, 1), target.flatten())

    return Case(network, loss)


def seq2seq_flops(length: float, width: int = 128, vocabulary: int = 4096) -> float:
    """Operations of a step on one pair: 6 a parameter and token, and two products of S T D, with their gradients.

    An LSTM layer of D cells that reads D numbers has 8 D² parameters. There are the decoder's, the encoder's two
    directions of half of it each (6 D²), the keys (D²), what combines context and state (2 D²), the output (D V).
    """
    parameters = (8 + 6 + 1 + 2) * width**2 + vocabulary * width
    return 6 * parameters * length + 12 * width * length**2


def seq2seq_bytes(length: int, attention: str, width: int = 128, vocabulary: int = 4096) -> int:
    """What a pair keeps: about 40 numbers of the width a place and its logits; the attention, S T numbers or S T D."""
    return 4 * (length * (40 * width + vocabulary) + length**2 * (width if attention == "mlp" else 2))


# Forecasting


def forecaster(context: int, cells: int, device: str, longest_lag: int | None = None) -> Forecaster:
    """A DeepAR as configs/deepar_synthetic.yaml has it, that knows hourly series of four kinds."""
    lags = [lag for lag in Frequency.parse("1H").lags if longest_lag is None or lag <= longest_lag]
    network = DeepAR(len(lags), features=6, cardinality=[4], num_cells=cells, dropout=0.0)
    task = Forecaster(StudentT(), longest_lag, network=network, optimizer=None)
    task.remember({"frequency": "1H", "context_length": context, "prediction_length": HORIZON})
    return task.to(device)


def windows(context: int, cells: int, batch: int, device: str) -> Case:
    """A step on windows that are there already."""
    task = forecaster(context, cells, device)
    steps = context + HORIZON + max(task.lags)
    values = torch.rand(batch, steps, device=device) + 1
    features = torch.rand(batch, steps, 6, device=device)
    window = Window(values, values > 0, features, torch.zeros(batch, 1, dtype=torch.long, device=device))
    return Case(task.network, lambda: task.loss(window))


def deepar_flops(times: float, cells: float, lags: int = 40, features: int = 6) -> float:
    """Operations of a step on one window: 6 a weight and time; 4 D (I + D) weights a layer (Hochreiter et al. 1997)."""
    inputs = lags + features + 3  # the embedding of one of four kinds, and the scale
    return 6 * times * (4 * cells * (inputs + cells) + 8 * cells**2 + 3 * cells)


def many_series(number: int, device: str, batch: int = 64, length: int = 100) -> Case:
    """A step on windows drawn from so many series on the device; the bytes are those of the series."""
    task = forecaster(24, 40, device, longest_lag=24)
    steps = 24 + HORIZON + max(task.lags)
    store = copies(SeriesStore(make_series(100, length, 0).series, Frequency.parse("1H")), number // 100, length)
    every = torch.full((number,), length - steps + 1)
    data = Windows(store, torch.full((number,), steps), every, 1, steps).to(torch.device(device))

    def loss() -> Tensor:
        return task.loss(data[torch.randint(len(data), (batch,))])

    return Case(task.network, loss, stands=lambda: tensors_bytes(store.buffers()))


def copies(store: SeriesStore, times: int, length: int) -> SeriesStore:
    """The same series many times over: a hundred thousand would take half a minute to draw."""
    for name in ("values", "observed", "features", "categories", "length"):
        tensor = getattr(store, name)
        setattr(store, name, tensor.repeat(times, *[1] * (tensor.ndim - 1)))
    store.differences = torch.cat([store.differences[:1], store.differences[1:].repeat(times, 1)])
    store.begin = torch.arange(len(store.length)) * length
    return store


# The sweeps


def sweeps(device: str) -> dict[str, Sweep]:
    """All of them by name. A GPU is given sixteen times the batch, or its cores would wait for most of a step."""
    many = 16 if device == "cuda" else 1
    return of_pictures(many, device) | of_texts(many, device) | of_sequences(many, device)


def of_pictures(many: int, device: str) -> dict[str, Sweep]:
    """Batch, side and depth."""
    depths = {round(forward_flops(depth, 128), 3): depth for depth in (18, 34, 50, 101, 152)}
    return {
        "batch": Sweep(
            "ResNet-18 at 96 px",
            "pictures of a batch",
            [many * size for size in (1, 2, 4, 8, 16)],
            "time and memory ∝ B",
            [Line("", lambda size: images(ResNet(18), size, 96, device), (1, 1))],
        ),
        "side": Sweep(
            f"ResNet-18, {2 * many} pictures",
            "side of a picture, px",
            [64, 96, 128, 192, 256],
            "time and memory ∝ H W = side²",
            [Line("", lambda size: images(ResNet(18), 2 * many, size, device), (2, 2))],
        ),
        "masks": Sweep(
            f"FCN, ResNet-20, {2 * many} pictures",
            "side of a picture, px",
            [64, 96, 128, 192, 256],
            "time and memory ∝ H W = side²",
            [Line("", lambda size: masks(2 * many, size, device), (2, 2))],
        ),
        "depth": Sweep(
            f"ResNet-18 to 152, {2 * many} pictures of 128 px",
            "forward pass of a picture, GFLOP",
            list(depths.values()),
            "time ∝ FLOPs; memory ∝ maps: two a convolution",
            [
                Line(
                    "",
                    lambda depth: images(ResNet(depth), 2 * many, 128, device),
                    (1, None),
                    memory=lambda depth: map_bytes(depth, 128),
                )
            ],
            place={depth: flops for flops, depth in depths.items()}.get,
        ),
    }


def of_texts(many: int, device: str) -> dict[str, Sweep]:
    """Context, width and vocabulary of a language model."""
    context, width, vocabulary = 128, 128, 1024
    return {
        "context": Sweep(
            f"GPT of 2.1 million, {many} text{'s' if many > 1 else ''}",
            "context T, tokens",
            [64, 128, 256, 512, 1024, 2048],
            "time 6 N T + 12 L E T²; memory ∝ T, with all weights of the attention ∝ T²",
            [
                Line(
                    "fused attention",
                    lambda size: gpt(many, size, device),
                    (2, 1),
                    lambda size: gpt_flops(size, size, 3, 192, 4096),
                    lambda size: gpt_bytes(many * size, size, 3, 192, 4096),
                ),
                Line(
                    "written out",
                    lambda size: gpt(many, size, device, written_out=True),
                    (2, 2),
                    lambda size: gpt_flops(size, size, 3, 192, 4096),
                    lambda size: gpt_bytes(many * size, size, 3, 192, 4096, written_out=True),
                ),
            ],
        ),
        "width": Sweep(
            f"GPT, 2 layers, {2 * many} texts of {context}, AdamW",
            "width E",
            [64, 128, 192, 256, 384, 512],
            "time 6 N + 12 L E T a token, N = 12 L E² + V E; 16 bytes a parameter, activations ∝ E",
            [
                Line(
                    "weights, gradients, moments",
                    lambda size: with_adam(gpt(2 * many, context, device, 2, size, vocabulary)),
                    (2, 2),
                    lambda size: gpt_flops(2 * many * context, context, 2, size, vocabulary),
                    lambda size: 16 * (24 * size**2 + vocabulary * size),
                ),
                Line(
                    "activations",
                    lambda size: gpt(2 * many, context, device, 2, size, vocabulary),
                    (None, 1),
                ),
            ],
        ),
        "vocabulary": Sweep(
            f"GPT, 1 layer of {width}, {8 * many} texts of {context}",
            "vocabulary V, tokens",
            [1024, 2048, 4096, 8192, 16384, 32768],
            "time ∝ V; memory of all logits ∝ B T V, in parts only the gradient of the output layer: E V",
            [
                Line(
                    "loss in parts",
                    lambda size: gpt(8 * many, context, device, 1, width, size),
                    (1, 1),
                    lambda size: gpt_flops(8 * many * context, context, 1, width, size),
                    lambda size: gpt_bytes(8 * many * context, context, 1, width, size),
                ),
                Line(
                    "all logits",
                    lambda size: gpt(8 * many, context, device, 1, width, size, whole=True),
                    (1, 1),
                    lambda size: gpt_flops(8 * many * context, context, 1, width, size),
                    lambda size: gpt_bytes(8 * many * context, context, 1, width, size, whole=True),
                ),
            ],
        ),
    }


def of_sequences(many: int, device: str) -> dict[str, Sweep]:
    """Sentences of a translator; context, cells and series of a forecaster."""
    return {
        "sentences": Sweep(
            f"Seq2Seq, {16 * many} pairs",
            "tokens of source and of target, S = T",
            [8, 16, 32, 64, 128],
            "recurrence ∝ S + T, attention ∝ S T: scores alone, or D numbers each (`mlp`)",
            [
                Line(
                    attention,
                    lambda size, attention=attention: seq2seq(16 * many, size, device, attention),
                    (2, 2),
                    seq2seq_flops,
                    lambda size, attention=attention: seq2seq_bytes(size, attention),
                )
                for attention in ("general", "mlp")
            ],
        ),
        "times": Sweep(
            f"DeepAR, {64 * many} windows",
            "context, hours",
            [24, 48, 96, 192, 384],
            "time and memory ∝ context + prediction",
            [
                Line(
                    "",
                    lambda size: windows(size, 40, 64 * many, device),
                    (1, 1),
                    lambda size: size + HORIZON,
                    lambda size: size + HORIZON,
                )
            ],
        ),
        "cells": Sweep(
            f"DeepAR, {64 * many} windows of {48 + HORIZON} hours",
            "cells of a layer, D",
            [20, 40, 80, 160, 320],
            "time 6 · 4 D (I + D) a layer and time; memory ∝ D, and the inputs",
            [
                Line(
                    "",
                    lambda size: windows(48, size, 64 * many, device),
                    (2, 1),
                    lambda size: deepar_flops(48 + HORIZON, size),
                )
            ],
        ),
        "series": Sweep(
            "DeepAR, 64 windows a step, series of 100 hours",
            "series on the device",
            [100, 1000, 10_000, 100_000],
            "time of a step constant; bytes of the series ∝ series",
            [Line("", lambda size: many_series(size, device), (0, 1))],
        ),
    }


def levers(device: str) -> dict[str, dict[str, Case]]:
    """What one can do where memory or time is short: the same step in several ways."""
    many = 16 if device == "cuda" else 1
    picture, text = 16 * many, 8 * many
    frozen = ResNet(18)
    freeze(frozen, "conv1|bn1|layer[123]")
    return {
        f"ResNet-18, {picture} pictures of 96 px": {
            "as it comes": images(ResNet(18), picture, 96, device),
            "`channels_last`": images(ResNet(18), picture, 96, device, channels_last=True),
            "`bf16-mixed`": halved(images(ResNet(18), picture, 96, device), device),
            "half the batch": images(ResNet(18), picture // 2, 96, device),
            "`freeze` all but the last stage": images(frozen, picture, 96, device),
        },
        f"GPT of 2.1 million, {text} texts of 256": {
            "as it comes": gpt(text, 256, device),
            "`bf16-mixed`": halved(gpt(text, 256, device), device),
            "half the batch": gpt(text // 2, 256, device),
        },
    }


def halved(case: Case, device: str) -> Case:
    """The same by bfloat16 autocast, as `--trainer.precision bf16-mixed` has it."""

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return case.loss()

    return replace(case, loss=loss)


def measure(device: str) -> dict:
    """Everything."""
    torch.manual_seed(0)
    found = {}
    known = sweeps(device)
    for number, (name, sweep) in enumerate(known.items(), 1):
        found[name] = measured(sweep, f"{number}/{len(known) + 1} {sweep.title}: {sweep.axis}", device)
    ways: dict[str, dict] = {}
    for title, cases in levers(device).items():
        seconds = in_turns(f"{len(known) + 1}/{len(known) + 1} {title}", step_of(cases), device, TURNS)
        ways[title] = {
            name: {"seconds": rounded(seconds[name]), "bytes": memory(cases[name], device)} for name in cases
        }
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "turns": TURNS,
        "sweeps": found,
        "levers": ways,
    }


def step_of(cases: dict[str, Case]) -> dict[str, Callable[[], None]]:
    """The call of each case."""
    return {name: case.step for name, case in cases.items()}


# What is written


def exponent(sizes: list[float], values: list[float] | None, large: float | None = None) -> str:
    """For a table, with that of large sizes where it is another; a dash where nothing was measured or follows."""
    if values is None:
        return "–"
    here = f"{slope(sizes, values):.2f}".replace("-0.00", "0.00")
    return here if large is None or math.isclose(float(here), large, abs_tol=0.005) else f"{here}, then {large}"


def middles(line: dict) -> list[float] | None:
    """Seconds of each size."""
    return line["seconds"] and [statistics.median(turns) for turns in line["seconds"]]


def number(size: float) -> str:
    """A size, as short as it can be read."""
    return f"{size:,.0f}" if size >= 20 else f"{size:.3g}"


def tables(found: dict) -> str:
    """The page's tables, in Markdown."""
    rows = [
        "| trained | what grows | on paper | time on paper | measured | memory on paper | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for sweep in found["sweeps"].values():
        sizes = sweep["sizes"]
        span = f"{sweep['axis']}, {number(sizes[0])} to {number(sizes[-1])}"
        for name, line in sweep["lines"].items():
            title = f"{sweep['title']}{f': {name}' if name else ''}"
            pairs = zip(("time", "memory"), line["exponents"], (middles(line), line["bytes"]), strict=True)
            exponents = [
                f"{exponent(sizes, line[f'paper_{of}'], large)} | {exponent(sizes, values)}"
                for of, large, values in pairs
            ]
            rows.append(f"| {title} | {span} | {sweep['paper']} | {' | '.join(exponents)} |")
    rows += ["", "| the same step | | ms | memory, MB | of the memory as it comes |", "|---|---|---|---|---|"]
    for title, ways in found["levers"].items():
        whole = next(iter(ways.values()))["bytes"]
        rows += [
            f"| {title} | {name} | {1e3 * statistics.median(way['seconds']):.0f} | {way['bytes'] / 1e6:.0f} | "
            f"{way['bytes'] / whole:.0%} |"
            for name, way in ways.items()
        ]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    where = f"{machine(found)}; Python {found['python']}, {versions}; median of {found['turns']} turns."
    return "\n".join([where, "", *rows])


def machine(found: dict) -> str:
    """Where it was measured."""
    threads = f", {found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return found["machine"] + (threads if found["device"] == "cpu" else "")


def put_between(page: str, text: str) -> str:
    """A page with `text` between its two marks, and all else as it was."""
    begin, end = MARKS
    found, times = re.subn(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
    if times != 1:
        raise ValueError(f"expected {begin} and {end} once")
    return found


def draw(found: dict, path: Path, of: str) -> None:
    """Small multiples of `time` or `memory`: what was measured, and dashed what follows on paper from the last size."""
    from matplotlib.figure import Figure

    factor, unit = (1e3, "ms") if of == "time" else (1e-6, "MB")
    columns = 4
    rows = -(-len(found["sweeps"]) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns).flatten()
    for axes, sweep in zip(grid, found["sweeps"].values(), strict=False):
        drawn: list[float] = []
        shown = [name for name, line in sweep["lines"].items() if of == "memory" or line["seconds"]]
        for colour, (name, line) in zip(COLOURS, sweep["lines"].items(), strict=False):
            values = middles(line) if of == "time" else line["bytes"]
            if name not in shown:
                continue
            values, sizes, paper = [factor * value for value in values], sweep["sizes"], line[f"paper_{of}"]
            label = f"{name if len(shown) > 1 else ''} {exponent(sizes, values)} ({exponent(sizes, paper)})".strip()
            axes.plot(sizes, values, "o-", color=colour, markersize=4, linewidth=1.2, label=label)
            if paper:
                guide = [values[-1] * value / paper[-1] for value in paper]
                axes.plot(sizes, guide, "--", color=colour, linewidth=1.1, alpha=0.7)
            drawn += values
        axes.set(xscale="log", yscale="log", xlabel=sweep["axis"], ylabel=unit)
        axes.set_title(sweep["title"], fontsize=9)
        plain_ticks(axes, sweep["sizes"], drawn)
        axes.legend(fontsize=8, frameon=False, handlelength=1.2, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(found["sweeps"]) :]:
        axes.set_visible(False)
    what = "a training step" if of == "time" else "memory"
    figure.suptitle(
        f"{what}: measured, with its exponent over the upper half of the sizes; "
        f"dashed and in brackets: on paper\n{machine(found)}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def plain_ticks(axes, sizes: list[float], values: list[float]) -> None:
    """Sizes as they are where they are few, and room above for the legend; a flat line is to look flat."""
    middle = math.sqrt(min(values) * max(values))
    low, high = min(min(values) / 1.5, middle / 4), max(2.5 * max(values), 5 * middle)
    axes.set_ylim(low, high)
    apart = [size for size, before in zip(sizes, [0, *sizes], strict=False) if size > 1.3 * before]
    axes.set_xticks(apart, [number(size) for size in apart], fontsize=7)
    axes.minorticks_off()
    powers = [power for power in range(-6, 7) if low <= 10.0**power <= high]
    ticks = [m * 10.0**power for power in range(-6, 7) for m in ((1,) if len(powers) > 1 else (1, 3))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks], fontsize=7)
    axes.tick_params(length=2)


def write(found: dict, folder: Path) -> None:
    """Pictures, and the tables of the page."""
    (folder / "images").mkdir(exist_ok=True)
    draw(found, folder / "images/scaling.png", "time")
    draw(found, folder / "images/scaling-memory.png", "memory")
    page = folder / "scaling.md"
    page.write_text(put_between(page.read_text(encoding="utf-8"), tables(found)), encoding="utf-8")


def lines_of(found: dict) -> str:
    """As JSON, a list of numbers on one line."""
    text = json.dumps(found, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text) + "\n"


def main() -> None:
    """Measure, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", action="store_true", help="pictures and tables of what was measured before")
    options = parser.parse_args()
    path = DOCS / "scaling.json"
    if not options.draw:
        path.write_text(lines_of(measure(options.device)), encoding="utf-8")
    write(json.loads(path.read_text(encoding="utf-8")), DOCS)


if __name__ == "__main__":
    main()
