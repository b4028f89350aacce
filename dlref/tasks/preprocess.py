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
    """

    def __init__(self, size: int, mean: list[float], std: list[float]):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels and std {len(std)}; expected as many")
        self.size, self.channels = size, len(mean)
        # Folded: (x / 255 - mean) / std. Not persistent, so that weights load across projects.
        self.register_buffer("offset", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std))[:, None, None], persistent=False)

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D size size"]:
        """Pixels of any size -> the network's input; one channel stands for all where there are more."""
        if images.shape[1] not in (1, self.channels):
            raise UserError(f"images have {images.shape[1]} channels, preprocess has means for {self.channels}")
        pixels = images.float()
        height, width = images.shape[-2:]
        # Exported with a free height and width, the resize has to be there whatever the size at hand.
        if isinstance(height, torch.SymInt) or (height, width) != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return (pixels - self.offset) * self.scale
