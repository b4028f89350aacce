"""MultiBox: matching of default boxes to true boxes, the loss, and detections from the heads' outputs.

W. Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016; titles in quotes are from its section 2.2. Matching and
loss process whole batches of padded boxes, without loops over images, waits for the device or shapes that depend on the
data.

Legend of shapes: B batch, N default boxes, M true boxes (padded), K classes, K1 = K + 1 with the background first, C
candidates, D detections. Boxes are in fractions of the image: default boxes as centre, width and height, all others as
corners.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou, nms

PADDED = -1  # label of padding
# Offsets of centres and sides are learnt in these units (the "variances" of the authors' code).
CENTRE, SIDE = 0.1, 0.2
SMALLEST = 1e-6  # ratio of a side to its default: rounding to fractions of the image can make a side 0
LARGEST = math.log(1000 / 16)  # logarithm of that ratio: the exponential of more would overflow
NEGATIVES = 3  # for each positive ("Hard negative mining")
CANDIDATES = 1000  # pairs of default box and class in an image that suppression considers
GRID = 1 << 16  # suppression compares corners rounded to 1 / GRID of the image


def encode(boxes: Float[Tensor, "*B 4"], anchors: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """Return the offsets from default boxes to `boxes` (equation 2)."""
    boxes = box_convert(boxes, "xyxy", "cxcywh")
    centre = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:] / CENTRE
    sides = (boxes[..., 2:] / anchors[..., 2:]).clamp(min=SMALLEST)
    return torch.cat([centre, sides.log() / SIDE], dim=-1)


def decode(offsets: Float[Tensor, "*B 4"], anchors: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """Return the boxes given by `offsets`, clipped to the image."""
    centre = anchors[..., :2] + CENTRE * offsets[..., :2] * anchors[..., 2:]
    half = anchors[..., 2:] * (SIDE * offsets[..., 2:]).clamp(max=LARGEST).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1).clamp(0, 1)


def match(
    boxes: Float[Tensor, "B M 4"], labels: Int[Tensor, "B M"], anchors: Float[Tensor, "N 4"], threshold: float
) -> Int[Tensor, "B N"]:
    """Return the index of each default box's true box, or -1 for the background ("Matching strategy").

    Each true box is matched to the default box that overlaps it most; if two true boxes claim the same one, the later
    gets it. Any other default box is matched to the true box that it overlaps most, if by at least `threshold`.
    """
    there = labels != PADDED
    overlap = box_iou(boxes.flatten(0, 1), box_convert(anchors, "cxcywh", "xyxy")).unflatten(0, labels.shape)
    overlap = torch.where(there[:, :, None], overlap, -1.0)  # (B, M, N)
    most, matched = overlap.max(dim=1)
    matched = torch.where(most >= threshold, matched, -1)
    best = overlap.argmax(dim=2)  # (B, M)
    order = torch.where(there, torch.arange(labels.shape[1], device=labels.device), -1)
    claimed = torch.full_like(matched, -1).scatter_reduce(1, best, order, "amax")
    return torch.where(claimed >= 0, claimed, matched)


def multibox_loss(
    offsets: Float[Tensor, "B N 4"],
    logits: Float[Tensor, "B N K1"],
    boxes: Float[Tensor, "B M 4"],
    labels: Int[Tensor, "B M"],
    anchors: Float[Tensor, "N 4"],
    matched: Int[Tensor, "B N"],
) -> tuple[Tensor, Tensor]:
    """Return the localisation and the confidence loss (equations 1 to 3), each a sum divided by the positives' number.

    For each positive, three negatives of its image count, those with the highest loss. In an image without positives,
    three count, so that the network learns the background (the paper has no loss in a batch without positives).
    """
    positive = matched >= 0
    index = matched.clamp(min=0)
    count = positive.sum().clamp(min=1)
    # Unmatched default boxes are encoded as themselves, which gives offsets of 0. They do not count in the loss.
    own = box_convert(anchors, "cxcywh", "xyxy").expand_as(offsets)
    true = torch.where(positive[..., None], boxes.gather(1, index[..., None].expand(-1, -1, 4)), own)
    distance = F.smooth_l1_loss(offsets.float(), encode(true, anchors.expand_as(offsets)), reduction="none").sum(-1)
    target = torch.where(positive, labels.gather(1, index) + 1, 0)
    error = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    hardest = torch.where(positive, 0.0, error).sort(dim=1, descending=True).values
    mined = NEGATIVES * positive.sum(dim=1, keepdim=True).clamp(min=1)
    counted = torch.arange(error.shape[1], device=error.device) < mined
    localisation = torch.where(positive, distance, 0.0).sum() / count
    confidence = (torch.where(positive, error, 0.0) + torch.where(counted, hardest, 0.0)).sum() / count
    return localisation, confidence


class Detections(nn.Module):
    """Detections from the heads of a batch: a threshold, suppression in each class, the best ones (section 3.7).

    Args:
        score: probability above which a box is a detection.
        overlap: intersection over union with a better detection of its class above which a detection is suppressed.
        most: D, maximum number of detections per image.
    """

    def __init__(self, score: float, overlap: float, most: int):
        super().__init__()
        self.score, self.overlap, self.most = score, overlap, most

    def forward(
        self, offsets: Float[Tensor, "B N 4"], logits: Float[Tensor, "B N K1"], anchors: Float[Tensor, "N 4"]
    ) -> tuple[Float[Tensor, "B D 4"], Float[Tensor, "B D"], Int[Tensor, "B D"], Int[Tensor, "B"]]:
        """Return boxes, scores and labels, best first and padded with zeros, and their number in each image."""
        scores, labels, anchor = self.likeliest(logits)
        index = anchor[..., None].expand(-1, -1, 4)
        boxes = decode(offsets.gather(1, index), anchors.expand_as(offsets).gather(1, index))
        scores = torch.where(self.kept(boxes, scores, labels), scores, 0.0)
        scores, best = scores.topk(min(self.most, scores.shape[1]), dim=1)
        there = scores > self.score
        boxes = torch.where(there[..., None], boxes.gather(1, best[..., None].expand(-1, -1, 4)), 0.0)
        return boxes, torch.where(there, scores, 0.0), torch.where(there, labels.gather(1, best), 0), there.sum(dim=1)

    def likeliest(self, logits: Float[Tensor, "B N K1"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the score, label and default box of each candidate, (B, C) each, best first."""
        classes = logits.shape[2] - 1
        candidates = min(CANDIDATES, logits.shape[1])
        scores = logits.float().softmax(dim=2)[..., 1:]
        # All of the best pairs are in these default boxes: no score exceeds the maximum of its own box.
        anchor = scores.amax(dim=2).topk(candidates, dim=1).indices
        scores = scores.gather(1, anchor[..., None].expand(-1, -1, classes)).flatten(1)
        scores, pair = scores.topk(candidates, dim=1)
        return scores, pair % classes, anchor.gather(1, pair // classes)

    def kept(
        self, boxes: Float[Tensor, "B C 4"], scores: Float[Tensor, "B C"], labels: Int[Tensor, "B C"]
    ) -> Bool[Tensor, "B C"]:
        """Return which candidates are not suppressed by a better one of their class and image.

        Each class of each image is moved to a cell of its own, classes to the right and images down, so that in a graph
        one suppression serves a batch of any size. Corners are rounded first, so that moving them is exact: up to 128
        images and 128 classes, a result does not depend on the position of its image in the batch.
        """
        image = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand_as(labels)
        cell = torch.stack([labels, image], dim=-1).to(boxes.dtype)
        placed = (boxes * GRID).round() / GRID + 2 * torch.cat([cell, cell], dim=-1)
        # Candidates below the threshold are moved to one place, where the first suppresses all others at once.
        placed = torch.where((scores > self.score)[..., None], placed, -placed.new_tensor([2, 2, 1, 1]))
        if torch.compiler.is_exporting():
            kept = nms(placed.flatten(0, 1), scores.flatten(), self.overlap)
        else:  # the same, image by image and without candidates below the threshold: its time is quadratic in boxes
            places, number = scores.shape[1], (scores > self.score).sum(dim=1).tolist()
            kept = torch.cat(
                [nms(placed[i, :n], scores[i, :n], self.overlap) + places * i for i, n in enumerate(number)]
            )
        return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, kept, True).view_as(scores)
