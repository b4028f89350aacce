"""Data modules: files on disk to checked, augmented batches."""

from dlref.data.object_detection import COCOBoxes, DigitScenes, ManifestBoxes, SageMakerBoxes, VOCBoxes
from dlref.data.semantic_segmentation import DigitSceneMasks, MaskFolders, MaskLists, VOCMasks
from dlref.data.small_images import CIFAR10, MNIST, Digits, FashionMNIST
from dlref.data.streamed_images import ImageFolder, ImageList, ImageManifest

__all__ = [
    "CIFAR10",
    "MNIST",
    "COCOBoxes",
    "DigitSceneMasks",
    "DigitScenes",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "ImageList",
    "ImageManifest",
    "ManifestBoxes",
    "MaskFolders",
    "MaskLists",
    "SageMakerBoxes",
    "VOCBoxes",
    "VOCMasks",
]
