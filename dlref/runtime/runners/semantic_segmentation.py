"""The runner of semantic segmentation: images -> a class for each pixel."""

import numpy as np
from PIL import Image, ImageDraw

from dlref.runtime.errors import UserError
from dlref.runtime.images import ImageRunner, Source, as_picture, ask, fixed_size

BACKGROUND = "background"  # a class of this name is not painted over pictures
PAINT = 0.6  # share of a class's colour in a pixel that is painted over
NAMED = 0.01  # smallest share of a picture at which a class is named on it


class Runner(ImageRunner):
    """Serves one graph: `image` uint8 (B, H, W, C) -> `mask` uint8 (B, H, W), of any size.

    A graph that was exported with probabilities also outputs `probability` float32 (B, K, H, W).
    """

    def __init__(self, graphs: dict, metadata: dict):
        super().__init__(graphs, metadata, "segment", "semantic segmentation")
        self.segment = graphs["segment"]

    def size(self, item: np.ndarray) -> int:
        """Return pixels times (channels + 4 × classes): a graph holds the logits of each class at the image's size."""
        return item.shape[0] * item.shape[1] * (item.shape[2] + 4 * len(self.metadata["labels"]))

    def answer(self, items: list[np.ndarray]) -> list[dict]:
        """Return for each image its size, the share of each label that occurs, and the mask."""
        return [answer(mask, self.metadata["labels"]) for mask in self.masks(np.stack(items))]

    def masks(self, image: np.ndarray) -> np.ndarray:
        """Return the class of each pixel: uint8 (B, H, W, C) -> uint8 (B, H, W)."""
        (masks,) = ask(self.segment, image, "mask")
        classes = len(self.metadata["labels"])
        if masks.dtype != np.uint8 or masks.ndim != 3 or not masks.size:
            raise UserError(f"graph returns mask {masks.dtype} {masks.shape}; expected uint8 (B, H, W)")
        if masks.max() >= classes:
            raise UserError(f"graph returns class {masks.max()}; expected 0 to {classes - 1}, one per label")
        if masks.shape[1:] == image.shape[1:3]:
            return masks
        if masks.shape[1:] != fixed_size(self.segment):  # to which the image was resized
            raise UserError(f"graph returns a mask of {masks.shape[1:]}; expected {image.shape[1:3]}, the image's size")
        size = image.shape[2], image.shape[1]
        return np.stack([np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks])

    def probability(self, source: Source) -> np.ndarray:
        """Return probabilities float32 (K, H, W) for one image. Raises UserError if the graph has none of that size."""
        if "probability" not in self.segment.outputs:
            raise UserError("no probabilities in this bundle; expected one of a run with model.init_args.probabilities")
        image, fixed = self.read(source), fixed_size(self.segment)
        if fixed and fixed != image.shape[:2]:  # masks alone are resized
            raise UserError(
                f"an image of {image.shape[1]}×{image.shape[0]} pixels; expected {fixed[1]}×{fixed[0]}, the fixed size "
                "of this bundle, for its probabilities"
            )
        probability = ask(self.segment, image[None], "probability")[0][0]
        expected = (len(self.metadata["labels"]), *image.shape[:2])
        if probability.shape != expected or probability.dtype != np.float32 or not np.isfinite(probability).all():
            raise UserError(
                f"graph returns probability {probability.dtype} {probability.shape}; expected finite float32 {expected}"
            )
        return probability

    def picture(self, answer: dict) -> Image.Image:
        """Return the mask as an indexed picture of class ids, which viewers show in colours."""
        return picture(answer)

    def draw(self, source: Source, answer: dict) -> Image.Image:
        """Draw each class in its colour over the picture, with the names of the visible classes."""
        image, mask, labels = as_picture(self.read(source)), answer["mask"], self.metadata["labels"]
        covered = np.array([0 if label == BACKGROUND else 255 for label in labels], dtype=np.uint8)[mask]
        painted = Image.blend(image, picture(answer).convert("RGB"), PAINT)
        image = Image.composite(painted, image, Image.fromarray(covered))
        pen, top = ImageDraw.Draw(image), 0.0
        for label, part in sorted(answer["classes"].items(), key=lambda item: -item[1]):
            if part < NAMED or label == BACKGROUND:
                continue
            colour = tuple(PALETTE[labels.index(label)].tolist())
            text = f" {label} {part:.0%} "
            *_, right, bottom = pen.textbbox((0, 0), text)
            pen.rectangle((0, top, right, top + bottom), fill=colour)
            pen.text((0, top), text, fill="black" if sum(colour) > 380 else "white")
            top += bottom
        return image


def answer(mask: np.ndarray, labels: list[str]) -> dict:
    """Return plain values for one mask uint8 (H, W), and the mask itself."""
    counts = np.bincount(mask.ravel(), minlength=len(labels))
    shares = {labels[k]: float(counts[k] / mask.size) for k in np.flatnonzero(counts)}
    return {"width": mask.shape[1], "height": mask.shape[0], "classes": shares, "mask": mask}


def picture(answer: dict) -> Image.Image:
    """Return the mask of a prediction as an indexed picture with a colour for each class."""
    image = Image.fromarray(answer["mask"])
    image.putpalette(PALETTE.ravel().tolist())
    return image


def palette() -> np.ndarray:
    """Return Pascal VOC's colours, uint8 (256, 3): bits 0, 3 and 6 of a class are the highest of red, and so on."""
    k = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((k >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return colours


PALETTE = palette()
