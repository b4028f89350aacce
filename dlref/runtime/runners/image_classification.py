"""The runner of image classification: images -> labels with their probabilities."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlref.runtime.errors import UserError
from dlref.runtime.images import batches, centre, read_image

TOP = 5
METADATA = {"labels", "channels", "multi_label", "crop"}


class Runner:
    """Serves one graph: `image` uint8 (B, H, W, C) -> `probability` float32 (B, K).

    `metadata` holds `labels` (K names), `channels` (1 or 3), `multi_label` and `crop`: the share of the shorter
    side that a central square of each picture keeps, or None. Raises UserError for metadata that lack these.
    """

    def __init__(self, graphs: dict, metadata: dict):
        if "classify" not in graphs or not metadata.keys() >= METADATA or metadata["channels"] not in (1, 3):
            raise UserError(f"not image classification; expected a graph classify and {', '.join(sorted(METADATA))}")
        self.classify = graphs["classify"]
        self.metadata = metadata

    def __call__(self, source: str | Path | np.ndarray | list) -> dict | list[dict]:
        """Answer for an image file or a uint8 array, or for a list of them (a list comes back)."""
        if isinstance(source, list):
            return list(self.stream(source))
        return next(self.stream([source]))

    def stream(self, sources: list) -> Iterator[dict]:
        """Answers one by one, in the order of `sources`, for lists too long to hold."""
        images = (centre(read_image(source, self.metadata["channels"]), self.metadata["crop"]) for source in sources)
        for batch in batches(images):
            yield from answers(self.probability(batch), self.metadata)

    def probability(self, image: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C) -> float32 (B, K)."""
        return self.classify(image=image)["probability"]


def answers(probability: np.ndarray, metadata: dict) -> list[dict]:
    """Plain values for each row of `probability` (B, K).

    `top` lists the likeliest classes; with several labels an image, `labels` lists those of at least 1/2.
    """
    labels = metadata["labels"]
    if probability.shape[-1] != len(labels):
        raise UserError(f"graph answers {probability.shape[-1]} classes; expected {len(labels)}, as there are labels")
    rows = []
    for row in probability:
        order = np.argsort(-row, kind="stable")[:TOP]
        top = [{"label": labels[k], "probability": float(row[k])} for k in order]
        several = {"labels": [labels[k] for k in np.flatnonzero(row >= 0.5)]} if metadata["multi_label"] else {}
        rows.append({**top[0], **several, "top": top})
    return rows
