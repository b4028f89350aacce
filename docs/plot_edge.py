"""Draw docs/images/edge.png from the rows of docs/benchmarks.json: `python docs/plot_edge.py`."""

import json
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

DOCS = Path(__file__).parent
COLOURS = {
    "PyTorch eager": "#c2410c",
    "PyTorch compiled": "#f59e0b",
    "its float32 graph": "#93c5fd",
    "bundle": "#1d4ed8",
}
PANELS = {  # what a row begins with: title, factor, format
    "an answer": ("one answer, ms", 1e3, "{:.3g}"),
    "peak memory": ("peak memory, MB", 1, "{:.0f}"),
    "start to first answer": ("start to first answer, s", 1, "{:.2g}"),
}


def figures(rows: dict[str, dict], what: str, contender: str) -> float:
    """The median of a contender's figures."""
    beside = "PyTorch eager" if contender == "bundle" else contender
    row = rows[f"{what}, beside {beside}"]
    return median(row["own" if contender == "bundle" else "peer"])


def main() -> None:
    """Draw and save."""
    known = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))
    exports = {name: record for name, record in known.items() if record["module"] == "edge" and record["rows"]}
    height = 1 + 0.8 * len(exports)
    figure = Figure(figsize=(12, height), layout="constrained")
    for axes, (what, (title, factor, text)) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
        for index, (contender, colour) in enumerate(COLOURS.items()):
            values = [factor * figures(record["rows"], what, contender) for record in exports.values()]
            places = [row + 0.2 * (index - 1.5) for row in range(len(values))]
            bars = axes.barh(places, values, 0.18, color=colour, label=contender)
            axes.bar_label(bars, [text.format(value) for value in values], padding=3, fontsize=8)
        axes.set(title=title, xscale="log")
        axes.margins(x=0.18)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    precisions = [
        next(iter(record["rows"].values()))["beside"].split(": ")[1].rstrip(")") for record in exports.values()
    ]
    names = [f"{name.removeprefix('edge-')}\n{precision}" for name, precision in zip(exports, precisions, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    machines = {record["where"]["machine"] for record in exports.values()}
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.suptitle(f"{'; '.join(sorted(machines))}; one answer at a time; logarithmic", fontsize=10)
    figure.savefig(DOCS / "images/edge.png", dpi=110)


if __name__ == "__main__":
    main()
