"""Figures and tables of a test run."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from sklearn.metrics import auc, roc_curve
from torch import Tensor

from dlref.runtime.attention import boxes_for_missing_glyphs, draw_attention, literal
from dlref.runtime.runners.object_detection import SHOWN as SURE
from dlref.runtime.runners.semantic_segmentation import BACKGROUND, PAINT, PALETTE
from dlref.training.run_folder import write_text

COLUMNS = 5  # of the grid of mistakes
SHOWN = 12  # classes named in a legend; more would hide the curves
COLOURED = 36  # classes named below masks
MANY = 100_000  # a matrix with a count this large shows shares
GROUPS = 6  # of source lengths


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with boxes_for_missing_glyphs():
        figure.savefig(path, dpi=120, bbox_inches="tight")


def _grid(panels: int, columns: int, width: float, height: float, extra: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Return a figure and the axes of its panels, row by row; the rest of the last row stays blank.

    `width` and `height` are those of one panel, in inches; `extra` is the height left for titles and legends.
    """
    rows = max(1, math.ceil(panels / columns))
    figure = Figure(figsize=(width * columns, height * rows + extra), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for blank in axes[panels:]:
        blank.set_axis_off()
    return figure, axes[:panels]


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, **style) -> None:
    """Plot a line with gaps where values are NaN, and a dot for a value without a neighbour to be joined to."""
    there = np.pad(np.isfinite(y), 1)
    alone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:]).tolist()
    axes.plot(x, y, **style, **({"marker": ".", "markevery": alone} if alone else {}))


def _class_curves(
    by_class: dict[int, tuple[np.ndarray, np.ndarray, float]],
    labels: list[str],
    area: str,
    digits: int,
    corner: str,
    **line,
) -> tuple[Figure, Axes]:
    """Draw one curve per class, from (x, y, area under the curve).

    The legend calls the areas `area` and gives them to `digits` decimals; with more than SHOWN classes it names those
    with the smallest areas. `line` styles the curves.
    """
    figure, (axes,) = _grid(1, 1, width=6.5, height=5)
    weakest = sorted(by_class, key=lambda k: by_class[k][2])[:SHOWN]
    for k, (x, y, size) in by_class.items():
        label = f"{literal(labels[k])}  {size:.{digits}f}" if k in weakest else None
        axes.plot(x, y, label=label, linewidth=1.2 if k in weakest else 0.4, **line)
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    if by_class:
        title = area if len(by_class) <= SHOWN else f"{area}, the {SHOWN} weakest of {len(by_class)}"
        axes.legend(title=title, loc=corner, fontsize=8)
    return figure, axes


def curves(path: Path, metrics: Path) -> None:
    """Plot every metric of metrics.csv over the steps: one panel per metric, for training and validation."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key in rows[0] if rows else []:
        stage, _, name = key.partition("/")
        points = [(float(row["step"]), float(row[key])) for row in rows if row[key]]
        if stage in ("train", "val") and points:
            series.setdefault(name, {})[stage] = points
    if not series:
        return
    figure, grid = _grid(len(series), len(series), width=4.5, height=3.4)
    for axes, (name, stages) in zip(grid, series.items(), strict=True):
        for stage, colour in (("train", "tab:blue"), ("val", "tab:orange")):
            if stage in stages:
                style = {"marker": "o", "markersize": 3} if len(stages[stage]) < 60 else {}
                axes.plot(*zip(*stages[stage], strict=True), color=colour, label=stage, **style)
        axes.set(title=name, xlabel="optimiser step")
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def confusion(path: Path, matrix: Tensor, labels: list[str], score: str = "F1") -> None:
    """Draw a (K, K) confusion matrix, rows true and columns predicted, and the F1 score or IoU of each class."""
    counts = matrix.numpy().astype(float)
    correct, true, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    f1 = 2 * correct / np.maximum(true + predicted, 1)
    values = f1 / (2 - f1) if score == "IoU" else f1
    present = true + predicted > 0
    share = counts / np.maximum(true[:, None], 1)
    classes = len(labels)
    side = max(4.5, 0.45 * min(classes, 40))
    figure = Figure(figsize=(side * 1.45, side), layout="constrained")
    heat, bars = figure.subplots(1, 2, width_ratios=[4, 1], sharey=True)
    heat.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if classes <= 20:
        for row, column in np.ndindex(classes, classes):
            if counts[row, column]:
                colour = "white" if share[row, column] > 0.5 else "black"
                text = f"{counts[row, column]:.0f}" if counts.max() < MANY else f"{share[row, column]:.1%}"
                heat.text(column, row, text, ha="center", va="center", color=colour, size=8 if len(text) < 6 else 6)
    ticks = range(classes) if classes <= 40 else range(0, classes, classes // 20)
    names = [literal(labels[k]) for k in ticks]
    heat.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0)
    heat.set_yticks(ticks, names)
    heat.set(xlabel="predicted", ylabel="true", title="Confusion")
    bars.barh(range(classes), values, color="tab:blue")
    mean = values[present].mean() if present.any() else 0
    bars.set(xlabel=score, xlim=(max(values.min() - 0.05, 0), 1), title=f"{score}, mean {mean:.3f}")
    bars.grid(axis="x", alpha=0.3)
    _save(figure, path)


def roc(path: Path, probability: Tensor, targets: Tensor, labels: list[str]) -> None:
    """Plot one-against-the-rest ROC curves from probabilities (N, K) and targets (N,) or several labels (N, K).

    All classes are drawn; with more than SHOWN the legend names the weakest.
    """
    probability, targets = probability.numpy(), targets.numpy()
    by_class = {}
    for k in range(len(labels)):
        positive = targets[:, k] if targets.ndim == 2 else targets == k
        if 0 < positive.sum() < len(positive):  # otherwise there is no curve
            false, true, _ = roc_curve(positive, probability[:, k])
            by_class[k] = (false, true, auc(false, true))
    area = "area under the curve" if len(by_class) <= SHOWN else "area"
    figure, axes = _class_curves(by_class, labels, area, 4, "lower right", drawstyle="steps-post")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set(xlabel="false positive rate (log above 0.001)", ylabel="true positive rate")
    axes.set_title("ROC, each class against the rest")
    _save(figure, path)


def mistakes(path: Path, worst: list[tuple[float, Tensor, int, int]], labels: list[str]) -> None:
    """Draw the most confident mistakes: (confidence, uint8 image (C, H, W), predicted, true)."""
    figure, grid = _grid(len(worst), COLUMNS, width=1.9, height=2.1, extra=0.5)
    for axes, (confidence, image, predicted, true) in zip(grid, worst, strict=True):
        axes.set_axis_off()
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        found, there = literal(labels[predicted]), literal(labels[true])
        axes.set_title(f"{found} {confidence:.0%}\ntrue: {there}", fontsize=9)
    figure.suptitle("Most confident mistakes" if worst else "No mistakes")
    _save(figure, path)


def detections(path: Path, pictures: list, labels: list[str]) -> None:
    """Draw pictures (uint8 image (C, H, W), (boxes, scores, classes), targets): true boxes left, detections right.

    Boxes are fractions of the image. Detections are drawn from a score of 0.3.
    """
    figure, grid = _grid(2 * len(pictures), 6, width=2.6, height=2.8)
    pairs = zip(grid[::2], grid[1::2], pictures, strict=True)
    for truth, found, (image, (boxes, scores, classes), targets) in pairs:
        height, width = targets["sizes"].tolist()
        for axes, title in ((truth, "true"), (found, "found")):
            axes.set_axis_off()
            axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
            axes.set_title(title, fontsize=9)
        there = targets["labels"] >= 0
        for box, k in zip(targets["boxes"][there].tolist(), targets["labels"][there].tolist(), strict=True):
            _box(truth, box, width, height, f"C{k % 10}", literal(labels[k]))
        for box, score, k in zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True):
            if score >= SURE:
                _box(found, box, width, height, f"C{k % 10}", f"{literal(labels[k])} {score:.0%}")
    _save(figure, path)


def masks(path: Path, pictures: list[tuple[Tensor, Tensor, Tensor]], labels: list[str]) -> None:
    """Draw pictures (uint8 (C, H, W)) alone, and in grey under their true and predicted masks (uint8 (H, W)).

    Ignored pixels stay uncovered, and so does a class called background.
    """
    height, width = pictures[0][1].shape if pictures else (1, 1)
    shape = min(max(height / width, 0.5), 2)  # a thin picture must not make the figure huge, or too small for titles
    figure, grid = _grid(3 * len(pictures), 6, width=2.5, height=2.5 * shape, extra=0.6)
    seen: set[int] = set()
    for i, (image, true, found) in enumerate(pictures):
        shown = (("picture", None), ("true", true), ("found", found))
        for axes, (title, mask) in zip(grid[3 * i : 3 * i + 3], shown, strict=True):
            axes.set_axis_off()
            pixels = image.permute(1, 2, 0).numpy()
            grey = mask is not None or pixels.shape[2] == 1  # colours of a picture would mix with those of the classes
            axes.imshow(pixels.mean(axis=2) if grey else pixels, cmap="gray", vmin=0, vmax=255)
            if mask is not None:
                classes = mask.numpy()
                seen.update(np.unique(classes).tolist())
                axes.imshow(_paint(classes, labels))
            axes.set_title(title, fontsize=9)
    named = [k for k in sorted(seen) if k < len(labels) and labels[k] != BACKGROUND][:COLOURED]
    handles = [Patch(color=PALETTE[k] / 255, label=literal(labels[k])) for k in named]
    figure.legend(handles=handles, loc="outside lower center", ncols=12, fontsize=8)
    _save(figure, path)


def _paint(mask: np.ndarray, labels: list[str]) -> np.ndarray:
    """Return colours with opacity (H, W, 4) for class ids (H, W)."""
    opacity = np.zeros(256)
    opacity[: len(labels)] = [0 if label == BACKGROUND else PAINT for label in labels]
    return np.dstack([PALETTE[mask] / 255, opacity[mask]])


def _box(axes, box: list[float], width: int, height: int, colour: str, text: str) -> None:
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=1.5))
    style = {"facecolor": colour, "alpha": 0.8, "pad": 0.5, "linewidth": 0}
    place = "bottom" if top > height / 20 else "top"  # above the box if there is room, else inside
    axes.text(left, top, text, fontsize=6, color="white", va=place, bbox=style, clip_on=True)


def precision_recall(path: Path, precision: dict[int, np.ndarray], labels: list[str]) -> None:
    """Plot each class's precision (101,) over recalls from 0 to 1; with more than SHOWN, only the weakest are named."""
    by_class = {k: (np.linspace(0, 1, len(curve)), curve, curve.mean()) for k, curve in precision.items()}
    figure, axes = _class_curves(by_class, labels, "AP50", 3, "lower left")
    axes.set(xlabel="recall", ylabel="precision")
    axes.set_title("Precision over recall at an overlap of 0.5")
    _save(figure, path)


def forecasts(path: Path, shown: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Plot series (past (T,), actual values (H,), sample paths (S, H)), with the paths' quantiles as a fan."""
    figure, grid = _grid(len(shown), 2, width=7, height=2.6, extra=0.4)
    for axes, (past, after, paths) in zip(grid, shown, strict=True):
        before, ahead = np.arange(-len(past), 0), np.arange(len(after))
        beside = ahead if len(ahead) > 1 else np.array([-0.3, 0.3])  # the fan of a single step needs a width
        _line(axes, before, past.numpy(), color="black", linewidth=1, label="past")
        for low, high, colour in ((0.05, 0.95, "#deebf7"), (0.1, 0.9, "#c6dbef"), (0.25, 0.75, "#9ecae1")):
            edges = np.quantile(paths.numpy(), [low, high], axis=0)
            axes.fill_between(beside, *edges, color=colour, linewidth=0, label=f"{high - low:.0%} of the paths")
        _line(axes, ahead, np.median(paths.numpy(), axis=0), color="tab:blue", linewidth=1.2, label="median")
        _line(axes, ahead, after.numpy(), color="tab:red", linewidth=1, label="actual")
        axes.axvline(-0.5, color="grey", linewidth=0.6)
        axes.margins(x=0.01)
        axes.grid(alpha=0.3)
    if shown:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    figure.suptitle("Forecasts; steps from the start of the forecast")
    _save(figure, path)


def calibration(path: Path, levels: tuple[float, ...], covered: Tensor) -> None:
    """Plot the share of values at or below each quantile (Q,) against its level."""
    figure, (axes,) = _grid(1, 1, width=4.6, height=4.4)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    axes.plot(levels, covered.numpy(), marker="o", color="tab:blue", label="this model")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the quantile", ylabel="share of values at or below it")
    axes.set_title("Calibration")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def by_time(path: Path, losses: dict[str, Tensor]) -> None:
    """Plot the weighted quantile loss (H,) of several forecasts over the steps ahead."""
    figure, (axes,) = _grid(1, 1, width=6.5, height=4)
    for i, (name, loss) in enumerate(losses.items()):
        style = {"color": f"C{i}", "linewidth": 2 if name == "this model" else 1}
        _line(axes, np.arange(1, len(loss) + 1), loss.numpy(), label=name, **style)
    axes.set(xlabel="steps ahead", ylabel="weighted quantile loss", ylim=(0, None))
    axes.set_title("Loss by forecast step")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def attention(path: Path, maps: list[tuple[np.ndarray, list[str], list[str]]]) -> None:
    """Draw heat maps of attention weights (T, S), labelled with the tokens of source and target."""
    figure, grid = _grid(len(maps), min(3, len(maps)), width=6, height=5)
    for axes, (weights, source, target) in zip(grid, maps, strict=True):
        draw_attention(axes, weights, source, target)
    figure.suptitle("Attention of each output token (rows) to the source tokens (columns)")
    _save(figure, path)


def heads(path: Path, layers: list[np.ndarray], pieces: list[str]) -> None:
    """Draw the attention (H, T, T) of each layer: one row per layer, one column per head, tokens at the edges only."""
    names = [literal(repr(piece)[1:-1].replace(" ", "\u2423")) for piece in pieces]
    rows, columns = len(layers), len(layers[0])
    figure = Figure(figsize=(1 + 2.6 * columns, 1 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, j in np.ndindex(rows, columns):
        axes = grid[i, j]
        axes.imshow(layers[i][j], cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
        axes.set_yticks(range(len(names)), names, fontsize=5)
        axes.set_title(f"layer {i + 1}, head {j + 1}", fontsize=8)
    _save(figure, path)


def by_position(path: Path, nats: Tensor) -> None:
    """Plot the loss of a token over the number of tokens read, with the mean of each octave."""
    seen = np.arange(len(nats)) + 1
    figure, (axes,) = _grid(1, 1, width=5.5, height=3.6)
    axes.plot(seen, nats.numpy(), color="tab:blue", alpha=0.35, linewidth=1, label="each position")
    edges = [2**i for i in range(len(nats).bit_length())]
    for low, high in zip(edges, [*edges[1:], len(nats) + 1], strict=True):
        part = nats.numpy()[low - 1 : high - 1]
        axes.hlines(part.mean(), low, high, color="tab:orange", linewidth=2, label="octave" if low == 1 else None)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens read", ylabel="nats per token", title="Loss by position in the context")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def continuations(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write prompts and their continuations as Markdown."""
    fence = "~~~~~~"
    parts = [f"{fence}\n{prompt}\n{fence}\n\ncontinues as\n\n{fence}\n{text}\n{fence}\n" for prompt, text in rows]
    write_text(path, "# Prompts of the test split\n\n" + "\n---\n\n".join(parts))


def by_length(path: Path, lengths: list[int], texts: list[str], references: list[str], score: Callable) -> None:
    """Plot the score of texts grouped by the length of their sources, and the size of each group."""
    bounds = np.unique(np.quantile(lengths, np.linspace(0, 1, GROUPS + 1)).astype(int))
    places = np.clip(np.searchsorted(bounds, lengths, side="right") - 1, 0, max(len(bounds) - 2, 0))
    names, values, counts = [], [], []
    for group in np.unique(places):
        inside = np.flatnonzero(places == group)
        names.append(f"{min(lengths[i] for i in inside)}–{max(lengths[i] for i in inside)}")
        values.append(score([texts[i] for i in inside], [references[i] for i in inside]))
        counts.append(len(inside))
    figure, (axes,) = _grid(1, 1, width=6.5, height=4)
    bars = axes.bar(range(len(names)), values, color="tab:blue")
    axes.bar_label(bars, [f"{value:.1f}\n({count})" for value, count in zip(values, counts, strict=True)], fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="tokens of the source (sentences in brackets)", ylabel="BLEU", title="BLEU by source length")
    axes.margins(y=0.18)
    axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def samples(path: Path, rows: list[tuple[str, str, str]], notes: list[str]) -> None:
    """Write `notes` and a Markdown table of source, reference and output of some sentences."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")

    lines = [*notes, "", "| source | reference | output |", "|---|---|---|"]
    lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    write_text(path, "\n".join(lines) + "\n")
