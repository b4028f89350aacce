"""Image classification data sets small enough to be kept, as uint8, on the training device."""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.utils import extract_archive

from dlref.data.augment import random_crop, random_erase, random_flip
from dlref.data.cifar import read_cifar_batch, read_class_names
from dlref.data.download import fetch
from dlref.data.files import SPLIT_SEED
from dlref.data.idx import read_idx_pair
from dlref.data.image_classification import ImageClassificationData, check_targets
from dlref.data.images import read_images
from dlref.data.listings import read_folder
from dlref.data.loader import check_at_least, sent
from dlref.runtime.errors import UserError


class ImageTensors(Dataset):
    """Images and targets in memory. A batch is a single selection from each tensor."""

    def __init__(self, images: Tensor, targets: Tensor):
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = sent(index, self.images.device)
        # On a CPU, images[index] takes twenty times as long.
        return self.images.index_select(0, index), self.targets[index]

    def to(self, device: torch.device) -> "ImageTensors":
        """Return the same data on a device, copied only if it is elsewhere."""
        return ImageTensors(self.images.to(device), self.targets.to(device))


Splits = dict[str, ImageTensors]


class InMemoryImages(ImageClassificationData):
    """Images few and small enough to be kept, as uint8, on the training device.

    Args:
        batch_size: images in a batch.
        pad_crop: pad each training image by this many black pixels on each side, then crop its size at a random place.
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
        """Read all data once and move it to the trainer's device."""
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, pad_crop=self.pad_crop, cutout=self.cutout)
        # Lightning recommends workers, but here the data is already on the device.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        if not self.splits:
            self.labels, self.splits = self.read()
            for name, split in self.splits.items():
                check_targets(name, split.targets, len(split), len(self.labels), self.multi_label)
        self.splits = {name: split.to(self.device) for name, split in self.splits.items()}

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


class Digits(InMemoryImages):
    """The 1,797 handwritten digits of 8 × 8 pixels that scikit-learn includes; no file is needed.

    The split is stratified by class and always the same: 1,077 for training, 360 for validation and 360 for testing.

    Args:
        batch_size: images in a batch.
        kwargs: further arguments of `InMemoryImages`.
    """

    def __init__(self, batch_size: int = 64, **kwargs):
        super().__init__(batch_size=batch_size, **kwargs)

    def read(self) -> tuple[list[str], Splits]:
        """Return the class names and all three splits."""
        splits = {name: ImageTensors(digits[:, None], labels) for name, (digits, labels) in digit_pools().items()}
        return [str(digit) for digit in range(10)], splits


def digit_pools() -> dict[str, tuple[Tensor, Tensor]]:
    """Load the pools "train", "val" and "test": digits, uint8 (D, 8, 8), and labels, int64 (D,).

    They are scikit-learn's digits, with their 17 levels spread over 0 to 255. The split is stratified by class and
    always the same: 1,077, 360 and 360.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    digits = torch.from_numpy(np.round(source.images * 255 / 16).astype(np.uint8))
    labels = torch.from_numpy(source.target).long()
    everything = np.arange(len(labels))
    rest, test = train_test_split(everything, test_size=360, stratify=source.target, random_state=SPLIT_SEED)
    train, val = train_test_split(rest, test_size=360, stratify=source.target[rest], random_state=SPLIT_SEED)
    return {name: (digits[index], labels[index]) for name, index in (("train", train), ("val", val), ("test", test))}


Arrays = tuple[np.ndarray | Tensor, np.ndarray | Tensor]


class PublishedImages(InMemoryImages):
    """A data set published as files of a training part and a test part.

    Args:
        root: the folder of the files.
        validation: number of training images held out for validation, always the same ones.
        download: download missing files.
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
        # NumPy never changes the numbers of RandomState: later versions must hold out the same images.
        order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(count))
        whole, test = (ImageTensors(torch.as_tensor(x), torch.as_tensor(y).long()) for x, y in (train, test))
        val, train = (ImageTensors(*whole[index]) for index in (order[:held_out], order[held_out:]))
        return {"train": train, "val": val, "test": test}


class MNIST(PublishedImages):
    """LeCun's handwritten digits, 28 × 28: 60,000 training and 10,000 test images in four idx files, gzipped or not."""

    published = datasets.MNIST  # for its mirrors, file names and checksums
    classes: Sequence[str] = "0123456789"

    def prepare_data(self) -> None:
        """Download missing files if `download` is set."""
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
        """Return the path of the unpacked file if it exists, otherwise that of the .gz file."""
        plain = self.root / name.removesuffix(".gz")
        return plain if plain.is_file() else self.root / name


class FashionMNIST(MNIST):
    """Zalando's articles of clothing, in MNIST's format: Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017."""

    published = datasets.FashionMNIST
    classes = datasets.FashionMNIST.classes


class CIFAR10(PublishedImages):
    """Krizhevsky's small photographs, 32 × 32: 50,000 training and 10,000 test images in ten classes.

    The files are either the published binary version (`data_batch_1.bin` to `data_batch_5.bin`, `test_batch.bin` and
    `batches.meta.txt`, in `root` or in `root/cifar-10-batches-bin`) or image files of one size in folders
    (`train/<class>/*` and `test/<class>/*`, in `root` or in `root/CIFAR-10-images`).
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    md5 = "c32a1d4ab5d03f1284b67883e8d87530"
    train_batches = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    binary = (*train_batches, "test_batch.bin", "batches.meta.txt")

    def prepare_data(self) -> None:
        """Download the binary version if `download` is set and there is no data."""
        if self.download and not self._binary_folder() and not self._image_folder():
            archive = self.root / "cifar-10-binary.tar.gz"
            fetch([self.url], archive, self.md5)
            with tempfile.TemporaryDirectory(dir=self.root, prefix=".part-") as part:
                extract_archive(str(archive), part)
                for path in (path for path in Path(part).rglob("*") if path.is_file()):  # each file arrives complete
                    place = self.root / path.relative_to(part)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(place)

    def read(self) -> tuple[list[str], Splits]:
        """Read whichever form exists; the binary one takes precedence."""
        if folder := self._binary_folder():
            batches = [read_cifar_batch(folder / name) for name in self.train_batches]
            images, targets = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
            splits = self.split((images, targets), read_cifar_batch(folder / "test_batch.bin"))
            return read_class_names(folder / "batches.meta.txt"), splits
        if folder := self._image_folder():
            train = read_folder(folder / "train")
            test = read_folder(folder / "test", train.classes)
            pairs = ((read_images(listing.images), listing.targets) for listing in (train, test))
            return train.classes, self.split(*pairs)
        for folder in self._binary_folders():
            missing = self._missing(folder)
            if len(missing) < len(self.binary):
                raise UserError(f"{folder}: no {', '.join(missing)} in it; expected {', '.join(self.binary)}")
        raise UserError(
            f"{self.root}: no CIFAR-10 in it; expected {self.binary[0]} and the other binary "
            "files, or train/<class>/ and test/<class>/ with images, or --data.init_args.download true"
        )

    def _binary_folders(self) -> tuple[Path, Path]:
        return self.root, self.root / "cifar-10-batches-bin"

    def _missing(self, folder: Path) -> list[str]:
        return [name for name in self.binary if not (folder / name).is_file()]

    def _binary_folder(self) -> Path | None:
        return next((folder for folder in self._binary_folders() if not self._missing(folder)), None)

    def _image_folder(self) -> Path | None:
        folders = (self.root, self.root / "CIFAR-10-images")
        return next((folder for folder in folders if (folder / "train").is_dir()), None)
