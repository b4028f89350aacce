"""Training augmentation of a whole batch at once, on the device that holds it.

uint8 in, uint8 out. Every image draws its own numbers, and the draws, the indexing and the masking stay on
the device: nothing here waits for it.

B batch, C channels, H W height and width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Pad each image (B, C, H, W) by `padding` black pixels on every side, and crop H × W of it at random.

    The augmentation of He et al., "Deep Residual Learning", 2016, section 4.2, where `padding` is 4.
    """
    batch, channels, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, batch, 1), device=images.device)
    rows = shifts[0] + torch.arange(height, device=images.device)  # (B, H)
    columns = shifts[1] + torch.arange(width, device=images.device)  # (B, W)
    # Indexing the channels too keeps the result contiguous: a layout that differed between training and
    # evaluation would make torch.compile specialise twice.
    return F.pad(images, [padding] * 4)[
        torch.arange(batch, device=images.device)[:, None, None, None],
        torch.arange(channels, device=images.device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image (B, C, H, W) left to right with probability one half."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def random_erase(images: Tensor, size: int) -> Tensor:
    """Blacken a square of side `size` in each image (B, C, H, W): cutout.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, section
    3.2: the centre is uniform over the pixels, so that a square near the border is partly outside. They erase
    normalised images with zeros, the mean colour; these are not normalised yet, and black is what pads them.
    """
    batch, _, height, width = images.shape
    top = torch.randint(height, (batch, 1), device=images.device) - size // 2
    left = torch.randint(width, (batch, 1), device=images.device) - size // 2
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + size)  # (B, H)
    in_columns = (columns >= left) & (columns < left + size)  # (B, W)
    return images.masked_fill(in_rows[:, None, :, None] & in_columns[:, None, None, :], 0)
