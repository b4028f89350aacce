"""FCN with a ResNet-50 beside torchvision's: `python -m benchmarks.segmentation`.

Both hold the same weights and see the same pictures and masks, in one process and in turns. Timed are the training step
(forward, enlarging, loss of both heads and backward, without the optimiser; dlref in NHWC as its configs have it) and
the update of the metric, beside torchmetrics' own on the same pixels. Of each metric it says whether it waits for the
device: on a GPU by torch.cuda.set_sync_debug_mode, elsewhere by tensors that have no values.

A bundle beside PyTorch is what export.py measures; see its report.md.
"""

import argparse
import platform
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.models.segmentation import fcn_resnet50

from benchmarks.turns import in_turns, show
from dlref.models import FCNResNet
from dlref.tasks.semantic_segmentation import VOID, Confusion, pixel_loss

CLASSES = 21
AUXILIARY = 0.5  # torchvision's weight of the auxiliary head


def steps(theirs: torch.nn.Module, own: FCNResNet, images: Tensor, masks: Tensor) -> dict[str, list[float]]:
    """Forward, loss of both heads and backward. Both losses have to be equal."""
    targets = masks.long()

    def published() -> Tensor:
        theirs.zero_grad()
        heads = theirs(images)
        loss = sum(
            w * F.cross_entropy(heads[k], targets, ignore_index=VOID) for k, w in (("out", 1), ("aux", AUXILIARY))
        )
        loss.backward()
        return loss

    own = own.to(memory_format=torch.channels_last)

    def ours() -> Tensor:
        own.zero_grad()
        head, auxiliary = own(images.contiguous(memory_format=torch.channels_last))
        loss = pixel_loss(head, masks, None) + AUXILIARY * pixel_loss(auxiliary, masks, None)
        loss.backward()
        return loss

    print(f"losses of one step: torchvision {published().item():.6f}, dlref {ours().item():.6f}")
    return in_turns("training steps", {"torchvision": published, "dlref": ours}, images.device.type)


def waits(update: Callable, found: Tensor, masks: Tensor) -> bool:
    """Whether an update of a metric asks the device for a value."""
    if found.is_cuda:
        torch.cuda.set_sync_debug_mode("error")
        try:
            update(found, masks)
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            update(mode.from_tensor(found), mode.from_tensor(masks))
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True
    return False


def updates(masks: Tensor) -> dict[str, list[float]]:
    """The confusion matrix of a batch, by torchmetrics and by this project. Both have to be equal."""
    found = torch.randint(0, CLASSES, masks.shape, device=masks.device)

    def metrics() -> dict:
        theirs = MulticlassConfusionMatrix(CLASSES, ignore_index=VOID, validate_args=False)
        return {"torchvision": theirs.to(masks.device), "dlref": Confusion(CLASSES).to(masks.device)}

    theirs, own = metrics().values()
    theirs.update(found, masks)
    own.update(found, masks)
    assert torch.equal(theirs.compute(), own.compute())
    names = {"torchvision": "torchmetrics", "dlref": "dlref"}
    for name, metric in metrics().items():
        print(f"{names[name]}'s confusion matrix waits for the device: {waits(metric.update, found, masks)}")
    calls = {name: (lambda m=metric: m.update(found, masks)) for name, metric in metrics().items()}
    return in_turns("metric", calls, masks.device.type)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="pictures of a training step (default: 2)")
    parser.add_argument("--size", type=int, default=224, help="side of a picture, in pixels (default: 224)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = options.device
    theirs = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    own = FCNResNet(50, CLASSES)
    own.load_state_dict(theirs.state_dict())
    for dropout in (m for network in (theirs, own) for m in network.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0  # so that the losses can be compared
    theirs, own = theirs.to(device), own.to(device)
    shape = (options.batch, options.size, options.size)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    masks = torch.randint(0, CLASSES, shape, dtype=torch.uint8, device=device)
    masks[:, : options.size // 10] = VOID
    rows = {
        f"training step, {options.batch} pictures of {options.size}×{options.size}": steps(theirs, own, images, masks),
        "confusion matrix of 8 masks of 480×360 (torchmetrics)": updates(
            torch.randint(0, CLASSES, (8, 360, 480), dtype=torch.uint8, device=device)
        ),
    }
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"\n{where}\n\n| what | torchvision, ms | dlref, ms | torchvision / dlref |\n| --- | --- | --- | --- |")
    for title, seconds in rows.items():
        show(title, seconds)
    packages = ("torch", "torchvision", "torchmetrics")
    print(", ".join(f"{name} {version(name)}" for name in packages), platform.python_version())


if __name__ == "__main__":
    main()
