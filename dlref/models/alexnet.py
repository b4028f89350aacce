"""AlexNet: A. Krizhevsky, I. Sutskever and G. Hinton, "ImageNet Classification with Deep Convolutional
Neural Networks", NeurIPS 2012; section 3.5 and figure 2. This is the single-column form of A. Krizhevsky, "One
weird trick for parallelizing convolutional neural networks", 2014, as implemented in torchvision and with its keys
(conv4 has 256 kernels in torchvision, 384 in that paper).

Differences from the 2012 paper:

- One column of 64, 192, 384, 256 and 256 kernels. The paper's 96, 256, 384, 384 and 256 are split over two
  GPUs, and conv2, conv4 and conv5 see only the maps on their own GPU (section 3.2).
- No local response normalisation (section 3.3).
- Dropout acts on the inputs of the first two linear layers; in the paper on their outputs (section 4.2).
- Weights have PyTorch's default initialisation. The paper draws them from N(0, 0.01) and starts the biases of conv2,
  conv4, conv5 and the hidden linear layers at 1 (section 5).
- The maps are averaged to 6x6 before the classifier. At 224x224 they are 6x6 already; other sizes work too.

61,100,840 parameters for 1000 classes.

Legend of shapes: B batch, C channels, H W height and width (at least 63), K classes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlref.models.activations import ActivationName, make_activation


class AlexNet(nn.Module):
    """Five convolutions and three linear layers.

    Args:
        num_classes: K.
        in_channels: C.
        activation: applied after every layer except the last.
        dropout: dropout probability of the inputs of the first two linear layers.
    """

    class_layers = ("classifier.6",)

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        activation: ActivationName = "relu",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, kernel_size=11, stride=4, padding=2),
            make_activation(activation),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            make_activation(activation),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            make_activation(activation),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            make_activation(activation),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            make_activation(activation),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            make_activation(activation),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            make_activation(activation),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return the logits of each image."""
        x = self.avgpool(self.features(x))  # 256 maps of 6x6
        return self.classifier(torch.flatten(x, 1))
