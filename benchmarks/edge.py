"""PyTorch eager, compiled, ONNX float32 and the bundle, for every run there is: `python -m benchmarks.edge`.

Exports each run that a config has under `--runs` for this machine's own processor, and prints what the export step
measured, each contender in a process of its own. `--untrained` adds networks of published sizes with random weights,
whose speed and memory are those of trained ones.
"""

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from dlref.cli import load_run
from dlref.export.bundle import export
from dlref.export.report import FIGURES, busy, contenders, table
from dlref.export.targets import ARM, TARGETS, Target
from dlref.models import LeNet5, ResNet
from dlref.tasks import ImageClassifier, ImagePreprocess

UNTRAINED = {  # network, classes, side, channels
    "LeNet-5": (lambda: LeNet5(10, activation="relu"), 10, 32, 1),
    "ResNet-18 at 224 px": (lambda: ResNet(18, 1000), 1000, 224, 3),
    "ResNet-50 at 224 px": (lambda: ResNet(50, 1000), 1000, 224, 3),
}
RATIOS = ("latency_ms", "peak_rss_mb", "first_answer_s", "model_mb", "installed_mb")


class Noise:
    """A data module of random images, enough to export."""

    multi_label, crop = False, None

    def __init__(self, classes: int, side: int, channels: int, n: int = 32):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator)
        self.labels = [str(k) for k in range(classes)]
        self.set = TensorDataset(images, torch.randint(0, classes, (n,), generator=generator))

    def prepare_data(self) -> None:
        """There is nothing to fetch."""

    def setup(self, stage: str) -> None:
        """Nor to read."""

    def train_dataloader(self) -> DataLoader:
        """One set for every split."""
        return DataLoader(self.set, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def untrained(network, classes: int, side: int, channels: int) -> tuple[ImageClassifier, Noise]:
    """A task as `load_run` gives one, without a run."""
    torch.manual_seed(0)
    preprocess = ImagePreprocess(side, mean=[0.45] * channels, std=[0.25] * channels)
    return ImageClassifier(network=network(), preprocess=preprocess, optimizer=None).eval(), Noise(
        classes, side, channels
    )


def rows(name: str, manifest: dict, trained: bool) -> list[list[str]]:
    """The contenders of one export, and how many times less the bundle takes than PyTorch eager."""
    measured = manifest["measurement"]["contenders"]
    test = manifest["verification"]["test"]
    score = {"pytorch": f"{test['pytorch']:.4f}", "bundle": f"{test['bundle']:.4f}"} if trained else {}
    lines = []
    for contender in busy(measured):
        print(f"{name}: {contender} waited for a core {measured[contender]['waited']:.0%} of the time")
    for contender, *figures in contenders(measured):
        precision = f"bundle, {manifest['precision']}" if contender == "bundle" else contender
        side = "bundle" if contender == "bundle" else "pytorch"
        lines.append(["", precision, score.get(side, "–"), *figures])
    lines[0][0] = name
    eager, bundle = measured["pytorch-eager"], measured["bundle"]
    known = [key for key in RATIOS if eager[key] and bundle[key]]
    times = [f"**{eager[key] / bundle[key]:.1f}×**" if key in known else "" for key in FIGURES]
    return [*lines, ["", "**eager / bundle**", "", *times]]


def main() -> None:
    """Export, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--output", type=Path, default=Path("bundles/edge"), help="folder of the bundles")
    parser.add_argument("--untrained", action="store_true", help="networks of published sizes too")
    options = parser.parse_args()
    configs = sorted(path.stem for path in Path("configs").glob("*.yaml"))
    names = [name for name in configs if (options.runs / name / "config.yaml").is_file()]
    print(f"without a run in {options.runs}: {', '.join(sorted(set(configs) - set(names))) or 'none'}")
    target: Target = TARGETS["arm64" if platform.machine() in ARM else "x86-64"]
    lines = []
    for name in names:
        manifest = export(*load_run(options.runs / name, []), target, options.output / name)
        lines += rows(f"`{name}`", manifest, trained=True)
    for name, case in UNTRAINED.items() if options.untrained else ():
        manifest = export(*untrained(*case), target, options.output / name)
        lines += rows(f"{name}, random weights", manifest, trained=False)
    if lines:
        print(
            f"\n{manifest['measurement']['processor']}, {manifest['measurement']['threads']} threads, {target.name}\n"
        )
        print(table(["network", "contender", "test score", *(title for title, _ in FIGURES.values())], lines))
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime")), platform.python_version())


if __name__ == "__main__":
    main()
