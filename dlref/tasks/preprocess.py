"""Preprocessing of images for a network. The same module is used in training and in the exported graph."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dlref.runtime import UserError


class Normalise(nn.Module):
    """Shift and scale the pixels, both in the task and in the exported graph.

    Args:
        mean: mean of each channel, for pixels scaled to 0..1; their number D is that of the network's input channels.
        std: standard deviation of each channel, likewise.
    """

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels and std {len(std)}; expected the same number")
        self.channels = len(mean)
        # Folded: (x / 255 - mean) / std. Not persistent, so that weights load across projects.
        self.register_buffer("offset", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std))[:, None, None], persistent=False)

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the network's input; a single channel is repeated if the network has more.

        Raises UserError for pixels already scaled or normalised, which the bundle will not get, and other channels.
        """
        if images.dtype != torch.uint8:
            raise UserError(f"images are {images.dtype}; expected torch.uint8, 0 to 255, as preprocess normalises them")
        if images.shape[1] not in (1, self.channels):
            raise UserError(
                f"images have {images.shape[1]} channels; expected {self.channels}, the number of preprocess's "
                "means, or as many in model.init_args.preprocess.init_args.mean, std and the network's in_channels"
            )
        return (self.resize(images.float()) - self.offset) * self.scale

    def resize(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """Leave the size unchanged."""
        return pixels


class ImagePreprocess(Normalise):
    """Resize to a square and normalise.

    Args:
        size: side of the square that the network sees, in pixels.
        mean: mean of each channel, for pixels scaled to 0..1; their number D is that of the network's input channels.
        std: standard deviation of each channel, likewise.
    """

    def __init__(self, size: int, mean: list[float], std: list[float]):
        super().__init__(mean, std)
        self.size = size

    def resize(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C size size"]:
        """Resize bilinearly with antialiasing."""
        height, width = pixels.shape[-2:]
        # With dynamic height and width, the exported graph must contain the resize, whatever the size of the example.
        if isinstance(height, torch.SymInt) or (height, width) != (self.size, self.size):
            return F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return pixels
