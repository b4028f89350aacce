"""Image classification data sets whose images are decoded by worker processes, batch by batch."""

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dlref.data.files import warn_of_shared
from dlref.data.image_classification import ImageClassificationData
from dlref.data.images import read_image
from dlref.data.listings import Listing, read_folder, read_image_manifest, read_lst
from dlref.data.loader import check_at_least
from dlref.runtime.errors import UserError


class ImageFiles(Dataset):
    """Image files, decoded and transformed on access."""

    def __init__(self, listing: Listing, transform: Callable[[Tensor], Tensor]):
        self.paths, self.targets = listing.paths, listing.targets
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

    def list_split(self, split: str, classes: list[str] | None) -> Listing | None:
        """List "train", "val" or "test", with the classes of "train"; return None if there is no test split."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """List the images of all splits, once, and check their labels against the training classes."""
        if self.splits:
            return
        check_at_least(1, batch_size=self.batch_size, image_size=self.image_size)
        check_at_least(self.image_size, resize=self.resize)
        check_at_least(0, num_workers=self.num_workers)
        train = self.list_split("train", None)
        val = self.list_split("val", train.classes)
        test = self.list_split("test", train.classes)
        if test is None:
            rank_zero_info("No test images are given: the validation images are also used for testing.")
            test = val
        for listing in (val, test):
            if listing.multi_label != train.multi_label:
                forms = ("class ids", "multi-hot labels")
                found, expected = forms[listing.multi_label], forms[train.multi_label]
                raise UserError(f"{listing.paths[0]}: {found} in its list; expected {expected}, as in training")
        self.labels, self.multi_label = train.classes, train.multi_label
        times = train.targets.sum(0) if train.multi_label else train.targets.bincount(minlength=len(self.labels))
        if without := [name for name, count in zip(self.labels, times, strict=True) if not count]:
            rank_zero_warn(f"train: no image of {', '.join(without)}")
        warn_of_shared({"train": train.paths, "val": val.paths, "test": test.paths}, "images")
        self.splits = {
            "train": ImageFiles(train, self.train_transform()),
            "val": ImageFiles(val, self.eval_transform()),
            "test": ImageFiles(test, self.eval_transform()),
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

    def list_split(self, split: str, classes: list[str] | None) -> Listing | None:
        """List the folder of a split."""
        folder = self.root / split
        return None if split == "test" and not folder.is_dir() else read_folder(folder, classes)


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
        self.files = {"train": train, "val": val, "test": test}
        self.class_names = class_names

    def list_split(self, split: str, classes: list[str] | None) -> Listing | None:
        """Read the list of a split."""
        file = self.files[split]
        return None if file is None else read_lst(file, self.root, classes or self.class_names)


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
        self.files = {"train": train, "val": val, "test": test}
        self.root = root
        self.label_attribute = label_attribute

    def list_split(self, split: str, classes: list[str] | None) -> Listing | None:
        """Read the manifest of a split."""
        file = self.files[split]
        return None if file is None else read_image_manifest(file, self.root, self.label_attribute, classes)
