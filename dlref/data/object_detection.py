"""Data modules for object detection.

Tasks receive batches `(images, targets)`. Images are uint8 (B, 3, S, S) and not normalised. `targets` contains
`boxes`, float32 (B, M, 4), corners as fractions of the image; `labels`, int64 (B, M), from 0, or -1 if there is no box;
`ignored`, bool (B, M), objects that evaluation ignores; and `sizes`, int64 (B, 2), height and width of the original
picture in pixels. M is the largest number of boxes in a picture of the split, so that all batches of a split have one
shape. After `setup`, `labels` holds the K class names.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dlref.data.annotated_pictures import MEAN, AnnotatedPictures
from dlref.data.box_listings import BoxListing, OnBadBox, Picture
from dlref.data.coco_boxes import read_coco
from dlref.data.files import listing_of, read_splits
from dlref.data.images import UnreadableImage, read_image
from dlref.data.loader import check_at_least
from dlref.data.sagemaker_boxes import read_box_manifest, read_sagemaker
from dlref.data.scenes import make_scenes
from dlref.data.small_images import digit_pools
from dlref.data.voc_boxes import read_voc
from dlref.runtime.errors import UserError

# Shorter side of a shrunk picture, in sides of the network's image: even the smallest crop, 0.3 of a picture's sides,
# has more pixels than that image.
ENOUGH = 4


class Shrunk(nn.Module):
    """Shrink large pictures: a canvas four times as wide and high as 12 megapixels would take 576 MB.

    Args:
        side: maximum length of the shorter side, in pixels.
    """

    def __init__(self, side: int):
        super().__init__()
        self.side, self.resize = side, v2.Resize(side, antialias=True)

    def forward(self, sample: dict) -> dict:
        """Resize the picture and its boxes if the picture is too large."""
        return self.resize(sample) if min(sample["image"].shape[-2:]) > self.side else sample


class Cropped(v2.RandomIoUCrop):
    """A random crop that overlaps an object; a picture so thin that the smallest crop would have no pixel stays whole.

    So does a picture without objects, for which torchvision would try some 240 crops.
    """

    def forward(self, sample: dict) -> dict:
        """Crop the picture and its boxes; the boxes of objects whose centres are outside are set to zeros."""
        possible = len(sample["boxes"]) and min(sample["image"].shape[-2:]) * self.min_scale >= 1
        return super().forward(sample) if possible else sample


class Inside(nn.Module):
    """Remove the boxes without area, which a crop leaves of objects outside.

    torchvision's `SanitizeBoundingBoxes` would also remove thin objects, those narrower than a pixel of the network's
    image, and train the network to call them background.
    """

    def forward(self, sample: dict) -> dict:
        """Remove boxes, and what belongs to them."""
        boxes = sample["boxes"]
        there = (boxes[:, 2:] > boxes[:, :2]).all(1)
        kept = {name: sample[name][there] for name in ("labels", "ignored")}
        return sample | kept | {"boxes": tv_tensors.wrap(boxes[there], like=boxes)}


class Pictures(Dataset):
    """Pictures with their boxes, decoded and transformed on access.

    Args:
        pictures: paths or numbers, boxes in pixels, labels.
        transform: maps a dict with `image`, `boxes`, `labels` and `ignored` to one with a square image.
        keep_ignored: whether to keep boxes that evaluation ignores.
        images: uint8 (N, 3, H, W) if the pictures are in memory; then no paths are read.
    """

    def __init__(
        self, pictures: list[Picture], transform: Callable[[dict], dict], keep_ignored: bool, images: Tensor | None
    ):
        # Arrays: a worker that is not forked receives one open file per tensor, and open files are limited.
        self.objects = [tuple(part.numpy() for part in picture[1:]) for picture in pictures]
        self.names = [picture.path for picture in pictures]
        self.transform, self.keep_ignored, self.images = transform, keep_ignored, images
        self.places = max([1, *(len(picture.labels) for picture in pictures)])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        boxes, labels, ignored = map(torch.from_numpy, self.objects[index])
        image = read_image(self.names[index]) if self.images is None else self.images[index]
        height, width = image.shape[-2:]
        outside = ((boxes < 0) | (boxes > torch.tensor([width, height] * 2))).any(dim=1)
        if outside.any():  # of a data set of one's own: the readers have checked theirs
            box = boxes[outside][0].tolist()
            raise UnreadableImage(f"{self.names[index]}: a box {box}; expected it within 0, 0, {width}, {height}")
        kept = torch.ones_like(ignored) if self.keep_ignored else ~ignored
        sample = self.transform(
            {
                "image": tv_tensors.Image(image),
                "boxes": tv_tensors.BoundingBoxes(boxes[kept], format="XYXY", canvas_size=(height, width)),
                "labels": labels[kept],
                "ignored": ignored[kept],
            }
        )
        boxes = sample["boxes"]
        shares = boxes.as_subclass(Tensor) / torch.tensor(boxes.canvas_size).flip(0).repeat(2)
        targets = {
            "boxes": padded(shares, self.places, 0),
            "labels": padded(sample["labels"], self.places, -1),
            "ignored": padded(sample["ignored"], self.places, False),
            "sizes": torch.tensor([height, width]),
        }
        return sample["image"].as_subclass(Tensor), targets


def padded(rows: Tensor, places: int, value: float) -> Tensor:
    """Pad `rows` (n, ...) with `value` to (places, ...)."""
    return torch.cat([rows, rows.new_full((places - len(rows), *rows.shape[1:]), value)])


class ObjectDetectionData(AnnotatedPictures):
    """Pictures with boxes; a subclass lists the splits.

    Training augments as SSD does (Liu et al. 2016, section 2.2, "Data augmentation", and section 3.6): a picture is
    zoomed out up to `zoom_out` times with probability one half, cropped to a part that overlaps an object enough,
    mirrored, and changed in brightness and colours. Evaluation resizes whole pictures. Neither keeps the aspect ratio.

    Args:
        batch_size: pictures in a batch.
        image_size: height and width of the network's input image, in pixels.
        zoom_out: maximum side of the canvas that a training picture is placed on, in sides of the picture; 1: off.
        crop: crop a random part of each training picture.
        flip: mirror half of the training pictures left to right.
        photometric: change brightness, contrast, saturation and hue of training pictures, on the device.
        num_workers: worker processes that decode; 0 decodes in the training process.
    """

    keep_ignored = True  # whether training uses the ignored objects

    def __init__(
        self,
        batch_size: int = 32,
        image_size: int = 300,
        zoom_out: float = 4.0,
        crop: bool = True,
        flip: bool = True,
        photometric: bool = True,
        num_workers: int = 4,
    ):
        super().__init__(batch_size, num_workers)
        self.image_size, self.photometric = image_size, photometric
        self.zoom_out, self.crop, self.flip = zoom_out, crop, flip
        self.images: dict[str, Tensor] = {}  # of the splits in memory, uint8 (N, 3, H, W)

    def list_splits(self) -> dict[str, BoxListing]:
        """List "train", "val" and "test", with the classes of "train"."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """List the pictures of all splits, once, and check their boxes."""
        if self.splits:
            return
        check_at_least(1, batch_size=self.batch_size, image_size=self.image_size)
        check_at_least(0, num_workers=self.num_workers)
        if not 1 <= self.zoom_out < 100:
            raise UserError(f"--data.init_args.zoom_out: {self.zoom_out}; expected 1 to below 100")
        listings = self.list_splits()
        self.labels = listings["train"].classes
        for name, listing in listings.items():
            check_objects(name, listing.pictures, len(self.labels))
        learnt = (one.labels[self.keep_ignored | ~one.ignored] for one in listings["train"].pictures)
        there = {int(label) for labels in learnt for label in labels.unique()}
        if not there:
            raise UserError("train: no box in any of the pictures; expected some, to learn from")
        if without := [name for k, name in enumerate(self.labels) if k not in there]:
            rank_zero_warn(f"train: no box of {', '.join(without)}")
        for name, listing in listings.items():
            train = name == "train"
            transform = self.train_transform() if train else self.eval_transform()
            kept = self.keep_ignored or not train
            self.splits[name] = Pictures(listing.pictures, transform, kept, self.images.get(name))

    def train_transform(self) -> v2.Transform:
        """Return the transform of training pictures, except for changes of brightness and colours."""
        transforms: list[v2.Transform] = []
        if self.zoom_out > 1:
            fill = {tv_tensors.Image: MEAN, "others": 0}
            transforms.append(Shrunk(ENOUGH * self.image_size))
            transforms.append(v2.RandomZoomOut(fill, side_range=(1.0, self.zoom_out)))
        if self.crop:
            transforms.append(Cropped())
        if self.flip:
            transforms.append(v2.RandomHorizontalFlip())
        transforms.append(v2.Resize((self.image_size, self.image_size), antialias=True))
        # Resizing in float32 can move a box at the border just outside (of 598 px: to 300.00003).
        return v2.Compose([*transforms, v2.ClampBoundingBoxes(), Inside()])

    def eval_transform(self) -> v2.Transform:
        """Return the transform of validation and test pictures."""
        return v2.Resize((self.image_size, self.image_size), antialias=True)


def check_objects(split: str, pictures: list[Picture], classes: int) -> None:
    """Raise UserError for objects that are not as `Picture` describes them; most others would train all the same."""
    if not pictures:
        raise UserError(f"{split}: no pictures; expected at least one")
    types = [torch.float32, torch.int64, torch.bool]
    for picture in pictures:
        found = [getattr(part, "dtype", type(part).__name__) for part in picture[1:]]
        if found != types:
            raise UserError(f"{picture.path}: boxes, labels and ignored are of {found}; expected {types}")
        shapes, count = [list(part.shape) for part in picture[1:]], picture.labels.numel()
        if shapes != [[count, 4], [count], [count]]:
            raise UserError(f"{picture.path}: boxes, labels and ignored are {shapes}; expected [N, 4], [N] and [N]")
    boxes = torch.cat([picture.boxes for picture in pictures])
    labels = torch.cat([picture.labels for picture in pictures])
    of = torch.arange(len(pictures)).repeat_interleave(torch.tensor([len(picture.labels) for picture in pictures]))
    # Also those of NaN: augmentation would remove a box without an area, and training call its object background.
    turned = ~(boxes[:, 2:] > boxes[:, :2]).all(dim=1) | ~boxes.isfinite().all(dim=1)
    unknown = (labels < 0) | (labels >= classes)
    if turned.any():
        path, box = pictures[of[turned][0]].path, boxes[turned][0].tolist()
        raise UserError(f"{path}: a box {box}; expected x1 y1 x2 y2 in pixels, x1 below x2 and y1 below y2")
    if unknown.any():
        path, label = pictures[of[unknown][0]].path, labels[unknown][0]
        raise UserError(f"{path}: label {label}; expected 0 to {classes - 1}")
    if len(boxes) and boxes.max() <= 1:
        raise UserError(f"{split}: boxes with numbers up to {boxes.max():g}; expected pixels of the picture")


class DigitScenes(ObjectDetectionData):
    """Scenes with scikit-learn's handwritten digits, drawn from a seed; see `scenes`. No file is needed.

    No digit appears in more than one split.

    Args:
        train: number of training scenes.
        held_out: number of validation scenes, and of test scenes.
        most: maximum number of digits in a scene.
        image_size: height and width of a scene and of the network's image, in pixels.
        flip: see `ObjectDetectionData`; the default differs.
        num_workers: see `ObjectDetectionData`; the default differs.
        kwargs: further arguments of `ObjectDetectionData`.
    """

    def __init__(
        self,
        train: int = 1000,
        held_out: int = 200,
        most: int = 8,
        image_size: int = 96,
        flip: bool = False,
        num_workers: int = 0,
        **kwargs,
    ):
        super().__init__(image_size=image_size, flip=flip, num_workers=num_workers, **kwargs)
        self.counts = {"train": train, "val": held_out, "test": held_out}
        self.most = most

    def list_splits(self) -> dict[str, BoxListing]:
        """Draw the scenes; each split has its own seed."""
        check_at_least(1, train=self.counts["train"], held_out=self.counts["val"], most=self.most)
        check_at_least(16, image_size=self.image_size)
        listings = {}
        for seed, (name, pool) in enumerate(digit_pools().items()):
            scenes = make_scenes(*pool, self.counts[name], self.image_size, seed, self.most)
            self.images[name] = scenes.images
            pictures = []
            for i, (boxes, labels) in enumerate(zip(scenes.boxes, scenes.labels, strict=True)):
                there = labels >= 0
                ignored = torch.zeros(int(there.sum()), dtype=torch.bool)
                pictures.append(Picture(str(i), boxes[there], labels[there], ignored))
            listings[name] = BoxListing(pictures, [str(digit) for digit in range(10)])
        return listings


class ListedBoxes(ObjectDetectionData):
    """Pictures listed in files: each split has one list, or several that are concatenated.

    Args:
        root: the folder that the lists are relative to.
        train: the training list; see the subclass.
        val: the validation list. None: a share of the training pictures, always the same ones, is held out.
        test: the test list; by default, the validation pictures are used for testing, too.
        class_names: the classes in order; by default, those of the first training list.
        on_bad_box: how to treat a box that has no area or is not within its picture: "error", "clip" or "skip".
        held_out: the share of the training pictures to hold out if there is no validation list.
    """

    def __init__(
        self,
        root: str | Path,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        class_names: list[str] | None = None,
        on_bad_box: OnBadBox = "error",
        held_out: float = 0.1,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.root = Path(root)
        self.lists = {"train": train, "val": val, "test": test}
        self.class_names, self.on_bad_box, self.held_out = class_names, on_bad_box, held_out

    def read(self, path: Path, classes: list[str] | None) -> BoxListing:
        """Read one list. `classes`, if given, are the class names that its ids are the places of."""
        raise NotImplementedError

    def read_all(self, lists: str | list[str], classes: list[str] | None) -> BoxListing:
        """Read the lists of a split and concatenate them."""
        pictures: list[Picture] = []
        for name in [lists] if isinstance(lists, str) else lists:
            listing = listing_of(self.read, self.root / name, classes, "pictures")
            classes = listing.classes
            pictures += listing.pictures
        if not pictures:
            raise UserError("--data.init_args: an empty list of lists; expected at least one file")
        path, times = Counter(picture.path for picture in pictures).most_common(1)[0]
        if times > 1:
            raise UserError(f"{path}: in {times} of the lists {lists}; expected it in one")
        return BoxListing(pictures, classes)

    def list_splits(self) -> dict[str, BoxListing]:
        """Read the lists of each split, with the classes of the training lists."""
        if self.class_names and len(set(self.class_names)) < len(self.class_names):
            raise UserError(f"--data.init_args.class_names: {self.class_names}; expected names that differ")
        return read_splits(self.lists, self.read_all, self.class_names, self.held_out)


class VOCBoxes(ListedBoxes):
    """Pascal VOC: lists `F/ImageSets/Main/*.txt` of stems, and `F/Annotations/*.xml` and `F/JPEGImages/*` beside them.

    Objects marked difficult are used in training and ignored in evaluation.
    """

    def read(self, path: Path, classes: list[str] | None) -> BoxListing:
        """Read a list of stems and their annotations."""
        return read_voc(path.parent.parent.parent, path, classes, self.on_bad_box)


class COCOBoxes(ListedBoxes):
    """COCO: lists such as `annotations/instances_NAME.json`, and the pictures of each in the folder `NAME` of `root`.

    Crowds are left out of training and ignored in evaluation.

    Args:
        pictures: the folder of a list's pictures; {} stands for NAME.
    """

    keep_ignored = False

    def __init__(self, pictures: str = "{}", **kwargs):
        super().__init__(**kwargs)
        self.pictures = pictures

    def read(self, path: Path, classes: list[str] | None) -> BoxListing:
        """Read one JSON file."""
        folder = self.root / self.pictures.replace("{}", path.stem.removeprefix("instances_"))
        return read_coco(path, folder, classes, self.on_bad_box)


class SageMakerBoxes(ListedBoxes):
    """SageMaker's channels: folders such as `train_annotation` with one JSON for each picture of the folder `train`."""

    def read(self, path: Path, classes: list[str] | None) -> BoxListing:
        """Read one folder."""
        pictures = path.with_name(path.name.removesuffix("_annotation"))
        return read_sagemaker(pictures, path, classes, self.on_bad_box)


class ManifestBoxes(ListedBoxes):
    """Augmented manifests of boxes, as written by SageMaker Ground Truth; paths are relative to a manifest's folder.

    Args:
        label_attribute: the key of the boxes; by default, the only key besides `source-ref` and `*-metadata`.
    """

    def __init__(self, label_attribute: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.label_attribute = label_attribute

    def read(self, path: Path, classes: list[str] | None) -> BoxListing:
        """Read one manifest."""
        return read_box_manifest(path, self.label_attribute, classes, self.on_bad_box)
