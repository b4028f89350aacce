"""Data modules for semantic segmentation.

What passes to a task: batches `(images, masks)`, images uint8 (B, 3, H, W) and not normalised, masks uint8 (B, H, W)
with the class of each pixel, and 255 where a pixel counts for nothing. Training batches are squares of one size.
Evaluation sees pictures as they are; where their sizes differ, one at a time. After `setup`, `labels` holds the K
class names.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dlref.data.annotated_pictures import MEAN, AnnotatedPictures
from dlref.data.files import read_splits
from dlref.data.images import read_image
from dlref.data.loader import check_at_least
from dlref.data.mask_listings import (
    OF_255,
    VOID,
    MaskListing,
    read_mask,
    read_mask_folders,
    read_mask_list,
    read_voc_masks,
)
from dlref.data.scenes import Scenes, make_scenes
from dlref.data.small_images import digit_pools
from dlref.runtime.errors import UserError

Batch = tuple[Tensor, Tensor]
Pair = tuple[tv_tensors.Image, tv_tensors.Mask]


class MaskedPictures(Dataset):
    """Pictures and their masks, transformed together when asked for; a subclass says how they are read.

    Args:
        names: of each picture: its path, or its number.
        sizes: heights and widths, in pixels.
        transform: of an image and its mask.
    """

    def __init__(self, names: list[str], sizes: list[tuple[int, int]], transform: Callable[[Pair], Pair] | None = None):
        self.names, self.sizes, self.transform = names, sizes, transform

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (3, H, W) and mask uint8 (H, W)."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.read(index)
        if self.transform is None:
            return image, mask
        image, mask = self.transform((tv_tensors.Image(image), tv_tensors.Mask(mask)))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


class MaskedScenes(MaskedPictures):
    """Scenes, from memory."""

    def __init__(self, scenes: Scenes):
        size = tuple(scenes.masks.shape[1:])
        super().__init__([str(i) for i in range(len(scenes.masks))], [size] * len(scenes.masks))
        # Arrays: a worker process that does not fork gets a file for each tensor, and there are only so many.
        self.images, self.masks = scenes.images.numpy(), scenes.masks.numpy()

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and mask of a scene."""
        return torch.from_numpy(self.images[index]), torch.from_numpy(self.masks[index])


class MaskedFiles(MaskedPictures):
    """Files, decoded when asked for."""

    def __init__(self, listing: MaskListing, transform: Callable[[Pair], Pair] | None = None):
        super().__init__(listing.images, listing.sizes, transform)
        self.masks, self.table = listing.masks, listing.table

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and mask of two files."""
        return read_image(self.names[index]), torch.from_numpy(read_mask(self.masks[index], self.table))


class SegmentationData(AnnotatedPictures):
    """Pictures with masks; a subclass says what its splits are.

    Training resizes each picture by a random factor (so that its shorter side is 0.5 to 2 times `base_size`), takes a
    random square of it, mirrors half of them, and changes brightness and colours; what is beyond a picture counts for
    nothing.

    Args:
        batch_size: pictures in a batch.
        crop_size: side of a training image, in pixels.
        base_size: shorter side of a training picture that is resized by a factor of 1, in pixels.
        scales: the smallest and the largest factor.
        flip: mirror half of the training pictures left to right.
        photometric: change brightness, contrast, saturation and hue of training pictures, on the device.
        num_workers: processes that decode; 0 decodes in the training process.
    """

    def __init__(
        self,
        batch_size: int = 16,
        crop_size: int = 480,
        base_size: int = 520,
        scales: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        photometric: bool = True,
        num_workers: int = 4,
    ):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.crop_size, self.base_size, self.scales = crop_size, base_size, scales
        self.flip, self.photometric = flip, photometric
        self.splits: dict[str, MaskedPictures] = {}

    def make_splits(self) -> dict[str, MaskedPictures]:
        """Set `labels` and return "train", "val" and "test"."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """List the pictures of all splits, once, and check their masks."""
        if self.splits:
            return
        sizes = {"crop_size": self.crop_size, "base_size": self.base_size}
        check_at_least(1, batch_size=self.batch_size, **sizes)
        check_at_least(0, num_workers=self.num_workers)
        if not 0 < self.scales[0] <= self.scales[1] < 100:
            raise UserError(
                f"--data.init_args.scales: {list(self.scales)}; expected two factors, the smaller one first"
            )
        self.splits = self.make_splits()

    def train_transform(self) -> v2.Transform:
        """Return what training does to each picture and its mask, light aside."""
        smallest, largest = (max(1, round(self.base_size * scale)) for scale in self.scales)
        resize = v2.RandomResize(smallest, largest + 1, antialias=True)
        fill = {tv_tensors.Image: MEAN, tv_tensors.Mask: VOID}
        crop = v2.RandomCrop(self.crop_size, pad_if_needed=True, fill=fill)
        return v2.Compose([resize, crop, *[v2.RandomHorizontalFlip()] * self.flip])

    def eval_batch_size(self, split: str) -> int:
        """Pictures stay as they are; alone where others have other sizes, for the network would see what pads one."""
        return self.batch_size if len(set(self.splits[split].sizes)) == 1 else 1

    def sources(self) -> list[str]:
        """Return the name of each test picture, in order."""
        return self.splits["test"].names


class DigitSceneMasks(SegmentationData):
    """Scenes with scikit-learn's handwritten digits, drawn from a seed; see `scenes`. They need no file.

    The digits of a split are in no other. What is no digit is background.

    Args:
        train: number of training scenes.
        held_out: number of validation scenes, and of test scenes.
        most: digits in a scene.
        image_size: side of a scene, in pixels.
        photometric: see `SegmentationData`.
        num_workers: see there.
        batch_size: see there.
    """

    def __init__(
        self,
        train: int = 1000,
        held_out: int = 200,
        most: int = 8,
        image_size: int = 96,
        photometric: bool = False,
        num_workers: int = 0,
        batch_size: int = 16,
    ):
        super().__init__(batch_size=batch_size, photometric=photometric, num_workers=num_workers)
        self.counts = {"train": train, "val": held_out, "test": held_out}
        self.most, self.image_size = most, image_size

    def make_splits(self) -> dict[str, MaskedPictures]:
        """Draw the scenes; each split has a seed of its own."""
        check_at_least(1, train=self.counts["train"], held_out=self.counts["val"], most=self.most)
        check_at_least(16, image_size=self.image_size)
        self.labels = ["background", *map(str, range(10))]
        return {
            name: MaskedScenes(make_scenes(*pool, self.counts[name], self.image_size, seed, self.most))
            for seed, (name, pool) in enumerate(digit_pools().items())
        }


class ListedMasks(SegmentationData):
    """Pictures and masks in files; a subclass says how a split is listed.

    Args:
        root: the folder that the splits are relative to.
        train: the training split; see the subclass.
        val: the validation split. None: a share of the training pictures, always the same, is held out.
        test: the test split; by default validation serves for testing too.
        class_names: the classes in order; by default those that the first split has.
        held_out: the share of the training pictures where there is no validation split.
    """

    hint = ""  # what an error says of masks that have one class

    def __init__(
        self,
        root: str | Path,
        train: str,
        val: str | None = None,
        test: str | None = None,
        class_names: list[str] | None = None,
        held_out: float = 0.1,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.root = Path(root)
        self.lists = {"train": train, "val": val, "test": test}
        self.class_names, self.held_out = class_names, held_out

    def read(self, name: str, classes: list[str] | None) -> MaskListing:
        """Read one split."""
        raise NotImplementedError

    def make_splits(self) -> dict[str, MaskedPictures]:
        """Read the splits, with the classes of training, and say which classes have no pixel there."""
        listings = read_splits(self.lists, self.read, self.class_names, self.held_out)
        self.labels = listings["train"].classes
        for name, listing in listings.items():
            if name == "test" and listing is listings["val"]:
                continue  # warned of as val
            counts = listing.pixels.sum(axis=0)
            if empty := [label for label, count in zip(listing.classes, counts, strict=True) if not count]:
                rank_zero_warn(f"{name}: no pixel of {', '.join(empty)}")
            if name == "train" and len(empty) > len(self.labels) - 2:
                there = len(self.labels) - len(empty)
                raise UserError(f"train: {there} of the classes have pixels; expected 2 or more{self.hint}")
        return {
            name: MaskedFiles(listing, self.train_transform() if name == "train" else None)
            for name, listing in listings.items()
        }


class MaskFolders(ListedMasks):
    """A folder of pictures and one with a PNG for each of them: SageMaker's channels, and any other pairs.

    Args:
        pictures: where the pictures of a split are; {} stands for the name that `train`, `val` or `test` gives it.
        masks: where its masks are, likewise.
        label_map: SageMaker's label map, or the folder of those of each split (F_label_map.json for the split F);
            relative to `root`. By default, a pixel's value is its class.
        void: value of pixels that count for nothing, besides 255.
    """

    hint = OF_255

    def __init__(
        self,
        pictures: str = "{}",
        masks: str = "{}_annotation",
        label_map: str | Path | None = None,
        void: int = VOID,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.pictures, self.masks, self.label_map, self.void = pictures, masks, label_map, void

    def read(self, name: str, classes: list[str] | None) -> MaskListing:
        """Read two folders."""
        name = str(Path(name))  # without a slash at the end
        label_map = self.label_map and self.root / self.label_map
        if label_map and label_map.is_dir():
            label_map /= f"{name}_label_map.json"
        pictures, masks = (self.root / place.replace("{}", name) for place in (self.pictures, self.masks))
        return read_mask_folders(pictures, masks, classes, label_map, self.void)


class MaskLists(ListedMasks):
    """Lists with a picture and its mask on each line, as CamVid has them; paths are relative to their own list.

    Args:
        void: value of pixels that count for nothing, besides 255.
    """

    def __init__(self, void: int = VOID, **kwargs):
        super().__init__(**kwargs)
        self.void = void

    def read(self, name: str, classes: list[str] | None) -> MaskListing:
        """Read one list."""
        return read_mask_list(self.root / name, classes, self.void)


class VOCMasks(ListedMasks):
    """Pascal VOC: lists `ImageSets/Segmentation/*.txt` of stems, `JPEGImages/*` and `SegmentationClass/*.png`."""

    def read(self, name: str, classes: list[str] | None) -> MaskListing:
        """Read the stems of a list."""
        return read_voc_masks(self.root / name, classes)
