"""SSD300 with a VGG-16 base beside torchvision's.

Both hold the same weights and see the same pictures and boxes, in one process and in turns. Timed are the way from the
heads to detections, for a network that knows nothing (every class of every default box is above the threshold) and for
heads as a trained one has them (a few in a hundred default boxes are certain of something), and the training step:
forward, matching, loss and backward, without the optimiser, dlref in NHWC as its configs have it.
"""

import torch
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_convert

from benchmarks.rows import DEVICE, Row, Rows, in_turns, run
from dlref.models import SSDVGG16
from dlref.tasks.multibox import Detections, match, multibox_loss

CLASSES = 90
DECODED, TRAINED = 8, 4  # pictures whose heads are decoded, and of a training step


def both() -> tuple[torch.nn.Module, SSDVGG16]:
    """Theirs and ours with the same weights."""
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1, trainable_backbone_layers=5)
    own = SSDVGG16(CLASSES)
    own.load_state_dict(theirs.state_dict())
    return theirs.to(DEVICE), own.to(DEVICE)


def heads(batch: int, boxes: int, trained: bool) -> tuple[Tensor, Tensor]:
    """Offsets and logits: noise, or noise far below the background with three default boxes in a hundred above it."""
    offsets, logits = torch.randn(batch, boxes, 4) / 2, torch.randn(batch, boxes, CLASSES + 1)
    if trained:
        logits[..., 0] += 12
        certain = torch.rand(batch, boxes, 1) < 0.03
        logits += certain * 6 * torch.nn.functional.one_hot(torch.randint(0, CLASSES, (batch, boxes)) + 1, CLASSES + 1)
        logits[..., 0] -= 6 * certain[..., 0]
    return offsets.to(DEVICE), logits.to(DEVICE)


def detections(theirs: torch.nn.Module, own: SSDVGG16, trained: bool) -> Row:
    """From the heads to detections. Both have to find as many."""
    detect = Detections(0.01, 0.45, 200).to(DEVICE)
    offsets, logits = heads(DECODED, len(own.anchors), trained)
    corners = [box_convert(own.anchors, "cxcywh", "xyxy") * 300] * DECODED

    def published() -> list[dict[str, Tensor]]:
        heads = {"bbox_regression": offsets, "cls_logits": logits}
        return theirs.postprocess_detections(heads, corners, [(300, 300)] * DECODED)

    with torch.inference_mode():
        counts = [len(found["scores"]) for found in published()], detect(offsets, logits, own.anchors)[3].tolist()
        assert counts[0] == counts[1], f"detections of an image: torchvision {counts[0]}, dlref {counts[1]}"
        calls = {"torchvision": published, "dlref": lambda: detect(offsets, logits, own.anchors)}
        seconds = in_turns("detections", calls)
    return Row(seconds["dlref"], seconds["torchvision"], "s", "torchvision", ">= 3")


def decoding() -> Rows:
    """Heads of two kinds."""
    networks = both()
    title = f"from the heads to detections, SSD300, batch {DECODED}"
    return {
        f"{title}, untrained": detections(*networks, False),
        f"{title}, as trained": detections(*networks, True),
    }


def step() -> Rows:
    """Forward, matching, loss and backward. Both losses have to be equal."""
    theirs, own = both()
    images = torch.rand(TRAINED, 3, 300, 300, device=DEVICE)
    corner = torch.rand(TRAINED, 8, 2, device=DEVICE) * 0.7
    boxes = torch.cat([corner, corner + 0.05 + 0.25 * torch.rand(TRAINED, 8, 2, device=DEVICE)], dim=-1)
    labels = torch.randint(0, CLASSES, (TRAINED, 8), device=DEVICE)
    targets = [{"boxes": b * 300, "labels": k + 1} for b, k in zip(boxes, labels, strict=True)]
    means = torch.tensor([0.48235, 0.45882, 0.40784], device=DEVICE)[:, None, None]  # as torchvision normalises

    def published() -> Tensor:
        theirs.zero_grad()
        loss = sum(theirs(list(images), targets).values())
        loss.backward()
        return loss

    own.to(memory_format=torch.channels_last)  # as the configs have it

    def ours() -> Tensor:
        own.zero_grad()
        matched = match(boxes, labels, own.anchors, 0.5)
        pixels = ((images - means) * 255).contiguous(memory_format=torch.channels_last)
        loss = sum(multibox_loss(*own(pixels), boxes, labels, own.anchors, matched))
        loss.backward()
        return loss

    torch.testing.assert_close(ours(), published(), rtol=1e-3, atol=0)
    seconds = in_turns("training steps", {"torchvision": published, "dlref": ours})
    row = Row(seconds["dlref"], seconds["torchvision"], "s", "torchvision", ">= 1")
    return {f"training step, SSD300 with VGG-16, batch {TRAINED}": row}


BENCHMARKS = {"detection-decoding": decoding, "detection-step": step}


if __name__ == "__main__":
    run(BENCHMARKS)
