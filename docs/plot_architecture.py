"""Draw docs/images/architecture.png: `python docs/plot_architecture.py`."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, PAPER = "#1f2933", {"door": "#fde8c8", "torch": "#dbeafe", "edge": "#d8f3dc", "disk": "#ffffff"}
BOXES = {  # name: (x, y, width, text, kind)
    "config": (0.2, 5.3, 2.2, "configs/NAME.yaml", "disk"),
    "train": (3.1, 5.3, 2.2, "train.py", "door"),
    "run": (6.0, 5.3, 2.6, "runs/NAME\nconfig, checkpoints,\nmetrics, figures", "disk"),
    "export.py": (9.3, 5.3, 2.0, "export.py", "door"),
    "bundle": (12.0, 5.3, 2.6, "bundles/NAME\n*.onnx, manifest.json,\nreport.md", "disk"),
    "data": (0.2, 2.6, 2.6, "data\nfiles → checked,\naugmented batches", "torch"),
    "tasks": (4.2, 2.6, 2.8, "tasks\nloss, metrics, figures,\ndeployable()", "torch"),
    "export": (9.0, 2.6, 2.6, "export\nto ONNX, quantised,\nverified, measured", "torch"),
    "training": (1.5, 0.3, 2.4, "training\nrun folder, checkpoints,\ndevices", "torch"),
    "models": (4.2, 0.3, 2.8, "models\nnetworks, one file\nper architecture", "torch"),
    "runtime": (9.0, 0.3, 2.6, "runtime\nbundle → predictions,\nwithout torch", "edge"),
    "predictions": (12.4, 0.3, 2.2, "predictions\nplain values", "disk"),
}
HEIGHT = 1.15
IMPORTS = [  # from, to: side of leaving, side of arriving
    ("train", "data", "bottom", "top"),
    ("train", "tasks", "bottom", "top"),
    ("train", "training", "bottom", "top"),
    ("export.py", "export", "bottom", "top"),
    ("tasks", "models", "bottom", "top"),
    ("tasks", "training", "bottom", "top"),
    ("tasks", "runtime", "right", "left"),
    ("export", "runtime", "bottom", "top"),
]
FLOWS = [
    ("config", "train"),
    ("train", "run"),
    ("run", "export.py"),
    ("export.py", "bundle"),
    ("runtime", "predictions"),
]


def side(name: str, where: str) -> tuple[float, float]:
    """Return the middle of one side of a box."""
    x, y, width, *_ = BOXES[name]
    middle = (x + width / 2, y + HEIGHT / 2)
    return {
        "top": (middle[0], y + HEIGHT),
        "bottom": (middle[0], y),
        "left": (x, middle[1]),
        "right": (x + width, middle[1]),
    }[where]


def main() -> None:
    """Draw and save the figure."""
    figure = Figure(figsize=(13, 6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 14.8), ylim=(-0.9, 6.9))
    axes.set_axis_off()
    for x, y, width, text, kind in BOXES.values():
        style = {"facecolor": PAPER[kind], "edgecolor": INK, "linestyle": ":" if kind == "disk" else "-"}
        axes.add_patch(FancyBboxPatch((x, y), width, HEIGHT, boxstyle="round,pad=0.03,rounding_size=0.12", **style))
        name, _, rest = text.partition("\n")
        axes.text(x + width / 2, y + HEIGHT - (0.28 if rest else 0.57), name, ha="center", va="center", weight="bold")
        axes.text(x + width / 2, y + 0.42, rest, ha="center", va="center", fontsize=9, color=INK)
    flow = {"arrowstyle": "-|>", "color": "#c2410c", "lw": 2, "mutation_scale": 16}
    for start, end in FLOWS:
        axes.annotate("", side(end, "left"), side(start, "right"), arrowprops=flow)
    axes.annotate("", (11.55, 0.3 + HEIGHT), side("bundle", "bottom"), arrowprops=flow)
    axes.text(12.9, 3.5, "copied to\nthe device", color="#c2410c", fontsize=9)
    call = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "mutation_scale": 12}
    for start, end, leave, arrive in IMPORTS:
        axes.annotate("", side(end, arrive), side(start, leave), arrowprops=call)
    hook = {**call, "linestyle": "--"}
    axes.annotate("", side("tasks", "right"), side("export", "left"), arrowprops=hook)
    axes.text(8.0, 3.3, "calls\ndeployable()", ha="center", fontsize=9, style="italic")
    axes.plot([0.9, 0.9, 10.3], [2.6, -0.05, -0.05], color=INK, lw=1.1)  # around training and the models
    axes.plot([2.7, 2.7], [0.3, -0.05], color=INK, lw=1.1)
    axes.annotate("", side("runtime", "bottom"), (10.3, -0.08), arrowprops=call)
    legend = "orange: files on disk    black: imports    dashed: calls without importing"
    axes.text(7.4, -0.6, f"{legend}    blue: needs torch    green: no torch", ha="center", fontsize=9)
    figure.savefig(Path(__file__).parent / "images" / "architecture.png", dpi=110)


if __name__ == "__main__":
    main()
