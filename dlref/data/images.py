"""Decode image files to uint8 tensors. C H W: channels, height, width."""

import os
import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_image

from dlref.runtime.errors import UserError
from dlref.runtime.images import orientation, upright
from dlref.runtime.images import read_image as read_as_device

# torchvision 0.29 deprecates its decoders in favour of torchcodec, which is not available beside torchvision 0.26.
# For JPEG they are two to four times as fast as Pillow and return the same pixels.
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
# Pillow's warnings about truncated EXIF data and large pictures.
warnings.filterwarnings("ignore", module=r"PIL\.")

JPEG = b"\xff\xd8\xff"  # the first bytes of such a file
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
FORMATS = "JPEG, PNG, GIF or WebP"
SHOW_PROGRESS_ABOVE = 2000  # files: about a tenth of a second

Item = TypeVar("Item")


class UnreadableImage(UserError):
    """An image file that is missing or cannot be decoded.

    A DataLoader re-raises a worker's exception as `type(error)(traceback as text)`. The constructor keeps only the
    last line of that text, the message, so that the error of a worker is one line, too.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().rsplit(f"{type(self).__name__}: ", 1)[-1])


def read_image(path: str) -> Tensor:
    """Decode an image file to uint8 RGB (3, H, W), oriented as its EXIF or XMP data specifies."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(JPEG):
            decoded = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode="RGB")
            with Image.open(BytesIO(content), formats=("JPEG",)) as header:  # torchvision ignores XMP
                pixels = upright(decoded.permute(1, 2, 0).numpy(), orientation(header))
        else:
            # Read as a device does. This decodes PNG more slowly than torchvision, which crashes the process on a
            # damaged file, does not rotate a WebP, and fills the holes of a GIF with another colour.
            pixels = read_as_device(content, channels=3)
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path}: {error}; expected a smaller image") from None
    except (OSError, RuntimeError, ValueError, UserError):  # ValueError: a path that no file can have
        wrong = "cannot be decoded" if os.path.isfile(path) else "no such file"
        raise UnreadableImage(f"{path}: {wrong}; expected a {FORMATS} image") from None
    # Always copy: numpy regards a flipped axis of one pixel as contiguous, torch does not.
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)


def show_progress(items: list[Item], what: str) -> Iterable[Item]:
    """Iterate over items, with a progress bar on a terminal if there are many."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = console.is_terminal or console.is_jupyter  # elsewhere rich would leave an empty line
    hidden = len(items) <= SHOW_PROGRESS_ABOVE or not shown
    return track(items, what, transient=True, console=console, disable=hidden)


def read_images(paths: Sequence[str]) -> Tensor:
    """Decode files of one size into memory: uint8 (N, 3, H, W).

    This uses a single thread: on images this small, threads would lose more time to switching than they gain.
    """
    images = torch.empty(len(paths), *read_image(paths[0]).shape, dtype=torch.uint8)
    for i, path in show_progress(list(enumerate(paths)), "Decoding images"):
        image = read_image(path)
        if image.shape != images.shape[1:]:
            size, expected = (f"{shape[-1]} x {shape[-2]} pixels" for shape in (image.shape, images.shape))
            raise UserError(f"{path}: {size}; expected {expected}, as {paths[0]} has")
        images[i] = image
    return images
