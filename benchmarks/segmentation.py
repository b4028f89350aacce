"""FCN with a ResNet-50 compared with torchvision's.

Both networks hold the same weights and see the same pictures and masks, in one process and in turns. One benchmark
times the training step: forward, upsampling, loss of both heads and backward, without the optimiser. dlref runs in
NHWC, as in its configs, torchvision in its default layout and in NHWC. The other times the update of the metric,
compared with torchmetrics' on the same pixels. It also verifies that torchmetrics' update waits for the device and
dlref's does not: on a GPU with torch.cuda.set_sync_debug_mode, elsewhere with tensors that have no values.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.models.segmentation import fcn_resnet50

from benchmarks.rows import DEVICE, Row, Rows, in_turns, run
from dlref.models import FCNResNet
from dlref.tasks.semantic_segmentation import VOID, Confusion, pixel_loss

CLASSES = 21
AUXILIARY = 0.5  # torchvision's weight of the auxiliary head
BATCH, SIZE = 2, 224  # pictures of a training step, and their side
MASKS = (8, 360, 480)  # of an update of the metric


def both() -> tuple[torch.nn.Module, FCNResNet]:
    """Return torchvision's network and dlref's: the same weights, and no dropout so that losses are comparable."""
    theirs = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    own = FCNResNet(50, CLASSES)
    own.load_state_dict(theirs.state_dict())
    for dropout in (m for network in (theirs, own) for m in network.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0
    return theirs.to(DEVICE), own.to(DEVICE, memory_format=torch.channels_last)


def step() -> Rows:
    """Time forward, loss of both heads and backward. Both losses must be equal."""
    torch.manual_seed(0)
    theirs, own = both()
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE)
    masks = torch.randint(0, CLASSES, (BATCH, SIZE, SIZE), dtype=torch.uint8, device=DEVICE)
    masks[:, : SIZE // 10] = VOID
    targets = masks.long()

    peers = {"torchvision": theirs, "torchvision, NHWC": deepcopy(theirs).to(memory_format=torch.channels_last)}
    nhwc = images.contiguous(memory_format=torch.channels_last)

    def published(name: str) -> Tensor:
        peers[name].zero_grad()
        heads = peers[name](nhwc if name.endswith("NHWC") else images)
        loss = sum(
            w * F.cross_entropy(heads[k], targets, ignore_index=VOID) for k, w in (("out", 1), ("aux", AUXILIARY))
        )
        loss.backward()
        return loss

    def ours() -> Tensor:
        own.zero_grad()
        head, auxiliary = own(nhwc)
        loss = pixel_loss(head, masks, None) + AUXILIARY * pixel_loss(auxiliary, masks, None)
        loss.backward()
        return loss

    calls = {name: partial(published, name) for name in peers}
    for call in calls.values():
        torch.testing.assert_close(ours(), call(), rtol=1e-4, atol=0)
    seconds = in_turns("training steps", calls | {"dlref": ours})
    title = f"training step, FCN with ResNet-50, {BATCH} pictures of {SIZE}×{SIZE}"
    return {f"{title}, beside {name}": Row(seconds["dlref"], seconds[name], "s", name, ">= 1") for name in peers}


def waits(update: Callable, found: Tensor, masks: Tensor) -> bool:
    """Return whether an update of a metric waits for a value from the device."""
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


def metric() -> Rows:
    """Time the confusion matrix of a batch by torchmetrics and by this project. Both must be equal."""
    torch.manual_seed(0)
    masks = torch.randint(0, CLASSES, MASKS, dtype=torch.uint8, device=DEVICE)
    found = torch.randint(0, CLASSES, MASKS, device=DEVICE)

    def metrics() -> tuple[MulticlassConfusionMatrix, Confusion]:
        theirs = MulticlassConfusionMatrix(CLASSES, ignore_index=VOID, validate_args=False)
        return theirs.to(DEVICE), Confusion(CLASSES).to(DEVICE)

    theirs, own = metrics()
    theirs.update(found, masks)
    own.update(found, masks)
    assert torch.equal(theirs.compute(), own.compute()), "the confusion matrices differ"
    waiting = [waits(one.update, found, masks) for one in metrics()]
    assert waiting == [True, False], f"waits for the device: torchmetrics {waiting[0]}, dlref {waiting[1]}"
    theirs, own = metrics()
    calls = {"torchmetrics": lambda: theirs.update(found, masks), "dlref": lambda: own.update(found, masks)}
    seconds = in_turns("metric", calls)
    row = Row(seconds["dlref"], seconds["torchmetrics"], "s", "torchmetrics")
    return {f"confusion matrix, {MASKS[0]} masks of {MASKS[2]}×{MASKS[1]}": row}


BENCHMARKS = {"segmentation-step": step, "segmentation-metric": metric}


if __name__ == "__main__":
    run(BENCHMARKS)
