"""PSPNet: H. Zhao, J. Shi, X. Qi, X. Wang and J. Jia, "Pyramid Scene Parsing Network", CVPR 2017.

Figure 3 on a dilated ResNet with torchvision's stem and keys (`backbone.*`); the paper's ResNet begins with three 3x3
convolutions. The auxiliary head on the third stage is that of figure 4.

Legend of shapes: B batch, C channels (C2 = 2 C), H W height and width, K classes, h w height and width
of the logits.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dlref.models.fcn import FCN, dilated_resnet, head
from dlref.models.precision import without_autocast

BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """Averages over the cells of four grids, upsampled and concatenated with the maps (section 3.2).

    A 1x1 convolution reduces the averages of each grid to a quarter of the channels, so the number of channels doubles.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels // len(BINS), kernel_size=1, bias=False),
                nn.BatchNorm2d(channels // len(BINS)),
                nn.ReLU(),
            )
            for _ in BINS
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H W"]:
        """Return the maps, followed by the upsampled levels of the pyramid."""
        size = x.shape[-2:]
        # PyTorch's pooling accumulates in float32, so these products do too, even under autocast. bfloat16 would round
        # even the factors 1/n.
        with without_autocast(x):
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            means = [averages(exact, bins) for bins in BINS]
        pooled = [level(mean.to(x.dtype)) for level, mean in zip(self.levels, means, strict=True)]
        return torch.cat([x, *(F.interpolate(y, size, mode="bilinear", align_corners=False) for y in pooled)], dim=1)


def averages(x: Float[Tensor, "B C H W"], bins: int) -> Float[Tensor, "B C bins bins"]:
    """Average over each cell of a grid: adaptive average pooling as two matrix products.

    PyTorch's own pooling, exported with dynamic height and width, fails at sizes other than those traced.
    """
    height, width = x.shape[-2:]
    return _averaging(bins, height, x) @ x @ _averaging(bins, width, x).mT


def _averaging(bins: int, size: int | torch.SymInt, like: Tensor) -> Float[Tensor, "bins size"]:
    """Return the matrix whose row i averages positions floor(i * size / bins) to ceil((i + 1) * size / bins) - 1."""
    row = torch.arange(bins, device=like.device)[:, None]
    place = torch.arange(size, device=like.device)
    inside = (place >= row * size // bins) & (place < ((row + 1) * size + bins - 1) // bins)
    return (inside / inside.sum(dim=1, keepdim=True)).to(like.dtype)


class PSPNet(FCN):
    """A dilated ResNet, pyramid pooling and one more convolution.

    Args:
        depth: depth of the ResNet.
        num_classes: K, including the background if it is a class.
        auxiliary: whether to add an auxiliary head on the third stage (section 4).
        output_stride: ratio of the image's resolution to the logits'; the paper uses 8.

    Raises:
        ValueError: no ResNet has this depth, or `output_stride` is not one of those listed.
    """

    class_layers = ("classifier.5", "aux_classifier.4")

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        num_classes: int = 21,
        auxiliary: bool = True,
        output_stride: Literal[8, 16, 32] = 8,
    ) -> None:
        backbone = dilated_resnet(depth, output_stride)
        *_, before, last = backbone.channels
        classifier = nn.Sequential(
            PyramidPooling(last),
            nn.Conv2d(2 * last, last // 4, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(last // 4),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(last // 4, num_classes, kernel_size=1),
        )
        super().__init__(backbone, classifier, head(before, num_classes) if auxiliary else None)
