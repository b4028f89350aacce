"""Image files to uint8 tensors. C H W: channels, height, width."""

import os
import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import decode_image, read_file
from torchvision.transforms.v2 import functional as F

from dlref.runtime.errors import UserError

# torchvision 0.29 deprecates its decoders for torchcodec's, which torchvision 0.26 does not have beside it.
# They decode two to four times as fast as Pillow, to the same pixels.
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
FORMATS = "JPEG, PNG, GIF or WebP"
SHOW_PROGRESS_ABOVE = 2000  # files: about a tenth of a second


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
        if bytes(content[8:12].numpy()) == b"WEBP":  # which torchvision does not turn
            with Image.open(BytesIO(content.numpy().tobytes())) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
            return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()
        image = decode_image(content, mode="RGB", apply_exif_orientation=True)
    # ValueError: a path that no file can have; the last three are Pillow's.
    except (RuntimeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        wrong = "cannot be decoded" if os.path.isfile(path) else "no such file"
        raise UnreadableImage(f"{path}: {wrong}; expected a {FORMATS} image") from None
    if image.ndim == 4:  # an animated GIF: its first frame stands for it
        image = image[0]
    return F.to_dtype(image, torch.uint8, scale=True)  # a 16-bit PNG arrives as uint16


def read_images(paths: Sequence[str]) -> Tensor:
    """Decode files of one size into memory: uint8 (N, 3, H, W).

    In this thread: on images of this size, threads spend more on taking turns than they gain.
    """
    from rich.console import Console
    from rich.progress import track

    images = torch.empty(len(paths), *read_image(paths[0]).shape, dtype=torch.uint8)
    progress = track(
        enumerate(paths),
        "Decoding images",
        total=len(paths),
        transient=True,
        console=Console(stderr=True),
        disable=len(paths) <= SHOW_PROGRESS_ABOVE,
    )
    for i, path in progress:
        image = read_image(path)
        if image.shape != images.shape[1:]:
            size, expected = (f"{shape[-1]} x {shape[-2]} pixels" for shape in (image.shape, images.shape))
            raise UserError(f"{path}: {size}; expected {expected}, as {paths[0]} has")
        images[i] = image
    return images
