"""Draw docs/images/edge.png from the bundles of `python -m benchmarks.edge --untrained`: `python docs/plot_edge.py`."""

import json
from pathlib import Path

from matplotlib.figure import Figure

NETWORKS = ("LeNet-5", "ResNet-18 at 224 px", "ResNet-50 at 224 px")
COLOURS = {
    "pytorch-eager": "#c2410c",
    "pytorch-compiled": "#f59e0b",
    "onnx-float32": "#93c5fd",
    "bundle": "#1d4ed8",
}
PANELS = {  # figure of the manifest: title, format
    "latency_ms": ("one answer, ms", "{:.3g}"),
    "peak_rss_mb": ("peak memory, MB", "{:.0f}"),
    "first_answer_s": ("start to first answer, s", "{:.2g}"),
}


def main() -> None:
    """Draw and save."""
    manifests = [
        json.loads(Path("bundles/edge", name, "manifest.json").read_text(encoding="utf-8")) for name in NETWORKS
    ]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (key, (title, text)) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        for index, (contender, colour) in enumerate(COLOURS.items()):
            values = [manifest["measurement"]["contenders"][contender][key] for manifest in manifests]
            places = [row + 0.2 * (index - 1.5) for row in range(len(manifests))]
            bars = axes.barh(places, values, 0.18, color=colour, label=contender)
            axes.bar_label(bars, [text.format(value) for value in values], padding=3, fontsize=8)
        axes.set(title=title, xscale="log")
        axes.margins(x=0.18)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    names = [f"{name}\n{manifest['precision']}" for name, manifest in zip(NETWORKS, manifests, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    measurement = manifests[0]["measurement"]
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.suptitle(f"{measurement['processor']}, {measurement['threads']} threads, batch 1; logarithmic", fontsize=10)
    figure.savefig(Path(__file__).parent / "images/edge.png", dpi=110)


if __name__ == "__main__":
    main()
