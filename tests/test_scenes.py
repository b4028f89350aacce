import numpy as np
import pytest
import torch

from dlref.data.scenes import EMPTY, OVERLAP, Scenes, make_scenes
from dlref.data.small_images import Digits, digit_pools

COUNT, SIZE, MOST = 200, 64, 5


@pytest.fixture(scope="module")
def pools():
    return digit_pools()


@pytest.fixture(scope="module")
def scenes(pools) -> Scenes:
    return make_scenes(*pools["train"], COUNT, SIZE, seed=3, most=MOST)


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def objects(scenes: Scenes):
    """Yield each scene's boxes, as lists of whole numbers, its labels and its mask."""
    for boxes, labels, mask in zip(scenes.boxes, scenes.labels, scenes.masks, strict=True):
        there = labels >= 0
        yield boxes[there].long().tolist(), labels[there].tolist(), mask


def extent(inside: torch.Tensor) -> list[int]:
    """Return x1 y1 x2 y2 around the true values of (H, W); x2 and y2 are exclusive."""
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def meet(a: list[int], b: list[int]) -> int:
    """Return the area of the boxes' intersection."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def area(box: list[int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def test_scenes_have_the_documented_types_and_shapes(scenes):
    promised = (
        (torch.uint8, (COUNT, 3, SIZE, SIZE)),
        (torch.float32, (COUNT, MOST, 4)),
        (torch.int64, (COUNT, MOST)),
        (torch.uint8, (COUNT, SIZE, SIZE)),
    )
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in scenes] == list(promised)


def test_a_box_is_the_extent_of_its_digit_when_no_other_digit_is_near(scenes):
    checked = 0
    for boxes, labels, mask in objects(scenes):
        for i, (x1, y1, x2, y2) in enumerate(boxes):
            others = torch.zeros_like(mask, dtype=torch.bool)
            for left, top, right, bottom in boxes[:i] + boxes[i + 1 :]:
                others[top:bottom, left:right] = True
            if others[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1].any():
                continue
            # All pixels of the class outside the other digits' boxes: a box too small would miss some.
            assert extent((mask == labels[i] + 1) & ~others) == boxes[i]
            checked += 1
    assert checked > COUNT / 2


def test_the_mask_of_a_single_digit_has_the_extent_of_its_box(pools):
    alone = make_scenes(*pools["test"], 40, 48, seed=0, most=1)
    counts = [len(boxes) for boxes, _, _ in objects(alone)]
    assert max(counts) == 1
    for boxes, labels, mask in objects(alone):
        if boxes:
            assert [extent(mask > 0)] == boxes
        assert sorted({*labels}) == [value - 1 for value in mask.unique().tolist() if value]


def test_mask_classes_are_those_of_the_boxes_and_stay_inside_them(scenes):
    for boxes, labels, mask in objects(scenes):
        assert {value - 1 for value in mask.unique().tolist() if value} == set(labels)
        inside = torch.zeros(10, SIZE, SIZE, dtype=torch.bool)
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            inside[label, y1:y2, x1:x2] = True
        for label in set(labels):
            assert not ((mask == label + 1) & ~inside[label]).any()


def test_a_later_digit_covers_an_earlier_one(pools):
    """The digit drawn last is not covered: its class reaches all four sides of its box."""
    crowded = make_scenes(*pools["train"], 60, SIZE, seed=5)
    touching = 0
    for boxes, labels, mask in objects(crowded):
        if not boxes:
            continue
        x1, y1, x2, y2 = boxes[-1]
        own = mask[y1:y2, x1:x2] == labels[-1] + 1
        assert extent(own) == [0, 0, x2 - x1, y2 - y1]
        touching += any(meet(boxes[-1], other) for other in boxes[:-1])
    assert touching > 10


def test_boxes_are_inside_the_scene_and_not_too_small(scenes):
    for boxes, _, _ in objects(scenes):
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= SIZE
            assert 0 <= y1 < y2 <= SIZE
            assert y2 - y1 >= 0.1 * SIZE


def test_boxes_are_padded_with_zeros_and_labels_with_minus_one(scenes):
    there = scenes.labels >= 0
    assert there.any()
    assert not there.all()
    assert bool((scenes.labels[~there] == -1).all())
    assert not scenes.boxes[~there].any()
    assert not (there[:, 1:] & ~there[:, :-1]).any()  # no gaps


def test_some_scenes_are_empty_and_none_has_too_many_digits(scenes):
    counts = (scenes.labels >= 0).sum(1)
    assert 0 < int((counts == 0).sum()) < 3 * EMPTY * COUNT
    assert int(counts.max()) == MOST
    assert not scenes.masks[counts == 0].any()


def test_boxes_overlap_but_never_beyond_the_limit(scenes):
    shares = [
        meet(a, b) / min(area(a), area(b))
        for boxes, _, _ in objects(scenes)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    ]
    assert OVERLAP / 2 < max(shares) <= OVERLAP


def test_digits_contrast_with_their_surroundings(scenes):
    """Compare the mean luma inside and around each digit that is alone in its box, in the finished scenes."""
    luma = (scenes.images.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    contrasts = []
    for (boxes, _, mask), levels in zip(objects(scenes), luma, strict=True):
        for i, box in enumerate(boxes):
            if any(meet(box, other) for other in boxes[:i] + boxes[i + 1 :]):
                continue
            x1, y1, x2, y2 = box
            ink = mask[y1:y2, x1:x2] > 0
            if not ink.all():  # a 1 may fill its box
                part = levels[y1:y2, x1:x2]
                contrasts.append(float((part[ink].mean() - part[~ink].mean()).abs()))
    assert len(contrasts) > 100
    assert min(contrasts) > 20
    assert np.median(contrasts) > 40


def test_the_same_seed_gives_the_same_scenes_and_another_seed_different_ones(pools, scenes):
    assert same(make_scenes(*pools["train"], COUNT, SIZE, seed=3, most=MOST), scenes)
    other = make_scenes(*pools["train"], COUNT, SIZE, seed=4, most=MOST)
    assert not any(torch.equal(x, y) for x, y in zip(other, scenes, strict=True))


def test_fewer_scenes_are_the_first_ones(pools, scenes):
    few = make_scenes(*pools["train"], 7, SIZE, seed=3, most=MOST)
    assert same(few, Scenes(*(tensor[:7] for tensor in scenes)))


def test_torchs_random_state_is_neither_used_nor_changed(pools):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = make_scenes(*pools["val"], 5, 32, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert same(make_scenes(*pools["val"], 5, 32, seed=0), first)


def test_only_the_pools_digits_are_drawn(pools):
    digits, labels = pools["train"]
    sevens = make_scenes(digits[labels == 7], labels[labels == 7], 30, 48, seed=0)
    assert sevens.labels.unique().tolist() == [-1, 7]
    assert sevens.masks.unique().tolist() == [0, 8]


def test_digits_of_all_classes_are_drawn(scenes):
    assert scenes.labels.unique().tolist() == list(range(-1, 10))


def test_pools_are_the_splits_of_the_digits(pools):
    assert {name: len(labels) for name, (_, labels) in pools.items()} == {"train": 1077, "val": 360, "test": 360}
    _, splits = Digits().read()
    for name, (digits, labels) in pools.items():
        assert torch.equal(digits, splits[name].images[:, 0])
        assert torch.equal(labels, splits[name].targets)


def test_pools_are_disjoint(pools):
    """The 1,797 scans are all different, so equal pixels would be one scan in two pools."""
    scans = torch.cat([digits.flatten(1) for digits, _ in pools.values()])
    assert len(scans.unique(dim=0)) == len(scans) == 1797
