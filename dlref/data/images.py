"""Image files to uint8 tensors. C H W: channels, height, width."""

import os
import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import decode_image, read_file
from torchvision.transforms.v2 import functional as F

from dlref.runtime.errors import UserError

# torchvision 0.29 deprecates its decoders for torchcodec's, which torchvision 0.26 does not have beside it.
# Of JPEG and PNG they decode two to four times as fast as Pillow, to the same pixels.
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
FORMATS = "JPEG, PNG, GIF or WebP"
SHOW_PROGRESS_ABOVE = 2000  # files: about a tenth of a second

Item = TypeVar("Item")


class UnreadableImage(UserError):
    """An image file that is missing or cannot be decoded.

    A DataLoader raises a worker's exception again as `type(error)(traceback as text)`. The constructor keeps
    that text's last line, the message, so that it is one line from a worker too.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().rsplit(f"{type(self).__name__}: ", 1)[-1])


def read_image(path: str) -> Tensor:
    """Decode an image file to uint8 RGB (3, H, W), turned as its EXIF orientation says."""
    try:
        content = read_file(path)
        start = bytes(content[:12].numpy())
        # torchvision does not turn the one, and fills the other's holes with another colour than a device.
        if start[8:] == b"WEBP" or start[:4] == b"GIF8":
            with Image.open(BytesIO(content.numpy().tobytes())) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
            return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()
        image = decode_image(content, mode="RGB", apply_exif_orientation=True)
    # ValueError: a path that no file can have; the last three are Pillow's.
    except (RuntimeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        wrong = "cannot be decoded" if os.path.isfile(path) else "no such file"
        raise UnreadableImage(f"{path}: {wrong}; expected a {FORMATS} image") from None
    return F.to_dtype(image, torch.uint8, scale=True)  # a 16-bit PNG arrives as uint16


def show_progress(items: list[Item], what: str) -> Iterable[Item]:
    """The items, with a progress bar where they are many files."""
    from rich.console import Console
    from rich.progress import track

    return track(
        items,
        what,
        transient=True,
        console=Console(stderr=True),
        disable=len(items) <= SHOW_PROGRESS_ABOVE,
    )


def read_images(paths: Sequence[str]) -> Tensor:
    """Decode files of one size into memory: uint8 (N, 3, H, W).

    In this thread: on images of this size, threads spend more on taking turns than they gain.
    """
    images = torch.empty(len(paths), *read_image(paths[0]).shape, dtype=torch.uint8)
    for i, path in show_progress(list(enumerate(paths)), "Decoding images"):
        image = read_image(path)
        if image.shape != images.shape[1:]:
            size, expected = (f"{shape[-1]} x {shape[-2]} pixels" for shape in (image.shape, images.shape))
            raise UserError(f"{path}: {size}; expected {expected}, as {paths[0]} has")
        images[i] = image
    return images
