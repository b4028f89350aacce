"""The training steps of the sweeps, each next to its law on paper."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling.measure import Case
from dlref.data.synthetic_series import make_series
from dlref.data.windows import SeriesStore, Window, Windows
from dlref.models import GPT, DeepAR, FCNCifarResNet, ResNet, Seq2Seq
from dlref.runtime.calendar import Frequency
from dlref.tasks import Forecaster, StudentT
from dlref.tasks.cross_entropy import linear_cross_entropy
from dlref.tasks.semantic_segmentation import pixel_loss

HORIZON = 24  # hours that DeepAR forecasts


def tensors_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of several tensors in total."""
    return sum(t.numel() * t.element_size() for t in tensors)


def halved(case: Case, device: str) -> Case:
    """Return the same case with bfloat16 autocast, as in `--trainer.precision bf16-mixed`."""

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return case.loss()

    return replace(case, loss=loss)


# Pictures


def images(network: nn.Module, batch: int, side: int, device: str, channels_last: bool = False) -> Case:
    """Return a classifier on random pictures."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device, memory_format=order)
    pixels = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=order)
    classes = torch.zeros(batch, dtype=torch.long, device=device)
    return Case(network, lambda: F.cross_entropy(network(pixels), classes))


def masks(batch: int, side: int, device: str) -> Case:
    """Return the network of configs/fcn_digit_scenes.yaml on random pictures."""
    network = FCNCifarResNet(20, 11, output_stride=2).to(device, memory_format=torch.channels_last)
    pixels = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(batch, side, side, dtype=torch.uint8, device=device)
    return Case(network, lambda: pixel_loss(network(pixels), targets, None))


def forward_flops(depth: int, side: int) -> float:
    """Return the operations of a ResNet's forward pass on one picture, in thousand millions, without computing it."""
    with torch.device("meta"):
        network, pixels = ResNet(depth), torch.randn(1, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        network(pixels)
    return counter.get_total_flops() / 1e9


def map_bytes(depth: int, side: int) -> float:
    """Return the bytes a ResNet keeps of one picture.

    Each convolution counts two maps: its output, and the map after norm and activation.
    """
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
    """Return the operations of a training step: 6 per parameter and token, and 12 L E T per token for the attention.

    Chowdhery et al., "PaLM", 2022, appendix B. The output layer is one of the matrices in the N parameters. Reading a
    token's embedding is not a product, but uses the same matrix here.
    """
    parameters = 12 * layers * width**2 + vocabulary * width
    return tokens * (6 * parameters + 12 * layers * width * context)


def gpt_bytes(
    tokens: int, context: int, layers: int, width: int, vocabulary: int, whole: bool = False, written_out: bool = False
) -> int:
    """Return the bytes a GPT keeps of a batch: about 20 numbers of the width per token and layer, and some by method.

    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, have 17 with
    dropout, without rotary positions and norms of queries and keys. The logits are added if `whole`, otherwise the
    gradient of the output layer. The attention's weights in each head of 64 are added if `written_out`.
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
    """Return a GPT as in configs/gpt_python.yaml, on random tokens.

    Args:
        batch: number of texts.
        context: tokens of each text.
        device: where it runs.
        layers: number of layers.
        width: of the network; heads are 64 wide.
        vocabulary: number of tokens in the vocabulary.
        whole: compute all logits at once, instead of the task's loss in parts.
        written_out: compute attention by its products, all weights at once, instead of by one kernel.
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
    """Return the same case with AdamW, and count the bytes of weights, gradients and moments."""
    optimizer = torch.optim.AdamW(case.network.parameters(), fused=True)

    def stands() -> int:
        own = list(case.network.parameters())
        moments = (t for state in optimizer.state.values() for name, t in state.items() if name != "step")
        return tensors_bytes(chain(own, (p.grad for p in own), moments))

    return replace(case, optimizer=optimizer, stands=stands)


# Translation


def seq2seq(batch: int, length: int, device: str, attention: str, width: int = 128) -> Case:
    """Return a translator on sentences that all have one length, on both sides."""
    network = Seq2Seq(4096, 4096, hidden_size=width, embedding_size=width, attention=attention, dropout=0.0).to(device)
    source, target = torch.randint(4, 4096, (2, batch, length), device=device)
    lengths = torch.full((batch,), length, device=device)

    def loss() -> Tensor:
        return F.cross_entropy(network(source, lengths, target).flatten(0, 1), target.flatten())

    return Case(network, loss)


def seq2seq_flops(length: float, width: int = 128, vocabulary: int = 4096) -> float:
    """Return the operations of a step on one pair: 6 per parameter and token, and two products of S T D with gradients.

    An LSTM layer of D cells that reads D numbers has 8 D² parameters. The layers are the decoder's, the encoder's two
    directions of half the size each (6 D²), the keys (D²), the combination of context and state (2 D²), and the output
    (D V).
    """
    parameters = (8 + 6 + 1 + 2) * width**2 + vocabulary * width
    return 6 * parameters * length + 12 * width * length**2


def seq2seq_bytes(length: int, attention: str, width: int = 128, vocabulary: int = 4096) -> int:
    """Return the bytes a pair keeps: about 40 × width + V numbers a place, and S T or S T D for the attention."""
    return 4 * (length * (40 * width + vocabulary) + length**2 * (width if attention == "mlp" else 2))


# Forecasting


def forecaster(context: int, cells: int, device: str, longest_lag: int | None = None) -> Forecaster:
    """Return a DeepAR as in configs/deepar_synthetic.yaml, for hourly series of four kinds."""
    lags = [lag for lag in Frequency.parse("1H").lags if longest_lag is None or lag <= longest_lag]
    network = DeepAR(len(lags), features=6, cardinality=[4], num_cells=cells, dropout=0.0)
    task = Forecaster(StudentT(), longest_lag, network=network, optimizer=None)
    task.remember({"frequency": "1H", "context_length": context, "prediction_length": HORIZON})
    return task.to(device)


def windows(context: int, cells: int, batch: int, device: str) -> Case:
    """Return a step on windows that already exist."""
    task = forecaster(context, cells, device)
    steps = context + HORIZON + max(task.lags)
    values = torch.rand(batch, steps, device=device) + 1
    features = torch.rand(batch, context + HORIZON, 6, device=device)
    window = Window(values, values > 0, features, torch.zeros(batch, 1, dtype=torch.long, device=device))
    return Case(task.network, lambda: task.loss(window)[0])


def deepar_flops(times: float, cells: float, lags: int = 40, features: int = 6) -> float:
    """Return the operations of a step on one window: 6 per weight and time.

    A layer has 4 D (I + D) weights (Hochreiter et al. 1997).
    """
    inputs = lags + features + 3  # the embedding of one of four kinds, and the scale
    return 6 * times * (4 * cells * (inputs + cells) + 8 * cells**2 + 3 * cells)


def many_series(number: int, device: str, batch: int = 64, length: int = 100) -> Case:
    """Return a step on windows drawn from `number` series on the device; its bytes are those of the series."""
    task = forecaster(24, 40, device, longest_lag=24)
    steps = 24 + HORIZON + max(task.lags)
    store = copies(SeriesStore(make_series(100, length, 0).series, Frequency.parse("1H")), number // 100, length)
    every = torch.full((number,), length - steps + 1)
    data = Windows(store, torch.full((number,), steps), every, 1, steps, 24 + HORIZON).to(torch.device(device))

    def loss() -> Tensor:
        return task.loss(data[torch.randint(len(data), (batch,))])[0]

    return Case(task.network, loss, stands=lambda: tensors_bytes(store.buffers()))


def copies(store: SeriesStore, times: int, length: int) -> SeriesStore:
    """Repeat the same series many times: drawing a hundred thousand would take half a minute."""
    for name in ("values", "observed", "features", "categories", "length", "lead"):
        tensor = getattr(store, name)
        setattr(store, name, tensor.repeat(times, *[1] * (tensor.ndim - 1)))
    store.seasonal_errors = torch.cat([store.seasonal_errors[:1], store.seasonal_errors[1:].repeat(times)])
    store.begin = torch.arange(len(store.length)) * length
    return store
