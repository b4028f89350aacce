"""ResNet: K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.

`ResNet` is table 1 (ImageNet) with torchvision's keys; `CifarResNet` is section 4.2 (CIFAR-10). Differences from the
paper:

- The stride of a bottleneck is in its 3x3 convolution, as in torchvision ("v1.5"), not in the first 1x1, which
  would skip three quarters of its input.
- Depth 200 has the stages [3, 24, 36, 3] of K. He et al., "Identity Mappings in Deep Residual Networks", ECCV
  2016 (16 more blocks than depth 152, on the 28x28 maps), but the blocks of the other depths: that paper's
  200 layers put normalisation and activation before each convolution.

A stage can keep the resolution of the previous one and dilate its convolutions instead ("à trous", L.-C. Chen et al.,
"Rethinking Atrous Convolution for Semantic Image Segmentation", 2017, section 3.1). With the same weights, every second
pixel of its maps in each direction equals that of the undilated network; if two stages are dilated, every fourth.

Legend of shapes: B batch, C channels, H W height and width, K classes, D and h w channels, height and width of the
output maps.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dlref.models.activations import ActivationName, make_activation

Shortcut = Callable[[int, int, int], nn.Module]  # (in_channels, out_channels, stride) -> module
Dilations = tuple[int, int]  # of a block's convolutions up to and including the strided one, and after it
Step = tuple[int, Dilations]  # stride and dilations of a stage's first block


class PaddedShortcut(nn.Module):
    """Option A (section 3.3): every `stride`-th pixel, and zeros for new channels; no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the subsampled input, followed by the channels of zeros."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B (section 3.3): a 1x1 convolution."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them (figure 5, left)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dilations: Dilations,
        shortcut: nn.Module,
        activation: ActivationName,
    ) -> None:
        super().__init__()
        first, second = dilations
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=first, dilation=first, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=second, dilation=second, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut
        self.act2 = make_activation(activation)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the activation of F(x) + x (equation 1)."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut around them (figure 5, right)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dilations: Dilations,
        shortcut: nn.Module,
        activation: ActivationName,
    ) -> None:
        super().__init__()
        dilation, _ = dilations
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = make_activation(activation)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut
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
_UNCHANGED: Step = (1, (1, 1))
_CIFAR_DEPTHS = (20, 32, 44, 56, 110)


class ResNet(nn.Module):
    """The ImageNet networks (table 1), with projection shortcuts where the shape changes (option B).

    Args:
        depth: number of layers with weights, excluding shortcuts.
        num_classes: K.
        in_channels: C.
        activation: applied after every convolution.
        stem: "imagenet" divides the resolution by four with a 7x7 convolution and a max-pool, each of stride 2;
            "cifar" is a 3x3 convolution of stride 1, for images of about 32x32.
        replace_stride_with_dilation: whether the second, third and fourth stage keep the resolution.

    `channels` lists the number of channels of each stage's maps.

    Raises:
        ValueError: `depth`, `activation` or `stem` is not one of those listed.
    """

    class_layers = ("fc",)

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152, 200],
        num_classes: int = 1000,
        in_channels: int = 3,
        activation: ActivationName = "relu",
        stem: Literal["imagenet", "cifar"] = "imagenet",
        replace_stride_with_dilation: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"no ResNet of depth {depth}: expected one of {', '.join(map(str, _STAGES))}")
        block, (n1, n2, n3, n4) = _STAGES[depth]
        second, third, fourth = _steps(replace_stride_with_dilation)
        wide = block.expansion
        self.channels = [wide * channels for channels in (64, 128, 256, 512)]
        self.conv1, self.maxpool = _stem(stem, in_channels)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = make_activation(activation)
        self.layer1 = _stage(block, n1, 64, 64, _UNCHANGED, projection_shortcut, activation)
        self.layer2 = _stage(block, n2, 64 * wide, 128, second, projection_shortcut, activation)
        self.layer3 = _stage(block, n3, 128 * wide, 256, third, projection_shortcut, activation)
        self.layer4 = _stage(block, n4, 256 * wide, 512, fourth, projection_shortcut, activation)
        self.fc = nn.Linear(512 * wide, num_classes)
        self.apply(_initialise)

    def stages(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Return the maps of each stage; undilated, the last are 1/32 of the image's size ("cifar" stem: 1/8)."""
        first = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))
        second = self.layer2(first)
        third = self.layer3(second)
        return [first, second, third, self.layer4(third)]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return the logits of each image."""
        return self.fc(self.stages(x)[-1].mean(dim=(2, 3)))  # global average pooling


class CifarResNet(nn.Module):
    """The CIFAR-10 networks (section 4.2): 6n + 2 layers for 32x32 images, shortcuts without parameters.

    269,722 parameters at depth 20, 464,154 at 32, 658,586 at 44, 853,018 at 56 and 1,727,962 at 110, for
    three channels and ten classes (table 6: 0.27M, 0.46M, 0.66M, 0.85M and 1.7M).

    Args:
        depth: number of layers with weights.
        num_classes: K.
        in_channels: C.
        activation: applied after every convolution.
        replace_stride_with_dilation: whether the second and the third stage keep the resolution.

    `channels` lists the number of channels of each stage's maps.

    Raises:
        ValueError: `depth` or `activation` is not one of those listed.
    """

    class_layers = ("fc",)

    def __init__(
        self,
        depth: Literal[20, 32, 44, 56, 110],
        num_classes: int = 10,
        in_channels: int = 3,
        activation: ActivationName = "relu",
        replace_stride_with_dilation: tuple[bool, bool] = (False, False),
    ) -> None:
        super().__init__()
        if depth not in _CIFAR_DEPTHS:
            raise ValueError(f"no CifarResNet of depth {depth}: expected one of {', '.join(map(str, _CIFAR_DEPTHS))}")
        n = (depth - 2) // 6
        second, third = _steps(replace_stride_with_dilation)
        self.channels = [16, 32, 64]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = make_activation(activation)
        self.layer1 = _stage(BasicBlock, n, 16, 16, _UNCHANGED, PaddedShortcut, activation)
        self.layer2 = _stage(BasicBlock, n, 16, 32, second, PaddedShortcut, activation)
        self.layer3 = _stage(BasicBlock, n, 32, 64, third, PaddedShortcut, activation)
        self.fc = nn.Linear(64, num_classes)
        self.apply(_initialise)

    def stages(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Return the maps of each stage; undilated, the last are 1/4 of the image's size."""
        first = self.layer1(self.act1(self.bn1(self.conv1(x))))
        second = self.layer2(first)
        return [first, second, self.layer3(second)]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return the logits of each image."""
        return self.fc(self.stages(x)[-1].mean(dim=(2, 3)))  # global average pooling


def _stem(name: str, in_channels: int) -> tuple[nn.Module, nn.Module]:
    if name == "imagenet":
        conv = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        return conv, nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    if name == "cifar":
        return nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False), nn.Identity()
    raise ValueError(f"no ResNet stem {name!r}: expected imagenet or cifar")


def _steps(replace_stride_with_dilation: Sequence[bool]) -> list[Step]:
    """Return the step into each stage: a stride of 2, or a dilation that doubles."""
    steps, dilation = [], 1
    for replaced in replace_stride_with_dilation:
        before, dilation = dilation, 2 * dilation if replaced else dilation
        steps.append((1 if replaced else 2, (before, dilation)))
    return steps


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    depth: int,
    in_channels: int,
    channels: int,
    step: Step,
    shortcut: Shortcut,
    activation: ActivationName,
) -> nn.Sequential:
    """Return `depth` blocks at one resolution; the first block changes the shape of the maps if necessary."""
    stride, (before, after) = step
    out_channels = channels * block.expansion
    same = stride == 1 and in_channels == out_channels
    around = nn.Identity() if same else shortcut(in_channels, out_channels, stride)
    first = block(in_channels, channels, stride, (before, after), around, activation)
    rest = [block(out_channels, channels, 1, (after, after), nn.Identity(), activation) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


def _initialise(module: nn.Module) -> None:
    """Initialise as He et al., 2015; batch normalisation already starts at weight 1 and bias 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
