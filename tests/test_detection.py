"""Object detection: networks and weights, augmented batches, the task, the runner, the bundle."""

import json
import math
import re
import warnings
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import ROOT
from lightning import Trainer
from PIL import Image
from refusals import error_of, one_line
from scipy.spatial.transform import Rotation
from test_export import export
from test_tasks import sgd
from torch import nn
from torchvision import models as published
from torchvision import tv_tensors
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert

from dlref.data import COCOBoxes, DigitScenes, ManifestBoxes, SageMakerBoxes, VOCBoxes
from dlref.data.augment import photometric
from dlref.data.box_listings import BoxListing, Picture
from dlref.data.object_detection import ListedBoxes
from dlref.export.convert import Plan, convert
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.models import SSDVGG16, VGG, ResNet, SSDResNet
from dlref.models.ssd import LAYOUTS
from dlref.runtime import UserError, load, make_runner
from dlref.runtime.__main__ import main
from dlref.tasks import ImagePreprocess, ObjectDetector
from dlref.tasks.multibox import PADDED
from dlref.tasks.object_detection import average_precision, predictions, truth
from dlref.training.weights import load_weights

PLAIN = {"mean": [0.5] * 3, "std": [0.25] * 3}
RED, BLUE = (200, 30, 30), (30, 30, 200)


class Corners(nn.Module):
    """The smallest detector: four default boxes, one for each quarter of the image, classified by colour."""

    class_layers = ()
    size = 8

    def __init__(self, classes=2):
        super().__init__()
        centres = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
        self.register_buffer("anchors", torch.cat([centres, torch.full((4, 2), 0.5)], dim=1), persistent=False)
        self.conv = nn.Conv2d(3, classes + 1, 4, stride=4)

    def forward(self, x):
        logits = self.conv(x).flatten(2).transpose(1, 2)
        return torch.zeros_like(logits[..., :1]).expand(-1, -1, 4), logits


def painted(size=8):
    """Return a grey picture (H, W, C) whose first quarter is red and whose last quarter is blue."""
    image = np.full((size, size, 3), 128, dtype=np.uint8)
    image[: size // 2, : size // 2], image[size // 2 :, size // 2 :] = RED, BLUE
    return image


def detector(network=None, labels=("red", "blue"), **options):
    network = network or Corners()
    task = ObjectDetector(
        network=network, preprocess=ImagePreprocess(network.size, **PLAIN), **{"optimizer": sgd, **options}
    )
    task.remember({"labels": list(labels)})
    return task


def sighted():
    """Return a detector with hand-set weights that finds red and blue quarters in grey pictures."""
    task = detector().eval()
    with torch.no_grad():
        weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]])
        task.network.conv.weight.copy_(weight[:, :, None, None].expand(-1, -1, 4, 4) / 2)
        task.network.conv.bias.copy_(torch.tensor([6.0, 0.0, 0.0]))
    return task


class Painted(DigitScenes):
    """A data module of painted pictures instead of digit scenes."""

    def __init__(self, n=6, **options):
        super().__init__(image_size=8, batch_size=4, zoom_out=1, crop=False, photometric=False, **options)
        self.n = n

    def list_splits(self):
        boxes = torch.tensor([[0.0, 0, 4, 4], [4, 4, 8, 8]])
        picture = Picture("0", boxes, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool))
        image = torch.from_numpy(painted()).permute(2, 0, 1)
        self.images = dict.fromkeys(("train", "val", "test"), image.repeat(self.n, 1, 1, 1))
        return dict.fromkeys(("train", "val", "test"), BoxListing([picture] * self.n, ["red", "blue"]))


# Networks and their weights


def test_ssd300_vgg16_has_the_published_parameter_count():
    assert sum(p.numel() for p in SSDVGG16(90).parameters()) == 35_641_826


@pytest.mark.parametrize(
    ("depth", "count"), [(11, 132_863_336), (13, 133_047_848), (16, 138_357_544), (19, 143_667_240)]
)
def test_vgg_has_the_published_parameter_count(depth, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in VGG(depth).parameters()) == count


def test_vgg_outputs_match_torchvision():
    theirs, own = published.vgg11(num_classes=3).eval(), VGG(11, 3).eval()
    own.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(own(images), theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "sides", "boxes"),
    [
        (lambda: SSDVGG16(3), [38, 19, 10, 5, 3, 1], 8732),
        (lambda: SSDVGG16(3, 512), [64, 32, 16, 8, 4, 2, 1], 24564),
        (lambda: SSDResNet(50, 3, 300), [38, 19, 10, 5, 3, 1], 8732),
        (lambda: SSDResNet(34, 3, 512), [64, 32, 16, 8, 4, 2, 1], 24564),
        (lambda: SSDResNet(18, 3, 96), [12, 6, 3, 2, 1], 866),
    ],
)
def test_maps_default_boxes_and_heads_have_matching_shapes(network, sides, boxes):
    with torch.device("meta"):
        network = network().eval()
        images = torch.rand(1, 3, network.size, network.size)
    maps, (offsets, logits) = network.backbone(images), network(images)
    assert [x.shape[2:] for x in maps] == [(side, side) for side in sides]
    assert offsets.shape == (1, boxes, 4)
    assert logits.shape == (1, boxes, 4)
    assert network.anchors.shape == (boxes, 4)


def test_default_boxes_have_the_scales_of_the_config():
    """Each map starts with two squares: one of its scale, one of the geometric mean of its scale and the next."""
    scales = [0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05]
    config = yaml.safe_load((ROOT / "configs/ssd300_vgg16_voc.yaml").read_text(encoding="utf-8"))
    assert config["model"]["init_args"]["network"]["init_args"]["scales"] == scales
    network = SSDResNet(18, 3, 300, scales)
    place = 0
    for side, a_cell, scale, following in zip(
        [38, 19, 10, 5, 3, 1], [4, 6, 6, 6, 4, 4], scales, scales[1:], strict=False
    ):
        found = network.anchors[place : place + 2, 2:]
        expected = torch.tensor([[scale] * 2, [math.sqrt(scale * following)] * 2])
        torch.testing.assert_close(found, expected)
        place += side**2 * a_cell
    for refused in (scales[1:], [0.0, *scales[1:]]):
        with pytest.raises(ValueError, match="expected 7 numbers above 0 at 300 pixels"):
            SSDResNet(18, 3, 300, refused)


def test_default_boxes_match_torchvision():
    layout = LAYOUTS[300]
    published = DefaultBoxGenerator(list(map(list, layout.ratios)), scales=layout.scales, steps=layout.steps)
    maps = [torch.zeros(1, 1, side, side) for side in layout.maps]
    (theirs,) = published(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)
    torch.testing.assert_close(box_convert(layout.boxes(300), "cxcywh", "xyxy"), theirs / 300)


def test_sizes_without_a_layout_are_refused(unchecked):
    with pytest.raises(ValueError, match="for 400 pixels: expected 300 or 512"):
        SSDVGG16(3, 400)
    with pytest.raises(ValueError, match="for 400 pixels: expected one of 96, 300, 512"):
        SSDResNet(18, 3, 400)


def test_published_vgg_weights_load_into_the_base(tmp_path, caplog):
    theirs = published.vgg16(init_weights=False)  # skips a second initialisation
    torch.save(theirs.state_dict(), tmp_path / "vgg16.pth")
    network = SSDVGG16(3)
    fresh = load_weights(network, tmp_path / "vgg16.pth")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.backbone.features(image), theirs.features[:23](image))
    fc6 = network.backbone.extra[0][7][1].weight
    torch.testing.assert_close(fc6[1, 5, 1, 2], theirs.classifier[0].weight[4, 5 * 49 + 3 * 7 + 6])
    assert "backbone.extra.1.0.weight" in fresh
    assert not any(name.startswith(("backbone.features", "backbone.extra.0")) for name in fresh)
    assert "loaded into the base" in caplog.text


def test_fc7_takes_every_fourth_value_of_a_published_vgg():
    network = SSDVGG16(3)
    row, column = torch.arange(4096.0)[:, None], torch.arange(4096.0)
    linear = {"classifier.0.weight": torch.zeros(4096, 25088), "classifier.3.weight": row * 4096 + column}
    linear |= {"classifier.0.bias": torch.arange(4096.0), "classifier.3.bias": torch.arange(4096.0)}
    own = network.of_base(linear)
    fc7 = own["backbone.extra.0.7.3.weight"][..., 0, 0]
    assert torch.equal(fc7, row[::4] * 4096 + column[::4])
    assert torch.equal(own["backbone.extra.0.7.3.bias"], column[::4])


def test_crops_have_the_sizes_and_overlaps_of_the_ssd_authors():
    crop = DigitScenes(zoom_out=1).train_transform().transforms[0]
    assert (crop.min_scale, crop.max_scale) == (0.3, 1.0)
    assert (crop.min_aspect_ratio, crop.max_aspect_ratio) == (0.5, 2.0)
    assert crop.options == [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]


def test_the_first_vgg_map_has_an_initial_norm_of_20():
    """Section 3.1: the features of conv4_3 are larger than those of the deeper maps."""
    with torch.no_grad():
        first = SSDVGG16(3).backbone(torch.randn(1, 3, 300, 300))[0]
    torch.testing.assert_close(first.norm(dim=1), torch.full((1, 38, 38), 20.0))


def test_new_layers_have_xavier_initialisation():
    network = SSDResNet(18, 10, 96)
    layers = [network.backbone.extra[0][0], network.head["classification_head"].module_list[1]]
    for layer in layers:
        fan_in, fan_out = (layer.weight[0].numel(), layer.weight[:, 0].numel())
        limit = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * limit < layer.weight.abs().max() <= limit
        assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.03)
    assert not layers[1].bias.any()


def test_published_resnet_weights_load_into_the_base(tmp_path):
    theirs = ResNet(18)
    kept = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "resnet18.pth")  # as published
    network = SSDResNet(18, 3, 96)
    fresh = load_weights(network, tmp_path / "resnet18.pth")
    torch.testing.assert_close(network.backbone.features.layer3[1].conv2.weight, theirs.layer3[1].conv2.weight)
    assert all(name.startswith(("backbone.extra", "head.")) for name in fresh)
    torch.save(ResNet(34).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match=r"resnet34\.pth: \d+ tensors do not fit SSDResNet"):
        load_weights(network, tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match=r"resnet18\.pth: \d+ tensors do not fit SSDResNet"):
        load_weights(SSDResNet(34, 3, 96), tmp_path / "resnet18.pth")  # would leave the deeper layers untrained


@pytest.mark.parametrize("network", [lambda: SSDVGG16(3), lambda: SSDResNet(18, 3, 96), Corners])
def test_weights_of_an_unrelated_network_are_refused(tmp_path, network):
    torch.save({"features.conv0.weight": torch.zeros(3), "classifier.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: \d+ tensors do not fit"):
        load_weights(network(), tmp_path / "other.pth")


def test_a_vgg_with_other_linear_layers_is_refused(tmp_path):
    linear = {f"classifier.{i}.weight": torch.zeros(512, 512) for i in (0, 3)}
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3), **linear}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"small\.pth: \d+ tensors do not fit SSDVGG16"):
        load_weights(SSDVGG16(3), tmp_path / "small.pth")


def test_weights_for_other_classes_get_new_class_heads_and_keep_the_rest(tmp_path, caplog):
    trained, network = SSDResNet(18, 10, 96), SSDResNet(18, 3, 96)
    torch.save(trained.state_dict(), tmp_path / "ssd.pth")
    fresh = load_weights(network, tmp_path / "ssd.pth")
    assert fresh == sorted(n for n in network.state_dict() if n.startswith("head.classification_head."))
    assert "new head for other classes: head.classification_head" in caplog.text
    boxes = "head.regression_head.module_list.0.weight"
    torch.testing.assert_close(network.state_dict()[boxes], trained.state_dict()[boxes])


# Batches


def framed(tmp_path, count=1):
    """Write a VOC folder of noisy 60×40 pictures, each with a box around a red area that the pixels show."""
    rng = np.random.default_rng(0)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(90, 110, (40, 60, 3), dtype=np.uint8)
        pixels[10:30, 20:45] = (255, 0, 0)
        Image.fromarray(pixels).save(tmp_path / f"JPEGImages/{i}.png")
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = f"{i}.png"
        entry = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(entry, "name").text = "red"
        box = ElementTree.SubElement(entry, "bndbox")
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), (20, 10, 45, 30), strict=True):
            ElementTree.SubElement(box, name).text = str(value)
        ElementTree.ElementTree(root).write(tmp_path / f"Annotations/{i}.xml")
    (tmp_path / "ImageSets/Main/train.txt").write_text("".join(f"{i}\n" for i in range(count)))
    return tmp_path


def coco(root, annotations, place="train"):
    """Write a COCO file of one picture and two classes; return the options of its data module."""
    (root / "annotations").mkdir()
    (root / place).mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(root / place / "a.png")
    entry = {"id": 1, "file_name": "a.png", "width": 60, "height": 40}
    classes = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    (root / "annotations/instances_train.json").write_text(
        json.dumps({"images": [entry], "annotations": annotations, "categories": classes})
    )
    lists = dict.fromkeys(("train", "val"), "annotations/instances_train.json")
    return {"root": root, **lists, "num_workers": 0}


@pytest.mark.filterwarnings("ignore:.* are among those of train")
@pytest.mark.parametrize("crowds", [0, 1])
def test_a_training_set_without_boxes_is_refused(tmp_path, crowds):
    crowd = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20], "iscrowd": 1}
    with pytest.raises(UserError, match="train: no box in any of the pictures"):
        COCOBoxes(**coco(tmp_path, [crowd] * crowds)).setup()


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        ([[0.1, 0.2, 0.5, 1.0]], [1], "train: boxes with numbers up to 1; expected pixels"),
        ([[30, 20, 10, 8]], [1], r"b.png: a box \[30.0, 20.0, 10.0, 8.0\]; expected x1 y1 x2 y2 in pixels"),
        ([[30, 20, 30, 40]], [1], r"b.png: a box \[30.0, 20.0, 30.0, 40.0\]; expected x1 y1 x2 y2 in pixels"),
        ([[1, 2, float("nan"), 40]], [1], r"b.png: a box \[1.0, 2.0, nan, 40.0\]; expected x1 y1 x2 y2 in pixels"),
        ([[1, 2, float("inf"), 40]], [1], r"b.png: a box \[1.0, 2.0, inf, 40.0\]; expected x1 y1 x2 y2 in pixels"),
        ([[1, 2, 30, 20]], [1, 0], r"b.png: .* are \[\[1, 4\], \[2\], \[1\]\]; expected \[N, 4\], \[N\] and \[N\]"),
        ([[1], [2], [30], [20]], [1], r"b.png: .* are \[\[4, 1\], \[1\], \[1\]\]; expected \[N, 4\], \[N\] and \[N\]"),
        ([[1, 2, 30, 20]], [2], "b.png: label 2; expected 0 to 1"),
        ([[1, 2, 30, 20]], [-1], "b.png: label -1; expected 0 to 1"),
        ([[1, 2, 30, 20]], [1.0], "b.png: boxes, labels and ignored are of .*float32, torch.float32, torch.bool"),
    ],
)
def test_objects_that_are_not_as_a_listing_describes_them_are_refused(box, label, message):
    class Own(ListedBoxes):
        def read(self, path, classes):
            empty = Picture("a.png", torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0) > 0)
            picture = Picture("b.png", torch.tensor(box).float(), torch.tensor(label), torch.zeros(1) > 0)
            return BoxListing([empty, picture], ["red", "blue"])

    with pytest.raises(UserError, match=message) as caught, warnings.catch_warnings(action="ignore"):
        Own(root=".", train="a", val="b").setup()
    one_line(caught.value)


def test_a_listing_of_ones_own_as_a_plain_tuple_is_refused():
    class Own(ListedBoxes):
        def read(self, path, classes):
            return [], ["red"]

    assert error_of(Own(root=".", train="a").setup).startswith("pictures read as tuple; expected a listing")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": "ab", "val": "b"}, "b: pictures read with the classes ['b']; expected those given, ['a', 'b']"),
        ({"train": ["ab", "b"]}, "b: pictures read with the classes ['b']; expected those given, ['a', 'b']"),
        ({"train": "ab", "class_names": ["b", "a"]}, "ab: pictures read with the classes ['a', 'b']; expected those "
         "given, ['b', 'a']"),
    ],
)  # fmt: skip
def test_a_listing_of_ones_own_that_ignores_the_classes_given_is_refused(lists, message):
    """Class 0 would be "a" in training and "b" in validation."""

    class Own(ListedBoxes):
        def read(self, path, classes):
            box, ignored = torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(1) > 0
            return BoxListing([Picture(f"{path}.png", box, torch.tensor([0]), ignored)], list(path.name))

    assert error_of(Own(root=".", **lists).setup) == message


@pytest.mark.parametrize("box", [[0.0, 0, 9, 8], [0, -0.1, 8, 8]])
def test_a_box_of_ones_own_that_is_not_within_its_picture_is_refused(box, tmp_path):
    """Of boxes in the pixels of another size, training would learn places without the objects."""

    class Own(ListedBoxes):
        def read(self, path, classes):
            Image.new("RGB", (8, 8)).save(path)
            return BoxListing([Picture(str(path), torch.tensor([box]), torch.tensor([0]), torch.zeros(1) > 0)], ["red"])

    data = Own(root=tmp_path, train="a.png", val="b.png", num_workers=0)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        message = error_of(lambda loader=loader: next(iter(loader)))
        assert re.fullmatch(r".*\.png: a box \[.*\]; expected it within 0, 0, 8, 8", message)


@pytest.mark.filterwarnings("ignore:.* are among those of train")
def test_coco_pictures_can_be_in_another_folder(tmp_path):
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20], "iscrowd": 0}
    data = COCOBoxes(**coco(tmp_path, [box], "images/train"), pictures="images/{}")
    with pytest.warns(UserWarning, match="train: no box of blue"):
        data.setup()
    assert data.splits["train"].names[0].endswith("images/train/a.png")


def test_boxes_follow_their_pixels_through_augmentation(tmp_path):
    data = VOCBoxes(
        framed(tmp_path, 40),
        train="ImageSets/Main/train.txt",
        held_out=0.2,
        image_size=120,
        batch_size=8,
        num_workers=0,
    )
    data.setup()
    assert (len(data.splits["train"]), len(data.splits["val"]), data.labels) == (32, 8, ["red"])
    seen = []
    for images, targets in data.train_dataloader():
        assert images.shape == (8, 3, 120, 120)
        assert targets["boxes"].shape == (8, 1, 4)
        for image, box, label in zip(images, targets["boxes"][:, 0], targets["labels"][:, 0], strict=True):
            red = (image[0] > 200) & (image[1] < 60)
            if label < 0:
                continue
            rows, columns = red.any(dim=1).nonzero(), red.any(dim=0).nonzero()
            found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 120
            torch.testing.assert_close(box, found, atol=0.03, rtol=0)
            seen.append(box)
    seen = torch.stack(seen)
    assert len(seen) > 24  # a crop must overlap an object
    assert (seen[:, 2] - seen[:, 0]).min() < 0.25  # zoomed out: 25 of 60 columns are 0.42
    assert (seen[:, 2] - seen[:, 0]).max() > 0.5  # cropped


def test_crop_and_flip_are_independent_options():
    for flip, name in ((True, "RandomHorizontalFlip"), (False, "Cropped")):
        steps = DigitScenes(zoom_out=1, crop=not flip, flip=flip).train_transform().transforms
        assert [type(step).__name__ for step in steps] == [
            name,
            "Resize",
            "ClampBoundingBoxes",
            "Inside",
        ]


@pytest.mark.parametrize("size", [(1, 9), (3, 200), (200, 3), (4, 4)])
def test_very_thin_pictures_can_be_cropped(size):
    """torchvision crops down to 0.3 of a side: for a side of 3 pixels, less than one pixel."""
    crop = DigitScenes(zoom_out=1, flip=False).train_transform()
    height, width = size
    for seed in range(40):
        torch.manual_seed(seed)
        box = tv_tensors.BoundingBoxes([[0.0, 0, width, height]], format="XYXY", canvas_size=size)
        image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
        sample = {"image": image, "boxes": box, "labels": torch.tensor([1]), "ignored": torch.tensor([False])}
        assert len(crop(sample)["boxes"]) == 1


def test_boxes_that_reach_the_border_survive_resizing():
    """In float32, 598 times 300 / 598 is 300.00003, which is outside the picture."""
    resized = DigitScenes(image_size=300, zoom_out=1, crop=False, flip=False).train_transform()
    sample = {
        "image": tv_tensors.Image(torch.zeros(3, 598, 598, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes([[500.0, 500, 598, 598]], format="XYXY", canvas_size=(598, 598)),
        "labels": torch.tensor([1]),
        "ignored": torch.tensor([False]),
    }
    assert resized(sample)["boxes"][0, 2:].tolist() == [300, 300]


def sample_of(boxes, height, width, labels):
    """Return a training sample with boxes in an empty picture."""
    return {
        "image": tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor(labels),
        "ignored": torch.tensor([label % 2 == 0 for label in labels]),
    }


def test_objects_thinner_than_a_pixel_of_the_network_are_learnt():
    """A pole of 3 of 1,200 columns is 0.75 of 300 columns wide: evaluation counts it, too."""
    data = DigitScenes(image_size=300, zoom_out=1, crop=False, flip=False)
    pole, bolt = [300.0, 100, 303, 700], [100.0, 100, 101, 101]
    resized = data.train_transform()(sample_of([pole, bolt], 900, 1200, [3, 4]))
    expected = data.eval_transform()(sample_of([pole, bolt], 900, 1200, [3, 4]))
    torch.testing.assert_close(resized["boxes"], expected["boxes"])
    assert resized["labels"].tolist() == [3, 4]
    assert resized["ignored"].tolist() == [False, True]


def test_a_crop_drops_the_objects_whose_centres_are_outside():
    crop = DigitScenes(zoom_out=1, flip=False, image_size=100).train_transform()
    left, right = [0.0, 0, 20, 90], [180.0, 0, 200, 90]
    kept = set()
    for seed in range(60):
        torch.manual_seed(seed)
        sample = crop(sample_of([left, right], 90, 200, [1, 2]))
        boxes, labels = sample["boxes"], sample["labels"].tolist()
        assert len(boxes) == len(labels) == len(sample["ignored"])
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert sample["ignored"].tolist() == [label % 2 == 0 for label in labels]
        kept.add(tuple(labels))
    assert kept == {(1,), (2,), (1, 2)}


def test_a_picture_without_objects_stays_whole():
    crop = DigitScenes(zoom_out=1, flip=False, image_size=9).train_transform()
    state = torch.get_rng_state()
    sample = crop(sample_of(torch.zeros(0, 4), 90, 200, []))
    assert sample["boxes"].shape == (0, 4)
    assert torch.equal(torch.get_rng_state(), state)  # no crop was tried


def test_zoom_out_pads_with_the_imagenet_mean():
    assert DigitScenes(zoom_out=3).train_transform().transforms[1].side_range == (1.0, 3)
    zoom = DigitScenes(zoom_out=4).train_transform().transforms[1]
    zoom.p = 1.0
    image = tv_tensors.Image(torch.zeros(3, 8, 8, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[0, 0, 8, 8]], format="XYXY", canvas_size=(8, 8))
    pixels = zoom({"image": image, "boxes": boxes})["image"].flatten(1).T.tolist()
    assert set(map(tuple, pixels)) == {(0, 0, 0), (123, 117, 104)}


def test_large_pictures_are_shrunk_before_zooming_out():
    shrunk = DigitScenes(image_size=8).train_transform().transforms[0]
    for (height, width), shape in (((64, 96), (3, 32, 48)), ((32, 96), (3, 32, 96))):
        image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
        boxes = tv_tensors.BoundingBoxes([[0, 0, 48, 16]], format="XYXY", canvas_size=(height, width))
        found = shrunk({"image": image, "boxes": boxes})
        assert found["image"].shape == shape
        assert found["boxes"].tolist() == [[0, 0, 48 * shape[2] / width, 16 * shape[1] / height]]


def test_evaluation_uses_whole_pictures(tmp_path):
    data = VOCBoxes(framed(tmp_path, 10), train="ImageSets/Main/train.txt", image_size=120, batch_size=2, num_workers=0)
    data.setup()
    _, targets = next(iter(data.val_dataloader()))
    torch.testing.assert_close(targets["boxes"][0, 0], torch.tensor([20 / 60, 10 / 40, 45 / 60, 30 / 40]))
    assert targets["sizes"].tolist() == [[40, 60]]
    assert data.sources() == data.splits["val"].names


def test_digit_scenes_are_generated_without_files_and_differ_by_split():
    data = DigitScenes(train=20, held_out=10, batch_size=5, zoom_out=1, crop=False)
    data.setup()
    images, targets = next(iter(data.val_dataloader()))
    assert images.shape == (5, 3, 96, 96)
    assert images.dtype == torch.uint8
    there = targets["labels"] >= 0
    assert there.any()
    assert (targets["boxes"][there] >= 0).all()
    assert (targets["boxes"][there] <= 1).all()
    assert not targets["boxes"][~there].any()
    assert not torch.equal(data.images["val"], data.images["test"])


@pytest.mark.filterwarnings("ignore:.* are among those of train")
def test_sagemaker_manifest_and_coco_lists_are_read_and_test_defaults_to_val(tmp_path, capsys):
    for i, name in enumerate("abc"):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.fromarray(painted(20 + i)).save(tmp_path / f"train/{name}.png")
    boxes = [{"class_id": 0, "left": 1, "top": 2, "width": 5, "height": 6}]
    (tmp_path / "train_annotation").mkdir()
    for name in "abc":
        row = {"file": f"{name}.png", "annotations": boxes, "categories": [{"class_id": 0, "name": "red"}]}
        (tmp_path / f"train_annotation/{name}.json").write_text(json.dumps(row))
    named = {"box": {"annotations": boxes}, "box-metadata": {"class-map": {"0": "red"}}}
    rows = [{"source-ref": f"train/{name}.png", **named} for name in "abc"]
    (tmp_path / "train.manifest").write_text("".join(json.dumps(row) + "\n" for row in rows))
    coco = {
        "images": [{"id": i, "file_name": f"{n}.png"} for i, n in enumerate("abc")],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2, 5, 6], "iscrowd": 0},
            {"id": 2, "image_id": 0, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "red"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(coco))
    for module, train in (
        (SageMakerBoxes, "train_annotation"),
        (ManifestBoxes, "train.manifest"),
        (COCOBoxes, "annotations/instances_train.json"),
    ):
        data = module(root=tmp_path, train=train, val=train, image_size=32, crop=False, zoom_out=1, flip=False)
        data.setup()
        assert data.labels == ["red"]
        assert len(data.splits["val"]) == len(data.splits["test"]) == 3
        _, targets = data.splits["val"][0]
        torch.testing.assert_close(targets["boxes"][0], torch.tensor([1.0, 2, 6, 8]) / 20)
    # Evaluation ignores the crowd; training leaves it out.
    assert targets["ignored"].tolist() == [False, True]
    assert (data.splits["train"][0][1]["labels"] >= 0).tolist() == [True, False]


def test_every_split_uses_the_classes_of_the_training_split(monkeypatch):
    asked = {}

    def read(self, path, classes):
        asked[path.name] = classes
        picture = Picture(path.name, torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool())
        return BoxListing([picture], classes or ["b", "a"])

    monkeypatch.setattr(VOCBoxes, "read", read)
    VOCBoxes(root="", train="train", val="val", test="test").list_splits()
    assert asked == {"train": None, "val": ["b", "a"], "test": ["b", "a"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoom_out": 0.5}, "zoom_out: 0.5; expected 1 to below 100"),
        ({"zoom_out": float("nan")}, "zoom_out: nan; expected 1 to below 100"),
        ({"val": []}, "an empty list of lists; expected at least one file"),
        ({"train": ["ImageSets/Main/train.txt"] * 2}, "0.png: in 2 of the lists"),
        ({"class_names": ["red", "red"]}, "expected names that differ"),
        ({"batch_size": 0}, "batch_size: 0; expected at least 1"),
        ({"train": []}, "an empty list of lists; expected at least one file"),
        ({"train": "ImageSets/Main/missing.txt"}, "missing.txt: No such file"),
        ({"held_out": 0.0}, "--data.init_args.held_out: 0.0 of 4 pictures; expected at least one in each part"),
    ],
)
def test_invalid_data_options_are_refused(tmp_path, options, message):
    data = VOCBoxes(**{"root": framed(tmp_path, 4), "train": "ImageSets/Main/train.txt", **options})
    with pytest.raises(UserError) as caught:
        data.setup()
    assert message in str(caught.value)


def test_repaired_boxes_are_counted_in_a_warning(tmp_path):
    path = framed(tmp_path, 4) / "Annotations/2.xml"
    path.write_text(path.read_text().replace("<xmax>45</xmax>", "<xmax>75</xmax>"))
    data = VOCBoxes(tmp_path, train="ImageSets/Main/train.txt", on_bad_box="clip", held_out=0.25)
    with pytest.warns(UserWarning, match="train.txt: boxes that stick out of their picture or have no area: 1 clipped"):
        data.setup()


def test_photometric_changes_differ_by_image_and_keep_greys_grey():
    images = torch.full((64, 3, 4, 4), 100, dtype=torch.uint8)
    changed = photometric(images)
    assert changed.dtype == torch.uint8
    assert (changed.int().amax(1) - changed.int().amin(1)).max() <= 1  # saturation and hue leave greys unchanged
    levels = changed[:, 0, 0, 0].tolist()
    assert 8 < sum(level == 100 for level in levels) < 56  # a quarter change neither brightness nor contrast
    assert min(levels) < 80
    assert max(levels) > 120
    colours = photometric(
        torch.tensor([200, 50, 50], dtype=torch.uint8)[:, None, None].expand(64, 3, 2, 2).contiguous()
    )
    assert len({tuple(c) for c in colours[:, :, 0, 0].tolist()}) > 40


@pytest.mark.parametrize(("labels", "expected"), [([0, 1], 0.5), ([-1, -1], math.nan)])
def test_evaluate_takes_a_runners_boxes_in_pixels_of_its_images_and_is_nan_without_a_box_to_find(labels, expected):
    boxes, none = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]]), torch.zeros(1, 2, dtype=torch.bool)
    targets = {"boxes": boxes, "labels": torch.tensor([labels]), "ignored": none, "sizes": torch.tensor([[40, 80]])}
    red = np.float32([[0, 0, 4, 4]]), np.float32([0.9]), np.int64([0])
    runner = SimpleNamespace(detections=lambda image: [red])
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    score = detector().evaluate(runner, [(images, targets)])  # red is found, blue is not
    assert score == pytest.approx(expected, nan_ok=True)


def test_validation_without_boxes_logs_nan_scores():
    task, logged = detector(), {}
    task.val_map, task.log_dict = average_precision(), lambda values, **_: logged.update(values)
    none = {"boxes": torch.zeros(1, 1, 4), "labels": torch.full((1, 1), PADDED), "sizes": torch.tensor([[8, 8]])}
    nothing = [(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))]
    none["ignored"] = torch.zeros(1, 1, dtype=torch.bool)
    task.val_map.update(predictions(nothing, none["sizes"]), truth(none))
    task.on_validation_epoch_end()
    assert all(value.isnan() for value in logged.values())
    assert logged.keys() == {"val/map", "val/map_50"}


def test_photometric_changes_apply_only_in_training():
    data = Painted()
    data.photometric = True
    batch = (torch.full((16, 3, 8, 8), 100, dtype=torch.uint8), None)
    for training in (True, False):
        data.trainer = SimpleNamespace(training=training)
        assert data.on_after_batch_transfer(batch, 0)[0].eq(100).all() != training


def test_brightness_shifts_by_up_to_32_levels_and_contrast_scales_the_shift():
    black, white = (photometric(torch.full((512, 3, 1, 1), level, dtype=torch.uint8)) for level in (0, 255))
    assert 33 < black.max() <= 48
    assert white.min() >= 100


def test_photometric_is_brightness_saturation_contrast_and_a_hue_rotation(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_(high))
    colour = torch.tensor([100, 60, 50], dtype=torch.uint8)
    moved = colour.double() + 32
    luma = moved @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    turn = Rotation.from_rotvec([math.pi / 10 / math.sqrt(3)] * 3)
    expected = 1.5 * turn.apply((1.5 * moved - 0.5 * luma).numpy())
    found = photometric(colour[None, :, None, None])[0, :, 0, 0].double().numpy()
    np.testing.assert_allclose(found, expected, atol=0.51)


# The task


def test_average_precision_matches_values_computed_by_hand():
    """One of two objects is found: the precision is 1 up to a recall of 0.5, that is at 51 of 101 recall levels."""
    targets = {
        "boxes": torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]]),
        "labels": torch.tensor([[0, 0]]),
        "ignored": torch.tensor([[False, False]]),
        "sizes": torch.tensor([[200, 100]]),
    }
    found = [(np.float32([[0, 0, 0.5, 0.5]]), np.float32([0.9]), np.int64([0]))]
    metric = average_precision()
    metric.update(predictions(found, targets["sizes"]), truth(targets))
    assert metric.compute()["map"].item() == pytest.approx(51 / 101)
    metric.reset()
    targets["ignored"][0, 1] = True
    metric.update(predictions(found, targets["sizes"]), truth(targets))
    assert metric.compute()["map"].item() == pytest.approx(1)
    (row,) = truth(targets)
    assert row["boxes"].tolist() == [[0, 0, 50, 100], [50, 100, 100, 200]]


def fit(tmp_path, task, data, **options):
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **options},
    )
    trainer.fit(task, datamodule=data)
    return trainer


@pytest.mark.parametrize("kept", [True, False])
def test_evaluation_losses_leave_out_ignored_boxes_unless_training_keeps_them(kept):
    """An ignored box that training does not learn from does not change the losses of an evaluation."""
    task = detector().eval()
    task.trainer = SimpleNamespace(datamodule=SimpleNamespace(keep_ignored=kept))
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0.5, 0.5, 1, 1]]])
    targets = {"boxes": boxes, "labels": torch.tensor([[0, 1]]), "ignored": torch.tensor([[True, False]])}
    without = targets | {"labels": torch.tensor([[PADDED, 1]])}
    heads = task(torch.from_numpy(painted()).permute(2, 0, 1)[None])
    assert targets["labels"][0, 0] != PADDED
    found, expected = task.losses(heads, task.as_trained(targets)), task.losses(heads, targets if kept else without)
    assert found == expected
    assert found["positives"] != task.losses(heads, without if kept else targets)["positives"]


def test_losses_sum_both_parts_and_are_logged_with_the_number_of_positives():
    """Both parts have the same weight. The number weights the means when batches and devices are combined."""
    task, said = detector(), []
    task.trainer = SimpleNamespace(datamodule=SimpleNamespace(keep_ignored=True))
    task.val_map = average_precision()
    task.log_train_loss = lambda loss, count, **parts: said.append((loss, count, parts)) or loss
    task.log_eval_loss = lambda stage, loss, count: said.append((loss, count))
    boxes = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.5, 0, 1, 0.5]]])
    targets = {"boxes": boxes, "labels": torch.tensor([[0, 1, 0]]), "ignored": torch.zeros(1, 3, dtype=torch.bool)}
    batch = torch.from_numpy(painted()).permute(2, 0, 1)[None], targets | {"sizes": torch.tensor([[8, 8]])}
    task.training_step(batch, 0)
    with torch.no_grad():
        task.validation_step(batch, 0)
    (trained, over, parts), (evaluated, also_over) = said
    assert over == also_over == 3
    assert parts["box_loss"] != parts["class_loss"]
    torch.testing.assert_close(trained, parts["box_loss"] + parts["class_loss"])
    torch.testing.assert_close(evaluated, trained.detach())


def test_pictures_without_boxes_train_on_their_hardest_negatives():
    task = detector()
    task.log = lambda *_: None
    targets = {"boxes": torch.zeros(1, 1, 4), "labels": torch.tensor([[PADDED]])}
    loss = task.training_step((torch.from_numpy(painted()).permute(2, 0, 1)[None], targets), 0)
    loss.backward()
    assert loss > 0
    assert any(parameter.grad.any() for parameter in task.network.parameters())


@torch.no_grad()
def test_each_validation_resets_the_metric():
    task, logged = sighted(), []
    task.val_map, task.log_eval_loss = average_precision(), lambda *_: None
    task.log_dict = lambda values, **_: logged.append(values["val/map"].item())
    task.trainer = SimpleNamespace(datamodule=SimpleNamespace(keep_ignored=True))
    images, boxes = torch.from_numpy(painted()).permute(2, 0, 1)[None], [[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    known = {"boxes": torch.tensor([boxes]), "ignored": torch.zeros(1, 2, dtype=torch.bool)}
    for labels in ([0, 1], [1, 0], [0, 1]):
        task.validation_step((images, known | {"labels": torch.tensor([labels]), "sizes": torch.tensor([[8, 8]])}), 0)
        task.on_validation_epoch_end()
    assert logged[0] == logged[2] > logged[1]


def test_defaults_are_those_of_the_ssd_authors():
    task, data = detector(), VOCBoxes(root="voc", train="VOC2007/ImageSets/Main/train.txt")
    assert (task.overlap_threshold, task.detect.overlap, task.detect.score, task.detect.most) == (0.5, 0.45, 0.01, 200)
    assert (data.zoom_out, data.crop, data.flip, data.photometric) == (4, True, True, True)


def test_per_class_average_precision_covers_objects_of_all_sizes():
    task, logged = detector(), {}
    task.test_map, task.log_dict = average_precision(extended_summary=True), logged.update
    boxes = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0.5, 0.5, 0.51, 0.51]]])
    targets = {"boxes": boxes, "labels": torch.zeros(1, 3).long(), "ignored": torch.zeros(1, 3, dtype=torch.bool)}
    found = [(boxes[0, :2].numpy(), np.float32([0.9, 0.8]), np.int64([0, 0]))]  # the large ones
    sizes = torch.tensor([[400, 400]])
    task.test_map.update(predictions(found, sizes), truth(targets | {"sizes": sizes}))
    task.on_test_epoch_end()
    assert logged["test/ap_red"] == logged["test/ap50_red"] == pytest.approx(67 / 101)


def test_a_detector_trains_tests_predicts_and_draws(tmp_path):
    task, data = detector(optimizer=lambda p: torch.optim.Adam(p, lr=0.05)), Painted()
    trainer = fit(tmp_path, task, data, max_epochs=20)
    (results,) = trainer.test(task, datamodule=data, verbose=False)
    assert results["test/map"] == pytest.approx(1, abs=1e-6)
    assert results["test/ap50_red"] == pytest.approx(1, abs=1e-6)
    assert {"test/map_50", "test/map_75", "test/ap_blue", "test/loss"} <= results.keys()
    task.draw(tmp_path / "figures")
    for name in ("detections", "precision_recall"):
        with Image.open(tmp_path / f"figures/{name}.png") as figure:
            assert np.asarray(figure.convert("L")).std() > 5
    (row, *_), *_ = trainer.predict(task, datamodule=data)
    assert (row["width"], row["height"]) == (8, 8)
    assert {found["label"] for found in row["objects"] if found["score"] > 0.5} == {"red", "blue"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["red"]}, "network returns 2 classes, the data has 1; expected"),
        ({"overlap_threshold": 1.5}, "overlap_threshold 1.5; expected 0 to 1"),
        ({"nms_threshold": -0.1}, "nms_threshold -0.1; expected 0 to 1"),
        ({"detections": 0}, "detections 0; expected 1 to 1000"),
        ({"detections": 1001}, "detections 1001; expected 1 to 1000"),
        ({"preprocess": ImagePreprocess(9, **PLAIN)}, "preprocess resizes to 9 pixels; expected 8, the network's size"),
        ({"preprocess": ImagePreprocess(8, [0.5], [0.5])}, "network rejects an image of 8×8 pixels and 1 channels"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, message):
    task = ObjectDetector(
        **{"network": Corners(), "preprocess": ImagePreprocess(8, **PLAIN), "optimizer": sgd}
        | {k: v for k, v in options.items() if k != "labels"}
    )
    task.remember({"labels": options.get("labels", ["red", "blue"])})
    with pytest.raises(UserError) as caught:
        task.check()
    assert message in str(caught.value)


class Fewer(Corners):
    """A detector that returns offsets for fewer boxes than it has anchors."""

    def forward(self, x):
        offsets, logits = super().forward(x)
        return offsets[:, :3], logits


def test_heads_must_have_a_row_for_each_anchor():
    words = r"network returns \[1, 3, 4\] and \[1, 4, 3\]; expected offsets \(B, 4, 4\) and logits \(B, 4, 3\)"
    with pytest.raises(UserError, match=words):
        detector(Fewer()).check()


@pytest.mark.parametrize(
    ("scale", "found"),
    [
        ([8, 8, 8, 8], "numbers up to 6 and sides from 4"),  # pixels
        ([1, 1, 0, 1], "numbers up to 0.75 and sides from 0"),
        ([1, 1, -1, 1], "numbers up to 0.75 and sides from -0.5"),  # corners in the wrong order
        ([1, 1, torch.nan, 1], "numbers up to nan and sides from nan"),
    ],
)
def test_default_boxes_that_nothing_can_match_are_refused(scale, found):
    network = Corners()
    network.anchors *= torch.tensor(scale)
    with pytest.raises(UserError, match=f"anchors with {found}; expected centre, width and height as fractions"):
        detector(network).check()


def test_a_default_box_matches_when_its_overlap_reaches_the_threshold():
    targets = {"boxes": torch.tensor([[[0.0, 0.0, 0.7, 0.7]]]), "labels": torch.tensor([[0]])}
    found = []
    for threshold in (0.1, 0.9):
        task = detector(overlap_threshold=threshold)
        heads = task(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        found.append(int(task.losses(heads, targets)["positives"]))
    assert found == [3, 1]


def test_an_image_size_that_differs_from_the_networks_is_refused():
    task, data = detector(), Painted()
    data.setup()
    task.take_facts(data)
    data.image_size = 16
    with pytest.raises(UserError, match=r"image_size 16; expected 8, the network's"):
        task.take_facts(data)


# The runner


def test_the_runner_returns_labelled_boxes_in_pixels_and_draws_them(tmp_path):
    task = sighted()
    deployable = task.deployable((torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}))
    runner = make_runner(deployable.kind, deployable.graphs, deployable.metadata)
    for side in (8, 64):
        answer = runner(painted(side))
        assert (answer["width"], answer["height"]) == (side, side)
        certain = [found for found in answer["objects"] if found["score"] > 0.5]
        boxes = {found["label"]: found["box"] for found in certain}
        half = side / 2
        assert boxes == {"red": [0, 0, half, half], "blue": [half, half, side, side]}
        assert [row[2:] for row in runner.sagemaker(answer)["prediction"][:2]] in (
            [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]],
            [[0.5, 0.5, 1, 1], [0, 0, 0.5, 0.5]],
        )
    drawn = np.asarray(runner.draw(painted(256), runner(painted(256))))
    assert drawn.shape == (256, 256, 3)
    changed = (drawn != painted(256)).any(axis=2)
    assert changed[128:, 128].all()  # the left edge of the second box
    assert changed[128:, 255].all()  # the right edge, in the picture's last column
    assert changed[255, 128:].all()
    assert not changed[200, :128].any()
    assert not changed[20:100, 140:250].any()  # no object is here
    (red, blue) = (drawn[half, x].tolist() for half, x in ((64, 0), (192, 128)))
    assert red != blue
    labelled = np.asarray(
        runner.draw(painted(256), {"objects": [{"label": "red", "score": 1, "box": [9, 99, 19, 109]}]})
    )
    assert (labelled != painted(256)).any(axis=2)[91:99, 9:40].all()  # the label, above its box
    thin = {"objects": [{"label": "red", "score": 0.9, "box": [140.2, 20, 140.6, 20.3]}]}  # less than a pixel
    assert (np.asarray(runner.draw(painted(256), thin)) != painted(256)).any()
    doubtful = [{"label": "red", "score": score, "box": [140, 20, 250, 100]} for score in (0.29, 0.31)]
    for found, shown in zip(doubtful, (False, True), strict=True):
        assert (np.asarray(runner.draw(painted(256), {"objects": [found]})) != painted(256)).any() == shown


def test_the_best_detection_is_drawn_on_top():
    served = sighted().deployable((torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}))
    runner = make_runner(served.kind, served.graphs, served.metadata)
    found = [
        {"label": label, "score": score, "box": [40, 40, 200, 200]} for label, score in (("red", 0.9), ("blue", 0.8))
    ]
    both, best = (np.asarray(runner.draw(painted(256), {"objects": some})) for some in (found, found[:1]))
    np.testing.assert_array_equal(both[199, 60:180], best[199, 60:180])


def test_a_fixed_size_graph_gives_boxes_in_pixels_of_the_picture():
    task = sighted()
    graph = task.deployable((torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {})).graphs["detect"]
    fixed = SimpleNamespace(shape={"image": [1, 8, 8, 3]})

    def answer(image):
        assert image.shape == (1, 8, 8, 3)
        return graph(image=image)

    detect = type("Fixed", (), {"shape": fixed.shape, "__call__": staticmethod(lambda image: answer(image))})()
    runner = make_runner("object-detection", {"detect": detect}, {"labels": ["red", "blue"], "channels": 3})
    wide = np.repeat(painted(64), 2, axis=1)
    found = runner([wide, wide])[1]
    boxes = {f["label"]: f["box"] for f in found["objects"] if f["score"] > 0.5}
    assert boxes == {"red": [0, 0, 64, 32], "blue": [64, 32, 128, 64]}
    rows = [[label, *shares] for label, score, *shares in runner.sagemaker(found)["prediction"] if score > 0.5]
    assert sorted(rows) == [[0, 0, 0, 0.5, 0.5], [1, 0.5, 0.5, 1, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((1, 2, 3), np.float32)}, "boxes float32"),
        ({"boxes": np.zeros(1, np.float32)}, "boxes float32"),
        ({"scores": np.zeros((1, 2))}, "scores float64"),
        ({"scores": np.full((1, 2), np.nan, np.float32)}, "not finite"),
        ({"labels": np.full((1, 2), 2)}, "classes 2 to 2; expected 0 to 1"),
        ({"labels": np.full((1, 2), -1)}, "classes -1 to -1; expected 0 to 1"),
        ({"boxes": np.float32([[[5, 5, 2, 9]] * 2])}, "boxes that end before they begin"),
        ({"count": np.array([3])}, "a count of 3"),
        ({"count": np.array([-1])}, "a count of -1"),
        ({"count": None}, "returns no count"),
    ],
)
def test_invalid_detector_outputs_are_refused(change, message):
    good = {
        "boxes": np.zeros((1, 2, 4), np.float32),
        "scores": np.zeros((1, 2), np.float32),
        "labels": np.zeros((1, 2), np.int64),
        "count": np.array([1]),
    }
    shape = {"image": ["batch", "height", "width", 3]}
    detect = type("Graph", (), {"shape": shape, "__call__": lambda self, image: good | change})()
    runner = make_runner("object-detection", {"detect": detect}, {"labels": ["a", "b"], "channels": 3})
    with pytest.raises(UserError) as caught:
        runner(painted())
    assert message in str(caught.value)


# The bundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """SSD with a ResNet-18 base and random weights, exported over a few scenes."""
    torch.manual_seed(0)
    task = detector(SSDResNet(18, 10, 96), [str(k) for k in range(10)]).eval()
    with torch.no_grad():
        for module in task.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    data = DigitScenes(train=8, held_out=6, batch_size=5, zoom_out=1, crop=False)
    folder = tmp_path_factory.mktemp("detector") / "bundle"
    return task, data, folder, export(task, data, TARGETS["cpu"], folder)


def test_bundle_detections_match_pytorch(exported):
    task, data, folder, manifest = exported
    verification = manifest["verification"]
    assert {row["shape"]["image"][0] for row in verification["parity"]} == {1, 2, 5}
    assert verification["metric"]["pytorch"] == pytest.approx(verification["metric"]["bundle"], abs=2e-3)
    assert verification["metric"]["rows"] == 6 * 200  # a random network returns as many detections as are allowed
    assert "compared as sets" in (folder / "report.md").read_text()
    graph = task.deployable(next(iter(data.val_dataloader()))).graphs["detect"]
    # Export repeats the example up to each size: a picture of equal halves has equal scores, which rounding orders.
    assert all(size == 96 or size % 96 for sizes in (graph.sizes["height"], graph.sizes["width"]) for size in sizes)
    runner = load(folder)
    images = np.random.default_rng(0).integers(0, 256, (5, 70, 133, 3), dtype=np.uint8)
    expected = graph(image=images)
    for together in ([0], [3, 1], [0, 1, 2, 3, 4]):
        for row, i in zip(runner.detections(images[together]), together, strict=True):
            boxes, scores, labels = row
            n = expected["count"][i]
            np.testing.assert_allclose(scores, expected["scores"][i, :n], atol=1e-4)
            same = np.abs(boxes - expected["boxes"][i, :n]).max(axis=1) < 1e-2
            assert same.mean() > 0.98  # detections of almost equal scores may swap places
            assert (labels == expected["labels"][i, :n]).mean() > 0.98


def test_the_command_draws_overlays_and_prints_other_forms(exported, tmp_path, capsys, monkeypatch):
    folder = exported[2]
    for name in ("one", "two"):
        Image.fromarray(painted(50)).save(tmp_path / f"{name}.png")
    one, two = str(tmp_path / "one.png"), str(tmp_path / "two.png")
    assert main([str(folder), one, "--overlay", str(tmp_path / "drawn.png"), "--form", "sagemaker"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    rows = json.loads(line)["prediction"]
    assert all(len(row) == 6 and min(row[2:]) >= 0 and max(row[2:]) <= 1 for row in rows)
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (50, 50)
    assert main([str(folder), one, two, "--overlay", str(tmp_path / "drawn")]) == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["one.png", "two.png"]
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "one.png").read_bytes()
    assert main([str(folder), "one.png", "--overlay", "one.png"]) == 2
    assert (tmp_path / "one.png").read_bytes() == before
    for arguments, message in (
        (["--form", "neo"], "--form neo; expected sagemaker with this bundle"),
        (["--overlay", one + "/x.png"], "cannot be written"),
        (["--overlay", one], "would be overwritten"),
        (["--overlay", str(tmp_path)], "would be overwritten"),
        (["--overlay", "/dev/null"], "/dev/null: expected a folder, or for one input the name of a PNG"),
        (["--overlay", str(tmp_path / "a.jpg")], "a.jpg: expected a folder, or for one input the name of a PNG"),
        (["--overlay", str(folder)], "inside the bundle"),
        (["--overlay", f"{tmp_path}/{'a' * 300}.png"], "cannot be written"),
    ):
        capsys.readouterr()
        assert main([str(folder), one, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main([str(folder), one, "--overlay", str(tmp_path / "folder")]) == 0
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["one.png"]
    (tmp_path / "same").mkdir()  # as on a case-insensitive file system
    (tmp_path / "same/one.png").hardlink_to(tmp_path / "one.png")
    assert main([str(folder), one, "--overlay", str(tmp_path / "same")]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    capsys.readouterr()
    assert main([str(folder), one, two, "--overlay", str(tmp_path / "drawn.png")]) == 2
    assert "drawn.png: expected a folder" in capsys.readouterr().err
    (tmp_path / "pipe.png").symlink_to("/dev/null")
    assert main([str(folder), one, "--overlay", str(tmp_path / "pipe.png")]) == 2
    assert "pipe.png: exists and is not a file" in capsys.readouterr().err
    assert main([str(folder), one, one, "--overlay", str(tmp_path / "twice")]) == 2
    assert "two inputs would be written to one.png" in capsys.readouterr().err


def test_box_decoding_stays_float_when_the_network_is_quantised(exported, tmp_path):
    task, data, *_ = exported
    served, target = task.deployable(next(iter(data.val_dataloader()))).graphs["detect"], TARGETS["arm64"]
    source, path = tmp_path / "detect.onnx", tmp_path / "int8.onnx"
    write_onnx(served, source, target)
    feeds = [{"image": image[None]} for image in served.inputs["image"].numpy()]
    convert(source, path, target, Plan("int8", "MinMax"), feeds)
    graph = onnx.load(path).graph
    writers = {output: node for node in graph.node for output in node.output}
    (suppression,) = (node for node in graph.node if node.op_type == "NonMaxSuppression")
    waiting, decoding = list(suppression.input), []
    while waiting:  # go back from suppression to the heads
        node = writers.get(waiting.pop())
        if node is not None and node.op_type != "DequantizeLinear":
            decoding.append(node.op_type)
            waiting += node.input
    assert "Exp" in decoding
    assert "QuantizeLinear" not in decoding
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) > 20


# Configs


def test_the_detection_configs_exist_and_use_a_single_size():
    names = {path.stem for path in (ROOT / "configs").glob("ssd*.yaml")}
    assert names >= {  # others may be added
        "ssd_digit_scenes",
        "ssd300_vgg16_bccd",
        "ssd300_resnet50_bccd",
        "ssd300_vgg16_voc",
        "ssd512_vgg16_voc",
        "ssd300_resnet50_coco",
    }
    for name in names:  # all sizes in a config are equal
        config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        sizes = {model["network"]["init_args"]["size"], model["preprocess"]["init_args"]["size"]}
        assert len(sizes | {data.get("image_size", 96 if name == "ssd_digit_scenes" else 300)}) == 1


@pytest.mark.parametrize(("objects", "found"), [(5, 3), (10, 6), (10, 3), (7, 4)])
def test_average_precision_includes_the_last_recall_that_is_reached(objects, found):
    """If all detections are correct, it is the share of the 101 recall levels reached, including the last."""
    boxes = torch.tensor([[20.0 * i, 0, 20 * i + 10, 10] for i in range(objects)])
    metric = average_precision()
    metric.update(
        [{"boxes": boxes[:found], "scores": torch.linspace(0.9, 0.5, found), "labels": torch.zeros(found).long()}],
        [{"boxes": boxes, "labels": torch.zeros(objects).long()}],
    )
    assert metric.compute()["map"].item() == pytest.approx((100 * found // objects + 1) / 101)


@pytest.mark.parametrize("size", [(427, 640), (333, 500), (1080, 1919)])
def test_areas_at_cocos_size_limits_stay_exact(size):
    """Boxes are relative to the picture, so in float32 the side of a square of 32 or 96 pixels is slightly off."""
    corners = torch.arange(0, 200, 7)
    for side in (32, 96):
        boxes = torch.stack([corners, corners, corners + side, corners + side], 1) / torch.tensor([*size[::-1]] * 2)
        (found,) = truth(
            {
                "boxes": boxes[None],
                "labels": torch.zeros(1, len(boxes)).long(),
                "ignored": torch.zeros(1, len(boxes)).bool(),
                "sizes": torch.tensor([size]),
            }
        )
        assert found["area"].tolist() == [side**2] * len(boxes)
