"""Networks: plain torch, one file per architecture, each to be read next to its paper.

`forward` takes tensors and returns tensors, the same in training and in evaluation mode (dropout and
batch-norm statistics aside). State-dict keys are torchvision's where torchvision has the network and Hugging Face's for
GPT-2, so published weights load directly.

Every network lists in its class attribute `class_layers` the modules that keep their fresh weights in transfer learning
if their shapes differ from the file's or the file lacks them: heads, and embeddings of categories or tokens (none in
GPT). A network that can start from weights published in another form (a classifier's for its backbone, Hugging Face's
for a GPT) has a method `of_base(state)`, which returns that state dict under this network's keys, without the layers
that it does not have. The returned dict must hold every weight under the prefix `base`; all others may stay fresh.
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
