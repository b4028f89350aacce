"""A bundle compared with what it replaces on this machine: PyTorch eager and compiled, and its own float32 graph.

Each contender runs in a process of its own and makes one prediction at a time. A turn is an export, whose last step
measures the contenders one after the other. If int8 was tried, both graphs were measured three times, and the median
counts. PyTorch runs the programs that torch.export saved, without the checks of each call, and compiles with an empty
cache. A config's bundle is exported from the run that the config's own benchmark trained. ResNet and LeNet-5 at
published sizes have random weights; their speed and memory are those of trained networks. "Model" is the size of the
bundle's graphs or of PyTorch's weights, "installed" that of the packages needed for predictions. PyTorch is the default
wheel, from `pip install torch`, whose CUDA libraries cost memory and disk on a machine without a GPU, too.
TORCH_CPU_PYTHON names an interpreter that has numpy, onnxruntime, pillow and the wheel without these libraries. It is a
contender of its own, whose speed is left out because its version may differ.
"""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.configs import ON_A_CPU, roots, trained
from benchmarks.rows import NotHere, Row, Rows, run
from dlref.cli import load_run
from dlref.export.bundle import export
from dlref.export.measure import Contenders
from dlref.export.targets import ARM, TARGETS, Target
from dlref.models import LeNet5, ResNet
from dlref.runtime import UserError
from dlref.runtime.machine import saturates
from dlref.tasks import ImageClassifier, ImagePreprocess
from dlref.tasks.task import Task

TURNS = 3
UNTRAINED = {  # network, classes, side, channels
    "edge-lenet5": (lambda: LeNet5(10, activation="relu"), 10, 32, 1),
    "edge-resnet18": (lambda: ResNet(18, 1000), 1000, 224, 3),
    "edge-resnet50": (lambda: ResNet(50, 1000), 1000, 224, 3),
}
FIGURES = {  # of a contender: key -> what, unit, factor
    "latency_ms": ("an answer", "s", 1e-3),
    "first_answer_s": ("start to first answer", "s", 1),
    "peak_rss_mb": ("peak memory", "MB", 1),
    "model_mb": ("model", "MB", 1),
    "installed_mb": ("installed", "MB", 1),
}
PEERS = {  # and its figures that are not also those of another contender
    "pytorch-eager": ("PyTorch eager", set(FIGURES)),
    "cpu-wheel": ("PyTorch eager, CPU wheel", {"first_answer_s", "peak_rss_mb", "installed_mb"}),
    "pytorch-compiled": ("PyTorch compiled", {"latency_ms", "first_answer_s", "peak_rss_mb"}),
    "onnx-float32": ("its float32 graph", {"latency_ms", "first_answer_s", "peak_rss_mb", "model_mb"}),
}
# Goals of the comparison with PyTorch eager, from either wheel.
GOALS = {"latency_ms": ">= 2", "first_answer_s": ">= 10", "peak_rss_mb": ">= 8", "installed_mb": ">= 10"}
SOONER = {"edge-lenet5": ">= 1", "edge-resnet50": ">= 3"}  # other goals for the latency


class Noise:
    """A data module of random images, sufficient for an export."""

    multi_label, crop = False, None

    def __init__(self, classes: int, side: int, channels: int, n: int = 32):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator)
        self.labels = [str(k) for k in range(classes)]
        self.set = TensorDataset(images, torch.randint(0, classes, (n,), generator=generator))

    def prepare_data(self) -> None:
        """Do nothing: there is nothing to download."""

    def setup(self, stage: str) -> None:
        """Do nothing: there is nothing to read."""

    def train_dataloader(self) -> DataLoader:
        """Return the same data for every split."""
        return DataLoader(self.set, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def untrained(network, classes: int, side: int, channels: int) -> tuple[ImageClassifier, Noise]:
    """Return a task and data like `load_run`, but without a run."""
    torch.manual_seed(0)
    preprocess = ImagePreprocess(side, mean=[0.45] * channels, std=[0.25] * channels)
    return ImageClassifier(network=network(), preprocess=preprocess, optimizer=None).eval(), Noise(
        classes, side, channels
    )


def fitting() -> Target:
    """Return the target for this processor."""
    if platform.machine() in ARM:
        return TARGETS["arm64"]
    return TARGETS["x86-64-avx2" if saturates() else "x86-64"]


def measured(built: Callable[[], tuple[Task, LightningDataModule]], target: Target, folder: Path) -> tuple[str, dict]:
    """Measure one turn. Return the precision of the bundle, and every contender's figures."""
    python = os.environ.get("TORCH_CPU_PYTHON")
    if python and not shutil.which(python):
        raise NotHere(f"TORCH_CPU_PYTHON is {python}, which cannot be run")
    task, data = built()
    manifest = export(task, data, target, folder / "bundle")
    figures = manifest["measurement"]["contenders"]
    if python:
        graphs = task.deployable(next(iter(data.val_dataloader()))).graphs
        (folder / "programs").mkdir()
        contenders = Contenders(target, graphs, folder / "programs", folder / "bundle", python)
        try:
            figures["cpu-wheel"] = contenders.undisturbed("pytorch-eager", folder / "bundle")
        except UserError as error:  # it may lack torchvision, whose operators SSD uses
            print(f"the CPU wheel: {error}", file=sys.stderr)
    return manifest["precision"], figures


def bundle(name: str, built: Callable[[], tuple[Task, LightningDataModule]]) -> Rows:
    """Compare every figure of a bundle with those of the other contenders."""
    target, goals = fitting(), GOALS | {"latency_ms": SOONER.get(name, GOALS["latency_ms"])}
    with tempfile.TemporaryDirectory() as folder:
        turns = [measured(built, target, Path(folder, str(turn))) for turn in range(TURNS)]
    precisions, contenders = zip(*turns, strict=True)
    precision = " or ".join(sorted(set(precisions)))
    rows = {}
    for peer, (beside, keys) in PEERS.items():
        if peer == "onnx-float32" and precision == "float32":
            continue  # it is the bundle
        # Some figures may be missing: compiling needs a compiler, and memory is known only on Linux.
        known = [key for key in FIGURES if key in keys and all(turn.get(peer, {}).get(key) for turn in contenders)]
        for key, (what, unit, factor) in ((key, FIGURES[key]) for key in known):
            own, theirs = ([factor * turn[name][key] for turn in contenders] for name in ("bundle", peer))
            goal = goals.get(key, "") if peer in ("pytorch-eager", "cpu-wheel") else ""
            rows[f"{what}, beside {beside}"] = Row(own, theirs, unit, f"{beside} (bundle: {precision})", goal)
    return rows


def of_run(config: str) -> tuple[Task, LightningDataModule]:
    """Return a trained task and its data."""
    return load_run(trained(config), roots(config))


MADE = {f"edge-{config.replace('_', '-')}": partial(of_run, config) for config in ON_A_CPU}
MADE |= {name: partial(untrained, *case) for name, case in UNTRAINED.items()}
BENCHMARKS = {name: partial(bundle, name, built) for name, built in MADE.items()}


if __name__ == "__main__":
    run(BENCHMARKS)
