"""The sweeps by name, and the levers: what grows, and how to save memory or time if they are short."""

from benchmarks.scaling.cases import (
    HORIZON,
    deepar_flops,
    forward_flops,
    gpt,
    gpt_bytes,
    gpt_flops,
    halved,
    images,
    many_series,
    map_bytes,
    masks,
    seq2seq,
    seq2seq_bytes,
    seq2seq_flops,
    windows,
    with_adam,
)
from benchmarks.scaling.measure import Case, Line, Sweep
from dlref.models import ResNet
from dlref.tasks.task import freeze


def sweeps(device: str) -> dict[str, Sweep]:
    """Return all sweeps by name. A GPU gets sixteen times the batch, or its cores would wait for most of a step."""
    many = 16 if device == "cuda" else 1
    return of_pictures(many, device) | of_texts(many, device) | of_sequences(many, device)


def of_pictures(many: int, device: str) -> dict[str, Sweep]:
    """Return the sweeps of batch, side and depth."""
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
    """Return the sweeps of context, width and vocabulary of a language model."""
    context, width, vocabulary = 128, 128, 1024
    return {
        "context": Sweep(
            f"GPT of 2.1 million, {many} text{'s' if many > 1 else ''}",
            "context T, tokens",
            [64, 128, 256, 512, 1024, 2048],
            "time 6 N T + 12 L E T²; memory ∝ T, with all weights of the attention ∝ T²",
            [
                Line(
                    name,
                    lambda size, out=out: gpt(many, size, device, written_out=out),
                    (2, 2 if out else 1),
                    lambda size: gpt_flops(size, size, 3, 192, 4096),
                    lambda size, out=out: gpt_bytes(many * size, size, 3, 192, 4096, written_out=out),
                )
                for name, out in (("fused attention", False), ("written out", True))
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
                    name,
                    lambda size, whole=whole: gpt(8 * many, context, device, 1, width, size, whole=whole),
                    (1, 1),
                    lambda size: gpt_flops(8 * many * context, context, 1, width, size),
                    lambda size, whole=whole: gpt_bytes(8 * many * context, context, 1, width, size, whole=whole),
                )
                for name, whole in (("loss in parts", False), ("all logits", True))
            ],
        ),
    }


def of_sequences(many: int, device: str) -> dict[str, Sweep]:
    """Return the sweeps of a translator's sentences, and of a forecaster's context, cells and series."""
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
    """Return ways to save memory or time: the same step in several variants."""
    many = 16 if device == "cuda" else 1
    picture, text = 16 * many, 8 * many
    frozen = ResNet(18)
    freeze(frozen, "conv1|bn1|layer[123]")
    return {
        f"ResNet-18, {picture} pictures of 96 px": {
            "baseline": images(ResNet(18), picture, 96, device),
            "`channels_last`": images(ResNet(18), picture, 96, device, channels_last=True),
            "`bf16-mixed`": halved(images(ResNet(18), picture, 96, device), device),
            "half the batch": images(ResNet(18), picture // 2, 96, device),
            "`freeze` all but the last stage": images(frozen, picture, 96, device),
        },
        f"GPT of 2.1 million, {text} texts of 256": {
            "baseline": gpt(text, 256, device),
            "`bf16-mixed`": halved(gpt(text, 256, device), device),
            "half the batch": gpt(text // 2, 256, device),
        },
    }
