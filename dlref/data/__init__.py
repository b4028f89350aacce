"""Data modules: files on disk to checked, augmented batches."""

from dlref.data.image_classification import (
    CIFAR10,
    MNIST,
    Digits,
    FashionMNIST,
    ImageFolder,
    ImageList,
    ImageManifest,
)

__all__ = ["CIFAR10", "MNIST", "Digits", "FashionMNIST", "ImageFolder", "ImageList", "ImageManifest"]
