"""ResNet: K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.

`ResNet` is table 1 (ImageNet) with torchvision's keys; `CifarResNet` is section 4.2 (CIFAR-10). Two things
are not the paper's:

- A bottleneck's stride sits on its 3x3 convolution, as in torchvision ("v1.5"), not on the first 1x1, which
  would skip three quarters of its input.
- Depth 200 has the stages [3, 24, 36, 3] of K. He et al., "Identity Mappings in Deep Residual Networks", ECCV
  2016 (16 more blocks than depth 152, on the 28x28 maps), but the blocks of the other depths: that paper's
  200 layers put normalisation and activation before each convolution.

Legend of shapes: B batch, C channels, H W height and width, K classes, D and h w the channels, height and
width of the maps that come out.
"""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dlref.models.activations import ActivationName, make_activation

Shortcut = Callable[[int, int, int], nn.Module]  # (in_channels, out_channels, stride) -> module


class PaddedShortcut(nn.Module):
    """Option A (section 3.3): every `stride`-th pixel, and zeros for new channels; no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the input's channels first, then the zeros."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


def padded_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option A: zero channels where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return PaddedShortcut(in_channels, out_channels, stride)


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B: a 1x1 convolution where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input passes (figure 5, left)."""

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, activation: ActivationName
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)
        self.act2 = make_activation(activation)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the activation of F(x) + x (equation 1)."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input passes (figure 5, right)."""

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, activation: ActivationName
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = make_activation(activation)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)
        self.act3 = make_activation(activation)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the activation of F(x) + x (equation 1)."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.act3(out + self.downsample(x))


_STAGES = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}
_CIFAR_DEPTHS = (20, 32, 44, 56, 110)


class ResNet(nn.Module):
    """The ImageNet networks (table 1), with projections where a shortcut changes shape (option B).

    Args:
        depth: number of layers with weights, shortcuts aside.
        num_classes: K.
        in_channels: C.
        activation: after every convolution.
        stem: "imagenet" quarters the resolution first, by a 7x7 convolution and a max-pool of stride 2 each;
            "cifar" is a 3x3 convolution of stride 1, for images of about 32x32.

    Raises:
        ValueError: `depth`, `activation` or `stem` is none of those listed.
    """

    class_layers = ("fc",)

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152, 200],
        num_classes: int = 1000,
        in_channels: int = 3,
        activation: ActivationName = "relu",
        stem: Literal["imagenet", "cifar"] = "imagenet",
    ) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"no ResNet of depth {depth}: expected one of {', '.join(map(str, _STAGES))}")
        block, (n1, n2, n3, n4) = _STAGES[depth]
        wide = block.expansion
        self.conv1, self.maxpool = _stem(stem, in_channels)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = make_activation(activation)
        self.layer1 = _stage(block, n1, 64, 64, 1, projection_shortcut, activation)
        self.layer2 = _stage(block, n2, 64 * wide, 128, 2, projection_shortcut, activation)
        self.layer3 = _stage(block, n3, 128 * wide, 256, 2, projection_shortcut, activation)
        self.layer4 = _stage(block, n4, 256 * wide, 512, 2, projection_shortcut, activation)
        self.fc = nn.Linear(512 * wide, num_classes)
        self.apply(_initialise)

    def features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the last maps: 512 or 2048 of 1/32 the image's size ("cifar" stem: 1/8)."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return the logits of each image."""
        return self.fc(self.features(x).mean(dim=(2, 3)))  # global average pooling


class CifarResNet(nn.Module):
    """The CIFAR-10 networks (section 4.2): 6n + 2 layers for 32x32 images, shortcuts without parameters.

    269,722 parameters at depth 20, 464,154 at 32, 658,586 at 44, 853,018 at 56 and 1,727,962 at 110, for
    three channels and ten classes (table 6: 0.27M, 0.46M, 0.66M, 0.85M and 1.7M).

    Args:
        depth: number of layers with weights.
        num_classes: K.
        in_channels: C.
        activation: after every convolution.

    Raises:
        ValueError: `depth` or `activation` is none of those listed.
    """

    class_layers = ("fc",)

    def __init__(
        self,
        depth: Literal[20, 32, 44, 56, 110],
        num_classes: int = 10,
        in_channels: int = 3,
        activation: ActivationName = "relu",
    ) -> None:
        super().__init__()
        if depth not in _CIFAR_DEPTHS:
            raise ValueError(f"no CifarResNet of depth {depth}: expected one of {', '.join(map(str, _CIFAR_DEPTHS))}")
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = make_activation(activation)
        self.layer1 = _stage(BasicBlock, n, 16, 16, 1, padded_shortcut, activation)
        self.layer2 = _stage(BasicBlock, n, 16, 32, 2, padded_shortcut, activation)
        self.layer3 = _stage(BasicBlock, n, 32, 64, 2, padded_shortcut, activation)
        self.fc = nn.Linear(64, num_classes)
        self.apply(_initialise)

    def features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 64 h w"]:
        """Return the last maps, of 1/4 the image's size."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return the logits of each image."""
        return self.fc(self.features(x).mean(dim=(2, 3)))  # global average pooling


def _stem(name: str, in_channels: int) -> tuple[nn.Module, nn.Module]:
    if name == "imagenet":
        conv = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        return conv, nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    if name == "cifar":
        return nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False), nn.Identity()
    raise ValueError(f"no ResNet stem {name!r}: expected imagenet or cifar")


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    depth: int,
    in_channels: int,
    channels: int,
    stride: int,
    shortcut: Shortcut,
    activation: ActivationName,
) -> nn.Sequential:
    """`depth` blocks at one resolution; the first of them brings the maps to their new shape."""
    first = block(in_channels, channels, stride, shortcut, activation)
    out_channels = channels * block.expansion
    rest = [block(out_channels, channels, 1, shortcut, activation) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


def _initialise(module: nn.Module) -> None:
    """As He et al., 2015; a batch normalisation starts at weight 1 and bias 0 by itself."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
