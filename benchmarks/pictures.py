"""Draw the measured figures: docs/images/benchmarks.png and docs/images/edge.png."""

import math
import re
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.page import Record, Records

MET, UNMET = "#1d4ed8", "#c2410c"
CONTENDERS = {
    "PyTorch eager": "#c2410c",
    "PyTorch eager, CPU wheel": "#78716c",
    "PyTorch compiled": "#f59e0b",
    "its float32 graph": "#93c5fd",
    "bundle": "#1d4ed8",
}
PANELS = {  # beginning of a row of `edge` -> title, factor, format
    "an answer": ("one answer, ms", 1e3, "{:.3g}"),
    "peak memory": ("peak memory, MB", 1, "{:.0f}"),
    "start to first answer": ("start to first answer, s", 1, "{:.2g}"),
}


def draw(folder: Path, records: Records) -> None:
    """Draw both pictures into the folder `images`."""
    (folder / "images").mkdir(exist_ok=True)
    draw_goals(folder / "images/benchmarks.png", records)
    draw_edge(folder / "images/edge.png", {n: one for n, one in records.items() if one.module == "edge" and one.rows})


def draw_goals(path: Path, records: Records) -> None:
    """Draw every ratio that has a goal, except for those of bundles, which are in the other picture."""
    rows = {
        f"{re.sub(',? beside .*', '', title).replace('`', '')}, vs. {row.beside}": row
        for record in records.values()
        for title, row in record.rows.items()
        if record.module != "edge" and row.peer and row.goal
    }
    if not rows:
        return
    figure = Figure(figsize=(11, 1.2 + 0.21 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows.values()):
        colour = MET if row.met else UNMET
        axes.plot([min(row.values), max(row.values)], [place, place], color=colour, linewidth=1.5, alpha=0.5)
        axes.plot(row.median, place, "o", color=colour, markersize=5)
        axes.plot(float(row.goal.split()[1]), place, "|", color="black", markersize=9)
    axes.axvline(1, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "How many times better dlref is: median and spread of all turns. Black mark: the goal; blue if it is met",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def draw_edge(path: Path, exports: Records) -> None:
    """Draw the time, memory and start of each bundle and of what it replaces."""
    if not exports:
        return
    figure = Figure(figsize=(12, 1 + len(exports)), layout="constrained")
    for axes, (what, (title, factor, text)) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
        for index, (contender, colour) in enumerate(CONTENDERS.items()):
            values = [factor * middle(record, what, contender) for record in exports.values()]
            places = [row + 0.16 * (index - (len(CONTENDERS) - 1) / 2) for row in range(len(values))]
            bars = axes.barh(places, values, 0.15, color=colour, label=contender)
            labels = ["" if math.isnan(value) else text.format(value) for value in values]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set(title=title, xscale="log")
        axes.margins(x=0.18)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    precisions = [next(iter(one.rows.values())).beside.split(": ")[1].rstrip(")") for one in exports.values()]
    names = [f"{name.removeprefix('edge-')}\n{precision}" for name, precision in zip(exports, precisions, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    machines = {record.where.machine for record in exports.values()}
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(CONTENDERS), frameon=False)
    figure.suptitle(f"{'; '.join(sorted(machines))}; one answer at a time; logarithmic", fontsize=10)
    figure.savefig(path, dpi=110)


def middle(record: Record, what: str, contender: str) -> float:
    """Return the median of a contender's figures, NaN if there are none. A float32 bundle is its own float32 graph."""
    if row := record.rows.get(f"{what}, beside {contender}"):
        return statistics.median(row.peer)
    row = record.rows.get(f"{what}, beside PyTorch eager")
    return statistics.median(row.own) if row and contender in ("bundle", "its float32 graph") else math.nan
