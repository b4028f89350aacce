"""Data modules for semantic segmentation.

Tasks receive batches `(images, masks)`. Images are uint8 (B, 3, H, W) and not normalised. Masks are uint8 (B, H, W)
with the class of each pixel, or 255 for pixels to ignore (void). Training batches are squares of one size. Evaluation
uses pictures at their own size, one at a time if the sizes differ. After `setup`, `labels` holds the K class names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dlref.data.annotated_pictures import MEAN, AnnotatedPictures
from dlref.data.files import read_splits
from dlref.data.images import UnreadableImage, read_image
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

Pair = tuple[tv_tensors.Image, tv_tensors.Mask]


class Resized(v2.RandomResize):
    """A random resize of a picture and its mask that keeps the mask in place.

    A pixel of the mask is the one whose centre is nearest, as in Pillow. torchvision takes the one to the upper left of
    that point, which shifts masks by half a pixel to the lower right of their pictures.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize a picture or a mask (H, W) to the size in `params`."""
        if not isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        exact = v2.InterpolationMode.NEAREST_EXACT
        resized = v2.functional.resize_image(inpt.as_subclass(Tensor)[None], params["size"], interpolation=exact)
        return tv_tensors.Mask(resized[0])


class MaskedPictures(Dataset):
    """Pictures and their masks, transformed together on access; a subclass reads them.

    Args:
        names: the path or the number of each picture.
        sizes: height and width of each picture, in pixels.
        transform: transforms an image and its mask.
    """

    num_classes = VOID  # if it is known

    def __init__(self, names: list[str], sizes: list[tuple[int, int]], transform: Callable[[Pair], Pair] | None = None):
        self.names, self.sizes, self.transform = names, sizes, transform

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 (3, H, W), and its mask, uint8 (H, W)."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.read(index)
        values = mask.numpy()  # torch takes ten times as long
        wrong = (values >= self.num_classes) & (values != VOID)
        if wrong.any():  # of a data set of one's own: the readers have checked theirs
            found = f"value {values[wrong][0]} in {wrong.sum()} pixels of its mask"
            known = f"expected 0 to {self.num_classes - 1}, or {VOID} for void"
            raise UnreadableImage(f"{self.names[index]}: {found}; {known}")
        if self.transform is None:
            return image, mask
        image, mask = self.transform((tv_tensors.Image(image), tv_tensors.Mask(mask)))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


class MaskedScenes(MaskedPictures):
    """Scenes in memory."""

    def __init__(self, scenes: Scenes):
        size = tuple(scenes.masks.shape[1:])
        super().__init__([str(i) for i in range(len(scenes.masks))], [size] * len(scenes.masks))
        # Arrays: a worker that is not forked receives one open file per tensor, and open files are limited.
        self.images, self.masks = scenes.images.numpy(), scenes.masks.numpy()

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image and the mask of a scene."""
        return torch.from_numpy(self.images[index]), torch.from_numpy(self.masks[index])


class MaskedFiles(MaskedPictures):
    """Pictures and masks in files, decoded on access."""

    def __init__(self, listing: MaskListing, transform: Callable[[Pair], Pair] | None = None):
        super().__init__(listing.images, listing.sizes, transform)
        self.masks, self.table = listing.masks, listing.table

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode the image and the mask from their two files."""
        return read_image(self.names[index]), torch.from_numpy(read_mask(self.masks[index], self.table))


class SegmentationData(AnnotatedPictures):
    """Pictures with masks; a subclass makes the splits.

    Training resizes each picture by a random factor (by default, its shorter side becomes 0.5 to 2 times `base_size`),
    crops a random square, mirrors half of the pictures, and changes brightness and colours. Pixels outside a picture
    are void.

    Args:
        batch_size: pictures in a batch.
        crop_size: side of a training image, in pixels.
        base_size: shorter side, in pixels, of a training picture resized by a factor of 1.
        scales: the smallest and the largest factor.
        flip: mirror half of the training pictures left to right.
        photometric: change brightness, contrast, saturation and hue of training pictures, on the device.
        num_workers: worker processes that decode; 0 decodes in the training process.
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
        super().__init__(batch_size, num_workers)
        self.crop_size, self.base_size, self.scales = crop_size, base_size, scales
        self.flip, self.photometric = flip, photometric

    def make_splits(self) -> dict[str, MaskedPictures]:
        """Set `labels` and return "train", "val" and "test"."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """List the pictures of all splits, once, and check their masks."""
        if self.splits:
            return
        check_at_least(1, batch_size=self.batch_size, crop_size=self.crop_size, base_size=self.base_size)
        check_at_least(0, num_workers=self.num_workers)
        if not 0 < self.scales[0] <= self.scales[1] < 100:
            raise UserError(
                f"--data.init_args.scales: {list(self.scales)}; expected two factors, the smaller one first"
            )
        self.splits = self.make_splits()
        for name, pictures in self.splits.items():
            if not len(pictures):
                raise UserError(f"{name}: no pictures; expected at least one")
            pictures.num_classes = len(self.labels)

    def train_transform(self) -> v2.Transform:
        """Return the transform of training pictures and masks, except for changes of brightness and colours."""
        smallest, largest = (max(1, round(self.base_size * scale)) for scale in self.scales)
        resize = Resized(smallest, largest + 1, antialias=True)
        fill = {tv_tensors.Image: MEAN, tv_tensors.Mask: VOID}
        crop = v2.RandomCrop(self.crop_size, pad_if_needed=True, fill=fill)
        return v2.Compose([resize, crop, *[v2.RandomHorizontalFlip()] * self.flip])

    def eval_batch_size(self, split: str) -> int:
        """Return `batch_size` if all pictures have one size, else 1: the network would see any padding."""
        return self.batch_size if len(set(self.splits[split].sizes)) == 1 else 1


class DigitSceneMasks(SegmentationData):
    """Scenes with scikit-learn's handwritten digits, drawn from a seed; see `scenes`. No file is needed.

    No digit appears in more than one split. Pixels outside the digits are background.

    Args:
        train: number of training scenes.
        held_out: number of validation scenes, and of test scenes.
        most: maximum number of digits in a scene.
        image_size: side of a scene, in pixels.
        photometric: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        batch_size: see `SegmentationData`.
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
        """Draw the scenes; each split has its own seed."""
        check_at_least(1, train=self.counts["train"], held_out=self.counts["val"], most=self.most)
        check_at_least(16, image_size=self.image_size)
        self.labels = ["background", *map(str, range(10))]
        return {
            name: MaskedScenes(make_scenes(*pool, self.counts[name], self.image_size, seed, self.most))
            for seed, (name, pool) in enumerate(digit_pools().items())
        }


class ListedMasks(SegmentationData):
    """Pictures and masks in files; a subclass reads the listing of a split.

    Args:
        root: the folder that the splits are relative to.
        train: the training split; see the subclass.
        val: the validation split. None: a share of the training pictures, always the same ones, is held out.
        test: the test split; by default, the validation pictures are used for testing, too.
        class_names: the classes in order; by default, those of the training split.
        held_out: the share of the training pictures to hold out if there is no validation split.
    """

    hint = ""  # ends the error that is raised if fewer than two classes have pixels

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
        """Read one split. `classes`, if given, are the class names that its ids are the places of."""
        raise NotImplementedError

    def make_splits(self) -> dict[str, MaskedPictures]:
        """Read the splits with the classes of the training split, and warn about classes without pixels."""
        listings = read_splits(self.lists, self.read, self.class_names, self.held_out)
        self.labels = listings["train"].classes
        for name, listing in listings.items():
            if name == "test" and listing is listings["val"]:
                continue  # warned about as val
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
    """A folder of pictures and a folder with a PNG mask for each: SageMaker's channels, or any other pairs.

    Args:
        pictures: the folder of a split's pictures; {} stands for the value of `train`, `val` or `test`.
        masks: the folder of a split's masks, likewise.
        label_map: SageMaker's label map, or a folder with one for each split (F_label_map.json for the split F);
            relative to `root`. By default, a pixel's value is its class.
        void: value of pixels to ignore, besides 255.
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
        name = str(Path(name))  # without a trailing slash
        label_map = self.label_map and self.root / self.label_map
        if label_map and label_map.is_dir():
            label_map /= f"{name}_label_map.json"
        pictures, masks = (self.root / place.replace("{}", name) for place in (self.pictures, self.masks))
        return read_mask_folders(pictures, masks, classes, label_map, self.void)


class MaskLists(ListedMasks):
    """Lists with a picture and its mask on each line, as in CamVid; paths are relative to the list's folder.

    Args:
        void: value of pixels to ignore, besides 255.
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
        """Read a list of stems and their masks."""
        return read_voc_masks(self.root / name, classes)
