"""Object detection with any network that has MultiBox heads."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_area

from dlref.runtime import UserError
from dlref.runtime.runners.object_detection import answer
from dlref.tasks.deployable import Deployable, Graph
from dlref.tasks.image_task import ImageTask, check_classes, enough_to_normalise, nhwc
from dlref.tasks.multibox import CANDIDATES, PADDED, Detections, match, multibox_loss
from dlref.tasks.preprocess import ImagePreprocess
from dlref.training.devices import gather_objects

PICTURES = 12  # in the figure of detections
LARGEST = 2  # number in the anchors: a default box may extend beyond the image
AT_HALF = 0  # index of 0.5 among COCO's thresholds of intersection over union

Batch = tuple[Tensor, dict[str, Tensor]] | list  # a list from a loader with workers
Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (n, 4), scores (n,), labels (n,) of an image


class ObjectDetector(ImageTask):
    """SSD's matching and loss (Liu et al. 2016, section 2.2), and COCO's metrics.

    The network must have `size`, the side of its square images in pixels, and `anchors` (N, 4), its default boxes as
    centre, width and height in fractions of the image; it returns offsets (B, N, 4) and logits (B, N, K + 1), the
    background first. Batches are images uint8 (B, C, S, S) and `boxes` (B, M, 4) in fractions of the image, `labels`
    (B, M) with -1 for padding, `ignored` (B, M) for objects that evaluation ignores, and `sizes` (B, 2), the height and
    width of the original image in pixels.

    Args:
        preprocess: maps pixels to the network's input, in training, evaluation and the bundle.
        overlap_threshold: intersection over union from which a default box matches a true box.
        nms_threshold: intersection over union with a better box of its class above which a box is suppressed.
        score_threshold: probability above which a box is a detection.
        detections: maximum number of detections per image.
        task: arguments of every `ImageTask`: channels_last, network, optimizer, lr_scheduler, weights, freeze, ...
    """

    needs = ("size", "anchors")
    fact_names = ("labels",)
    metric = "map"

    def __init__(
        self,
        preprocess: ImagePreprocess,
        overlap_threshold: float = 0.5,
        nms_threshold: float = 0.45,
        score_threshold: float = 0.01,
        detections: int = 200,
        **task,
    ):
        super().__init__(preprocess, **task)
        self.overlap_threshold = overlap_threshold
        self.detect = Detections(score_threshold, nms_threshold, detections)

    def take_facts(self, datamodule) -> None:
        """Also compare the image size with the network's: another size would train without an error."""
        super().take_facts(datamodule)
        if datamodule.image_size != self.network.size:
            raise UserError(
                f"data.init_args.image_size {datamodule.image_size}; expected {self.network.size}, the network's"
            )

    def check(self) -> None:
        """Run a black image through the network: heads of the wrong width would train without an error."""
        classes, side = len(self.facts["labels"]), self.preprocess.size
        shares = {"overlap_threshold": self.overlap_threshold, "nms_threshold": self.detect.overlap}
        for name, value in (shares | {"score_threshold": self.detect.score}).items():
            if not 0 <= value <= 1:
                raise UserError(f"{name} {value}; expected 0 to 1")
        if not 1 <= self.detect.most <= CANDIDATES:
            raise UserError(f"detections {self.detect.most}; expected 1 to {CANDIDATES}")
        if side != self.network.size:
            raise UserError(f"preprocess resizes to {side} pixels; expected {self.network.size}, the network's size")
        heads = self.probe(side)
        if len(heads) != 2:
            raise UserError(f"network returns {len(heads)} tensors; expected offsets (B, N, 4) and logits (B, N, K1)")
        (offsets, logits), boxes = heads, len(self.network.anchors)
        check_classes(logits.shape[-1] - 1, classes)  # the background is no class
        if offsets.shape != (1, boxes, 4) or logits.shape[:-1] != (1, boxes):
            found = f"{list(offsets.shape)} and {list(logits.shape)}"
            raise UserError(
                f"network returns {found}; expected offsets (B, {boxes}, 4) and logits (B, {boxes}, {classes + 1}) for "
                f"its {boxes} anchors"
            )
        largest, narrowest = self.network.anchors.abs().max().item(), self.network.anchors[:, 2:].min().item()
        if not (largest <= LARGEST and narrowest > 0):
            raise UserError(
                f"network has anchors with numbers up to {largest:g} and sides from {narrowest:g}; expected centre, "
                "width and height as fractions of the image"
            )

    def setup(self, stage: str) -> None:
        """Create the metrics, once the classes are known."""
        super().setup(stage)
        self.val_map, self.test_map = average_precision(), average_precision(extended_summary=True)

    def losses(self, heads: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss, its parts and the number of positives that it is a mean over; with none it is a sum."""
        anchors = self.network.anchors
        matched = match(targets["boxes"], targets["labels"], anchors, self.overlap_threshold)
        boxes, classes = multibox_loss(*heads, targets["boxes"], targets["labels"], anchors, matched)
        positives = (matched >= 0).sum()
        return {"loss": boxes + classes, "box_loss": boxes, "class_loss": classes, "positives": positives}

    def as_trained(self, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the boxes that training would have, so that losses of training and evaluation can be compared."""
        if self.trainer.datamodule.keep_ignored:
            return targets
        return targets | {"labels": targets["labels"].masked_fill(targets["ignored"], PADDED)}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the localisation plus the confidence loss."""
        images, targets = batch
        with enough_to_normalise(images):
            heads = self(images)
        losses = self.losses(heads, targets)
        return self.log_train_loss(losses.pop("loss"), losses.pop("positives"), **losses)

    def judge(self, stage: str, batch: Batch, metric: MeanAveragePrecision) -> list[Found]:
        """Add a batch to the loss and the metric of a stage; return its detections."""
        images, targets = batch
        heads = self(images)
        losses = self.losses(heads, self.as_trained(targets))
        self.log_eval_loss(stage, losses["loss"], losses["positives"])
        found = self.detections(heads)
        metric.update(predictions(found, targets["sizes"]), truth(targets))
        return found

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Log the loss, and keep detections for the metrics."""
        self.judge("val", batch, self.val_map)

    def on_validation_epoch_end(self) -> None:
        """Log COCO's mean average precision, over ten overlaps and at one half; NaN if there is no box to find."""
        values = computed(self.val_map)
        found = {f"val/{name}": values[name] for name in ("map", "map_50")}
        self.log_dict({name: value.where(value >= 0, math.nan) for name, value in found.items()}, prog_bar=True)
        self.val_map.reset()

    def on_test_start(self) -> None:
        """Clear the pictures kept for the figure."""
        self.pictures: list[tuple[Tensor, Found, dict[str, Tensor]]] = []

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Keep detections for the metrics, and some pictures from all over the split for the figure."""
        images, targets = batch
        found = self.judge("test", batch, self.test_map)
        for i in self.shown(batch_index, len(images), PICTURES):
            self.pictures.append((images[i].cpu(), found[i], {name: value[i].cpu() for name, value in targets.items()}))

    def on_test_epoch_end(self) -> None:
        """Log the scores except COCO's -1, which means nothing to count; the curves are only for the figure."""
        values = computed(self.test_map)
        log = {name: values[name] for name in SUMMARY if values[name] >= 0}
        self.precision = {}  # of each class that has objects, at 101 recalls from 0 to 1 and an overlap of one half
        by_class = values["precision"][..., 0, -1].cpu().unbind(2)  # (overlaps, recalls), objects of any size
        for k, precision in zip(values["classes"].flatten().tolist(), by_class, strict=True):
            ap, label = precision.mean(dim=1), self.facts["labels"][k]
            if ap[AT_HALF] >= 0:
                log[f"ap_{label}"], log[f"ap50_{label}"] = ap.mean(), ap[AT_HALF]
                self.precision[k] = precision[AT_HALF].numpy()
        self.log_dict({f"test/{name}": value for name, value in log.items()})
        self.test_map.reset()

    def predict_step(self, batch: Batch, batch_index: int) -> list[dict]:
        """Return predictions as the bundle's runner does, in pixels of the original images."""
        images, targets = batch
        rows = []
        for (boxes, scores, labels), size in zip(self.detections(self(images)), targets["sizes"].tolist(), strict=True):
            height, width = size
            boxes = boxes * np.float32([width, height, width, height])
            rows.append(answer(boxes, scores, labels, width, height, self.facts["labels"]))
        return rows

    def detections(self, heads: tuple[Tensor, Tensor]) -> list[Found]:
        """Return the boxes in fractions of the image, scores and labels of each image."""
        *arrays, count = (x.cpu().numpy() for x in self.detect(*(h.float() for h in heads), self.network.anchors))
        return [tuple(array[i, :n] for array in arrays) for i, n in enumerate(count)]

    # The contract with the export step

    def deployable(self, batch: Batch) -> Deployable:
        """Return a graph from uint8 images (B, H, W, C) of any size to boxes in pixels, scores, labels and number."""
        side = self.preprocess.size
        outputs = ["boxes", "scores", "labels", "count"]
        graph = Graph(
            module=_Detect(self),
            inputs={"image": nhwc(batch[0])},
            outputs=outputs,
            dynamic_axes={"image": {0: "batch", 1: "height", 2: "width"}},
            # Not twice the side: the example is repeated, and equal halves have equal scores, which rounding orders.
            sizes={"batch": (1, 2, 5), "height": (side, side + 5, 2 * side + 3), "width": (side, side + 9, side)},
            tolerance=1e-4,  # for the exponential of a large offset
            selected=outputs,
        )
        metadata = {"labels": self.facts["labels"], "channels": batch[0].shape[1]}
        return Deployable("object-detection", {"detect": graph}, metadata)

    def evaluate(self, runner, batches: Iterable[Batch]) -> float:
        """Return the mean average precision of a runner's detections over `batches`; NaN if there is no box to find."""
        metric = average_precision()
        for images, targets in batches:
            found = runner.detections(nhwc(images).numpy())
            side = np.float32(images.shape[-1])
            shares = [(boxes / side, scores, labels) for boxes, scores, labels in found]
            metric.update(predictions(shares, targets["sizes"]), truth(targets))
        score = metric.compute()[self.metric].item()
        return score if score >= 0 else math.nan  # COCO's -1

    def draw(self, folder: Path) -> None:
        """Draw pictures with true and predicted boxes, and the precision-recall curve of each class."""
        from dlref.tasks import figures  # matplotlib is slow to import, and only needed here

        figures.detections(folder / "detections.png", self.pictures, self.facts["labels"])
        figures.precision_recall(folder / "precision_recall.png", self.precision, self.facts["labels"])


class _Detect(nn.Module):
    """The exported graph: resize, normalise, network, decoding, suppression."""

    def __init__(self, task: ObjectDetector):
        super().__init__()
        self.preprocess, self.network, self.detect = task.preprocess, task.network, task.detect

    def forward(
        self, image: UInt8[Tensor, "B H W C"]
    ) -> tuple[Float[Tensor, "B D 4"], Float[Tensor, "B D"], Int[Tensor, "B D"], Int[Tensor, "B"]]:
        heads = self.network(self.preprocess(image.permute(0, 3, 1, 2)))
        boxes, scores, labels, count = self.detect(*heads, self.network.anchors)
        height, width = image.shape[1:3]
        sides = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
        return boxes * sides, scores, labels, count


# COCO's scores: mean average precision over overlaps of 0.5 to 0.95, at two of them, by size of the object
# (below 32² and 96² pixels, and above), and the mean recall of the best hundred.
SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
# In float64, like COCO's own: torchmetrics' are rounded to float32, and miss a recall of exactly 0.6.
THRESHOLDS = {
    "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
    "rec_thresholds": np.linspace(0, 1, 101).tolist(),
}


def average_precision(**options) -> MeanAveragePrecision:
    """Return COCO's metrics for boxes in pixels."""
    metric = MeanAveragePrecision(backend="faster_coco_eval", sync_on_compute=False, **THRESHOLDS, **options)
    metric.warn_on_many_detections = False  # COCO scores the best hundred; more are kept for other uses
    return metric


def computed(metric: MeanAveragePrecision) -> dict[str, Tensor]:
    """Compute the metrics over the pictures of all devices.

    torchmetrics would gather them one by one, which fails if devices have different numbers of pictures.
    """
    for name, mine in metric.metric_state.items():
        setattr(metric, name, [rows.to(metric.device) for part in gather_objects(mine) for rows in part])
    return metric.compute()


def predictions(found: list[Found], sizes: Int[Tensor, "B 2"]) -> list[dict[str, Tensor]]:
    """Convert detections in fractions of the image to torchmetrics' format, in pixels of the original image."""
    rows = []
    for image, size in zip(found, sizes.cpu(), strict=True):
        boxes, scores, labels = map(torch.from_numpy, image)
        rows.append({"boxes": pixels(boxes, size), "scores": scores, "labels": labels})
    return rows


def truth(targets: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the true boxes in torchmetrics' format; ignored boxes count neither as found nor as missed."""
    columns, rows = (targets[name].cpu() for name in ("boxes", "labels", "ignored", "sizes")), []
    for boxes, labels, ignored, size in zip(*columns, strict=True):
        there = labels != PADDED
        found = pixels(boxes[there], size)
        area = box_area(found).round(decimals=1)  # exactly 32² and 96² count in two sizes: undo rounding
        rows.append({"boxes": found, "labels": labels[there], "iscrowd": ignored[there].long(), "area": area})
    return rows


def pixels(boxes: Float[Tensor, "n 4"], size: Int[Tensor, "2"]) -> Float[Tensor, "n 4"]:
    """Convert fractions of an image to pixels; `size` is height and width."""
    return boxes * size.flip(0).repeat(2)
