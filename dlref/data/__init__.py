"""Data modules: files on disk to checked, augmented batches."""

from dlref.data.forecasting import DatedSeries, LongSeries, RowSeries, SageMakerSeries, SyntheticSeries, WideSeries
from dlref.data.language import PythonSources, TextFiles, TokenFiles
from dlref.data.object_detection import COCOBoxes, DigitScenes, ManifestBoxes, SageMakerBoxes, VOCBoxes
from dlref.data.semantic_segmentation import DigitSceneMasks, MaskFolders, MaskLists, VOCMasks
from dlref.data.small_images import CIFAR10, MNIST, Digits, FashionMNIST
from dlref.data.streamed_images import ImageFolder, ImageList, ImageManifest
from dlref.data.translation import PairFiles, ParallelText, SageMakerTokens, SyntheticDates

__all__ = [
    "CIFAR10",
    "MNIST",
    "COCOBoxes",
    "DatedSeries",
    "DigitSceneMasks",
    "DigitScenes",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "ImageList",
    "ImageManifest",
    "LongSeries",
    "ManifestBoxes",
    "MaskFolders",
    "MaskLists",
    "PairFiles",
    "ParallelText",
    "PythonSources",
    "RowSeries",
    "SageMakerBoxes",
    "SageMakerSeries",
    "SageMakerTokens",
    "SyntheticDates",
    "SyntheticSeries",
    "TextFiles",
    "TokenFiles",
    "VOCBoxes",
    "VOCMasks",
    "WideSeries",
]
