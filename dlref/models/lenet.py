"""LeNet-5: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, "Gradient-Based Learning Applied to Document
Recognition", Proceedings of the IEEE, 1998; section II.B and figure 2.

This is the form in use today. Differences from the paper:

- S2 and S4 are plain averages. The paper's sub-sampling adds the four inputs, multiplies the sum by a
  trainable coefficient, adds a trainable bias and squashes the result (12 and 32 parameters).
- Each map of C3 is connected to all six maps of S2 (2,416 parameters). Table I connects it to 3, 4 or 6 of them
  (1,516), to break symmetry and to bound the number of connections.
- The squashing function is tanh, not 1.7159 tanh(2/3 x) (appendix A).
- Weights have PyTorch's default initialisation. The paper draws them uniformly between -2.4/F and 2.4/F, where F is
  the number of inputs of the unit (appendix A).
- The output is a linear layer of logits, 850 parameters, for a cross-entropy loss. The paper's ten units are
  Euclidean radial basis functions: the squared distance of F6 to a fixed 7x12 bitmap of the digit, trained
  with a mean-squared-error-like loss (equation 8) or its discriminative extension (equation 9).

61,706 parameters in total for one channel and ten classes; the paper counts 60,000.

Legend of shapes: B batch, C channels, K classes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dlref.models.activations import ActivationName, make_activation


class LeNet5(nn.Module):
    """LeNet-5 for 32x32 images; the layers have the paper's names.

    Args:
        num_classes: K.
        in_channels: C, 1 in the paper.
        activation: applied after C1, C3, C5 and F6.
    """

    class_layers = ("output",)

    def __init__(self, num_classes: int = 10, in_channels: int = 1, activation: ActivationName = "tanh") -> None:
        super().__init__()
        self.c1 = nn.Conv2d(in_channels, 6, kernel_size=5)
        self.act1 = make_activation(activation)
        self.s2 = nn.AvgPool2d(2)
        self.c3 = nn.Conv2d(6, 16, kernel_size=5)
        self.act3 = make_activation(activation)
        self.s4 = nn.AvgPool2d(2)
        self.c5 = nn.Conv2d(16, 120, kernel_size=5)
        self.act5 = make_activation(activation)
        self.f6 = nn.Linear(120, 84)
        self.act6 = make_activation(activation)
        self.output = nn.Linear(84, num_classes)

    def forward(self, x: Float[Tensor, "B C 32 32"]) -> Float[Tensor, "B K"]:
        """Return the logits of each image."""
        x = self.s2(self.act1(self.c1(x)))  # 6 maps of 14x14
        x = self.s4(self.act3(self.c3(x)))  # 16 maps of 5x5
        x = self.act5(self.c5(x))  # 120 maps of 1x1; larger for larger images, so the paper calls it a convolution
        x = self.act6(self.f6(torch.flatten(x, 1)))
        return self.output(x)
