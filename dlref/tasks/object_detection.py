"""Object detection: boxes with a class each, by any network that answers MultiBox heads."""

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
AT_HALF = 0  # index of the intersection over union of 0.5 among COCO's

Batch = tuple[Tensor, dict[str, Tensor]] | list  # a loader with workers makes a list
Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (n, 4), scores (n,), labels (n,) of an image


class ObjectDetector(ImageTask):
    """SSD's matching and loss (Liu et al. 2016, section 2.2), and COCO's metrics.

    The network has `size`, the side of its square images in pixels, and `anchors` (N, 4), its default boxes as centre,
    width and height in shares of the image; it answers offsets (B, N, 4) and logits (B, N, K + 1), the
    background first. Batches are images uint8 (B, C, S, S) and `boxes` (B, M, 4) in shares of the image, `labels`
    (B, M) with -1 where there is no box, `ignored` (B, M) for objects that evaluation passes over, and `sizes` (B, 2),
    the height and width of the original image in pixels.

    Args:
        preprocess: pixels -> the network's input, in training, evaluation and the bundle.
        overlap_threshold: intersection over union from which a default box matches a true one.
        nms_threshold: intersection over union with a better box of its class above which a box is suppressed.
        score_threshold: probability above which something is a detection.
        detections: the most of an image.
        task: what every `ImageTask` takes: channels_last, network, optimizer, lr_scheduler, weights, freeze, ...
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
        """Hold the size of the batches against the network's too: another one would train without a word."""
        super().take_facts(datamodule)
        if datamodule.image_size != self.network.size:
            raise UserError(
                f"data.init_args.image_size {datamodule.image_size}; expected {self.network.size}, the network's"
            )

    def check(self) -> None:
        """One black image through the network: heads of another width would train without a word."""
        classes, side = len(self.facts["labels"]), self.preprocess.size
        shares = {"overlap_threshold": self.overlap_threshold, "nms_threshold": self.detect.overlap}
        for name, value in (shares | {"score_threshold": self.detect.score}).items():
            if not 0 <= value <= 1:
                raise UserError(f"{name} {value}; expected 0 to 1")
        if not 1 <= self.detect.most <= CANDIDATES:
            raise UserError(f"detections {self.detect.most}; expected 1 to {CANDIDATES}")
        if side != self.network.size:
            raise UserError(f"preprocess gives {side} pixels; expected {self.network.size}, the size of the network")
        heads = self.probe(side)
        if len(heads) != 2:
            raise UserError(f"network answers {len(heads)} tensors; expected offsets (B, N, 4) and logits (B, N, K1)")
        check_classes(heads[1].shape[-1] - 1, classes)  # the background is no class

    def setup(self, stage: str) -> None:
        """Once the classes are known, what counts over them."""
        super().setup(stage)
        self.val_map, self.test_map = average_precision(), average_precision(extended_summary=True)

    def losses(self, heads: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of the loss, their sum and over how many default boxes it is a mean; of none it is a sum."""
        anchors = self.network.anchors
        matched = match(targets["boxes"], targets["labels"], anchors, self.overlap_threshold)
        boxes, classes = multibox_loss(*heads, targets["boxes"], targets["labels"], anchors, matched)
        positives = (matched >= 0).sum()
        return {"loss": boxes + classes, "box_loss": boxes, "class_loss": classes, "positives": positives}

    def as_trained(self, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The boxes that training would have, so that losses of training and evaluation can be compared."""
        if self.trainer.datamodule.keep_ignored:
            return targets
        return targets | {"labels": targets["labels"].masked_fill(targets["ignored"], PADDED)}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Localisation and confidence loss, of equal weight."""
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
        """Loss; detections are kept for the metrics."""
        self.judge("val", batch, self.val_map)

    def on_validation_epoch_end(self) -> None:
        """COCO's mean average precision, over ten overlaps and at one half; NaN where there is no box to find."""
        values = computed(self.val_map)
        found = {f"val/{name}": values[name] for name in ("map", "map_50")}
        self.log_dict({name: value.where(value >= 0, math.nan) for name, value in found.items()}, prog_bar=True)
        self.val_map.reset()

    def on_test_start(self) -> None:
        """Clear the pictures kept for the figure."""
        self.pictures: list[tuple[Tensor, Found, dict[str, Tensor]]] = []

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Detections for the metrics, and some pictures from all over the split for the figure."""
        images, targets = batch
        found = self.judge("test", batch, self.test_map)
        for i in self.shown(batch_index, len(images), PICTURES):
            self.pictures.append((images[i].cpu(), found[i], {name: value[i].cpu() for name, value in targets.items()}))

    def on_test_epoch_end(self) -> None:
        """Numbers go to the log; the curves are for the figure alone. COCO's -1, nothing to count, is left out."""
        values = computed(self.test_map)
        self.precision = curves_at_half(values["precision"].cpu(), values["classes"], len(self.facts["labels"]))
        log = {name: values[name] for name in SUMMARY if values[name] >= 0}
        precision = values["precision"][..., 0, -1].cpu()  # (overlaps, recalls, classes), objects of any size
        for place, k in enumerate(values["classes"].flatten().tolist()):
            ap = precision[:, :, place].mean(dim=1)
            if ap[AT_HALF] >= 0:
                log[f"ap_{self.facts['labels'][k]}"], log[f"ap50_{self.facts['labels'][k]}"] = ap.mean(), ap[AT_HALF]
        self.log_dict({f"test/{name}": value for name, value in log.items()})
        self.test_map.reset()

    def predict_step(self, batch: Batch, batch_index: int) -> list[dict]:
        """The answers that the bundle's runner gives, in pixels of the original images."""
        images, targets = batch
        rows = []
        for (boxes, scores, labels), size in zip(self.detections(self(images)), targets["sizes"].tolist(), strict=True):
            height, width = size
            boxes = boxes * np.float32([width, height, width, height])
            rows.append(answer(boxes, scores, labels, width, height, self.facts["labels"]))
        return rows

    def detections(self, heads: tuple[Tensor, Tensor]) -> list[Found]:
        """For each image boxes in shares of it, scores and labels."""
        *arrays, count = (x.cpu().numpy() for x in self.detect(*(h.float() for h in heads), self.network.anchors))
        return [tuple(array[i, :n] for array in arrays) for i, n in enumerate(count)]

    # The contract with the export step

    def deployable(self, batch: Batch) -> Deployable:
        """uint8 (B, H, W, C) of any size -> boxes in its pixels, scores, labels and their number."""
        side = self.preprocess.size
        outputs = ["boxes", "scores", "labels", "count"]
        graph = Graph(
            module=_Detect(self),
            inputs={"image": nhwc(batch[0])},
            outputs=outputs,
            dynamic_axes={"image": {0: "batch", 1: "height", 2: "width"}},
            sizes={"batch": (1, 2, 5), "height": (side, side + 5, 2 * side), "width": (side, side + 9, side)},
            tolerance=1e-4,  # of a large offset's exponential
            selected=outputs,
        )
        metadata = {"labels": self.facts["labels"], "channels": batch[0].shape[1]}
        return Deployable("object-detection", {"detect": graph}, metadata)

    def evaluate(self, runner, batches: Iterable[Batch]) -> float:
        """Mean average precision of a runner's detections over `batches`; NaN where there is no box to find."""
        score = self.scores(runner, batches)[self.metric]
        return score if score >= 0 else math.nan  # COCO's -1

    def scores(self, runner, batches: Iterable[Batch]) -> dict[str, float]:
        """All that COCO reports of a runner's detections over `batches`."""
        metric = average_precision()
        for images, targets in batches:
            found = runner.detections(nhwc(images).numpy())
            side = np.float32(images.shape[-1])
            shares = [(boxes / side, scores, labels) for boxes, scores, labels in found]
            metric.update(predictions(shares, targets["sizes"]), truth(targets))
        values = metric.compute()
        return {name: values[name].item() for name in SUMMARY}

    def draw(self, folder: Path) -> None:
        """Pictures with their boxes beside the true ones, and the precision-recall curve of each class."""
        from dlref.tasks import figures  # matplotlib takes its time, and only this needs it

        figures.detections(folder / "detections.png", self.pictures, self.facts["labels"])
        figures.precision_recall(folder / "precision_recall.png", self.precision, self.facts["labels"])


class _Detect(nn.Module):
    """The graph that ships: resize, normalise, network, decoding, suppression."""

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


# What COCO reports: mean average precision over overlaps of 0.5 to 0.95, at two of them, by size of the object
# (below 32² and 96² pixels, and above), and the mean recall of the best hundred.
SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
# In float64, as COCO's own are: torchmetrics' are rounded to float32, and miss a recall of exactly 0.6.
THRESHOLDS = {
    "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
    "rec_thresholds": np.linspace(0, 1, 101).tolist(),
}


def average_precision(**options) -> MeanAveragePrecision:
    """COCO's metrics over boxes in pixels."""
    metric = MeanAveragePrecision(backend="faster_coco_eval", sync_on_compute=False, **THRESHOLDS, **options)
    metric.warn_on_many_detections = False  # COCO looks at the best hundred; more are kept for those who want them
    return metric


def computed(metric: MeanAveragePrecision) -> dict[str, Tensor]:
    """The metrics over all devices' pictures.

    torchmetrics would gather them one by one, which fails where devices have not as many.
    """
    for name, mine in metric.metric_state.items():
        setattr(metric, name, [rows.to(metric.device) for part in gather_objects(mine) for rows in part])
    return metric.compute()


def predictions(found: list[Found], sizes: Int[Tensor, "B 2"]) -> list[dict[str, Tensor]]:
    """Detections in shares of the image -> what torchmetrics takes, in pixels of the original image."""
    rows = []
    for image, size in zip(found, sizes.cpu(), strict=True):
        boxes, scores, labels = map(torch.from_numpy, image)
        rows.append({"boxes": pixels(boxes, size), "scores": scores, "labels": labels})
    return rows


def truth(targets: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The true boxes as torchmetrics takes them; those that are ignored count neither as found nor as missed."""
    targets = {name: value.cpu() for name, value in targets.items()}
    rows = []
    for boxes, labels, ignored, size in zip(
        *(targets[n] for n in ("boxes", "labels", "ignored", "sizes")), strict=True
    ):
        there = labels != PADDED
        found = pixels(boxes[there], size)
        area = box_area(found).round(decimals=1)  # 32² and 96² belong to two sizes: what shares rounded stays there
        rows.append({"boxes": found, "labels": labels[there], "iscrowd": ignored[there].long(), "area": area})
    return rows


def pixels(boxes: Float[Tensor, "n 4"], size: Int[Tensor, "2"]) -> Float[Tensor, "n 4"]:
    """Shares of an image -> its pixels; `size` is height and width."""
    return boxes * size.flip(0).repeat(2)


def curves_at_half(precision: Tensor, classes: Tensor, count: int) -> dict[int, np.ndarray]:
    """For each class that has objects its precision at 101 recalls from 0 to 1, at an overlap of one half."""
    rows = precision[AT_HALF, :, :, 0, -1]
    places = {k: place for place, k in enumerate(classes.flatten().tolist()) if k < count}
    return {k: rows[:, place].numpy() for k, place in places.items() if (rows[:, place] >= 0).all()}
