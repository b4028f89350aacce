"""Image classification data sets whose images are decoded by worker processes, batch by batch."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dlref.data.files import read_splits
from dlref.data.image_classification import ImageClassificationData, check_targets
from dlref.data.images import read_image
from dlref.data.listings import Listing, read_folder, read_image_manifest, read_lst
from dlref.data.loader import check_at_least
from dlref.runtime.errors import UserError


class ImageFiles(Dataset):
    """Image files, decoded and transformed on access."""

    def __init__(self, listing: Listing, transform: Callable[[Tensor], Tensor]):
        self.paths, self.targets = listing.images, listing.targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(read_image(self.paths[index])), self.targets[index]


class StreamedImages(ImageClassificationData):
    """Images decoded and transformed in worker processes, batch by batch.

    Training crops a random part of each image (Szegedy et al., "Going Deeper with Convolutions", 2015,
    section 6) and mirrors half of the images; evaluation resizes the shorter side and crops the centre.

    Args:
        batch_size: images in a batch.
        image_size: height and width of an image in a batch, in pixels.
        resize: length of the shorter side, in pixels, before evaluation crops the centre.
        trivial_augment: also apply one random operation of random strength to each training image (Müller and
            Hutter, "TrivialAugment", 2021).
        num_workers: worker processes that decode; 0 decodes in the training process.
    """

    decoded_singly = True
    # What `read` reads for "train", "val" and "test"; None for "test": the validation images serve for both.
    lists: Mapping[str, str | Path | None]

    def __init__(
        self,
        batch_size: int = 64,
        image_size: int = 224,
        resize: int = 256,
        trivial_augment: bool = False,
        num_workers: int = 4,
    ):
        super().__init__(batch_size, num_workers)
        self.image_size = image_size
        self.resize = resize
        self.trivial_augment = trivial_augment

    @property
    def crop(self) -> float:
        """The share of the shorter side that evaluation keeps."""
        return self.image_size / self.resize

    def read(self, source: str | Path, classes: list[str] | None) -> Listing:
        """List the images of a split."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """List the images of all splits, once, and check their labels against the training classes."""
        if self.splits:
            return
        check_at_least(1, batch_size=self.batch_size, image_size=self.image_size)
        check_at_least(self.image_size, resize=self.resize)
        check_at_least(0, num_workers=self.num_workers)
        listings = read_splits(self.lists, self.read, what="images")
        train = listings["train"]
        for listing in listings.values():
            if listing.multi_label != train.multi_label:
                forms = ("class ids", "multi-hot labels")
                found, expected = forms[listing.multi_label], forms[train.multi_label]
                raise UserError(f"{listing.images[0]}: {found} in its list; expected {expected}, as in training")
        self.labels, self.multi_label = train.classes, train.multi_label
        for name, listing in listings.items():
            check_targets(name, listing.targets, len(listing.images), len(self.labels), self.multi_label)
        times = train.targets.sum(0) if train.multi_label else train.targets.bincount(minlength=len(self.labels))
        if without := [name for name, count in zip(self.labels, times, strict=True) if not count]:
            rank_zero_warn(f"train: no image of {', '.join(without)}")
        self.splits = {
            name: ImageFiles(listing, self.train_transform() if name == "train" else self.eval_transform())
            for name, listing in listings.items()
        }

    def sources(self) -> list[str]:
        """Return the path of each test image, in order."""
        return self.splits["test"].paths

    def train_transform(self) -> v2.Transform:
        """Return the transform of training images."""
        transforms = [v2.RandomResizedCrop(self.image_size, antialias=True), v2.RandomHorizontalFlip()]
        return v2.Compose(transforms + [v2.TrivialAugmentWide()] * self.trivial_augment)

    def eval_transform(self) -> v2.Transform:
        """Return the transform of validation and test images."""
        return v2.Compose([v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.image_size)])


class ImageFolder(StreamedImages):
    """Images in `root/train/<class>/*`, `root/val/<class>/*` and, if there is one, `root/test/<class>/*`.

    The classes are the folders of `train`, sorted by name.

    Args:
        root: the folder that contains the splits.
    """

    def __init__(self, root: str | Path, **kwargs):
        super().__init__(**kwargs)
        self.root = Path(root)

    @property
    def lists(self) -> dict[str, Path | None]:
        """The folder of each split."""
        folders = {split: self.root / split for split in ("train", "val", "test")}
        return folders if folders["test"].is_dir() else folders | {"test": None}

    def read(self, source: Path, classes: list[str] | None) -> Listing:
        """List a folder."""
        return read_folder(source, classes)


class ImageList(StreamedImages):
    """Images listed in MXNet's .lst files: index, label(s) and path, separated by tabs.

    Several label columns are multi-hot: 0 or 1 for each class.

    Args:
        root: the folder that the paths are relative to.
        train: the list of the training images.
        val: the list of the validation images.
        test: the list of the test images; by default, the validation images are used.
        class_names: names of the classes, in order; by default, their ids.
    """

    def __init__(
        self,
        root: str | Path,
        train: str | Path,
        val: str | Path,
        test: str | Path | None = None,
        class_names: list[str] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.root = root
        self.lists = {"train": train, "val": val, "test": test}
        self.class_names = class_names

    def read(self, source: str | Path, classes: list[str] | None) -> Listing:
        """Read a list."""
        return read_lst(source, self.root, classes or self.class_names)


class ImageManifest(StreamedImages):
    """Images listed in SageMaker's augmented manifests, with one label or several; see `read_image_manifest`.

    Args:
        train: the manifest of the training images.
        val: the manifest of the validation images.
        test: the manifest of the test images; by default, the validation images are used.
        root: the folder that `source-ref` is relative to; by default, the manifest's own folder.
        label_attribute: the key of the label; by default, the only key besides `source-ref` and `*-metadata`.
    """

    def __init__(
        self,
        train: str | Path,
        val: str | Path,
        test: str | Path | None = None,
        root: str | Path | None = None,
        label_attribute: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.lists = {"train": train, "val": val, "test": test}
        self.root = root
        self.label_attribute = label_attribute

    def read(self, source: str | Path, classes: list[str] | None) -> Listing:
        """Read a manifest."""
        return read_image_manifest(source, self.root, self.label_attribute, classes)
