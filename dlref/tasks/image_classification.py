"""Image classification, with one class or several labels per image."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import AUROC, Accuracy, ConfusionMatrix, ExactMatch, F1Score, Precision, Recall
from torchvision.transforms import v2

from dlref.runtime import UserError
from dlref.runtime.runners.image_classification import answers
from dlref.tasks.deployable import Deployable, Graph
from dlref.tasks.image_task import ImageTask, as_tuple, check_class_weights, check_classes, enough_to_normalise, nhwc
from dlref.tasks.losses import or_one
from dlref.tasks.preprocess import ImagePreprocess

MISTAKES = 25  # in the figure of the most confident mistakes

Batch = tuple[Tensor, Tensor] | list[Tensor]  # images and targets; a list from a loader with workers


class ImageClassifier(ImageTask):
    """Cross entropy over K classes, or K independent binary cross entropies if the data has several labels.

    The network returns logits (B, K), or a tuple of the logits and those of auxiliary heads.

    Args:
        preprocess: maps pixels to the network's input, in training, evaluation and the bundle.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2015, section 7).
        mixup: alpha of MixUp's Beta distribution (Zhang et al. 2018); 0 disables blending of pairs.
        cutmix: alpha of CutMix's Beta distribution (Yun et al. 2019); 0 disables pasting of patches. With both,
            one of the two is chosen for each batch.
        class_weights: factor of each class in the loss; with several labels, for images that have the label.
        auxiliary_weight: weight of each auxiliary head's loss (Szegedy et al. 2014, section 5: 0.3).
        task: arguments of every `ImageTask`: channels_last, network, optimizer, lr_scheduler, weights, freeze, ...
    """

    fact_names = ("labels", "multi_label", "crop")
    metric = "accuracy"

    def __init__(
        self,
        preprocess: ImagePreprocess,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        class_weights: list[float] | None = None,
        auxiliary_weight: float = 0.3,
        **task,
    ):
        super().__init__(preprocess, **task)
        self.label_smoothing, self.auxiliary_weight = label_smoothing, auxiliary_weight
        self.mixup, self.cutmix = mixup, cutmix
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def check(self) -> None:
        """Run a black image through the network: a head of the wrong width would train without an error."""
        classes = len(self.facts["labels"])
        if classes < 2 and not self.facts["multi_label"]:
            raise UserError(f"the data has {classes} class; expected 2 or more")
        check_class_weights(self.class_weights, classes)
        if not 0 <= self.label_smoothing < 1 or (self.label_smoothing and self.facts["multi_label"]):
            raise UserError(f"label_smoothing {self.label_smoothing}; expected 0 to below 1, and 0 with several labels")
        if min(self.mixup, self.cutmix) < 0:
            raise UserError(f"mixup {self.mixup}, cutmix {self.cutmix}; expected 0 or more")
        for logits in self.probe(self.preprocess.size):
            if logits.ndim != 2:
                raise UserError(f"network returns {list(logits.shape)}; expected logits (B, {classes})")
            check_classes(logits.shape[1], classes)

    def setup(self, stage: str) -> None:
        """Create the metrics, once the classes are known."""
        super().setup(stage)
        size = getattr(self.trainer.datamodule, "image_size", self.preprocess.size)  # small images keep their size
        if stage == "fit" and size != self.preprocess.size:  # images would be resized silently
            raise UserError(f"data.init_args.image_size {size}; expected {self.preprocess.size}, preprocess's size")
        labels, multi_label = self.facts["labels"], self.facts["multi_label"]
        self.mix = mixing(self.mixup, self.cutmix, len(labels))
        self.val_metrics = metrics(len(labels), multi_label).clone(prefix="val/")
        self.test_metrics = test_metrics(len(labels), multi_label).clone(prefix="test/")

    def loss(self, logits: Float[Tensor, "B K"], targets: Tensor) -> Tensor:
        """Return the mean over the batch, or a sum if all of its images have a weight of 0.

        `targets` are class indices (B,), or probabilities or labels (B, K).
        """
        if self.facts["multi_label"]:
            return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=self.class_weights)
        smoothing = self.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        # With weights and smoothing torch's own mean waits for the GPU.
        total = F.cross_entropy(logits.float(), targets, self.class_weights, label_smoothing=smoothing, reduction="sum")
        return total / or_one(self.counted(targets))

    def counted(self, targets: Tensor) -> Tensor | int:
        """Return the number of images that the loss is a mean over, or the sum of their class weights.

        The weight of a blended image is that of its classes by their shares, unlike in torch's mean for probabilities:
        weights of 0.01 would divide the loss, and the learning rate with it, by a hundred once images are blended.
        """
        if self.class_weights is None or self.facts["multi_label"]:
            return len(targets)
        weights = targets * self.class_weights if targets.is_floating_point() else self.class_weights[targets]
        return weights.sum()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of the head plus the weighted losses of the auxiliary heads."""
        images, targets = batch
        pixels = self.preprocess(images)
        if self.mix is not None:
            pixels, targets = self.mix(pixels, targets)
        with enough_to_normalise(images):
            logits, *auxiliary = as_tuple(self.network(pixels))
        loss = self.loss(logits, targets)
        for auxiliary_logits in auxiliary:
            loss = loss + self.auxiliary_weight * self.loss(auxiliary_logits, targets)
        count = self.counted(targets)
        if isinstance(count, Tensor):  # smoothing adds losses of weight 0: without others, a sum that is no mean
            loss = loss * (count > 0)
        return self.log_train_loss(loss, count)

    def judge(self, stage: str, batch: Batch, metrics: MetricCollection) -> Float[Tensor, "B K"]:
        """Add a batch to the loss and the metrics of a stage; return its probabilities."""
        images, targets = batch
        logits = self(images)[0]
        probability = self.probability(logits)
        metrics.update(probability, targets.long())
        self.log_eval_loss(stage, self.loss(logits, targets), self.counted(targets))
        return probability

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Log loss and metrics of the head."""
        self.judge("val", batch, self.val_metrics)
        self.log_dict(self.val_metrics, prog_bar=True)

    def on_test_start(self) -> None:
        """Clear the data kept for the figures."""
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.mistakes: list[tuple[float, Tensor, int, int]] = []

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Update all metrics, and keep probabilities and the worst mistakes for the figures."""
        images, targets = batch
        probability = self.judge("test", batch, self.test_metrics)
        self.seen.append((probability.cpu(), targets.long().cpu()))
        if not self.facts["multi_label"]:
            self.mistakes = worst_mistakes(self.mistakes, images, probability, targets)

    def on_test_epoch_end(self) -> None:
        """Log the scores; the matrix is only for the figure."""
        values = self.test_metrics.compute()
        self.confusion = values.pop("test/confusion").cpu()
        areas = values.pop("test/roc_auc").cpu().flatten()  # torchmetrics returns a scalar for one class
        # A class that no test image has, or all have, has no curve.
        true = self.confusion.sum(-1)  # (K,), or with several labels (K, 2): images without and with each
        positives, images = (true, true.sum()) if true.ndim == 1 else (true[:, 1], true[0].sum())
        has_curve = (positives > 0) & (positives < images)
        if has_curve.any():
            values["test/roc_auc"] = areas[has_curve].mean()
        self.log_dict(values)
        self.test_metrics.reset()

    def predict_step(self, batch: Batch, batch_index: int) -> list[dict]:
        """Return predictions as the bundle's runner does."""
        probability = self.probability(self(batch[0])[0])
        return answers(probability.cpu().numpy(), self.facts)

    def probability(self, logits: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Return the softmax over the classes, or the sigmoid of each if there are several labels."""
        return logits.float().sigmoid() if self.facts["multi_label"] else logits.float().softmax(dim=-1)

    # The contract with the export step

    def deployable(self, batch: Batch) -> Deployable:
        """Return a graph from uint8 images (B, H, W, C) of any size to probabilities (B, K)."""
        side = self.preprocess.size
        graph = Graph(
            module=_Classify(self),
            inputs={"image": nhwc(batch[0])},
            outputs=["probability"],
            dynamic_axes={"image": {0: "batch", 1: "height", 2: "width"}},
            sizes={"batch": (1, 2, 7), "height": (side, side + 5, 2 * side), "width": (side, side + 9, side)},
        )
        metadata = {**self.facts, "channels": batch[0].shape[1]}  # grey images may train a network for colour
        return Deployable("image-classification", {"classify": graph}, metadata)

    def evaluate(self, runner, batches: Iterable[Batch]) -> float:
        """Return the accuracy of a runner's probabilities over `batches`."""
        accuracy = metrics(len(self.facts["labels"]), self.facts["multi_label"])["accuracy"]
        for images, targets in batches:
            probability = runner.probability(nhwc(images).numpy())
            accuracy.update(torch.from_numpy(probability), targets.long())
        return accuracy.compute().item()

    def draw(self, folder: Path) -> None:
        """Draw the confusion matrix, ROC curves and the most confident mistakes."""
        from dlref.tasks import figures  # matplotlib is slow to import, and only needed here

        probability, targets = (torch.cat(part) for part in zip(*self.seen, strict=True))
        labels = self.facts["labels"]
        if not self.facts["multi_label"]:
            figures.confusion(folder / "confusion.png", self.confusion, labels)
            figures.mistakes(folder / "mistakes.png", self.mistakes, labels)
        figures.roc(folder / "roc.png", probability, targets, labels)


class _Classify(nn.Module):
    """The exported graph: resize, normalise, network, softmax or sigmoid."""

    def __init__(self, task: ImageClassifier):
        super().__init__()
        self.preprocess, self.network = task.preprocess, task.network
        self.multi_label = task.facts["multi_label"]

    def forward(self, image: UInt8[Tensor, "B H W C"]) -> Float[Tensor, "B K"]:
        logits = as_tuple(self.network(self.preprocess(image.permute(0, 3, 1, 2))))[0]
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)


def mixing(mixup: float, cutmix: float, classes: int) -> v2.Transform | None:
    """Return the transform that mixes the images of a batch as the two alphas specify, or None."""
    if not (mixup or cutmix):
        return None
    both = [kind(alpha=alpha, num_classes=classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return v2.RandomChoice(both)


def of_task(classes: int, multi_label: bool) -> dict:
    """Return the arguments of torchmetrics that describe the task."""
    number = "num_labels" if multi_label else "num_classes"
    return {"task": "multilabel" if multi_label else "multiclass", number: classes, "validate_args": False}


def metrics(classes: int, multi_label: bool) -> MetricCollection:
    """Return the validation metrics. With several labels, accuracy counts images whose labels are all correct."""
    task = of_task(classes, multi_label)
    accuracy = ExactMatch(**task) if multi_label else Accuracy(average="micro", **task)
    # Without groups: torchmetrics would merge metrics whose states agree after the first batch. If all its images are
    # classified correctly, the top-5 accuracy would become the accuracy.
    return MetricCollection({"accuracy": accuracy, "f1": F1Score(average="macro", **task)}, compute_groups=False)


def test_metrics(classes: int, multi_label: bool) -> MetricCollection:
    """Return the test metrics; averages over classes are macro averages."""
    collection, task = metrics(classes, multi_label), of_task(classes, multi_label)
    name, accuracy = "top5_accuracy", {"average": "micro", "top_k": min(5, classes)}
    if multi_label:
        name, accuracy = "label_accuracy", {"average": "macro"}
    collection.add_metrics(
        {
            name: Accuracy(**accuracy, **task),
            "precision": Precision(average="macro", **task),
            "recall": Recall(average="macro", **task),
            "roc_auc": AUROC(average="none", **task),
            "confusion": ConfusionMatrix(**task),
        }
    )
    return collection


def worst_mistakes(worst: list, images: Tensor, probability: Tensor, targets: Tensor) -> list:
    """Return the most confident mistakes so far, (confidence, image, predicted, true), most confident first."""
    confidence, predicted = probability.max(dim=-1)
    wrong = confidence.where(predicted != targets, -1).nan_to_num(-1)
    sure, places = (part.tolist() for part in wrong.topk(min(MISTAKES, len(wrong))))
    fresh = [
        (value, images[i].cpu(), predicted[i].item(), targets[i].item())
        for value, i in zip(sure, places, strict=True)
        if value >= 0
    ]
    return sorted(worst + fresh, key=lambda mistake: -mistake[0])[:MISTAKES]
