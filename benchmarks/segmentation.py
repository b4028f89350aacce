"""FCN with a ResNet-50 beside torchvision's.

Both hold the same weights and see the same pictures and masks, in one process and in turns. Timed are the training step
(forward, enlarging, loss of both heads and backward, without the optimiser; dlref in NHWC as its configs have it,
torchvision's as it comes and in NHWC, too) and the update of the metric, beside torchmetrics' own on the same pixels.
Of both metrics it is made sure that theirs waits for the device and ours does not: on a GPU by
torch.cuda.set_sync_debug_mode, elsewhere by tensors that have no values.
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
BATCH, SIZE = 2, 224  # pictures of a training step, and their sides
MASKS = (8, 360, 480)  # of a metric's update


def both() -> tuple[torch.nn.Module, FCNResNet]:
    """Theirs and ours with the same weights, without dropout so that losses can be compared."""
    theirs = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    own = FCNResNet(50, CLASSES)
    own.load_state_dict(theirs.state_dict())
    for dropout in (m for network in (theirs, own) for m in network.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0
    return theirs.to(DEVICE), own.to(DEVICE, memory_format=torch.channels_last)


def step() -> Rows:
    """Forward, loss of both heads and backward. Both losses have to be equal."""
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


def metric() -> Rows:
    """The confusion matrix of a batch, by torchmetrics and by this project. Both have to be equal."""
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
