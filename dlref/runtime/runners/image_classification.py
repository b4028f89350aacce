"""The runner of image classification: images -> labels with their probabilities."""

import numpy as np

from dlref.runtime.errors import UserError
from dlref.runtime.images import ImageRunner, Source, ask, centre

TOP = 5


class Runner(ImageRunner):
    """Serves one graph: `image` uint8 (B, H, W, C) -> `probability` float32 (B, K).

    `metadata` also holds `multi_label` and `crop`: the side of the central square to which each picture is cropped, as
    a share of its shorter side, or None. Raises UserError if metadata lack these.
    """

    def __init__(self, graphs: dict, metadata: dict):
        super().__init__(graphs, metadata, "classify", "image classification")
        crop = metadata.get("crop", 0)
        if "multi_label" not in metadata or not (crop is None or (type(crop) in (float, int) and 0 < crop <= 1)):
            raise UserError("not image classification; expected metadata crop, multi_label")
        self.classify = graphs["classify"]

    def read(self, source: Source) -> np.ndarray:
        """Read any source that `read_image` accepts -> uint8 (H, W, C), cropped as in evaluation."""
        return centre(super().read(source), self.metadata["crop"])

    def answer(self, items: list[np.ndarray]) -> list[dict]:
        """Return labels with their probabilities."""
        return answers(self.probability(np.stack(items)), self.metadata)

    def probability(self, image: np.ndarray) -> np.ndarray:
        """Return the probabilities of classes: uint8 (B, H, W, C) -> float32 (B, K)."""
        return ask(self.classify, image, "probability")[0]


def answers(probability: np.ndarray, metadata: dict) -> list[dict]:
    """Return plain values for each row of `probability` (B, K).

    `top` lists the likeliest classes; if images can have several labels, `labels` lists those above 1/2, which
    the metrics count.
    """
    labels = metadata["labels"]
    if probability.ndim != 2 or probability.shape[1] != len(labels):
        raise UserError(f"graph returns {list(probability.shape)}; expected {len(labels)} classes, one per label")
    if probability.dtype != np.float32 or not np.isfinite(probability).all():
        raise UserError(f"graph returns {probability.dtype}, or numbers that are not finite; expected finite float32")
    rows = []
    for row in probability:
        order = np.argsort(-row, kind="stable")[:TOP]
        top = [{"label": labels[k], "probability": float(row[k])} for k in order]
        several = {"labels": [labels[k] for k in np.flatnonzero(row > 0.5)]} if metadata["multi_label"] else {}
        rows.append({**top[0], **several, "top": top})
    return rows
