"""The runner of image classification: images -> labels with their probabilities."""

from pathlib import Path

import numpy as np

from dlref.runtime.errors import UserError
from dlref.runtime.images import ask, centre, check_image_input, read_image
from dlref.runtime.runner import Runner as Base

TOP = 5
METADATA = {"labels", "channels", "multi_label", "crop"}


class Runner(Base):
    """Serves one graph: `image` uint8 (B, H, W, C) -> `probability` float32 (B, K).

    `metadata` holds `labels` (K names), `channels` (1 or 3), `multi_label` and `crop`: the share of the shorter
    side that a central square of each picture keeps, or None. Raises UserError for metadata that lack these.
    """

    def __init__(self, graphs: dict, metadata: dict):
        if "classify" not in graphs or not is_metadata(metadata):
            raise UserError(f"not image classification; expected a graph classify and {', '.join(sorted(METADATA))}")
        self.classify = graphs["classify"]
        check_image_input(self.classify)
        self.metadata = metadata

    def read(self, source: str | Path | np.ndarray) -> np.ndarray:
        """An image file or a uint8 array -> uint8 (H, W, C), cropped as in evaluation."""
        return centre(read_image(source, self.metadata["channels"]), self.metadata["crop"])

    def together(self, first: np.ndarray, second: np.ndarray) -> bool:
        """Images of one size."""
        return first.shape == second.shape

    def size(self, item: np.ndarray) -> int:
        """Pixels times channels."""
        return item.size

    def answer(self, items: list[np.ndarray]) -> list[dict]:
        """Labels with their probabilities."""
        return answers(self.probability(np.stack(items)), self.metadata)

    def probability(self, image: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C) -> float32 (B, K)."""
        return ask(self.classify, image, "probability")[0]


def is_metadata(metadata: dict) -> bool:
    """Whether every value that this runner reads is there and of its kind."""
    if not metadata.keys() >= METADATA or metadata["channels"] not in (1, 3) or type(metadata["channels"]) is not int:
        return False
    labels, crop = metadata["labels"], metadata["crop"]
    named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    return named and bool(labels) and (crop is None or (type(crop) in (float, int) and 0 < crop <= 1))


def answers(probability: np.ndarray, metadata: dict) -> list[dict]:
    """Plain values for each row of `probability` (B, K).

    `top` lists the likeliest classes; with several labels an image, `labels` lists those of at least 1/2.
    """
    labels = metadata["labels"]
    if probability.ndim != 2 or probability.shape[1] != len(labels):
        raise UserError(f"graph answers {list(probability.shape)}; expected {len(labels)} classes, as there are labels")
    if probability.dtype != np.float32 or not np.isfinite(probability).all():
        raise UserError(f"graph answers {probability.dtype} or no finite numbers; expected finite float32")
    rows = []
    for row in probability:
        order = np.argsort(-row, kind="stable")[:TOP]
        top = [{"label": labels[k], "probability": float(row[k])} for k in order]
        several = {"labels": [labels[k] for k in np.flatnonzero(row >= 0.5)]} if metadata["multi_label"] else {}
        rows.append({**top[0], **several, "top": top})
    return rows
