"""SSD300 with a VGG-16 base beside torchvision's: `python -m benchmarks.detection`.

Both hold the same weights and see the same pictures and boxes, in one process and in turns. Timed are the way from the
heads to detections, for a network that knows nothing (every class of every default box is above the threshold) and for
heads as a trained one has them (a few in a hundred default boxes are certain of something), and the training step:
forward, matching, loss and backward, without the optimiser, dlref in NHWC as its configs have it.

`python -m benchmarks.detection --agreement RUN BUNDLE` compares COCO's metrics of a run and of its bundle on the whole
test split instead.
"""

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_convert

from benchmarks.turns import in_turns, show
from dlref.cli import load_run
from dlref.models import SSDVGG16
from dlref.runtime import load, make_runner
from dlref.tasks.multibox import Detections, match, multibox_loss

CLASSES = 90
BATCH = 8  # pictures whose heads are decoded


def heads(batch: int, boxes: int, trained: bool, device: str) -> tuple[Tensor, Tensor]:
    """Offsets and logits: noise, or noise far below the background with three default boxes in a hundred above it."""
    offsets, logits = torch.randn(batch, boxes, 4) / 2, torch.randn(batch, boxes, CLASSES + 1)
    if trained:
        logits[..., 0] += 12
        certain = torch.rand(batch, boxes, 1) < 0.03
        logits += certain * 6 * torch.nn.functional.one_hot(torch.randint(0, CLASSES, (batch, boxes)) + 1, CLASSES + 1)
        logits[..., 0] -= 6 * certain[..., 0]
    return offsets.to(device), logits.to(device)


def detections(theirs, own: SSDVGG16, trained: bool, device: str) -> dict[str, list[float]]:
    """From the heads to detections. Both have to find as many."""
    detect = Detections(0.01, 0.45, 200).to(device)
    offsets, logits = heads(BATCH, len(own.anchors), trained, device)
    corners = [box_convert(own.anchors, "cxcywh", "xyxy") * 300] * BATCH

    def published() -> list[dict[str, Tensor]]:
        heads = {"bbox_regression": offsets, "cls_logits": logits}
        return theirs.postprocess_detections(heads, corners, [(300, 300)] * BATCH)

    with torch.inference_mode():
        counts = [len(found["scores"]) for found in published()], detect(offsets, logits, own.anchors)[3].tolist()
        print(f"detections of an image: torchvision {counts[0]}, dlref {counts[1]}")
        calls = {"torchvision": published, "dlref": lambda: detect(offsets, logits, own.anchors)}
        return in_turns("detections", calls, device)


def steps(theirs, own: SSDVGG16, batch: int, device: str) -> dict[str, list[float]]:
    """Forward, matching, loss and backward."""
    images = torch.rand(batch, 3, 300, 300, device=device)
    corner = torch.rand(batch, 8, 2, device=device) * 0.7
    boxes = torch.cat([corner, corner + 0.05 + 0.25 * torch.rand(batch, 8, 2, device=device)], dim=-1)
    labels = torch.randint(0, CLASSES, (batch, 8), device=device)
    targets = [{"boxes": b * 300, "labels": k + 1} for b, k in zip(boxes, labels, strict=True)]

    def published() -> None:
        theirs.zero_grad()
        sum(theirs(list(images), targets).values()).backward()

    own = own.to(memory_format=torch.channels_last)  # as the configs have it

    def ours() -> None:
        own.zero_grad()
        matched = match(boxes, labels, own.anchors, 0.5)
        pixels = ((images - 0.45) * 255).contiguous(memory_format=torch.channels_last)
        sum(multibox_loss(*own(pixels), boxes, labels, own.anchors, matched)).backward()

    return in_turns("training steps", {"torchvision": published, "dlref": ours}, device)


def agreement(run: Path, bundle: Path, overrides: list[str]) -> None:
    """Print the metrics of PyTorch and of the bundle, both by the runner that a device uses."""
    task, data = load_run(run, overrides)
    data.prepare_data()
    data.setup("test")
    task.learn(data)
    deployable = task.deployable(next(iter(data.test_dataloader())))
    runners = {"PyTorch": make_runner(deployable.kind, deployable.graphs, deployable.metadata), "bundle": load(bundle)}
    batches = data.test_dataloader()
    for name, runner in runners.items():
        shown = track(batches, name, console=Console(stderr=True), transient=True)
        scores = task.scores(runner, shown)
        print(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in scores.items())}")
    print(f"{run.name}, {len(batches.dataset)} test pictures")


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="pictures of a training step (default: 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--agreement", type=Path, nargs=2, metavar=("RUN", "BUNDLE"))
    options, overrides = parser.parse_known_args()
    if options.agreement:
        agreement(*options.agreement, overrides)
        return
    torch.manual_seed(0)
    device = options.device
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1, trainable_backbone_layers=5)
    own = SSDVGG16(CLASSES)
    own.load_state_dict(theirs.state_dict())
    theirs, own = theirs.to(device), own.to(device)
    rows = {
        f"detections, batch {BATCH}, untrained heads": detections(theirs, own, False, device),
        f"detections, batch {BATCH}, heads as trained": detections(theirs, own, True, device),
        f"training step, batch {options.batch}": steps(theirs, own, options.batch, device),
    }
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"\n{where}\n\n| what | torchvision, ms | dlref, ms | torchvision / dlref |\n| --- | --- | --- | --- |")
    for title, seconds in rows.items():
        show(title, seconds)
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision")), platform.python_version())


if __name__ == "__main__":
    main()
