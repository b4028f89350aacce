"""Images as they are -> what a network expects. The module that trains is the one that ships."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dlref.runtime import UserError


class Normalise(nn.Module):
    """Shift and scale the pixels, inside the task and inside the exported graph alike.

    Args:
        mean: of each channel, for pixels scaled to 0..1; their number D is the network's.
        std: standard deviations, likewise.
    """

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} channels and std {len(std)}; expected as many")
        self.channels = len(mean)
        # Folded: (x / 255 - mean) / std. Not persistent, so that weights load across projects.
        self.register_buffer("offset", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std))[:, None, None], persistent=False)

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Pixels -> the network's input; one channel stands for all where there are more."""
        if images.shape[1] not in (1, self.channels):
            raise UserError(
                f"images have {images.shape[1]} channels; expected {self.channels}, the number of preprocess's "
                "means, or as many in model.init_args.preprocess.init_args.mean, std and the network's in_channels"
            )
        return (self.resize(images.float()) - self.offset) * self.scale

    def resize(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """Leave the size as it is."""
        return pixels


class ImagePreprocess(Normalise):
    """Resize to a square and normalise.

    Args:
        size: side of the square that the network sees, in pixels.
        mean: of each channel, for pixels scaled to 0..1; their number D is the network's.
        std: standard deviations, likewise.
    """

    def __init__(self, size: int, mean: list[float], std: list[float]):
        super().__init__(mean, std)
        self.size = size

    def resize(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C size size"]:
        """Bilinear, antialiased."""
        height, width = pixels.shape[-2:]
        # Exported with a free height and width, the resize has to be there whatever the size at hand.
        if isinstance(height, torch.SymInt) or (height, width) != (self.size, self.size):
            return F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return pixels
