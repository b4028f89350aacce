"""FCN: J. Long, E. Shelhamer and T. Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.

`FCNVGG16` is the paper's network: FCN-32s, FCN-16s and FCN-8s (figure 3) on VGG-16, whose layers have torchvision's
keys. It pads the input of fc6 by 3, whereas the authors' code pads the image by 100 pixels. Each cell of the coarsest
maps thus corresponds to 32x32 pixels of the image, and the crops need no offset.

`FCN` is what torchvision and GluonCV call FCN: a ResNet with dilated last stages and a head of two convolutions on its
last maps. Keys, parameters and outputs are torchvision's. PSPNet and DeepLabV3 are FCNs with other heads.

A network returns logits at its own resolution, in training and in evaluation; with an auxiliary head, it returns a
tuple of both heads' logits. The task upsamples them to the image, except for `FCNVGG16`, where upsampling is a layer of
the network, as in the paper.

Legend of shapes: B batch, C channels, H W height and width, K classes, h w height and width of the logits, h2 w2
height and width of the auxiliary logits.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlref.models.resnet import CifarResNet, ResNet
from dlref.models.vgg import convolutions, initialise

Logits = Float[Tensor, "B K h w"]


class FCN(nn.Module):
    """A head on the last stage of a backbone, and optionally an auxiliary head on the stage before.

    Args:
        backbone: a ResNet; its classifier is removed.
        classifier: the head, which maps `backbone.channels[-1]` channels to logits.
        auxiliary: the auxiliary head, which maps `backbone.channels[-2]` channels to logits, or None.
    """

    class_layers = ("classifier.4", "aux_classifier.4")
    base = "backbone."

    def __init__(self, backbone: ResNet | CifarResNet, classifier: nn.Module, auxiliary: nn.Module | None) -> None:
        super().__init__()
        del backbone.fc
        self.backbone, self.classifier, self.aux_classifier = backbone, classifier, auxiliary

    def forward(self, x: Float[Tensor, "B C H W"]) -> Logits | tuple[Logits, Float[Tensor, "B K h2 w2"]]:
        """Return the logits, or a tuple of both heads' logits."""
        *_, before, last = self.backbone.stages(x)
        logits = self.classifier(last)
        return logits if self.aux_classifier is None else (logits, self.aux_classifier(before))

    def of_base(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the state dict of a classifier, in torchvision's format for ResNet, to the keys of the backbone."""
        return {f"{self.base}{key}": value for key, value in state.items() if not key.startswith("fc.")}


class FCNResNet(FCN):
    """FCN on a ResNet; 35,322,218 parameters at depth 50 and 54,314,346 at 101, for 21 classes and both heads.

    Args:
        depth: depth of the ResNet.
        num_classes: K, including the background if it is a class.
        auxiliary: whether to add an auxiliary head on the third stage.
        output_stride: ratio of the image's resolution to the logits'; torchvision uses 8.

    Raises:
        ValueError: no ResNet has this depth, or `output_stride` is not one of those listed.
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        num_classes: int = 21,
        auxiliary: bool = True,
        output_stride: Literal[8, 16, 32] = 8,
    ) -> None:
        backbone = dilated_resnet(depth, output_stride)
        *_, before, last = backbone.channels
        super().__init__(backbone, head(last, num_classes), head(before, num_classes) if auxiliary else None)


class FCNCifarResNet(FCN):
    """FCN on a CIFAR-10 ResNet, whose maps have few channels but a high resolution: for small images.

    Args:
        depth: depth of the ResNet.
        num_classes: K, including the background if it is a class.
        output_stride: ratio of the image's resolution to the logits'.

    Raises:
        ValueError: no CifarResNet has this depth, or `output_stride` is not one of those listed.
    """

    def __init__(
        self, depth: Literal[20, 32, 44, 56, 110] = 20, num_classes: int = 21, output_stride: Literal[1, 2, 4] = 2
    ) -> None:
        if output_stride not in (1, 2, 4):
            raise ValueError(f"no output_stride of {output_stride}: expected 1, 2 or 4")
        backbone = CifarResNet(depth, replace_stride_with_dilation=(output_stride < 2, output_stride < 4))
        super().__init__(backbone, head(backbone.channels[-1], num_classes), None)


def dilated_resnet(depth: int, output_stride: int) -> ResNet:
    """Return a ResNet whose last stages are dilated instead of reducing the resolution below 1 / `output_stride`."""
    if output_stride not in (8, 16, 32):
        raise ValueError(f"no output_stride of {output_stride}: expected 8, 16 or 32")
    return ResNet(depth, replace_stride_with_dilation=(False, output_stride < 16, output_stride < 32))


def head(channels: int, num_classes: int) -> nn.Sequential:
    """Return torchvision's FCNHead: a 3x3 convolution to a quarter of the channels, then a 1x1 to the classes."""
    middle = channels // 4
    return nn.Sequential(
        nn.Conv2d(channels, middle, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(middle, num_classes, kernel_size=1),
    )


class FCNVGG16(nn.Module):
    """FCN-32s, FCN-16s or FCN-8s, with logits at the resolution of the image.

    The scoring layers of the last maps and of the skip connections are initialised to zero (sections 4.2 and 4.3). The
    layers that upsample by two are initialised to bilinear interpolation and trained; the last upsampling stays
    bilinear (section 4.3, "Dense Prediction"). FCN-8s has 134,489,759 parameters for 21 classes (table 1: 134 million).

    Args:
        num_classes: K, including the background if it is a class.
        stride: factor by which the last layer upsamples the scores.
        dropout: dropout probability of the outputs of fc6 and fc7.

    Raises:
        ValueError: `stride` is not one of those listed.
    """

    class_layers = ("score_fr", "score_pool4", "score_pool3", "upscore2", "upscore_pool4", "upscore")
    base = "features."

    def __init__(self, num_classes: int = 21, stride: Literal[8, 16, 32] = 8, dropout: float = 0.5) -> None:
        super().__init__()
        if stride not in (8, 16, 32):
            raise ValueError(f"no FCN with a stride of {stride}: expected 8, 16 or 32")
        self.stride = stride
        self.features = nn.Sequential(*convolutions(16))
        self.fc6 = nn.Conv2d(512, 4096, kernel_size=7, padding=3)
        self.fc7 = nn.Conv2d(4096, 4096, kernel_size=1)
        self.drop = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.apply(initialise)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True  # every pixel belongs to a cell, for any image size
        self.score_fr = _score(4096, num_classes)
        if stride <= 16:
            self.score_pool4 = _score(512, num_classes)
            self.upscore2 = bilinear(num_classes, 2)
        if stride == 8:
            self.score_pool3 = _score(256, num_classes)
            self.upscore_pool4 = bilinear(num_classes, 2)
        self.upscore = bilinear(num_classes, stride)
        self.upscore.weight.requires_grad_(False)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K H W"]:
        """Return the logits of each pixel."""
        maps, pools = x, []
        for layer in self.features:
            maps = layer(maps)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(maps)
        _, _, pool3, pool4, pool5 = pools
        score = self.score_fr(self.drop(self.fc7(self.drop(self.fc6(pool5)))))
        if self.stride <= 16:
            score = _cropped(self.upscore2(score), pool4) + self.score_pool4(pool4)
        if self.stride == 8:
            score = _cropped(self.upscore_pool4(score), pool3) + self.score_pool3(pool3)
        return _cropped(self.upscore(score), x)

    def of_base(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename torchvision's VGG-16 to this network's keys, its linear layers as convolutions (section 3.1)."""
        if any(not key.startswith((self.base, "classifier.")) for key in state):
            return {}
        own = {key: value for key, value in state.items() if key.startswith(self.base)}
        for name, linear in (("fc6", "classifier.0"), ("fc7", "classifier.3")):
            weight, bias = state.get(f"{linear}.weight"), state.get(f"{linear}.bias")
            # The weights that torchvision converted from SSD's authors have NaN in the classifier.
            if weight is None or bias is None or not weight.isfinite().all():
                continue
            shape = getattr(self, name).weight.shape
            if weight.numel() != shape.numel():
                return {}
            own |= {f"{name}.weight": weight.reshape(shape), f"{name}.bias": bias}
        return own


def bilinear(channels: int, stride: int) -> nn.ConvTranspose2d:
    """Return a transposed convolution that upsamples by `stride`, initialised to bilinear interpolation."""
    layer = nn.ConvTranspose2d(channels, channels, 2 * stride, stride, padding=stride // 2, bias=False)
    places = torch.arange(2 * stride)
    tent = 1 - (places - (stride - 0.5)).abs() / stride
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[range(channels), range(channels)] = tent[:, None] * tent
    return layer


def _score(channels: int, num_classes: int) -> nn.Conv2d:
    """Return a 1x1 convolution to the score of each class (section 4.1), initialised to zero."""
    layer = nn.Conv2d(channels, num_classes, kernel_size=1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _cropped(score: Float[Tensor, "B K h w"], like: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K H W"]:
    """Crop to the size of `like`: if the stride does not divide it, cells extend beyond the border.

    `narrow` gives the length explicitly: torch 2.11's export cannot infer the size of a slice with a dynamic end.
    """
    height, width = like.shape[-2:]
    return score.narrow(2, 0, height).narrow(3, 0, width)
