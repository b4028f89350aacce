"""Training augmentation of a whole batch at once, on the device that holds it.

Images are uint8 before and after. Each image gets its own random numbers. Drawing, indexing and masking stay on
the device, so nothing here waits for it.

B batch, C channels, H W height and width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dlref.data.loader import sent

LUMA = torch.tensor([0.299, 0.587, 0.114])  # how bright red, green and blue look (ITU-R BT.601)
TURN = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)  # cross product, grey axis


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Pad each image (B, C, H, W) by `padding` black pixels on every side, and crop a random H × W part of it.

    The augmentation of He et al., "Deep Residual Learning", 2016, section 4.2, where `padding` is 4.
    """
    batch, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), device=images.device)
    crops = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view of all possible crops
    # Indexing the channels too keeps the result contiguous: a layout that differed between training and
    # evaluation would make torch.compile specialise twice.
    image, channel = torch.arange(batch, device=images.device), torch.arange(channels, device=images.device)
    return crops[image[:, None], channel, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image (B, C, H, W) left to right with probability one half."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def random_erase(images: Tensor, size: int) -> Tensor:
    """Blacken a square of side `size` in each image (B, C, H, W): cutout.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, section
    3.2: the centre is uniform over the pixels, so a square near the border is partly outside. The authors fill
    normalised images with zeros, the mean colour; images here are not normalised yet, and the fill is black, like
    the padding of `random_crop`.
    """
    batch, _, height, width = images.shape
    top = torch.randint(height, (batch, 1), device=images.device) - size // 2
    left = torch.randint(width, (batch, 1), device=images.device) - size // 2
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + size)  # (B, H)
    in_columns = (columns >= left) & (columns < left + size)  # (B, W)
    return images.masked_fill(in_rows[:, None, :, None] & in_columns[:, None, None, :], 0)


def photometric(images: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image (B, 3, H, W), each with probability one half.

    The distortions are those of Howard, "Some Improvements on Deep Convolutional Neural Network Based Image
    Classification", 2013, in the ranges of SSD's authors: brightness changes by ±32 levels, contrast and saturation by
    a factor of 0.5 to 1.5. Hue changes by ±18 degrees, as in torchvision (the authors' ±18 is in OpenCV's units of two
    degrees). All are linear in the colours (saturation mixes with the luma, hue rotates around the grey axis), so one
    matrix product per pixel applies them.
    """
    batch, device = len(images), images.device

    def draw(low: float, high: float, otherwise: float) -> Tensor:
        values = torch.empty(batch, 1, 1, device=device).uniform_(low, high)
        return torch.where(torch.rand(batch, 1, 1, device=device) < 0.5, values, otherwise)

    brightness, contrast, saturation = draw(-32, 32, 0.0), draw(0.5, 1.5, 1.0), draw(0.5, 1.5, 1.0)
    angle = draw(-math.pi / 10, math.pi / 10, 0.0)
    same = torch.eye(3, device=device)
    luma, turn = (sent(part, device) for part in (LUMA.expand(3, 3), TURN))
    grey = torch.full((3, 3), 1 / 3, device=device)
    hue = angle.cos() * same + angle.sin() * turn + (1 - angle.cos()) * grey  # Rodrigues' formula
    colours = contrast * (hue @ (saturation * same + (1 - saturation) * luma))  # (B, 3, 3)
    moved = colours @ brightness.expand(-1, 3, 1)
    pixels = torch.baddbmm(moved, colours, images.flatten(2).float())
    return pixels.round_().clamp_(0, 255).to(torch.uint8).view_as(images)
