"""Matching, loss and detections against values computed by hand and against torchvision's SSD."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.detection import _utils as published
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_convert, box_iou

from dlref.models import SSDVGG16
from dlref.tasks.multibox import Detections, decode, encode, match, multibox_loss

QUARTERS = torch.tensor(
    [[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]
)
NO_BOX = [0.0, 0.0, 0.0, 0.0]


def some_boxes(*shape):
    corner, size = torch.rand(*shape, 2) * 0.7, torch.rand(*shape, 2) * 0.25 + 0.05
    return torch.cat([corner, corner + size], dim=-1)


@pytest.fixture(scope="module")
def torchvision_ssd():
    torch.manual_seed(0)
    network = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).eval()
    with torch.no_grad():  # unscaled random heads saturate the predictions
        for parameter in network.head.parameters():
            parameter.mul_(0.1)
    return network


@pytest.fixture(scope="module")
def anchors():
    return SSDVGG16(1).anchors


# Offsets


def test_offsets_match_values_computed_by_hand():
    anchor = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.42, 0.4, 0.62, 0.8]])  # centre 0.52, 0.6; sides 0.2, 0.4
    torch.testing.assert_close(encode(box, anchor), torch.tensor([[1.0, 2.5, 0.0, 0.0]]))
    wide = torch.tensor([[0.3, 0.3, 0.7, 0.7]])  # sides 0.4, 0.4
    torch.testing.assert_close(encode(wide, anchor), torch.tensor([[0.0, 0.0, math.log(2) / 0.2, 0.0]]))


def test_offsets_match_torchvision_and_decoding_inverts_them(anchors):
    boxes = some_boxes(len(anchors))
    coder = published.BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    offsets = encode(boxes, anchors)
    expected = coder.encode_single(boxes, box_convert(anchors, "cxcywh", "xyxy"))
    torch.testing.assert_close(offsets, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(decode(offsets, anchors), boxes, atol=1e-5, rtol=0)


def test_huge_offsets_decode_to_a_finite_box():
    box = decode(torch.tensor([[0.0, 0.0, 1e6, 1e6]]), torch.tensor([[0.5, 0.5, 0.1, 0.1]]))
    torch.testing.assert_close(box, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_a_box_without_width_has_finite_offsets():
    line = encode(torch.tensor([[0.4, 0.4, 0.4, 0.6]]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    assert line.isfinite().all()


# Matching


def test_matches_are_those_found_by_hand():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.55, 0.0, 1.0, 0.4], NO_BOX]])
    labels = torch.tensor([[3, 1, -1]])
    # The first box is the first quarter. The second overlaps the second quarter by 0.18 of 0.25.
    assert match(boxes, labels, QUARTERS, 0.5).tolist() == [[0, 1, -1, -1]]
    assert match(boxes, labels, QUARTERS, 0.8).tolist() == [
        [0, 1, -1, -1]
    ]  # the best default box matches below the threshold too


def test_a_box_with_little_overlap_still_gets_its_best_default_box():
    tiny = torch.tensor([[[0.8, 0.8, 0.85, 0.85]]])
    assert match(tiny, torch.tensor([[0]]), QUARTERS, 0.5).tolist() == [[-1, -1, -1, 0]]


def test_an_overlap_equal_to_the_threshold_matches():
    quarter_and_its_half = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.25, 0.25, 0.5, 0.25]])
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]])
    assert match(boxes, torch.tensor([[0]]), quarter_and_its_half, 0.5).tolist() == [[0, 0]]


def test_the_later_of_two_boxes_gets_the_default_box_that_is_best_for_both():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.1, 0.1, 0.4, 0.4], NO_BOX]])
    assert match(boxes, torch.tensor([[0, 0, -1]]), QUARTERS, 0.5).tolist() == [[1, -1, -1, -1]]


def test_padding_matches_nothing_even_on_a_default_box():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5]], [[0.0, 0.0, 0.5, 0.5]]])
    assert match(boxes, torch.tensor([[-1], [0]]), QUARTERS, 0.5).tolist() == [[-1] * 4, [0, -1, -1, -1]]


def test_matches_are_those_of_torchvision(anchors):
    boxes = some_boxes(4, 6)
    labels = torch.randint(0, 5, (4, 6))
    corners = box_convert(anchors, "cxcywh", "xyxy")
    matched = match(boxes, labels, anchors, 0.5)
    for own, image in zip(matched, boxes, strict=True):
        expected = published.SSDMatcher(0.5)(box_iou(image, corners))
        torch.testing.assert_close(own, expected.clamp(min=-1))
    assert (matched >= 0).sum() > 24


# Loss


def test_the_loss_matches_a_value_computed_by_hand():
    """A box on the first of four default boxes gives one positive and three negatives, and all four count."""
    boxes, labels = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]), torch.tensor([[1]])
    offsets = torch.zeros(1, 4, 4)
    offsets[0, 0] = torch.tensor([0.5, -2.0, 0.0, 0.0])  # 0.5 * 0.25 + (2 - 0.5)
    logits = torch.zeros(1, 4, 3)
    logits[0, 0, 2] = math.log(2)  # the right class has a probability of 2 / 4
    logits[0, 1, 0] = math.log(6)  # the background has a probability of 6 / 8
    matched = match(boxes, labels, QUARTERS, 0.5)
    localisation, confidence = multibox_loss(offsets, logits, boxes, labels, QUARTERS, matched)
    torch.testing.assert_close(localisation, torch.tensor(0.125 + 1.5))
    torch.testing.assert_close(confidence, torch.tensor(math.log(2) + math.log(8 / 6) + 2 * math.log(3)))


def test_an_image_without_boxes_trains_on_its_three_hardest_negatives():
    boxes, labels = torch.zeros(1, 2, 4), torch.full((1, 2), -1)
    logits = torch.zeros(1, 4, 2, requires_grad=True)
    with torch.no_grad():
        logits[0, :, 1] = torch.tensor([3.0, -5.0, 1.0, 0.0])
    matched = match(boxes, labels, QUARTERS, 0.5)
    localisation, confidence = multibox_loss(torch.randn(1, 4, 4), logits, boxes, labels, QUARTERS, matched)
    assert localisation == 0
    torch.testing.assert_close(confidence, F.softplus(torch.tensor([3.0, 1.0, 0.0])).sum())
    confidence.backward()
    assert (logits.grad.abs().sum(-1) > 0).tolist() == [[True, False, True, True]]


def test_the_loss_matches_torchvision_for_the_same_matches(torchvision_ssd, anchors):
    boxes, labels = some_boxes(3, 5), torch.randint(0, 90, (3, 5))
    offsets, logits = torch.randn(3, len(anchors), 4), torch.randn(3, len(anchors), 91)
    matched = match(boxes, labels, anchors, 0.5)
    corners = box_convert(anchors, "cxcywh", "xyxy")
    expected = torchvision_ssd.compute_loss(
        [{"boxes": b, "labels": k + 1} for b, k in zip(boxes, labels, strict=True)],
        {"bbox_regression": offsets, "cls_logits": logits},
        [corners] * 3,
        list(matched),
    )
    localisation, confidence = multibox_loss(offsets, logits, boxes, labels, anchors, matched)
    torch.testing.assert_close(localisation, expected["bbox_regression"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(confidence, expected["classification"], rtol=1e-5, atol=1e-5)


def test_the_loss_of_bfloat16_inputs_equals_that_of_the_same_values_in_float32(anchors):
    boxes, labels = some_boxes(1, 3), torch.randint(0, 20, (1, 3))
    offsets, logits = torch.randn(1, len(anchors), 4).bfloat16(), 10 * torch.randn(1, len(anchors), 21).bfloat16()
    rest = boxes, labels, anchors, match(boxes, labels, anchors, 0.5)
    found = multibox_loss(offsets, logits, *rest)
    torch.testing.assert_close(found, multibox_loss(offsets.float(), logits.float(), *rest))


def test_padding_does_not_change_the_loss(anchors):
    boxes, labels = some_boxes(2, 3), torch.randint(0, 4, (2, 3))
    offsets, logits = torch.randn(2, len(anchors), 4), torch.randn(2, len(anchors), 5)
    wide, more = F.pad(boxes, (0, 0, 0, 4)), F.pad(labels, (0, 4), value=-1)
    losses = [
        multibox_loss(offsets, logits, b, k, anchors, match(b, k, anchors, 0.5))
        for b, k in ((boxes, labels), (wide, more))
    ]
    torch.testing.assert_close(*losses)


def test_matching_and_loss_need_no_device_synchronisation_and_have_finite_gradients():
    """Tracing without values works: no code reads a value and no shape depends on the data."""

    def step(offsets, logits, boxes, labels):
        return sum(multibox_loss(offsets, logits, boxes, labels, QUARTERS, match(boxes, labels, QUARTERS, 0.5)))

    offsets, logits = torch.randn(3, 4, 4, requires_grad=True), torch.randn(3, 4, 3, requires_grad=True)
    boxes = torch.cat([some_boxes(3, 1), torch.zeros(3, 1, 4)], dim=1)
    labels = torch.tensor([[1, -1], [0, -1], [-1, -1]])
    traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(offsets, logits, boxes, labels)
    loss = step(offsets, logits, boxes, labels)
    torch.testing.assert_close(traced(offsets, logits, boxes, labels), loss)
    loss.backward()
    assert offsets.grad.isfinite().all()
    assert logits.grad.isfinite().all()


# Detections


def published_detections(torchvision_ssd, offsets, logits, anchors):
    corners = [box_convert(anchors, "cxcywh", "xyxy") * 300] * len(offsets)
    heads = {"bbox_regression": offsets, "cls_logits": logits}
    return torchvision_ssd.postprocess_detections(heads, corners, [(300, 300)] * len(offsets))


@pytest.mark.parametrize("trained", [False, True])
def test_detections_match_torchvision(torchvision_ssd, anchors, trained):
    offsets, logits = torch.randn(2, len(anchors), 4) / 2, torch.randn(2, len(anchors), 91)
    if trained:  # few boxes stand out from the background
        logits[..., 0] += 12
        hot = torch.rand(2, len(anchors)) < 0.005
        logits += 5 * torch.randn_like(logits) * hot[..., None]
    boxes, scores, labels, count = Detections(0.01, 0.45, 200)(offsets, logits, anchors)
    for i, expected in enumerate(published_detections(torchvision_ssd, offsets, logits, anchors)):
        n = len(expected["scores"])
        assert count[i] == n
        assert n == 200 if not trained else 0 < n < 200
        torch.testing.assert_close(boxes[i, :n] * 300, expected["boxes"], atol=1e-4, rtol=0)
        torch.testing.assert_close(scores[i, :n], expected["scores"])
        assert torch.equal(labels[i, :n] + 1, expected["labels"])
        assert not boxes[i, n:].any()
        assert not scores[i, n:].any()


def test_suppression_keeps_the_better_of_two_overlapping_boxes_of_a_class():
    """The worse of two boxes of a class that overlap by 0.6 goes; boxes of other classes or less overlap stay."""
    anchors = torch.tensor(
        [[0.25, 0.25, 0.4, 0.4], [0.35, 0.25, 0.4, 0.4], [0.25, 0.75, 0.4, 0.4], [0.25, 0.8, 0.4, 0.4]]
    )
    logits = torch.full((1, 4, 3), -9.0)
    for anchor, label, value in ((0, 1, 3.0), (1, 1, 2.0), (2, 1, 1.0), (3, 2, 0.5)):
        logits[0, anchor, label] = value
    logits[..., 0] = 0
    boxes, scores, labels, count = Detections(0.1, 0.45, 5)(torch.zeros(1, 4, 4), logits, anchors)
    assert count.tolist() == [3]
    assert labels.tolist() == [[0, 0, 1, 0]]  # four rows for four candidates
    torch.testing.assert_close(
        scores[0], torch.tensor([3.0, 1.0, 0.5, -99.0]).sigmoid() * torch.tensor([1, 1, 1, 0]), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(boxes[0, :3], box_convert(anchors[[0, 2, 3]], "cxcywh", "xyxy"))


def test_suppressed_boxes_are_not_counted_with_a_score_threshold_of_zero():
    logits = torch.tensor([[[0.0, 5.0], [0.0, 4.0], [0.0, 3.0]]])
    *_, count = Detections(0.0, 0.5, 3)(torch.zeros(1, 3, 4), logits, QUARTERS[:1].expand(3, 4))
    assert count.tolist() == [1]


def test_detections_do_not_depend_on_the_position_in_the_batch(anchors):
    offsets, logits = torch.randn(1, len(anchors), 4) / 2, torch.randn(1, len(anchors), 21)
    detect = Detections(0.01, 0.45, 200)
    alone = detect(offsets, logits, anchors)
    together = detect(
        torch.cat([torch.randn(6, len(anchors), 4), offsets]),
        torch.cat([torch.randn(6, len(anchors), 21), logits]),
        anchors,
    )
    for one, several in zip(alone, together, strict=True):
        assert torch.equal(one[0], several[6])


def test_an_image_without_detections_has_a_count_of_zero():
    logits = torch.zeros(2, 4, 3)
    logits[0, :, 0] = 20
    *_, count = Detections(0.01, 0.45, 10)(torch.zeros(2, 4, 4), logits, QUARTERS)
    assert count[0] == 0
    assert count[1] > 0


def test_detections_of_the_whole_network_match_torchvision(torchvision_ssd):
    network = SSDVGG16(90).eval()
    network.load_state_dict(torchvision_ssd.state_dict())
    images = torch.rand(2, 3, 300, 300)
    mean = torch.tensor([0.48235, 0.45882, 0.40784])[:, None, None]  # torchvision's for this network, deviation 1/255
    with torch.no_grad():
        expected = torchvision_ssd(list(images))
        boxes, scores, labels, count = Detections(0.01, 0.45, 200)(*network((images - mean) * 255), network.anchors)
    for i, found in enumerate(expected):
        assert count[i] == len(found["scores"]) > 0
        n = count[i]
        torch.testing.assert_close(scores[i, :n], found["scores"], atol=1e-4, rtol=0)
        # Rounding may swap detections of almost equal scores, so compare them regardless of order.
        own = torch.cat([boxes[i, :n] * 300, scores[i, :n, None], labels[i, :n, None] + 1], 1)
        theirs = torch.cat([found["boxes"], found["scores"][:, None], found["labels"][:, None]], 1)
        apart = (own[:, None] - theirs).abs().amax(2)
        assert apart.amin(1).max() < 4e-3
        assert apart.amin(0).max() < 4e-3
