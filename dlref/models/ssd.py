"""SSD: W. Liu, D. Anguelov, D. Erhan, C. Szegedy, S. Reed, C.-Y. Fu and A. C. Berg, "SSD: Single Shot MultiBox
Detector", ECCV 2016.

`SSDVGG16` is figure 2 with torchvision's keys (35,641,826 parameters at 300 pixels and 90 classes; the network for 512
pixels is in footnote 3 of the arXiv version). `SSDResNet` follows NVIDIA's DeepLearningExamples: the base is a ResNet
up to its third stage, which keeps the resolution of the second, and the extra layers have batch norm.

A network returns the raw heads, in training and in evaluation: the box offsets and the class logits of each default
box. The task does the matching, the loss and the detections. The background is class 0, as in the paper.

Legend of shapes: B batch, C channels, H W height and width, N default boxes, K classes, excluding the background.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dlref.models.resnet import ResNet
from dlref.models.vgg import convolutions, initialise


@dataclass(frozen=True)
class Layout:
    """The default boxes of a network (section 2.2, "Choosing scales and aspect ratios for default boxes").

    Args:
        steps: image pixels from one cell to the next, for each feature map, as in the authors' code. The paper divides
            the size of the image by the number of cells.
        maps: number of cells along a side of each feature map.
        scales: side of the square boxes of each map, as a fraction of the image's, and one more: the second square of a
            map has the geometric mean of its scale and the next.
        ratios: aspect ratios of each map besides 1; the inverse of each is included, too.
    """

    steps: tuple[int, ...]
    maps: tuple[int, ...]
    scales: tuple[float, ...]
    ratios: tuple[tuple[int, ...], ...]

    @property
    def boxes_per_cell(self) -> list[int]:
        """Number of boxes in a cell of each map: two squares, and two boxes for each ratio."""
        return [2 + 2 * len(ratios) for ratios in self.ratios]

    def boxes(self, size: int) -> Float[Tensor, "N 4"]:
        """Return all default boxes as centre, width and height, as fractions of an image of `size`x`size` pixels.

        The order is: maps from fine to coarse, rows, columns, boxes of a cell. No side is longer than the image.
        """
        found = []
        for step, cells, (scale, following), ratios in zip(
            self.steps, self.maps, pairwise(self.scales), self.ratios, strict=True
        ):
            sides = [(scale, scale), (sqrt(scale * following),) * 2]
            for ratio in ratios:
                sides += [(scale * sqrt(ratio), scale / sqrt(ratio)), (scale / sqrt(ratio), scale * sqrt(ratio))]
            centres = (torch.arange(cells) + 0.5) * step / size
            y, x = torch.meshgrid(centres, centres, indexing="ij")
            xy = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, len(sides), 2)
            wh = torch.tensor(sides).clamp(max=1).expand(len(xy), -1, 2)
            found.append(torch.cat([xy, wh], dim=-1).reshape(-1, 4))
        return torch.cat(found)


# At 300 pixels the scales are the paper's for COCO (section 3.4), as in torchvision and NVIDIA's code; at 512 those for
# VOC (section 3.1). configs/ssd300_vgg16_voc.yaml has the scales for VOC at 300.
LAYOUTS = {
    # Not from any publication: for small images that a CPU learns from in minutes.
    96: Layout(
        steps=(8, 16, 32, 48, 96),
        maps=(12, 6, 3, 2, 1),
        scales=(0.12, 0.25, 0.4, 0.6, 0.8, 1.0),
        ratios=((2,), (2, 3), (2, 3), (2,), (2,)),
    ),
    300: Layout(
        steps=(8, 16, 32, 64, 100, 300),
        maps=(38, 19, 10, 5, 3, 1),
        scales=(0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
        ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    ),
    512: Layout(
        steps=(8, 16, 32, 64, 128, 256, 512),
        maps=(64, 32, 16, 8, 4, 2, 1),
        scales=(0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05),
        ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    ),
}


class VGGFeatures(nn.Module):
    """VGG-16 up to conv5_3, fc6 and fc7 as convolutions, and the extra layers (figure 2, section 3).

    Raises:
        ValueError: `size` is neither 300 nor 512.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size not in (300, 512):
            raise ValueError(f"no SSD with a VGG-16 base for {size} pixels: expected 300 or 512")
        layers = convolutions(16)
        layers[16].ceil_mode = True  # pool3: 75 -> 38
        nn.Sequential(*layers).apply(initialise)
        self.scale_weight = nn.Parameter(torch.full((512,), 20.0))
        self.features = nn.Sequential(*layers[:23])  # to conv4_3
        fc = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1),  # pool5, which keeps the resolution
            nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6),  # fc6, "à trous"
            nn.ReLU(inplace=True),
            nn.Conv2d(1024, 1024, kernel_size=1),  # fc7
            nn.ReLU(inplace=True),
        )
        extra = [_extra(1024, 256, 512, stride=2), _extra(512, 128, 256, stride=2)]
        if size == 300:
            extra += [_extra(256, 128, 256, padding=0), _extra(256, 128, 256, padding=0)]
        else:
            extra += [_extra(256, 128, 256, stride=2), _extra(256, 128, 256, stride=2)]
            extra += [_extra(256, 128, 256, kernel=4)]
        self.extra = nn.ModuleList([nn.Sequential(*layers[23:-1], fc), *extra])
        self.out_channels = [512, 1024, 512, *[256] * (len(extra) - 1)]
        for part in (fc, *extra):
            part.apply(_initialise)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Return the maps of conv4_3 (L2-normalised and scaled, section 3.1), of fc7 and of the extra layers."""
        x = self.features(x)
        maps = [self.scale_weight[:, None, None] * F.normalize(x)]
        for layer in self.extra:
            x = layer(x)
            maps.append(x)
        return maps

    def of_base(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename torchvision's VGG-16 to these keys and subsample fc6 and fc7 (section 3).

        Every fourth channel is kept, and every third row and column of the kernel of fc6.
        """
        own = {}
        for key, value in state.items():
            part, _, rest = key.partition(".")
            index, _, kind = rest.partition(".")
            if part == "features" and index.isdecimal():
                own[f"features.{index}.{kind}" if int(index) < 23 else f"extra.0.{int(index) - 23}.{kind}"] = value
        fc6, fc7 = (state.get(f"classifier.{i}.weight") for i in (0, 3))
        if fc6 is None or fc7 is None or not fc6.isfinite().all():  # NaN in torchvision's copy of the authors' weights
            return own
        if (fc6.shape, fc7.shape) != ((4096, 512 * 7 * 7), (4096, 4096)):
            return {}
        own["extra.0.7.1.weight"] = fc6.reshape(4096, 512, 7, 7)[::4, :, ::3, ::3].clone()
        own["extra.0.7.3.weight"] = fc7.reshape(4096, 4096, 1, 1)[::4, ::4].clone()
        biases = {f"extra.0.7.{to}.bias": state.get(f"classifier.{i}.bias") for i, to in ((0, 1), (3, 3))}
        own |= {name: bias[::4].clone() for name, bias in biases.items() if bias is not None}
        return own


# Channels and stride of the extra layers on a ResNet, by image size. As in NVIDIA's code, layers of stride 1 are not
# padded, so that the 3x3 kernel reduces the resolution by two.
EXTRA = {
    96: [(256, 2)] * 3,
    300: [(512, 2)] * 2 + [(256, 2)] + [(256, 1)] * 2,
    512: [(512, 2)] * 2 + [(256, 2)] * 4,
}


class ResNetFeatures(nn.Module):
    """A ResNet up to its third stage, and extra layers with batch norm that reduce the resolution.

    As in NVIDIA's SSD300 v1.1, the third stage keeps the resolution of the second, and its maps are the finest. At 96
    pixels this would be too costly: the maps of the second stage are the finest, and the third stage halves the
    resolution as usual.

    Raises:
        ValueError: `size` has no layout, or no ResNet has this depth.
    """

    def __init__(self, depth: int, size: int) -> None:
        super().__init__()
        if size not in LAYOUTS:
            raise ValueError(f"no SSD for {size} pixels: expected one of {', '.join(map(str, LAYOUTS))}")
        base = ResNet(depth)
        base.layer4 = nn.Identity()
        del base.fc
        self.features = base
        self.small = size == 96
        _, second, third, _ = base.channels
        if not self.small:
            for module in base.layer3[0].modules():  # without dilation, unlike `replace_stride_with_dilation`
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
        self.out_channels = [*([second] if self.small else []), third, *(after for after, _ in EXTRA[size])]
        extra, before = [], third
        for after, stride in EXTRA[size]:
            extra.append(_extra(before, after // 2, after, stride, padding=stride - 1, norm=True))
            before = after
        self.extra = nn.ModuleList(extra)
        self.extra.apply(_initialise)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Return the maps of the base's last stage or stages and of the extra layers."""
        _, second, third, _ = self.features.stages(x)
        maps = [second, third] if self.small else [third]
        for layer in self.extra:
            maps.append(layer(maps[-1]))
        return maps

    def of_base(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename torchvision's ResNet to these keys and drop the layers after the third stage."""
        return {f"features.{key}": value for key, value in state.items() if not key.startswith(("layer4.", "fc."))}


class Predictions(nn.Module):
    """A 3x3 convolution on each map (section 2.1, "Convolutional predictors for detection")."""

    def __init__(self, channels: list[int], boxes_per_cell: list[int], width: int) -> None:
        super().__init__()
        self.width = width
        self.module_list = nn.ModuleList(
            nn.Conv2d(c, boxes * width, kernel_size=3, padding=1)
            for c, boxes in zip(channels, boxes_per_cell, strict=True)
        )
        self.apply(_initialise)

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "B N width"]:
        """Return `width` values for each default box, in the order of `Layout.boxes`."""
        answers = [conv(x) for conv, x in zip(self.module_list, maps, strict=True)]
        # (B, boxes * width, H, W) -> (B, H * W * boxes, width)
        return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.width) for x in answers], dim=1)


class SSD(nn.Module):
    """Default boxes, a base that returns maps of decreasing resolution, and two heads on these maps.

    `anchors` (N, 4) holds the default boxes: centre, width and height as fractions of the image.
    """

    class_layers = ("head.classification_head",)
    base = "backbone.features."

    def __init__(self, backbone: nn.Module, size: int, num_classes: int, scales: list[float] | None = None) -> None:
        super().__init__()
        layout = LAYOUTS[size]
        if scales is not None:
            if len(scales) != len(layout.scales) or min(scales) <= 0:
                raise ValueError(f"scales {scales}: expected {len(layout.scales)} numbers above 0 at {size} pixels")
            layout = replace(layout, scales=tuple(scales))
        self.size = size
        self.backbone = backbone
        self.head = nn.ModuleDict(
            {
                "classification_head": Predictions(backbone.out_channels, layout.boxes_per_cell, num_classes + 1),
                "regression_head": Predictions(backbone.out_channels, layout.boxes_per_cell, 4),
            }
        )
        self.register_buffer("anchors", layout.boxes(size), persistent=False)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N 4"], Float[Tensor, "B N K1"]]:
        """Return the box offsets of each default box, and the logits of background and classes (K1 = K + 1)."""
        maps = self.backbone(x)
        return self.head["regression_head"](maps), self.head["classification_head"](maps)

    def of_base(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the state dict of a classifier, in torchvision's format, to the keys of this network's base."""
        return {f"backbone.{key}": value for key, value in self.backbone.of_base(state).items()}


class SSDVGG16(SSD):
    """SSD300 and SSD512 of the paper: 8,732 and 24,564 default boxes.

    Args:
        num_classes: K.
        size: side of the images, in pixels.
        scales: scales of the default boxes, as in `Layout`; by default those in `LAYOUTS`, which are the paper's for
            COCO at 300 pixels and for VOC at 512.

    Raises:
        ValueError: `size` is neither 300 nor 512, or `scales` are not positive or not one more than the maps.
    """

    def __init__(self, num_classes: int = 20, size: Literal[300, 512] = 300, scales: list[float] | None = None) -> None:
        super().__init__(VGGFeatures(size), size, num_classes, scales)


class SSDResNet(SSD):
    """SSD on a ResNet; depth 50 at 300 pixels is NVIDIA's, 22,894,902 parameters at 80 classes.

    Args:
        depth: depth of the ResNet.
        num_classes: K.
        size: side of the images, in pixels; 96 has 866 default boxes.
        scales: scales of the default boxes, as in `Layout`; by default those in `LAYOUTS`.

    Raises:
        ValueError: no ResNet has this depth, `size` is not one of those listed, or `scales` are not positive or not one
            more than the maps.
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        num_classes: int = 20,
        size: Literal[96, 300, 512] = 300,
        scales: list[float] | None = None,
    ) -> None:
        super().__init__(ResNetFeatures(depth, size), size, num_classes, scales)


def _extra(
    before: int, middle: int, after: int, stride: int = 1, padding: int = 1, kernel: int = 3, norm: bool = False
) -> nn.Sequential:
    """Return a 1x1 convolution and one that reduces the resolution (conv8 to conv11 of figure 2, conv12 at 512)."""
    layers: list[nn.Module] = []
    for conv in (
        nn.Conv2d(before, middle, kernel_size=1, bias=not norm),
        nn.Conv2d(middle, after, kernel, stride, padding, bias=not norm),
    ):
        layers += [conv, *([nn.BatchNorm2d(conv.out_channels)] if norm else []), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _initialise(module: nn.Module) -> None:
    """Initialise layers that a classifier does not have (section 3: "xavier")."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
