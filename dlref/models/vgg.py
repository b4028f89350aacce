"""VGG: K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015; table 1, configurations A, B, D and E, with torchvision's keys.

The maps are averaged to 7x7 before the classifier. At 224x224 they are 7x7 already; other sizes work too.

132,863,336 parameters at depth 11, 133,047,848 at 13, 138,357,544 at 16 and 143,667,240 at 19, for 1000 classes
(table 2: 133, 133, 138 and 144 million).

Legend of shapes: B batch, C channels, H W height and width (at least 32), K classes.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

STAGES = {  # number of 3x3 convolutions between poolings
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
CHANNELS = (64, 128, 256, 512, 512)


def convolutions(depth: int, in_channels: int = 3) -> list[nn.Module]:
    """Return the layers before the classifier: convolutions with activations, and a max-pool after each stage."""
    layers: list[nn.Module] = []
    for count, channels in zip(STAGES[depth], CHANNELS, strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(in_channels, channels, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            in_channels = channels
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return layers


class VGG(nn.Module):
    """Five stages of 3x3 convolutions and three linear layers.

    Args:
        depth: number of layers with weights.
        num_classes: K.
        in_channels: C.
        dropout: dropout probability of the outputs of the first two linear layers.

    Raises:
        ValueError: `depth` is not one of those listed.
    """

    class_layers = ("classifier.6",)

    def __init__(
        self, depth: Literal[11, 13, 16, 19], num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"no VGG of depth {depth}: expected one of {', '.join(map(str, STAGES))}")
        self.features = nn.Sequential(*convolutions(depth, in_channels))
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self.apply(initialise)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return the logits of each image."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def initialise(module: nn.Module) -> None:
    """Initialise as torchvision does. The paper (section 3.1) starts from a shallower network already trained."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
