"""LightningModules: one a task, around any network of `dlref.models`."""

from dlref.tasks.image_classification import ImageClassifier
from dlref.tasks.object_detection import ObjectDetector
from dlref.tasks.preprocess import ImagePreprocess, Normalise
from dlref.tasks.schedules import Poly, Steps, Triangle, WarmupCosine
from dlref.tasks.semantic_segmentation import SemanticSegmenter

__all__ = [
    "ImageClassifier",
    "ImagePreprocess",
    "Normalise",
    "ObjectDetector",
    "Poly",
    "SemanticSegmenter",
    "Steps",
    "Triangle",
    "WarmupCosine",
]
