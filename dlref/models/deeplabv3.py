"""DeepLabV3: L.-C. Chen, G. Papandreou, F. Schroff and H. Adam, "Rethinking Atrous Convolution for Semantic Image
Segmentation", 2017; figure 5, with torchvision's keys, parameters and outputs. As in torchvision, and unlike the
paper, the last stage has no multi-grid, a 3x3 convolution follows the pyramid, and there are dropout and an auxiliary
head.

Legend of shapes: B batch, C channels, H W height and width, K classes, h w height and width of the logits.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlref.models.fcn import FCN, dilated_resnet, head

RATES = (6, 12, 18)  # at an output stride of 16; doubled at 8 (section 3.3)
WIDTH = 256


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (section 3.3): a 1x1 and three dilated convolutions, and the image's average."""

    def __init__(self, channels: int, rates: list[int]) -> None:
        super().__init__()
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(channels, 1))
        self.convs = nn.ModuleList([_conv(channels, 1), *(_conv(channels, 3, rate) for rate in rates), pooled])
        self.project = _conv(WIDTH * len(self.convs), 1)
        self.project.append(nn.Dropout(0.5))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 256 H W"]:
        """Return maps that combine, at each position, the context at every rate and the average of the image."""
        *convs, pool = self.convs
        whole = pool(x).expand(-1, -1, *x.shape[-2:])
        return self.project(torch.cat([*(conv(x) for conv in convs), whole], dim=1))


def _conv(channels: int, kernel: int, rate: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, WIDTH, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU())


class DeepLabV3(FCN):
    """A dilated ResNet with ASPP; 42,004,074 parameters at depth 50 and 60,996,202 at 101, for 21 classes, both heads.

    Args:
        depth: depth of the ResNet.
        num_classes: K, including the background if it is a class.
        auxiliary: whether to add an auxiliary head on the third stage, as torchvision does.
        output_stride: ratio of the image's resolution to the logits'; torchvision uses 8, the paper trains at 16.

    Raises:
        ValueError: no ResNet has this depth, or `output_stride` is not one of those listed.
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        num_classes: int = 21,
        auxiliary: bool = True,
        output_stride: Literal[8, 16] = 8,
    ) -> None:
        if output_stride not in (8, 16):
            raise ValueError(f"no output_stride of {output_stride}: expected 8 or 16")
        backbone = dilated_resnet(depth, output_stride)
        *_, before, last = backbone.channels
        rates = [rate * 16 // output_stride for rate in RATES]
        classifier = nn.Sequential(ASPP(last, rates), *_conv(WIDTH, 3), nn.Conv2d(WIDTH, num_classes, kernel_size=1))
        super().__init__(backbone, classifier, head(before, num_classes) if auxiliary else None)
