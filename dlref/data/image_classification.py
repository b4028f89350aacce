"""Data modules for image classification.

What passes to a task: batches `(images, targets)`, images uint8 (B, C, H, W) and not normalised, for resizing
and normalising are part of the deployed model and what trains is what ships; targets int64 (B,), or multi-hot
float32 (B, K) where an image may have several labels. After `setup`, `labels` holds the K class names and
`multi_label` says which form the targets have.

Small sets live on the training device (`InMemoryImages`), large ones stream from disk (`StreamedImages`).
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

from dlref.data.augment import random_crop, random_erase, random_flip
from dlref.data.cifar import read_cifar_batch, read_class_names
from dlref.data.download import fetch
from dlref.data.idx import read_idx_pair
from dlref.data.images import read_image, read_images
from dlref.data.listings import Listing, read_folder, read_lst, read_manifest
from dlref.runtime.errors import UserError

SPLIT_SEED = 0  # of the validation split, which must be the same whatever the run's own seed


class ImageClassificationData(LightningDataModule):
    """The loaders over `splits`, which `setup` of a subclass fills: "train", "val" and "test"."""

    labels: list[str]
    multi_label = False

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        self.splits: dict[str, Dataset] = {}

    def loader_options(self) -> dict[str, Any]:
        """Return the arguments that all of the DataLoaders take."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, all of one size."""
        train = self.splits["train"]
        # A last, smaller batch would be another shape for torch.compile and for CUDA graphs.
        full = len(train) >= self.batch_size
        return DataLoader(train, batch_size=self.batch_size, shuffle=True, drop_last=full, **self.loader_options())

    def val_dataloader(self) -> DataLoader:
        """Every validation image once, in order."""
        return DataLoader(self.splits["val"], batch_size=self.batch_size, **self.loader_options())

    def test_dataloader(self) -> DataLoader:
        """Every test image once, in order."""
        return DataLoader(self.splits["test"], batch_size=self.batch_size, **self.loader_options())

    def predict_dataloader(self) -> DataLoader:
        """The test images."""
        return self.test_dataloader()


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raise a UserError for the first argument below the minimum.

    `setup` calls it, not the constructor: what that raises, jsonargparse wraps in an error of its own.
    """
    for name, value in arguments.items():
        if value < minimum:
            raise UserError(f"--data.init_args.{name}: {value}; expected at least {minimum}")


# Small sets, in memory


class ImageTensors(Dataset):
    """Images and targets in memory. A batch of them is one indexing of each tensor."""

    def __init__(self, images: Tensor, targets: Tensor):
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        # Non-blocking: an index in the host's memory would make every batch wait for the GPU to catch up.
        index = torch.tensor(indices).to(self.images.device, non_blocking=True)
        return self.images[index], self.targets[index]

    def to(self, device: torch.device) -> "ImageTensors":
        """Return the same data on a device, copied only if it is elsewhere."""
        return ImageTensors(self.images.to(device), self.targets.to(device))


Splits = dict[str, ImageTensors]


class InMemoryImages(ImageClassificationData):
    """Images few and small enough to live, as uint8, on the device that trains on them.

    Args:
        batch_size: images in a batch.
        pad_crop: pad each training image by this many black pixels on each side and crop it back at random.
        flip: mirror half of the training images left to right.
        cutout: blacken a square with this side in each training image.
    """

    def __init__(self, batch_size: int = 128, pad_crop: int = 0, flip: bool = False, cutout: int = 0):
        super().__init__(batch_size)
        self.pad_crop = pad_crop
        self.flip = flip
        self.cutout = cutout

    def read(self) -> tuple[list[str], Splits]:
        """Read the class names and the splits "train", "val" and "test"."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read everything, once, and move it to the trainer's device."""
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, pad_crop=self.pad_crop, cutout=self.cutout)
        # Lightning recommends workers; here they could only copy from the device what is already on it.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        if not self.splits:
            self.labels, self.splits = self.read()
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self.splits = {name: split.to(device) for name, split in self.splits.items()}

    def loader_options(self) -> dict[str, Any]:
        """Return the options for a dataset that already answers in batches."""
        return {"collate_fn": _already_a_batch}

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment training batches, on the device."""
        images, targets = batch
        if self.trainer is None or not self.trainer.training:
            return images, targets
        if self.pad_crop:
            images = random_crop(images, self.pad_crop)
        if self.flip:
            images = random_flip(images)
        if self.cutout:
            images = random_erase(images, self.cutout)
        return images, targets


def _already_a_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


class Digits(InMemoryImages):
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels; they come with it and need no file.

    Split by class into 1,077 for training, 360 for validation and 360 for testing, always the same.
    """

    def __init__(self, batch_size: int = 64, **kwargs):
        super().__init__(batch_size=batch_size, **kwargs)

    def read(self) -> tuple[list[str], Splits]:
        """Load the digits, and spread their 17 levels over 0 to 255."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
        targets = torch.from_numpy(digits.target).long()
        rest, test = train_test_split(
            np.arange(len(targets)), test_size=360, stratify=digits.target, random_state=SPLIT_SEED
        )
        train, val = train_test_split(rest, test_size=360, stratify=digits.target[rest], random_state=SPLIT_SEED)
        splits = {"train": train, "val": val, "test": test}
        labels = [str(name) for name in digits.target_names]
        return labels, {name: ImageTensors(images[index], targets[index]) for name, index in splits.items()}


Arrays = tuple[np.ndarray | Tensor, np.ndarray | Tensor]


class PublishedImages(InMemoryImages):
    """A data set published as files, in a training and a test part.

    Args:
        root: the folder of the files.
        validation: how many of the training images validate instead, always the same ones.
        download: fetch what is missing.
    """

    def __init__(self, root: str | Path, validation: int = 5000, download: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.root = Path(root)
        self.validation = validation
        self.download = download

    def split(self, train: Arrays, test: Arrays) -> Splits:
        """Hold out validation images; `train` and `test` are images (N, C, H, W) with class ids (N,)."""
        count, held_out = len(train[0]), self.validation
        if not 0 <= held_out < count:
            raise UserError(f"--data.init_args.validation: {held_out}; expected 0 to {count - 1}, of {count} images")
        # RandomState, for NumPy never changes its numbers: later versions must hold out the same images.
        order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(count))
        images, targets = torch.as_tensor(train[0]), torch.as_tensor(train[1]).long()
        return {
            "train": ImageTensors(images[order[held_out:]], targets[order[held_out:]]),
            "val": ImageTensors(images[order[:held_out]], targets[order[:held_out]]),
            "test": ImageTensors(torch.as_tensor(test[0]), torch.as_tensor(test[1]).long()),
        }


class MNIST(PublishedImages):
    """LeCun's handwritten digits, 28 × 28: 60,000 and 10,000, in the four idx files, gzipped or not."""

    published = datasets.MNIST  # for its mirrors, file names and checksums
    classes: Sequence[str] = "0123456789"

    def prepare_data(self) -> None:
        """Download the files that are missing, if asked to."""
        for name, md5 in self.published.resources:
            if self.download and not self._find(name).is_file():
                fetch([f"{mirror}{name}" for mirror in self.published.mirrors], self.root / name, md5)

    def read(self) -> tuple[list[str], Splits]:
        """Read the four files."""
        files = [self._find(name) for name, _ in self.published.resources]
        for path in files:
            if not path.is_file():
                raise UserError(f"{path}: no such file; expected it there, or --data.init_args.download true")
        (train, train_targets), (test, test_targets) = (
            read_idx_pair(*pair, len(self.classes)) for pair in (files[:2], files[2:])
        )
        # idx has no channels: (N, H, W) becomes (N, 1, H, W)
        return list(self.classes), self.split((train[:, None], train_targets), (test[:, None], test_targets))

    def _find(self, name: str) -> Path:
        """Return the file without .gz if there is one."""
        plain = self.root / name.removesuffix(".gz")
        return plain if plain.is_file() else self.root / name


class FashionMNIST(MNIST):
    """Zalando's articles of clothing, in MNIST's form: Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017."""

    published = datasets.FashionMNIST
    classes = datasets.FashionMNIST.classes


class CIFAR10(PublishedImages):
    """Krizhevsky's small photographs, 32 × 32: 50,000 and 10,000 in ten classes.

    Either the published binary version (`data_batch_1.bin` to `data_batch_5.bin`, `test_batch.bin` and
    `batches.meta.txt`, in `root` or in `root/cifar-10-batches-bin`) or image files of one size in folders
    (`train/<class>/*` and `test/<class>/*`, in `root` or in `root/CIFAR-10-images`).
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    md5 = "c32a1d4ab5d03f1284b67883e8d87530"
    train_batches = tuple(f"data_batch_{i}.bin" for i in range(1, 6))

    def prepare_data(self) -> None:
        """Download the binary version if there is no data, if asked to."""
        if self.download and not self._binary_folder() and not self._image_folder():
            archive = self.root / "cifar-10-binary.tar.gz"
            fetch([self.url], archive, self.md5)
            extract_archive(str(archive), str(self.root))

    def read(self) -> tuple[list[str], Splits]:
        """Read whichever form is there, the binary one first."""
        if folder := self._binary_folder():
            batches = [read_cifar_batch(folder / name) for name in self.train_batches]
            images, targets = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
            splits = self.split((images, targets), read_cifar_batch(folder / "test_batch.bin"))
            return read_class_names(folder / "batches.meta.txt"), splits
        if folder := self._image_folder():
            train = list_folder(folder / "train")
            test = list_folder(folder / "test", train.classes)
            pairs = ((read_images(listing.paths), listing.targets) for listing in (train, test))
            return train.classes, self.split(*pairs)
        raise UserError(
            f"{self.root}: no CIFAR-10 in it; expected {self.train_batches[0]} and the other binary "
            "files, or train/<class>/ and test/<class>/ with images, or --data.init_args.download true"
        )

    def _binary_folder(self) -> Path | None:
        names = (*self.train_batches, "test_batch.bin", "batches.meta.txt")
        folders = (self.root, self.root / "cifar-10-batches-bin")
        return next((folder for folder in folders if all((folder / name).is_file() for name in names)), None)

    def _image_folder(self) -> Path | None:
        folders = (self.root, self.root / "CIFAR-10-images")
        return next((folder for folder in folders if (folder / "train").is_dir()), None)


def list_folder(folder: Path, classes: list[str] | None = None) -> Listing:
    """List class folders, and warn once of the files in them that are no images."""
    listing, others = read_folder(folder, classes)
    if others:
        more = ", ..." if len(others) > 5 else ""
        rank_zero_warn(f"{folder}: left out {len(others)} that are no images: {', '.join(others[:5])}{more}")
    return listing


# Large sets, streamed


class ImageFiles(Dataset):
    """Image files, decoded and transformed when asked for."""

    def __init__(self, listing: Listing, transform: Callable[[Tensor], Tensor]):
        self.paths, self.targets = listing.paths, listing.targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(read_image(self.paths[index])), self.targets[index]


class StreamedImages(ImageClassificationData):
    """Images decoded and transformed in worker processes, batch by batch.

    Training takes a random part of each image (Szegedy et al., "Going Deeper with Convolutions", 2015,
    section 6) and mirrors half of them; evaluation resizes the short side and takes the centre.

    Args:
        batch_size: images in a batch.
        image_size: height and width of an image in a batch, in pixels.
        resize: length of the short side before evaluation takes the centre, in pixels.
        trivial_augment: also apply one random operation of random strength to each training image (Müller and
            Hutter, "TrivialAugment", 2021).
        num_workers: processes that decode; 0 decodes in the training process.
    """

    def __init__(
        self,
        batch_size: int = 64,
        image_size: int = 224,
        resize: int = 256,
        trivial_augment: bool = False,
        num_workers: int = 4,
    ):
        super().__init__(batch_size)
        self.image_size = image_size
        self.resize = resize
        self.trivial_augment = trivial_augment
        self.num_workers = num_workers

    def list_split(self, split: str, classes: list[str] | None) -> Listing | None:
        """List "train", "val" or "test" (None where there is no test split), with the classes of "train"."""
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
            rank_zero_info("No test images are given: the validation images serve for testing too.")
            test = val
        for listing in (val, test):
            if listing.multi_label != train.multi_label:
                forms = ("class ids", "multi-hot labels")
                found, expected = forms[listing.multi_label], forms[train.multi_label]
                raise UserError(f"{listing.paths[0]}: {found} in its list; expected {expected}, as in training")
        self.labels, self.multi_label = train.classes, train.multi_label
        self.splits = {
            "train": ImageFiles(train, self.train_transform()),
            "val": ImageFiles(val, self.eval_transform()),
            "test": ImageFiles(test, self.eval_transform()),
        }

    def train_transform(self) -> v2.Transform:
        """Return what training does to each image."""
        transforms = [v2.RandomResizedCrop(self.image_size, antialias=True), v2.RandomHorizontalFlip()]
        return v2.Compose(transforms + [v2.TrivialAugmentWide()] * self.trivial_augment)

    def eval_transform(self) -> v2.Transform:
        """Return what validation and testing do to each image."""
        return v2.Compose([v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.image_size)])

    def loader_options(self) -> dict[str, Any]:
        """Return the options of the worker processes."""
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


class ImageFolder(StreamedImages):
    """Images in `root/train/<class>/*`, `root/val/<class>/*` and, if there is one, `root/test/<class>/*`.

    The classes are the folders of `train`, sorted by name.

    Args:
        root: the folder of the splits.
    """

    def __init__(self, root: str | Path, **kwargs):
        super().__init__(**kwargs)
        self.root = Path(root)

    def list_split(self, split: str, classes: list[str] | None) -> Listing | None:
        """List the folder of a split."""
        folder = self.root / split
        return None if split == "test" and not folder.is_dir() else list_folder(folder, classes)


class ImageList(StreamedImages):
    """Images listed in MXNet's .lst files: index, label(s) and path, with tabs between.

    Several label columns are multi-hot: 0 or 1 for each class.

    Args:
        root: the folder that the paths are relative to.
        train: the list of the training images.
        val: the list of the validation images.
        test: the list of the test images; by default those of validation.
        class_names: names of the classes, in order; by default their numbers.
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
    """Images listed in SageMaker's augmented manifests, with one label or several; see `read_manifest`.

    Args:
        train: the manifest of the training images.
        val: the manifest of the validation images.
        test: the manifest of the test images; by default those of validation.
        root: the folder that `source-ref` is relative to; by default the manifest's own.
        label_attribute: the key of the label; by default the only one that it can be.
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
        return None if file is None else read_manifest(file, self.root, self.label_attribute, classes)
