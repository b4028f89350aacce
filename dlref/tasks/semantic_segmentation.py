"""Semantic segmentation: a class for each pixel, with any network that returns maps of logits."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor, nn
from torchmetrics import Metric

from dlref.runtime import UserError
from dlref.runtime.runners.semantic_segmentation import answer, picture
from dlref.tasks.deployable import Deployable, Graph
from dlref.tasks.image_task import ImageTask, as_tuple, check_class_weights, check_classes, enough_to_normalise, nhwc
from dlref.training.devices import widest_float

VOID = 255  # value of ignored pixels in masks
PICTURES = 12  # in the figure of masks

Batch = tuple[Tensor, Tensor] | list[Tensor]


class SemanticSegmenter(ImageTask):
    """Cross entropy over the pixels (Long et al. 2015, section 4), and the mean intersection over union.

    The network returns logits (B, K, h, w) at its own resolution, or a tuple of these and those of auxiliary heads.
    Batches are images uint8 (B, C, H, W) and masks uint8 (B, H, W) with 255 for ignored pixels.

    Args:
        class_weights: factor of each class in the loss.
        auxiliary_weight: weight of each auxiliary head's loss (Zhao et al. 2017, sections 4 and 5.1: 0.4).
        probabilities: whether the bundle also returns the probability of each class, in maps of the image's size.
        task: arguments of every `ImageTask`: preprocess, channels_last, network, optimizer, lr_scheduler, weights, ...
    """

    fact_names = ("labels",)
    metric = "miou"

    def __init__(
        self,
        class_weights: list[float] | None = None,
        auxiliary_weight: float = 0.4,
        probabilities: bool = False,
        **task,
    ):
        super().__init__(**task)
        self.auxiliary_weight, self.probabilities = auxiliary_weight, probabilities
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def check(self) -> None:
        """Run a black image through the network: a head of the wrong width would train without an error."""
        classes = len(self.facts["labels"])
        check_class_weights(self.class_weights, classes)
        if not 2 <= classes < VOID:
            raise UserError(f"the data has {classes} classes; expected 2 to {VOID - 1}, as 255 is no class")
        any_size = "expected one that takes pictures of any height and width, odd ones too"
        for logits in (*self.probe(64), *self.probe(65, any_size)):
            if logits.ndim != 4:
                raise UserError(f"network returns {list(logits.shape)}; expected maps of logits (B, {classes}, h, w)")
            check_classes(logits.shape[1], classes)

    def setup(self, stage: str) -> None:
        """Create the confusion matrices, once the classes are known."""
        super().setup(stage)
        self.val_confusion, self.test_confusion = (Confusion(len(self.facts["labels"])) for _ in range(2))

    def losses(self, outputs: tuple[Tensor, ...], masks: UInt8[Tensor, "B H W"]) -> Tensor:
        """Return the loss of the head plus the weighted losses of the auxiliary heads."""
        head, *auxiliary = (pixel_loss(logits, masks, self.class_weights) for logits in outputs)
        return head + self.auxiliary_weight * sum(auxiliary)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of all heads."""
        images, masks = batch
        check_masks(images, masks)
        with enough_to_normalise(images):
            outputs = self(images)
        return self.log_train_loss(self.losses(outputs, masks), counted(masks, self.class_weights))

    def judge(self, stage: str, batch: Batch, confusion: "Confusion") -> Int[Tensor, "B H W"]:
        """Add a batch to the loss and the confusion matrix of a stage; return the predicted classes."""
        images, masks = batch
        check_masks(images, masks)
        logits = self(images)[0]
        self.log_eval_loss(stage, pixel_loss(logits, masks, self.class_weights), counted(masks, self.class_weights))
        found = classes_of(logits, masks.shape[1:])
        confusion.update(found, masks)
        return found

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Update the loss of the main head and the confusion matrix."""
        self.judge("val", batch, self.val_confusion)

    def on_validation_epoch_end(self) -> None:
        """Log the mean intersection over union and the pixel accuracy."""
        _, values = scores(self.val_confusion.compute())
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=True)
        self.val_confusion.reset()

    def on_test_start(self) -> None:
        """Clear the pictures kept for the figure."""
        self.pictures: list[tuple[Tensor, Tensor, Tensor]] = []

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Update the confusion matrix, and keep some pictures from all over the split for the figure."""
        images, masks = batch
        found = self.judge("test", batch, self.test_confusion)
        for i in self.shown(batch_index, len(images), PICTURES):
            self.pictures.append((images[i].cpu(), masks[i].cpu(), found[i].cpu()))

    def on_test_epoch_end(self) -> None:
        """Log the scores; the matrix is only for the figure."""
        matrix = self.test_confusion.compute()
        union, values = scores(matrix)
        values |= {
            f"iou_{label}": value for label, value in zip(self.facts["labels"], union, strict=True) if value.isfinite()
        }
        self.log_dict({f"test/{name}": value for name, value in values.items()})
        self.confusion = matrix.cpu()
        self.test_confusion.reset()

    def predict_step(self, batch: Batch, batch_index: int) -> list[dict]:
        """Return predictions as the bundle's runner does."""
        images, _ = batch
        found = classes_of(self(images)[0], images.shape[-2:])
        return [answer(mask, self.facts["labels"]) for mask in found.to(torch.uint8).cpu().numpy()]

    def picture(self, answer: dict):
        """Return the mask of a prediction as an indexed picture."""
        return picture(answer)

    # The contract with the export step

    def deployable(self, batch: Batch) -> Deployable:
        """Return a graph from uint8 images (B, H, W, C) of any size to uint8 masks (B, H, W).

        With `probabilities`, it also returns the probabilities (B, K, H, W).
        """
        images = nhwc(batch[0])
        height, width = images.shape[1:3]
        graph = Graph(
            module=_Segment(self),
            inputs={"image": images},
            outputs=["mask", "probability"] if self.probabilities else ["mask"],
            dynamic_axes={"image": {0: "batch", 1: "height", 2: "width"}},
            sizes={  # including odd sizes, which no stride divides
                "batch": (1, 2, 3),
                "height": (height, height // 2 + 1, (height | 1) + 4),
                "width": (width, (width | 1) + 8, width // 2 + 3),
            },
            tolerance=1e-4,  # for probabilities, after the many layers of a deep network
            discrete=["mask"],
        )
        metadata = {"labels": self.facts["labels"], "channels": batch[0].shape[1]}
        return Deployable("semantic-segmentation", {"segment": graph}, metadata)

    def evaluate(self, runner, batches: Iterable[Batch]) -> float:
        """Return the mean intersection over union of a runner's masks over `batches`."""
        confusion = Confusion(len(self.facts["labels"]))
        for images, masks in batches:
            found = runner.masks(nhwc(images).numpy())
            confusion.update(torch.from_numpy(found), masks)
        return scores(confusion.compute())[1][self.metric].item()

    def draw(self, folder: Path) -> None:
        """Draw pictures with true and predicted masks, the confusion matrix and each class's IoU."""
        from dlref.tasks import figures  # matplotlib is slow to import, and only needed here

        labels = self.facts["labels"]
        figures.masks(folder / "masks.png", self.pictures, labels)
        figures.confusion(folder / "confusion.png", self.confusion, labels, "IoU")


class _Segment(nn.Module):
    """The exported graph: normalise, network, upsample, the most likely class."""

    def __init__(self, task: SemanticSegmenter):
        super().__init__()
        self.preprocess, self.network, self.probabilities = task.preprocess, task.network, task.probabilities

    def forward(self, image: UInt8[Tensor, "B H W C"]):
        logits = as_tuple(self.network(self.preprocess(image.permute(0, 3, 1, 2))))[0]
        logits = enlarged(logits, image.shape[1:3])
        mask = logits.argmax(dim=1).to(torch.uint8)
        return (mask, logits.softmax(dim=1)) if self.probabilities else mask


def check_masks(images: Tensor, masks: Tensor) -> None:
    """Raise UserError for masks of another type or size: fractions would be cut to 0, logits resized to any mask."""
    expected = [len(images), *images.shape[2:]]
    if masks.dtype != torch.uint8 or list(masks.shape) != expected:
        raise UserError(
            f"masks are {masks.dtype} {list(masks.shape)}; expected torch.uint8 {expected}, the class of each pixel"
        )


def enlarged(logits: Float[Tensor, "B K h w"], size: torch.Size) -> Float[Tensor, "B K H W"]:
    """Upsample logits from a network's own resolution to `size`, bilinearly."""
    if logits.shape[-2:] == size:
        return logits.float()
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def classes_of(logits: Float[Tensor, "B K h w"], size: torch.Size) -> Int[Tensor, "B H W"]:
    """Return the most likely class of each pixel."""
    return enlarged(logits, size).argmax(dim=1)


def pixel_loss(logits: Float[Tensor, "B K h w"], masks: UInt8[Tensor, "B H W"], weights: Tensor | None) -> Tensor:
    """Return the mean cross entropy over the pixels that count, weighted by their class; 0 if none counts."""
    targets = masks.long()
    pixels = enlarged(logits, masks.shape[1:])
    total = F.cross_entropy(pixels, targets, weights, ignore_index=VOID, reduction="sum")
    return total / counted(masks, weights)


def counted(masks: UInt8[Tensor, "B H W"], weights: Tensor | None) -> Tensor:
    """Return the number of pixels that count, weighted by their class; always above 0, as it is a divisor."""
    there = masks != VOID
    if weights is not None:
        there = there * weights[masks.long().where(there, 0)]
    return there.sum().clamp(min=torch.finfo(torch.float32).tiny)


class Confusion(Metric):
    """Confusion matrix of pixels: `matrix` int64 (K, K), rows true and columns predicted.

    Counts on the device without waiting for it; torchmetrics' own waits if pixels are ignored.
    """

    full_state_update = False

    def __init__(self, classes: int):
        super().__init__()
        self.add_state("matrix", torch.zeros(classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, found: Integer[Tensor, "B H W"], masks: UInt8[Tensor, "B H W"]) -> None:
        """Add the pixels that count."""
        classes = len(self.matrix)
        pairs = classes * masks.long() + found
        pairs = pairs.where(masks != VOID, classes * classes).flatten()  # beyond the matrix
        counts = torch.zeros(classes * classes + 1, dtype=torch.long, device=pairs.device)
        self.matrix += counts.scatter_add_(0, pairs, torch.ones_like(pairs))[:-1].view_as(self.matrix)

    def compute(self) -> Int[Tensor, "K K"]:
        """Return the matrix."""
        return self.matrix.clone()


def scores(matrix: Int[Tensor, "K K"]) -> tuple[Float[Tensor, "K"], dict[str, Tensor]]:
    """Return the intersection over union of each class, and their mean and the pixel accuracy.

    A class that is neither present nor predicted has NaN; so do mean and accuracy if no pixel counts.
    """
    correct = matrix.diagonal().to(widest_float(matrix.device))
    union = correct / (matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diagonal())
    return union, {"miou": union.nanmean(), "pixel_accuracy": correct.sum() / matrix.sum()}
