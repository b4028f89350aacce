"""Semantic segmentation: masks that follow the pixels, loss and metrics, the runner, the bundle."""

import json
import ntpath
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from refusals import error_of, one_line
from sklearn import metrics as sklearn_metrics
from test_detection import fit
from test_export import export
from test_segmentation_networks import thin_fcn
from test_tasks import sgd
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision import tv_tensors

from dlref.cli import TrainCLI
from dlref.data import DigitSceneMasks, DigitScenes, MaskFolders, MaskLists, VOCMasks
from dlref.data.scenes import make_scenes
from dlref.data.semantic_segmentation import ListedMasks, MaskedPictures, SegmentationData
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.export.verify import Compared, Refused, parity
from dlref.models import CifarResNet, DeepLabV3, FCNResNet, PSPNet
from dlref.runtime import UserError, make_runner
from dlref.runtime.__main__ import main
from dlref.runtime.bundle import OnnxGraph
from dlref.runtime.runners.semantic_segmentation import PALETTE, answer
from dlref.tasks import Normalise, SemanticSegmenter, figures
from dlref.tasks.semantic_segmentation import VOID, Confusion, classes_of, enlarged, pixel_loss, scores
from dlref.training.run_folder import written_pictures

PLAIN = {"mean": [0.5] * 3, "std": [0.25] * 3}
COLOURS = np.array([[120, 120, 120], [200, 30, 30], [30, 30, 200]], dtype=np.uint8)
LABELS = ["background", "red", "blue"]


class Colours(nn.Module):
    """The smallest network: it classifies pixels by colour, at `1 / stride` of the resolution."""

    class_layers = ("conv",)

    def __init__(self, classes=3, stride=1, auxiliary=False):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, stride, stride)
        self.auxiliary = nn.Conv2d(3, classes, 1) if auxiliary else None

    def forward(self, x):
        return (self.conv(x), self.auxiliary(x)) if self.auxiliary else self.conv(x)


def segmenter(network=None, labels=LABELS, **options):
    options = {"network": network or Colours(), "preprocess": Normalise(**PLAIN), "optimizer": sgd} | options
    task = SemanticSegmenter(**options)
    task.remember({"labels": list(labels)})
    return task


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
@pytest.mark.parametrize("change", [lambda masks: masks / 255, torch.Tensor.long, lambda masks: masks[:, ::2, ::2]])
def test_masks_of_another_type_or_size_are_refused(change, step, unchecked):
    task = segmenter()
    task.val_confusion = Confusion(3)
    batch = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), change(torch.zeros(2, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"^masks are torch") as caught:
        getattr(task, step)(batch, 0)
    assert "expected torch.uint8 [2, 8, 8]" in one_line(caught.value)


def sighted(**options):
    """Return a segmenter with hand-set weights that tells red and blue from grey."""
    task = segmenter(**options).eval()
    with torch.no_grad():
        weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]])
        task.network.conv.weight.copy_(weight[:, :, None, None])
        task.network.conv.bias.copy_(torch.tensor([0.5, 0.0, 0.0]))
    return task


def painted(height, width, seed=0):
    """Return a picture (H, W, 3) of blocks of three colours and its mask (H, W)."""
    blocks = np.random.default_rng(seed).integers(0, 3, (4, 5), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 5 // width
    mask = blocks[rows][:, columns]
    return COLOURS[mask], mask


def folders(root, **counts):
    """Write pictures of blocks, 40 × 60 pixels, and their masks to SageMaker's folders."""
    for split, count in counts.items():
        for name in (split, f"{split}_annotation"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture, mask = painted(40, 60, i)
            Image.fromarray(picture).save(root / split / f"{i}.png")
            Image.fromarray(mask).save(root / f"{split}_annotation" / f"{i}.png")
    return root


def masked(root, **options):
    options = {"train": "train", "class_names": LABELS, "batch_size": 4, "num_workers": 0, "crop_size": 32} | options
    return MaskFolders(root=root, base_size=options.pop("base_size", 40), **options)


# Data


def test_masks_follow_their_pixels_through_augmentation(tmp_path):
    data = masked(folders(tmp_path, train=16), photometric=False, crop_size=48)
    data.setup()
    torch.manual_seed(1)
    void, scales = 0, set()
    for images, masks in data.train_dataloader():
        assert (images.shape, images.dtype) == ((4, 3, 48, 48), torch.uint8)
        assert (masks.shape, masks.dtype) == ((4, 48, 48), torch.uint8)
        counted = masks != VOID
        void += int((~counted).sum())
        expected = torch.from_numpy(COLOURS)[masks.long().where(counted, 0)].permute(0, 3, 1, 2)
        near = ((images.int() - expected.int()).abs().sum(dim=1) < 60) | ~counted
        assert near.float().mean() > 0.9  # colours mix where blocks meet
        scales.update(counted.any(dim=2).sum(dim=1).tolist())
    assert void > 1000  # pictures of half the size are smaller than the crop
    assert len(scales) > 3


def test_evaluation_uses_unchanged_pictures_and_masks(tmp_path):
    data = masked(folders(tmp_path, train=4, validation=3), val="validation")
    data.setup()
    images, masks = next(iter(data.val_dataloader()))
    picture, mask = painted(40, 60)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), picture)
    np.testing.assert_array_equal(masks[0].numpy(), mask)
    assert images.shape == (3, 3, 40, 60)
    assert data.sources() == [str(tmp_path / f"validation/{i}.png") for i in range(3)]


def test_pictures_of_different_sizes_are_evaluated_one_at_a_time(tmp_path):
    folders(tmp_path, train=4, validation=2)
    Image.new("RGB", (33, 21)).save(tmp_path / "validation/small.png")
    Image.new("L", (33, 21)).save(tmp_path / "validation_annotation/small.png")
    data = masked(tmp_path, val="validation")
    data.setup()
    assert [tuple(images.shape) for images, _ in data.val_dataloader()] == [(1, 3, 40, 60)] * 2 + [(1, 3, 21, 33)]


def test_a_reproducible_share_is_held_out_and_workers_read_the_rest(tmp_path):
    data = masked(folders(tmp_path, train=10), held_out=0.2, num_workers=1)
    data.setup()
    again = masked(tmp_path, held_out=0.2)
    again.setup()
    assert (len(data.splits["train"]), len(data.splits["val"])) == (8, 2)
    assert data.sources() == again.sources()
    assert not set(data.splits["train"].names) & set(data.splits["val"].names)
    (images, masks), *_ = data.train_dataloader()
    assert (images.shape, masks.shape) == ((4, 3, 32, 32), (4, 32, 32))


@pytest.mark.filterwarnings("ignore:.* are among those of train")
def test_mask_lists_folders_label_maps_and_voc_are_read(tmp_path):
    folders(tmp_path, train=4, val=2)
    for split, count in (("train", 4), ("val", 2)):
        lines = [f"{split}/{i}.png {split}_annotation/{i}.png\n" for i in range(count)]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    lists = MaskLists(root=tmp_path, train="train.txt", val="val.txt", void=2, class_names=LABELS[:2])
    lists.setup()
    assert (len(lists.splits["train"]), len(lists.splits["val"]), lists.labels) == (4, 2, LABELS[:2])
    assert set(np.unique(lists.splits["train"][1][1])) <= {0, 1, VOID}
    mask = lists.splits["val"].read(0)[1]
    np.testing.assert_array_equal(mask.numpy(), np.where(painted(40, 60)[1] == 2, VOID, painted(40, 60)[1]))

    apart = masked(tmp_path, train=".", pictures="train/{}", masks="train_annotation", held_out=0.25)
    apart.setup()
    assert (len(apart.splits["train"]), len(apart.splits["val"])) == (3, 1)

    (tmp_path / "maps").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"maps/{split}_label_map.json").write_text('{"map": {"0": 2, "1": 0, "2": 1}}')
    mapped = masked(tmp_path, train="train/", val="val", label_map="maps")
    mapped.setup()
    np.testing.assert_array_equal(mapped.splits["val"].read(0)[1].numpy(), (painted(40, 60)[1] + 1) % 3)

    voc = tmp_path / "VOC2012"
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (voc / name).mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(voc / "JPEGImages/a.jpg")
    Image.fromarray(np.repeat([[0], [15]], 5, 0).astype(np.uint8).repeat(20, 1)).save(voc / "SegmentationClass/a.png")
    (voc / "ImageSets/Segmentation/val.txt").write_text("a\n")
    data = VOCMasks(root=voc, train="ImageSets/Segmentation/val.txt", val="ImageSets/Segmentation/val.txt")
    with pytest.warns(UserWarning, match=r"(train|val): no pixel of aeroplane, .* tvmonitor"):
        data.setup()
    assert data.labels[15] == "person"
    assert len(data.labels) == 21


@pytest.mark.parametrize("names", [["background", "thing"], None])
def test_black_and_white_masks_need_a_label_map(tmp_path, names):
    for split in ("train", "val"):
        folders(tmp_path, **{split: 2})
        for path in (tmp_path / f"{split}_annotation").iterdir():
            Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    data = masked(tmp_path, val="val", class_names=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a class without pixels
        with pytest.raises(UserError, match="255 is void, unless a label_map"):
            data.setup()
    (tmp_path / "map.json").write_text('{"map": {"0": 0, "1": 255}}')
    data = masked(tmp_path, val="val", class_names=names, label_map="map.json")
    data.setup()
    assert set(data.splits["val"].read(0)[1].unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (2.0, 0.5)}, r"scales: \[2.0, 0.5\]; expected two factors"),
        ({"scales": (0.0, 1.0)}, r"scales: \[0.0, 1.0\]; expected two factors"),
        ({"crop_size": 0}, "crop_size: 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size: 0; expected at least 1"),
        ({"num_workers": -1}, "num_workers: -1; expected at least 0"),
        ({"held_out": 0.01}, "held_out: 0.01 of 4 pictures; expected at least one in each part"),
        ({"held_out": 1.0}, "held_out: 1.0 of 4 pictures"),
        ({"val": "validation"}, "validation"),
        ({"label_map": "map.json"}, r"map\.json"),
        ({"class_names": ["only", "two"]}, "expected 0 to 1"),
    ],
)
def test_invalid_data_options_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        masked(folders(tmp_path, train=4), **options).setup()
    assert "\n" not in str(caught.value)


def test_digit_scenes_are_generated_without_files_and_differ_by_split():
    data = DigitSceneMasks(train=6, held_out=4, image_size=64, batch_size=2)
    data.setup()
    images, masks = next(iter(data.val_dataloader()))
    assert (images.shape, masks.shape) == ((2, 3, 64, 64), (2, 64, 64))
    assert data.labels == ["background", *"0123456789"]
    seen = {int(k) for _, mask in data.splits["train"] for k in mask.unique()}
    assert {0} < seen <= set(range(11))
    assert not torch.equal(data.splits["train"][0][0], data.splits["val"][0][0])


def test_scales_multiply_the_base_size(tmp_path):
    resize, *_ = masked(tmp_path, base_size=40, scales=(0.5, 2.0)).train_transform().transforms
    assert (resize.min_size, resize.max_size) == (20, 81)  # max_size is exclusive


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.4])
def test_a_resized_mask_is_not_shifted_against_its_picture(scale, tmp_path):
    levels = torch.arange(120, dtype=torch.uint8).expand(120, 120)  # of picture and mask: the number of the column
    options = {"base_size": 120, "scales": (scale, scale), "crop_size": round(120 * scale), "flip": False}
    transform = masked(tmp_path, **options).train_transform()
    for along, across in ((levels, -1), (levels.T, -2)):
        image, mask = transform((tv_tensors.Image(along.expand(3, -1, -1)), tv_tensors.Mask(along)))
        ahead = (image[0].float() - mask).movedim(across, 0)[3:-3] * scale  # in pixels; the border has no neighbours
        assert ahead.mean().abs() < 0.1


@pytest.mark.parametrize("module", [DigitSceneMasks, DigitScenes])
def test_no_two_splits_share_a_digit(module, monkeypatch):
    pools = []

    def recorded(digits, *rest):
        pools.append({digit.numpy().tobytes() for digit in digits})
        return make_scenes(digits, *rest)

    monkeypatch.setattr(sys.modules[module.__module__], "make_scenes", recorded)
    module(train=40, held_out=20, image_size=64).setup()
    train, val, test = pools
    assert not train & val | train & test | val & test


@pytest.mark.parametrize("module", [DigitSceneMasks, DigitScenes])
def test_scenes_too_small_for_a_digit_are_refused(module):
    with pytest.raises(UserError, match=r"image_size: 4; expected at least 16"):
        module(image_size=4).setup()


# Loss and metrics


def test_the_loss_matches_torchs_cross_entropy_without_void_pixels():
    logits, masks = torch.randn(2, 3, 4, 6), torch.randint(0, 3, (2, 8, 12), dtype=torch.uint8)
    masks[0, :3] = VOID
    large = F.interpolate(logits, (8, 12), mode="bilinear", align_corners=False)
    for weights in (None, torch.tensor([0.5, 2.0, 1.0])):
        expected = F.cross_entropy(large, masks.long(), weights, ignore_index=VOID)
        torch.testing.assert_close(pixel_loss(logits, masks, weights), expected)


def test_a_batch_of_void_pixels_has_zero_loss_and_zero_gradients():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 4, 4), VOID, dtype=torch.uint8), torch.ones(3))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_losses_are_logged_with_the_weight_of_the_pixels_they_average(weights):
    """The number of counted pixels, or the sum of their class weights, is used to combine batches and devices."""
    task, said = segmenter(Colours(auxiliary=True), class_weights=weights, auxiliary_weight=0.25), []
    task.val_confusion = Confusion(3)
    task.log_train_loss = lambda loss, count: said.append((loss, count)) or loss
    task.log_eval_loss = lambda stage, loss, count: said.append((loss, count))
    images, masks = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[0, :3], masks[1, 2:] = VOID, 1
    factor = torch.tensor(weights or [1.0, 1.0, 1.0])
    expected = factor[masks[masks != VOID].long()].sum()
    task.training_step((images, masks), 0)
    task.validation_step((images, masks), 0)
    head, auxiliary = (F.cross_entropy(logits, masks.long(), factor, ignore_index=VOID) for logits in task(images))
    (trained, over), (evaluated, also_over) = said
    torch.testing.assert_close(trained, head + 0.25 * auxiliary)
    torch.testing.assert_close(evaluated, head)
    assert float(over) == float(also_over) == float(expected)


def test_the_auxiliary_loss_is_weighted_in_training_and_left_out_of_validation():
    task = segmenter(Colours(auxiliary=True), auxiliary_weight=0.25)
    images, masks = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    head, auxiliary = task(images)
    expected = pixel_loss(head, masks, None) + 0.25 * pixel_loss(auxiliary, masks, None)
    torch.testing.assert_close(task.losses(task(images), masks), expected)
    seen = {}
    task.log_eval_loss = lambda split, loss, count: seen.update({split: loss})
    task.val_confusion = Confusion(len(LABELS))
    task.validation_step((images, masks), 0)
    torch.testing.assert_close(seen["val"], pixel_loss(head, masks, None))


def test_each_validation_resets_the_metric_and_uses_the_class_weights():
    task, logged, losses = segmenter(class_weights=[0.5, 2.0, 1.0]).eval(), [], []
    task.val_confusion, task.log_eval_loss = Confusion(3), lambda stage, loss, count: losses.append(loss)
    task.log_dict = lambda values, **_: logged.append(values["val/pixel_accuracy"].item())
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    found = classes_of(task(images)[0], images.shape[-2:]).to(torch.uint8)
    for masks in (found, (found + 1) % 3, found):
        task.validation_step((images, masks), 0)
        task.on_validation_epoch_end()
    assert logged == [1, 0, 1]
    torch.testing.assert_close(losses[0], F.cross_entropy(task(images)[0], found.long(), task.class_weights))


def test_the_default_auxiliary_weight_is_that_of_pspnet():
    assert segmenter().auxiliary_weight == 0.4


def test_scores_match_scikit_learn_and_torchmetrics():
    found = torch.randint(0, 5, (3, 20, 30))
    masks = torch.randint(0, 4, (3, 20, 30), dtype=torch.uint8)  # class 4 is predicted but never true
    masks[torch.rand(masks.shape) < 0.2] = VOID
    confusion, jaccard = (
        Confusion(6),
        MulticlassJaccardIndex(6, ignore_index=VOID),
    )  # class 5 is neither predicted nor true
    for picture, mask in zip(found.split(1), masks.split(1), strict=True):
        confusion.update(picture, mask)
        jaccard.update(picture, mask.long())
    counted = masks != VOID
    expected = sklearn_metrics.confusion_matrix(masks[counted], found[counted], labels=range(6))
    np.testing.assert_array_equal(confusion.compute().numpy(), expected)
    union, values = scores(confusion.compute())
    by_class = sklearn_metrics.jaccard_score(masks[counted], found[counted], labels=range(5), average=None)
    np.testing.assert_allclose(union[:5], by_class)
    assert union[5].isnan()
    assert values["miou"].item() == pytest.approx(jaccard.compute().item())
    assert values["pixel_accuracy"].item() == pytest.approx((masks == found)[counted].double().mean().item())


def test_scores_without_counted_pixels_are_nan():
    """With zeros, an export would compare 0 with 0."""
    _, values = scores(torch.zeros(3, 3, dtype=torch.long))
    assert all(value.isnan() for value in values.values())


def test_the_loss_and_the_metric_need_no_device_synchronisation(unchecked):
    """Fake tensors have no values, so a branch or a shape that depends on a value raises an error."""
    confusion = Confusion(3)
    theirs = MulticlassJaccardIndex(3, ignore_index=VOID, validate_args=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
        confusion.update(classes_of(logits, masks.shape[1:]), masks)
        assert pixel_loss(logits, masks, torch.ones(3)).shape == ()
        assert confusion.compute().shape == (3, 3)
        with pytest.raises(DynamicOutputShapeException):  # as in torchmetrics
            theirs.update(logits.argmax(dim=1), masks[:, :4, :4])


@pytest.mark.gpu
def test_updating_the_metric_does_not_synchronise_with_the_gpu():
    confusion = Confusion(11).cuda()
    found, masks = torch.randint(0, 11, (2, 64, 64)).cuda(), torch.randint(0, 11, (2, 64, 64)).byte().cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        confusion.update(found, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert confusion.compute().sum() == 2 * 64 * 64


def test_logits_of_the_images_size_are_not_resized():
    logits = torch.randn(1, 2, 5, 7)
    assert torch.equal(enlarged(logits, torch.Size([5, 7])), logits)


@pytest.mark.parametrize("size", [(4, 6), (8, 12)])
def test_logits_are_enlarged_in_float32(size):
    """bfloat16 is too coarse for interpolated values."""
    logits = torch.randn(1, 2, 4, 6).bfloat16()
    found = enlarged(logits, torch.Size(size))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, enlarged(logits.float(), torch.Size(size)), rtol=0, atol=0)


def test_a_class_found_only_in_held_out_pictures_causes_a_warning(tmp_path):
    folders(tmp_path, train=10)
    masks = sorted((tmp_path / "train_annotation").iterdir())
    for path in masks:
        Image.fromarray((np.arange(40 * 60).reshape(40, 60) % 2).astype(np.uint8)).save(path)
    held_out = masked(tmp_path, held_out=0.1)
    with pytest.warns(UserWarning, match="no pixel of"):
        held_out.setup()
    (place,) = [i for i, path in enumerate(masks) if str(path) in held_out.splits["val"].masks]
    Image.fromarray((np.arange(40 * 60).reshape(40, 60) % 3).astype(np.uint8)).save(masks[place])
    again = masked(tmp_path, held_out=0.1)
    with pytest.warns(UserWarning, match=f"^train: no pixel of {LABELS[2]}$") as told:
        again.setup()
    assert len(told) == 1


# The task


def test_a_segmenter_trains_tests_predicts_and_draws(tmp_path):
    data = masked(folders(tmp_path / "data", train=8, validation=4), val="validation", photometric=False)
    task = segmenter(Colours(), optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    trainer = fit(tmp_path, task, data, max_epochs=12)
    (results,) = trainer.test(task, datamodule=data, verbose=False)
    assert set(results) == {f"test/{k}" for k in ("loss", "miou", "pixel_accuracy", *(f"iou_{c}" for c in LABELS))}
    assert results["test/miou"] > 0.95
    by_class = [results[f"test/iou_{label}"] for label in LABELS]
    assert results["test/miou"] == pytest.approx(np.mean(by_class))
    task.draw(tmp_path / "figures")
    for name in ("masks", "confusion"):
        with Image.open(tmp_path / f"figures/{name}.png") as figure:
            assert np.asarray(figure.convert("L")).std() > 5
    (row, *_), *_ = trainer.predict(task, datamodule=data)
    assert (row["width"], row["height"]) == (60, 40)
    assert (row["mask"] == painted(40, 60)[1]).mean() > 0.95
    assert np.asarray(task.picture(row)).shape == (40, 60)


class Halved(torch.nn.Conv2d):
    """A network that accepts only even image sizes, because it halves its input and enlarges it again."""

    def __init__(self):
        super().__init__(3, 3, 1)

    def forward(self, images):
        halved = torch.nn.functional.avg_pool2d(images, 2)
        return super().forward(images + halved.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_a_training_batch_of_one_is_refused_by_batch_norms_over_pooled_features(tmp_path):
    data = masked(folders(tmp_path / "data", train=4, validation=1), val="validation", batch_size=1)
    with pytest.raises(UserError, match=r"a batch of 1: Expected more than 1 value .*; expected a larger batch_size"):
        fit(tmp_path, segmenter(DeepLabV3(18, 3, output_stride=16)), data, max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": LABELS[:2]}, "network returns 3 classes, the data has 2; expected"),
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 factors; expected 3, one a class"),
        ({"preprocess": Normalise([0.5], [0.5])}, "network rejects an image of 64×64 pixels and 1 channels"),
        ({"labels": ["one"], "network": Colours(1)}, "the data has 1 classes; expected 2 to 254"),
        ({"class_weights": []}, "class_weights has 0 factors"),
        ({"class_weights": [1.0, -1.0, 1.0]}, "expected factors of 0 or more"),
        ({"class_weights": [1.0, float("nan"), 1.0]}, "expected factors of 0 or more"),
        ({"class_weights": [0.0, 0.0, 0.0]}, "and not all 0"),
        ({"network": CifarResNet(20, 3)}, "network returns [1, 3]; expected maps of logits (B, 3, h, w)"),
        ({"network": Halved()}, "network rejects an image of 65×65 pixels and 3 channels"),
        ({"network": FCNResNet(18, 3)}, None),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, message):
    if message is None:
        segmenter(**options).check()
        return
    with pytest.raises(UserError) as caught:
        segmenter(**options).check()
    assert message in str(caught.value)


# Runner and bundle


def deployed(task, height=8, width=8):
    batch = torch.zeros(2, 3, height, width, dtype=torch.uint8), torch.zeros(2, height, width, dtype=torch.uint8)
    return task.deployable(batch)


def test_the_runner_returns_a_mask_with_class_shares_and_draws_it():
    deployable = deployed(sighted())
    runner = make_runner(deployable.kind, deployable.graphs, deployable.metadata)
    picture, mask = painted(200, 301)
    answer = runner(picture)
    np.testing.assert_array_equal(answer["mask"], mask)
    assert (answer["width"], answer["height"]) == (301, 200)
    counts = np.bincount(mask.ravel(), minlength=3) / mask.size
    assert answer["classes"] == pytest.approx(dict(zip(LABELS, counts, strict=True)))
    voc = {1: [128, 0, 0], 2: [0, 128, 0], 19: [128, 192, 0], 20: [0, 64, 128], 255: [224, 224, 192]}
    assert PALETTE[list(voc)].tolist() == list(voc.values())
    indexed = runner.picture(answer)
    assert indexed.mode == "P"
    np.testing.assert_array_equal(np.asarray(indexed), mask)
    np.testing.assert_array_equal(np.asarray(indexed.convert("RGB")), PALETTE[mask])
    names, drawn = np.split(np.asarray(runner.draw(picture, answer)), [60])
    assert (names > 200).all(axis=2).any()  # white letters
    np.testing.assert_array_equal(drawn[mask[60:] == 0], picture[60:][mask[60:] == 0])
    expected = (0.4 * COLOURS[1] + 0.6 * PALETTE[1]).round()
    assert (np.abs(drawn[mask[60:] == 1] - expected) <= 1).all()


def test_drawings_name_classes_that_cover_a_hundredth_of_the_picture():
    """The background is not named; the others are listed in their colours, the largest first."""
    task = sighted()
    task.facts["labels"] = ["background", *LABELS[1:]]
    deployable = deployed(task)
    runner = make_runner(deployable.kind, deployable.graphs, deployable.metadata)
    picture = np.zeros((100, 200, 3), np.uint8)

    def colours(ones, twos):
        mask = np.zeros((100, 200), np.uint8)
        mask.ravel()[-ones - twos :] = 1
        mask.ravel()[len(mask.ravel()) - twos :] = 2
        return np.asarray(runner.draw(picture, answer(mask, task.facts["labels"])))[:40, 0]

    one, two = (PALETTE[k].tolist() for k in (1, 2))
    assert not colours(199, 0).any()
    assert colours(200, 0)[1].tolist() == one
    both = [row for row in colours(200, 300).tolist() if row in (one, two)]
    assert both[0] == two
    assert both[-1] == one


def test_a_fixed_size_graph_gives_masks_of_the_pictures_size():
    graph = deployed(sighted()).graphs["segment"]
    shape = {"image": [1, 20, 30, 3]}

    def answer(self, image):
        assert image.shape == (1, 20, 30, 3)
        return graph(image=image)

    fixed = type("Fixed", (), {"shape": shape, "__call__": answer})()
    runner = make_runner("semantic-segmentation", {"segment": fixed}, {"labels": LABELS, "channels": 3})
    picture, mask = painted(40, 90)
    for found in runner([picture, picture]):
        assert found["mask"].shape == (40, 90)
        assert (found["mask"] == mask).mean() > 0.9


def test_an_enlarged_mask_has_no_interpolated_classes():
    shape = {"image": [1, 4, 4, 3]}
    mask = np.tile(np.uint8([0, 0, 2, 2]), (1, 4, 1))
    fixed = type("Fixed", (), {"shape": shape, "__call__": lambda self, image: {"mask": mask}})()
    runner = make_runner("semantic-segmentation", {"segment": fixed}, {"labels": LABELS, "channels": 3})
    assert set(np.unique(runner(np.zeros((9, 14, 3), np.uint8))["mask"])) == {0, 2}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((1, 4, 5), np.int64), "mask int64"),
        (np.zeros((1, 1, 4, 5), np.uint8), r"mask uint8 \(1, 1, 4, 5\)"),
        (np.full((1, 4, 5), 3, np.uint8), "class 3; expected 0 to 2"),
        (np.zeros((1, 4, 4), np.uint8), r"a mask of \(4, 4\); expected \(4, 5\)"),
        (np.zeros((2, 4, 5), np.uint8), "returns no mask for each of 1 images"),
        (None, "returns no mask"),
    ],
)
def test_invalid_segmenter_outputs_are_refused(mask, message):
    shape = {"image": ["batch", "height", "width", 3]}
    segment = type("Graph", (), {"shape": shape, "__call__": lambda self, image: {"mask": mask}})()
    runner = make_runner("semantic-segmentation", {"segment": segment}, {"labels": LABELS, "channels": 3})
    with pytest.raises(UserError, match=message):
        runner(np.zeros((4, 5, 3), np.uint8))


@pytest.mark.parametrize(
    "metadata", [{}, {"labels": [], "channels": 3}, {"labels": LABELS, "channels": 2}, {"labels": [1], "channels": 1}]
)
def test_a_bundle_of_another_task_is_refused(metadata):
    with pytest.raises(UserError, match="not semantic segmentation; expected a graph segment"):
        make_runner("semantic-segmentation", deployed(sighted()).graphs, metadata)


@pytest.mark.parametrize(
    "probability",
    [np.zeros((1, 3, 4, 5)), np.zeros((1, 2, 4, 5), np.float32), np.full((1, 3, 4, 5), np.nan, np.float32)],
)
def test_invalid_probability_outputs_are_refused(probability):
    shape = {"image": ["batch", "height", "width", 3]}
    members = {"shape": shape, "outputs": ["mask", "probability"]}
    segment = type("Graph", (), {**members, "__call__": lambda self, image: {"probability": probability}})()
    runner = make_runner("semantic-segmentation", {"segment": segment}, {"labels": LABELS, "channels": 3})
    with pytest.raises(UserError, match=r"expected finite float32 \(3, 4, 5\)"):
        runner.probability(np.zeros((4, 5, 3), np.uint8))


def test_a_bundle_without_probabilities_says_how_to_get_them():
    deployable = deployed(sighted())
    runner = make_runner(deployable.kind, deployable.graphs, deployable.metadata)
    with pytest.raises(UserError, match=r"no probabilities .* expected .* model\.init_args\.probabilities"):
        runner.probability(np.zeros((4, 5, 3), np.uint8))


def test_probabilities_of_a_bundle_of_fixed_size_are_for_images_of_that_size():
    """The masks are resized to the image; maps of probabilities are not, and the graph is not to blame."""
    answer = {"probability": np.zeros((1, 3, 4, 5), np.float32)}
    members = {"shape": {"image": [1, 4, 5, 3]}, "outputs": ["mask", "probability"]}
    segment = type("Graph", (), {**members, "__call__": lambda self, image: answer})()
    runner = make_runner("semantic-segmentation", {"segment": segment}, {"labels": LABELS, "channels": 3})
    assert runner.probability(np.zeros((4, 5, 3), np.uint8)).shape == (3, 4, 5)
    with pytest.raises(UserError, match="an image of 7×6 pixels; expected 5×4, the fixed size of this bundle"):
        runner.probability(np.zeros((6, 7, 3), np.uint8))


def write_pictures(*given):
    with written_pictures(*given):
        pass


def test_predicted_pictures_are_laid_out_like_their_inputs(tmp_path):
    picture = Image.new("L", (2, 2))
    names = [str(tmp_path / f"data/{name}.jpg") for name in ("one/0", "two/0", "two/1")]
    write_pictures(tmp_path / "predictions", names, [picture] * 3)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert found == ["predictions/one/0.png", "predictions/two/0.png", "predictions/two/1.png"]
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "x.jpg").touch()
    (tmp_path / "links").mkdir()
    links = [tmp_path / "links" / name for name in ("a.jpg", "b.jpg")]
    for link in links:
        link.symlink_to(blobs / "x.jpg")
    write_pictures(
        tmp_path / "predictions", list(map(str, links)), [picture] * 2
    )  # named after the links, not after their common target
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["a.png", "b.png"]
    (tmp_path / "predictions.part").mkdir()
    picture.save(tmp_path / "predictions.part/2.png")  # left by a process that was killed
    write_pictures(tmp_path / "predictions", ["0", "1"], [picture] * 2)  # for data that is not in files
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["0.png", "1.png"]
    with pytest.raises(UserError, match=r"two inputs would be written to 0\.png; expected names that differ"):
        write_pictures(tmp_path / "predictions", ["a/0.jpg", "a/0.png"], [picture] * 2)
    with pytest.raises(ValueError, match="shorter"):
        write_pictures(tmp_path / "predictions", ["a/0.jpg", "a/1.png"], [picture])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "links", "predictions"]


def test_pictures_of_inputs_on_several_drives_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.commonpath", lambda paths: ntpath.commonpath(["C:\\a", "D:\\b"]))
    with pytest.raises(UserError, match="predictions: inputs on several drives; expected them on one"):
        write_pictures(tmp_path / "predictions", ["a/0.jpg", "b/0.jpg"], [])


@pytest.mark.parametrize("refused", ["pictures", "rows"])
def test_a_failed_prediction_keeps_the_previous_pictures_and_rows(tmp_path, monkeypatch, refused):
    """For example, the disk may have room for only one of the two."""
    (tmp_path / "predictions.jsonl").write_text("of before")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/0.png").write_text("of before")
    trainer = SimpleNamespace(world_size=1, predict=lambda *_, **__: [[{"size": 1}, {"size": 2}]])
    model = SimpleNamespace(picture=lambda answer: Image.new("L", (2, 2)))
    data = SimpleNamespace(sources=lambda: ["a/0.jpg", "a/0.png" if refused == "pictures" else "a/1.png"])
    if refused == "rows":
        monkeypatch.setattr("dlref.cli.write_text", lambda *_: (tmp_path / "none" / "none").write_text(""))
    with pytest.raises((UserError, FileNotFoundError), match=r"two inputs would be written to|none"):
        TrainCLI.predict(SimpleNamespace(trainer=trainer, run=tmp_path), model, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions", "predictions.jsonl"]
    for name in ("predictions.jsonl", "predictions/0.png"):
        assert (tmp_path / name).read_text() == "of before"


def test_the_figure_shows_pictures_from_the_whole_split(tmp_path):
    data = masked(folders(tmp_path / "data", train=2, validation=30), val="validation", batch_size=2)
    task = sighted()
    fit(tmp_path, task, data, max_epochs=0).test(task, datamodule=data, verbose=False)
    assert len(task.pictures) == 12
    places = [i for image, _, _ in task.pictures for i in range(30) if torch.equal(image, data.splits["val"][i][0])]
    assert len(set(places)) >= 12
    assert max(places) >= 26


@pytest.mark.parametrize("size", [(1, 60), (60, 1)])
def test_a_thin_first_picture_does_not_change_the_figures_size_much(tmp_path, size):
    thin, square = (
        (torch.zeros(3, *side, dtype=torch.uint8), *torch.zeros(2, *side, dtype=torch.uint8)) for side in (size, (9, 9))
    )
    figures.masks(tmp_path / "masks.png", [thin, square, square, square], ["background", "a"])
    with Image.open(tmp_path / "masks.png") as figure:
        assert 0.2 < figure.height / figure.width < 1.5


NETWORKS = {
    "pspnet": lambda: PSPNet(18, 11, output_stride=16),
    "deeplabv3": lambda: DeepLabV3(18, 11, output_stride=16),
    "fcn8s": lambda: small_vgg(11),
}


def small_vgg(classes):
    """Return FCN-8s with thin fc6 and fc7, to save time, and with scores that are not zero."""
    network = thin_fcn(classes)
    nn.init.normal_(network.score_fr.weight, std=0.5)
    for score in (network.score_pool3, network.score_pool4):
        nn.init.normal_(score.weight, std=0.01)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_exported_with_dynamic_sizes(name, tmp_path):
    torch.manual_seed(0)
    task = segmenter(NETWORKS[name](), ["background", *"0123456789"], probabilities=name == "pspnet").eval()
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    served = task.deployable((images, torch.zeros(3, 64, 64, dtype=torch.uint8)))
    graph = served.graphs["segment"]
    write_onnx(graph, tmp_path / "segment.onnx", TARGETS["cpu"])
    exported = OnnxGraph(tmp_path / "segment.onnx", "CPUExecutionProvider")
    rows = parity("segment", graph, graph, exported, graph.tolerance, static=False)
    assert [row["shape"]["image"] for row in rows] == [[1, 64, 64, 3], [2, 33, 73, 3], [3, 69, 35, 3]]
    assert exported.shape == {"image": ["batch", "height", "width", 3]}
    runner = make_runner(served.kind, {"segment": exported}, served.metadata)
    for height, width in ((1, 1), (7, 150), (97, 41)):  # sizes that the verification does not use
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        found, expected = runner.masks(images), graph(image=images)
        assert found.shape == (2, height, width)
        assert (found == expected["mask"]).mean() >= 0.999
    if name == "pspnet":
        probability = runner.probability(images[0])
        np.testing.assert_allclose(probability, expected["probability"][0], atol=1e-4)
        np.testing.assert_allclose(probability.sum(axis=0), 1, atol=1e-5)


def test_the_command_writes_masks_and_overlays(tmp_path, capsys):
    data = masked(folders(tmp_path / "data", train=4, validation=2), val="validation")
    export(sighted(), data, TARGETS["cpu"], tmp_path / "bundle")
    one, two = (str(tmp_path / f"data/validation/{i}.png") for i in (0, 1))
    mask, overlay = tmp_path / "mask.png", tmp_path / "overlay.png"
    capsys.readouterr()
    assert main([str(tmp_path / "bundle"), one, "--output", str(mask), "--overlay", str(overlay)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"input", "width", "height", "classes"}
    with Image.open(mask) as ids, Image.open(overlay) as drawn:
        np.testing.assert_array_equal(np.asarray(ids), painted(40, 60)[1])
        assert (drawn.mode, drawn.size) == ("RGB", (60, 40))
    assert main([str(tmp_path / "bundle"), one, two, "--output", str(tmp_path / "masks")]) == 0
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0.png", "1.png"]
    capsys.readouterr()
    for arguments, message in (
        (["--output", str(mask), "--overlay", str(tmp_path / "bundle/../mask.png")], "both"),
        (["--output", str(tmp_path / "bundle/mask.png")], "inside the bundle, which holds only its own files"),
        (["--output", one], "would be overwritten"),
    ):
        assert main([str(tmp_path / "bundle"), one, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_pixels_flipped_by_rounding_are_counted_and_too_many_are_refused():
    expected = np.zeros((2, 100, 100), np.uint8)

    def compared(flipped, tolerance=1e-4):
        actual = expected.copy()
        actual.ravel()[:flipped] = 1
        exported = type("Graph", (), {"shape": {}, "declared": {}, "__call__": lambda self: {"mask": actual}})()
        discrete = SimpleNamespace(selected=(), discrete=["mask"])
        graph = Compared("segment", discrete, lambda: {"mask": expected}, exported, tolerance)
        graph()
        graph.check_flips()
        return graph

    assert (compared(20).rows, compared(20).flipped) == (20_000, 20)
    with pytest.raises(
        Refused, match=r"segment, outputs mask: 21 of 20000 differ from PyTorch's; expected at most 0.1%"
    ):
        compared(21)
    assert compared(5000, tolerance=np.inf).flipped == 5000  # a lower precision is judged by the metric


# Configs


def test_the_segmentation_configs_exist_and_have_a_class_name_per_class():
    names = {
        "fcn_digit_scenes",
        "fcn8s_vgg16_camvid",
        "fcn_resnet50_camvid",
        "pspnet_resnet50_camvid",
        "deeplabv3_resnet50_camvid",
        "fcn_resnet50_voc",
    }
    for name in names:
        config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        data, classes = config["data"]["init_args"], config["model"]["init_args"]["network"]["init_args"]["num_classes"]
        if "class_names" in data:
            assert len(data["class_names"]) == classes == 11


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mask_of_ones_own_with_a_value_that_is_no_class_is_refused(workers):
    class Own(MaskedPictures):
        def read(self, index):
            return torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((8, 8), [0, 255, 2][index], dtype=torch.uint8)

    class OwnData(SegmentationData):
        def make_splits(self):
            self.labels = Own.classes = ["sky", "sea"]
            return dict.fromkeys(("train", "val", "test"), Own(["a", "b", "c"], [(8, 8)] * 3))

    data = OwnData(batch_size=1, num_workers=workers)
    data.setup()
    assert data.splits["val"].classes == data.labels  # an attribute of its own stays
    batches = iter(data.val_dataloader())
    assert [int(next(batches)[1].max()) for _ in range(2)] == [0, 255]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert one_line(caught.value) == "c: value 2 in 64 pixels of its mask; expected 0 to 1, or 255 for void"


def test_a_listing_of_ones_own_as_a_plain_tuple_is_refused():
    class Own(ListedMasks):
        def read(self, name, classes):
            return (["a.png"], ["a.png"])

    assert error_of(Own(root=".", train="a").setup).startswith("pictures read as tuple; expected a listing")


def test_a_split_of_ones_own_without_pictures_is_refused():
    class OwnData(SegmentationData):
        def make_splits(self):
            self.labels = ["sky", "sea"]
            return {"train": MaskedPictures(["a"], [(8, 8)]), "val": MaskedPictures([], [])}

    assert error_of(OwnData().setup) == "val: no pictures; expected at least one"
