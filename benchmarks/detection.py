"""SSD300 with a VGG-16 base compared with torchvision's.

Both networks hold the same weights and see the same pictures and boxes, in one process and in turns. One benchmark
times decoding, from the outputs of the heads to detections. It does so for an untrained network (a third of all scores
are above the threshold) and for outputs like those of a trained one (three default boxes in a hundred are certain of a
class). torchvision keeps the 400 likeliest boxes of each of 90 classes, dlref the 1,000 likeliest of all classes. So
torchvision is also timed with 12 boxes per class, which are about as many in total and leave the same detections here.
The other benchmark times the training step: forward, matching, loss and backward, without the optimiser. dlref runs in
NHWC, as in its configs, torchvision in its default layout and in NHWC.
"""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_convert

from benchmarks.rows import DEVICE, Row, Rows, in_turns, run
from dlref.models import SSDVGG16
from dlref.tasks.multibox import Detections, match, multibox_loss

CLASSES = 90
FEW = 12  # candidates per class, 1,080 in total
DECODED, TRAINED = 8, 4  # pictures that are decoded, and pictures of a training step


def both() -> tuple[torch.nn.Module, SSDVGG16]:
    """Return torchvision's network and dlref's, with the same weights."""
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1, trainable_backbone_layers=5)
    own = SSDVGG16(CLASSES)
    own.load_state_dict(theirs.state_dict())
    return theirs.to(DEVICE), own.to(DEVICE)


def heads(batch: int, boxes: int, trained: bool) -> tuple[Tensor, Tensor]:
    """Return offsets and logits: noise, or noise far below the background except at three default boxes in 100."""
    offsets, logits = torch.randn(batch, boxes, 4) / 2, torch.randn(batch, boxes, CLASSES + 1)
    if trained:
        certain = torch.rand(batch, boxes) < 0.03
        sure_of = torch.where(certain, torch.randint(CLASSES, (batch, boxes)) + 1, 0)
        logits += 12 * torch.nn.functional.one_hot(sure_of, CLASSES + 1)
    return offsets.to(DEVICE), logits.to(DEVICE)


def detections(title: str, theirs: torch.nn.Module, own: SSDVGG16, trained: bool) -> Rows:
    """Time the decoding from the outputs of the heads to detections.

    All sides must find the same number of detections; with 12 candidates per class, the scores must be the same too.
    """
    detect = Detections(0.01, 0.45, 200).to(DEVICE)
    offsets, logits = heads(DECODED, len(own.anchors), trained)
    corners = [box_convert(own.anchors, "cxcywh", "xyxy") * 300] * DECODED

    def published(candidates: int) -> list[dict[str, Tensor]]:
        theirs.topk_candidates = candidates
        heads = {"bbox_regression": offsets, "cls_logits": logits}
        return theirs.postprocess_detections(heads, corners, [(300, 300)] * DECODED)

    def ours() -> tuple[Tensor, ...]:
        return detect(offsets, logits, own.anchors)

    peers = {"torchvision, 400 candidates a class": 400, f"torchvision, {FEW} candidates a class": FEW}
    with torch.inference_mode():
        _, scores, _, counts = ours()
        for candidates in peers.values():
            found = [len(one["scores"]) for one in published(candidates)]
            assert found == counts.tolist(), f"detections of an image: torchvision {found}, dlref {counts.tolist()}"
        for image, one in enumerate(published(FEW)):
            torch.testing.assert_close(scores[image, : counts[image]], one["scores"])
        calls = {name: partial(published, candidates) for name, candidates in peers.items()}
        seconds = in_turns("detections", calls | {"dlref": ours})
    return {f"{title}, beside {name}": Row(seconds["dlref"], seconds[name], "s", name, ">= 3") for name in peers}


def decoding() -> Rows:
    """Time decoding for both kinds of heads."""
    networks, title = both(), f"decoding of detections, SSD300, batch {DECODED}"
    return detections(f"{title}, untrained", *networks, False) | detections(f"{title}, as trained", *networks, True)


def step() -> Rows:
    """Time forward, matching, loss and backward. Both losses must be equal."""
    theirs, own = both()
    images = torch.rand(TRAINED, 3, 300, 300, device=DEVICE)
    corner = torch.rand(TRAINED, 8, 2, device=DEVICE) * 0.7
    boxes = torch.cat([corner, corner + 0.05 + 0.25 * torch.rand(TRAINED, 8, 2, device=DEVICE)], dim=-1)
    labels = torch.randint(0, CLASSES, (TRAINED, 8), device=DEVICE)
    targets = [{"boxes": b * 300, "labels": k + 1} for b, k in zip(boxes, labels, strict=True)]
    means = torch.tensor([0.48235, 0.45882, 0.40784], device=DEVICE)[:, None, None]  # as torchvision normalises

    def published(theirs: torch.nn.Module) -> Tensor:
        theirs.zero_grad()
        loss = sum(theirs(list(images), targets).values())
        loss.backward()
        return loss

    peers = {"torchvision": theirs, "torchvision, NHWC": deepcopy(theirs).to(memory_format=torch.channels_last)}
    own.to(memory_format=torch.channels_last)  # as in the configs

    def ours() -> Tensor:
        own.zero_grad()
        matched = match(boxes, labels, own.anchors, 0.5)
        pixels = ((images - means) * 255).contiguous(memory_format=torch.channels_last)
        loss = sum(multibox_loss(*own(pixels), boxes, labels, own.anchors, matched))
        loss.backward()
        return loss

    calls = {name: partial(published, network) for name, network in peers.items()}
    for call in calls.values():
        torch.testing.assert_close(ours(), call(), rtol=1e-3, atol=0)
    seconds = in_turns("training steps", calls | {"dlref": ours})
    title = f"training step, SSD300 with VGG-16, batch {TRAINED}"
    return {f"{title}, beside {name}": Row(seconds["dlref"], seconds[name], "s", name, ">= 1") for name in peers}


BENCHMARKS = {"detection-decoding": decoding, "detection-step": step}


if __name__ == "__main__":
    run(BENCHMARKS)
