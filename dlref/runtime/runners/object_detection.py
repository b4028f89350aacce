"""The runner of object detection: images -> labelled boxes in their pixels."""

import numpy as np
from PIL import Image, ImageDraw

from dlref.runtime.errors import UserError
from dlref.runtime.images import ImageRunner, Source, as_picture, ask, fixed_size

OUTPUTS = {"boxes": np.float32, "scores": np.float32, "labels": np.int64, "count": np.int64}
SHOWN = 0.3  # lowest score of a box that is drawn
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#008080", "#9a6324")


class Runner(ImageRunner):
    """Serves one graph: `image` uint8 (B, H, W, C) -> `boxes` (B, D, 4), `scores` and `labels` (B, D), `count` (B,).

    An image has places for D boxes; the first `count` are used, best first. Boxes are x1 y1 x2 y2 in pixels of
    `image`.
    """

    def __init__(self, graphs: dict, metadata: dict):
        super().__init__(graphs, metadata, "detect", "object detection")
        self.detect = graphs["detect"]
        self.forms = {"sagemaker": self.sagemaker}

    def answer(self, items: list[np.ndarray]) -> list[dict]:
        """Return labelled boxes with their scores, and the size of the image."""
        height, width = items[0].shape[:2]
        found = self.detections(np.stack(items))
        return [answer(*image, width, height, self.metadata["labels"]) for image in found]

    def detections(self, image: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return boxes (n, 4) in pixels, scores (n,) and labels (n,) for each image of uint8 (B, H, W, C)."""
        boxes, scores, labels, count = ask(self.detect, image, *OUTPUTS)
        check(boxes, scores, labels, count, len(self.metadata["labels"]))
        if size := fixed_size(self.detect):  # the image was resized to it
            boxes = boxes * np.tile(np.divide(image.shape[1:3], size, dtype=np.float32)[::-1], 2)
        return [(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(count)]

    def sagemaker(self, answer: dict) -> dict:
        """Return SageMaker's response: rows of class, score, xmin, ymin, xmax, ymax; edges as shares of the image."""
        size = [answer["width"], answer["height"]] * 2
        index = self.metadata["labels"].index
        rows = [
            [
                index(found["label"]),
                found["score"],
                *(edge / side for edge, side in zip(found["box"], size, strict=True)),
            ]
            for found in answer["objects"]
        ]
        return {"prediction": rows}

    def draw(self, source: Source, answer: dict) -> Image.Image:
        """Draw the boxes with a score of at least SHOWN over the picture, with their labels and scores."""
        image = as_picture(self.read(source))
        pen, width = ImageDraw.Draw(image), max(1, round(min(image.size) / 200))
        for found in reversed(answer["objects"]):  # the best on top
            if found["score"] < SHOWN:
                continue
            colour = COLOURS[self.metadata["labels"].index(found["label"]) % len(COLOURS)]
            x1, y1, x2, y2 = found["box"]
            pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)  # Pillow's is closed
            text = f" {found['label']} {found['score']:.0%} "
            *_, right, bottom = pen.textbbox((0, 0), text)
            x, y = x1, max(y1 - bottom, 0)
            pen.rectangle((x, y, x + right, y + bottom), fill=colour)
            pen.text((x, y), text, fill="black")
        return image


def check(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, count: np.ndarray, classes: int) -> None:
    """Raise UserError for invalid outputs: wrong types or shapes, non-finite numbers, classes without a name."""
    arrays = {"boxes": boxes, "scores": scores, "labels": labels, "count": count}
    images, places = len(boxes), boxes.shape[1] if boxes.ndim == 3 else -1
    shapes = {"boxes": (images, places, 4), "scores": (images, places), "labels": (images, places), "count": (images,)}
    for name, array in arrays.items():
        if array.dtype != OUTPUTS[name] or array.shape != shapes[name]:
            expected = str(shapes[name]).replace("-1", "D")  # the number of places is unknown
            raise UserError(
                f"graph returns {name} {array.dtype} {array.shape}; expected {OUTPUTS[name].__name__} {expected}"
            )
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise UserError("graph returns boxes or scores that are not finite; expected finite numbers")
    if (boxes[..., 2:] < boxes[..., :2]).any():
        raise UserError("graph returns boxes that end before they begin; expected x1 y1 x2 y2")
    if count.min(initial=0) < 0 or count.max(initial=0) > places:
        raise UserError(f"graph returns a count of {count.min()} to {count.max()}; expected 0 to {places}")
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise UserError(
            f"graph returns classes {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, one per label"
        )


def answer(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, width: int, height: int, names: list[str]
) -> dict:
    """Return plain values for one image."""
    rows = zip(labels, scores.tolist(), boxes.tolist(), strict=True)
    return {
        "width": width,
        "height": height,
        "objects": [{"label": names[k], "score": score, "box": box} for k, score, box in rows],
    }
