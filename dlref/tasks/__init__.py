"""LightningModules: one a task, around any network of `dlref.models`."""

from dlref.tasks.image_classification import ImageClassifier
from dlref.tasks.object_detection import ObjectDetector
from dlref.tasks.preprocess import ImagePreprocess
from dlref.tasks.schedules import Steps, Triangle, WarmupCosine

__all__ = ["ImageClassifier", "ImagePreprocess", "ObjectDetector", "Steps", "Triangle", "WarmupCosine"]
