"""Networks: plain torch, one file per architecture, each to be read next to its paper.

`forward` takes tensors and returns logits, the same in training and in evaluation mode (dropout and
batch-norm statistics aside). State-dict keys are torchvision's where torchvision has the network, so its
published weights load directly.

Every network names in its class attribute `head` the modules whose shape depends on `num_classes`. Transfer
learning replaces these and nothing else.
"""

from dlref.models.activations import ActivationName, make_activation
from dlref.models.alexnet import AlexNet
from dlref.models.googlenet import GoogLeNet
from dlref.models.lenet import LeNet5
from dlref.models.resnet import CifarResNet, ResNet

__all__ = ["ActivationName", "AlexNet", "CifarResNet", "GoogLeNet", "LeNet5", "ResNet", "make_activation"]
