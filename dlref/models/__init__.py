"""Networks: plain torch, one file per architecture, each to be read next to its paper.

`forward` takes tensors and returns tensors, the same in training and in evaluation mode (dropout and
batch-norm statistics aside). State-dict keys are torchvision's where torchvision has the network, so its
published weights load directly.

Every network names in its class attribute `class_layers` the modules whose shape depends on `num_classes`. Transfer
learning replaces these and nothing else. One that is built on another network's layers has `of_base(state)`: that
network's published state dict under its own names, without what it does not have. All under the prefix `base` has to
come from there.
"""

from dlref.models.activations import ActivationName, make_activation
from dlref.models.alexnet import AlexNet
from dlref.models.deepar import DeepAR
from dlref.models.deeplabv3 import DeepLabV3
from dlref.models.fcn import FCNVGG16, FCNCifarResNet, FCNResNet
from dlref.models.googlenet import GoogLeNet
from dlref.models.gpt import GPT
from dlref.models.lenet import LeNet5
from dlref.models.pspnet import PSPNet
from dlref.models.resnet import CifarResNet, ResNet
from dlref.models.seq2seq import Seq2Seq
from dlref.models.ssd import SSDVGG16, SSDResNet
from dlref.models.vgg import VGG

__all__ = [
    "FCNVGG16",
    "GPT",
    "SSDVGG16",
    "VGG",
    "ActivationName",
    "AlexNet",
    "CifarResNet",
    "DeepAR",
    "DeepLabV3",
    "FCNCifarResNet",
    "FCNResNet",
    "GoogLeNet",
    "LeNet5",
    "PSPNet",
    "ResNet",
    "SSDResNet",
    "Seq2Seq",
    "make_activation",
]
