"""GoogLeNet: C. Szegedy et al., "Going Deeper with Convolutions", CVPR 2015; table 1 and figures 2b and 3.
Keys are torchvision's, so that its published weights load.

Like torchvision's network, this one differs from the paper:

- Every convolution is followed by batch normalisation (Ioffe & Szegedy, 2015), which replaces its bias and
  the local response normalisation.
- The 5x5 branch of a module is a 3x3 convolution, by a mistake that torchvision's weights were trained with
  (https://github.com/pytorch/vision/issues/906).
- The last max-pool has a 2x2 window, not 3x3.
- The auxiliary classifiers average their maps to 4x4 at every image size; the paper pools 5x5 windows with
  stride 3.
- Dropout before the main classifier is 0.2, not 0.4. In the auxiliary classifiers it is 0.7, as in the paper.

13,004,888 parameters for 1000 classes, including 6,379,984 in the auxiliary classifiers.

Legend of shapes: B batch, C channels, H W height and width (at least 15), K classes, D and h w channels, height and
width of the output maps.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlref.models.activations import ActivationName, make_activation


class BasicConv2d(nn.Module):
    """Convolution, batch normalisation, activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        activation: ActivationName,
        stride: int = 1,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)
        self.act = make_activation(activation)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the output maps, whose h and w are H and W divided by the stride, rounded up."""
        return self.act(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Four parallel branches (figure 2b); the arguments are the columns of table 1, in order."""

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        activation: ActivationName,
    ) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(in_channels, ch1x1, 1, activation)
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, ch3x3red, 1, activation),
            BasicConv2d(ch3x3red, ch3x3, 3, activation),
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, ch5x5red, 1, activation),
            BasicConv2d(ch5x5red, ch5x5, 3, activation),  # 3, not 5: see the top of this file
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1),
            BasicConv2d(in_channels, pool_proj, 1, activation),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        """Return the branches' maps, concatenated along the channels."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class InceptionAux(nn.Module):
    """An auxiliary classifier on intermediate maps, which adds gradient to the lower layers (section 5)."""

    def __init__(self, in_channels: int, num_classes: int, activation: ActivationName, dropout: float) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d((4, 4))
        self.conv = BasicConv2d(in_channels, 128, 1, activation)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.act = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return the auxiliary logits of each image."""
        x = self.conv(self.avgpool(x))  # 128 maps of 4x4
        x = self.act(self.fc1(torch.flatten(x, 1)))
        return self.fc2(self.dropout(x))


class GoogLeNet(nn.Module):
    """Three convolutions, nine inception modules, a classifier and two auxiliary classifiers.

    Args:
        num_classes: K.
        in_channels: C.
        activation: applied after every convolution and the auxiliary classifiers' first linear layer.
        dropout: dropout probability of the inputs of the main classifier.
        aux_dropout: dropout probability of the inputs of the auxiliary classifiers' last layer.
    """

    class_layers = ("fc", "aux1.fc2", "aux2.fc2")

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        activation: ActivationName = "relu",
        dropout: float = 0.2,
        aux_dropout: float = 0.7,
    ) -> None:
        super().__init__()
        self.conv1 = BasicConv2d(in_channels, 64, 7, activation, stride=2)
        self.maxpool1 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, 1, activation)
        self.conv3 = BasicConv2d(64, 192, 3, activation)
        self.maxpool2 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)

        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32, activation)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64, activation)
        self.maxpool3 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)

        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64, activation)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64, activation)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64, activation)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64, activation)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128, activation)
        self.maxpool4 = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)

        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128, activation)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128, activation)

        self.aux1 = InceptionAux(512, num_classes, activation, aux_dropout)
        self.aux2 = InceptionAux(528, num_classes, activation, aux_dropout)

        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        self.apply(_initialise)

    def forward(
        self, x: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"], Float[Tensor, "B K"]]:
        """Return the logits of each image and those of the auxiliary classifiers after 4a and 4d.

        Only the training loss uses the auxiliary logits, with a weight of 0.3 each (section 5). An exported graph
        that has only the first output does not contain the auxiliary classifiers.
        """
        x = self.maxpool1(self.conv1(x))  # 64 maps of 56x56, from 224x224
        x = self.maxpool2(self.conv3(self.conv2(x)))  # 192 of 28x28
        x = self.maxpool3(self.inception3b(self.inception3a(x)))  # 480 of 14x14
        x = self.inception4a(x)
        aux1 = self.aux1(x)
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x)
        x = self.maxpool4(self.inception4e(x))  # 832 of 7x7
        x = self.inception5b(self.inception5a(x)).mean(dim=(2, 3))  # global average pooling
        return self.fc(self.dropout(x)), aux1, aux2


def _initialise(module: nn.Module) -> None:
    """Draw weights from a normal distribution truncated at two standard deviations; the paper does not specify it."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)
