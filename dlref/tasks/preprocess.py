"""Images as they are -> what a network expects. The module that trains is the one that ships."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dlref.runtime import UserError


class ImagePreprocess(nn.Module):
    """Resize to a square and normalise, inside the task and inside the exported graph alike.

    Args:
        size: side of the square that the network sees, in pixels.
        mean: of each channel, for pixels scaled to 0..1; their number D is the network's.
        std: standard deviations, likewise.
        crop: the central share of the shorter side that is kept before resizing an image of any shape at
            the edge (0.875 is "resize to 256, crop 224"); None keeps all and lets the aspect ratio go.
    """

    def __init__(self, size: int, mean: list[float], std: list[float], crop: float | None = None):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels and std {len(std)}; expected as many")
        self.size, self.crop, self.channels = size, crop, len(mean)
        # Folded: (x / 255 - mean) / std. Not persistent, so that weights load across projects.
        self.register_buffer("offset", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std))[:, None, None], persistent=False)

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D size size"]:
        """Pixels of any size -> the network's input; one channel stands for all where there are more."""
        if images.shape[1] not in (1, self.channels):
            raise UserError(f"images have {images.shape[1]} channels, preprocess has means for {self.channels}")
        pixels = images.float()
        if torch.compiler.is_exporting() or images.shape[-2:] != (self.size, self.size):
            # Exported, the height and width are free, so the resize has to be there at every size.
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return (pixels - self.offset) * self.scale

    def centre(self, images: UInt8[Tensor, "B C H W"]) -> UInt8[Tensor, "B C h w"]:
        """The central square whose side is `crop` of the shorter side, for pictures as cameras make them."""
        if self.crop is None:
            return images
        height, width = images.shape[-2:]
        side = torch.sym_min(height, width) * round(self.crop * 1000)
        side = (side + 999) // 1000  # rounded up: never empty
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, :, top : top + side, left : left + side]
        torch._check(images.shape[-2] > 0)  # what torch.export cannot derive from the slice
        torch._check(images.shape[-1] > 0)
        return images
