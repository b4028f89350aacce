"""LightningModules, one per task, each for any suitable network of `dlref.models`."""

from dlref.tasks.averaging import EMA
from dlref.tasks.distributions import Beta, Deterministic, Gaussian, NegativeBinomial, StudentT
from dlref.tasks.forecasting import Forecaster
from dlref.tasks.image_classification import ImageClassifier
from dlref.tasks.language_modelling import LanguageModel
from dlref.tasks.monitor import Monitor
from dlref.tasks.object_detection import ObjectDetector
from dlref.tasks.optimizers import MuonAdamW
from dlref.tasks.preprocess import ImagePreprocess, Normalise
from dlref.tasks.schedules import Polynomial, Steps, WarmupCosine
from dlref.tasks.semantic_segmentation import SemanticSegmenter
from dlref.tasks.translation import Translator

__all__ = [
    "EMA",
    "Beta",
    "Deterministic",
    "Forecaster",
    "Gaussian",
    "ImageClassifier",
    "ImagePreprocess",
    "LanguageModel",
    "Monitor",
    "MuonAdamW",
    "NegativeBinomial",
    "Normalise",
    "ObjectDetector",
    "Polynomial",
    "SemanticSegmenter",
    "Steps",
    "StudentT",
    "Translator",
    "WarmupCosine",
]
