"""Losses, metrics, schedules, transfer learning and stored facts of tasks, against libraries and by hand."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from refusals import error_of, one_line
from safetensors.torch import save_file
from sklearn import metrics as sklearn_metrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from dlref.data.streamed_images import StreamedImages
from dlref.models import CifarResNet, LeNet5
from dlref.runtime import UserError
from dlref.runtime.images import centre
from dlref.tasks import (
    EMA,
    ImageClassifier,
    ImagePreprocess,
    LanguageModel,
    ObjectDetector,
    Polynomial,
    Steps,
    Translator,
    WarmupCosine,
    figures,
    image_classification,
)
from dlref.tasks.averaging import Average
from dlref.tasks.image_classification import mixing, worst_mistakes
from dlref.tasks.image_task import ImageTask
from dlref.tasks.task import MeanLoss, freeze
from dlref.training.devices import fast_steps
from dlref.training.preflight import Preflight
from dlref.training.weights import load_weights, read_checkpoint

GREY = {"mean": [0.5], "std": [0.25]}


class Pixels(LightningDataModule):
    """Random images whose brightness is their class."""

    def __init__(self, labels="abc", multi_label=False, n=48, size=32):
        super().__init__()
        self.labels, self.multi_label, self.crop = list(labels), multi_label, None
        generator = torch.Generator().manual_seed(1)
        targets = torch.arange(n) % len(labels)
        noise = torch.randint(0, 60, (n, 1, size, size), generator=generator)
        images = (noise + 80 * targets[:, None, None, None]).clamp(max=255).to(torch.uint8)
        if multi_label:
            targets = torch.stack([targets > 0, targets > 1, targets == 0], dim=1).float()
        self.set = TensorDataset(images, targets)

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=16)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Linear(nn.Module):
    """The smallest classifier, with an auxiliary head."""

    class_layers = ("fc", "aux")

    def __init__(self, classes=3, size=32):
        super().__init__()
        self.fc = nn.Linear(size * size, classes)
        self.aux = nn.Linear(size * size, classes)

    def forward(self, x):
        return self.fc(x.flatten(1)), self.aux(x.flatten(1))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def classifier(network=None, **options):
    options = {"optimizer": sgd, **options}
    task = ImageClassifier(preprocess=ImagePreprocess(32, **GREY), network=network or LeNet5(3), **options)
    task.remember({"labels": ["a", "b", "c"], "multi_label": False, "crop": None})
    return task


def test_fit_refuses_data_whose_image_size_differs_from_preprocess():
    task = classifier()
    known = SimpleNamespace(image_size=48, labels=["a", "b", "c"], multi_label=False, crop=None)
    task.trainer = SimpleNamespace(datamodule=known)
    task.setup("test")  # runs that were trained with such data can still be tested and exported
    with pytest.raises(UserError, match=r"image_size 48; expected 32, preprocess's size"):
        task.setup("fit")


def trainer(tmp_path, **options):
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


# Loss


def test_loss_with_smoothing_and_class_weights_matches_the_formula_written_out():
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    task = classifier(label_smoothing=0.1, class_weights=[1.0, 2.0, 0.5])
    log_p = logits.log_softmax(-1)
    weight = torch.tensor([1.0, 2.0, 0.5])
    hard = -(weight[targets] * log_p[torch.arange(6), targets])
    soft = -(weight * log_p).sum(-1) / 3
    expected = (0.9 * hard + 0.1 * soft).sum() / weight[targets].sum()
    torch.testing.assert_close(task.loss(logits, targets), expected)


def test_logged_losses_are_means_over_all_devices(monkeypatch):
    """The other device contributes 3 items with a mean loss of 2, half of which is the box loss."""
    task, logged = classifier(), {}
    task.log = lambda name, value: logged.update({name: value.item()})
    monkeypatch.setattr("dlref.tasks.task.is_distributed", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: sums.add_(torch.tensor([3.0, 6.0, 3.0])))
    loss = torch.tensor(4.0, requires_grad=True)
    task.log_train_loss(loss, 1, box_loss=loss / 4).backward()
    assert logged == {"train/loss": pytest.approx(10 / 4), "train/box_loss": pytest.approx(4 / 4)}
    assert task.train_loss.item() == pytest.approx(10 / 4)
    assert loss.grad.item() == pytest.approx(2 / 4)  # DDP takes the mean of two gradients: a quarter for 1 of 4


@pytest.mark.parametrize(("elsewhere", "gradient"), [(3.0, 2 / 3), (0.0, 2.0)])
def test_a_share_without_items_is_a_sum_that_is_divided_by_those_of_other_devices(elsewhere, gradient, monkeypatch):
    """A batch of pictures without boxes still trains the detector on its hardest negatives."""
    task = classifier()
    task.log = lambda *_: None
    monkeypatch.setattr("dlref.tasks.task.is_distributed", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: sums.add_(torch.tensor([elsewhere, 6.0])))
    loss = torch.tensor(4.0, requires_grad=True)
    task.log_train_loss(loss, torch.tensor(0.0)).backward()
    assert loss.grad.item() == pytest.approx(gradient)  # DDP halves it


@pytest.mark.parametrize(("batches", "size"), [(11, 4), (3, 4), (12, 4), (40, 2), (1, 30), (5, 3)])
def test_examples_drawn_in_figures_are_spread_over_the_whole_split(batches, size):
    task = classifier()
    task._trainer = SimpleNamespace(num_test_batches=[batches])
    rows = [task.shown(i, size, most=12) for i in range(batches)]
    assert sum(map(len, rows)) == min(12, batches * size)
    assert all(len(set(part)) == len(part) and max(part) < size for part in rows if part)
    assert rows[-1] or batches > 12
    assert any(rows[-4:])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_whose_classes_all_have_weight_zero_trains_nothing(smoothing):
    task = classifier(class_weights=[0.0, 1.0, 1.0], label_smoothing=smoothing)
    task.mix, task.log = None, lambda *_: None
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    loss = task.training_step((images, torch.tensor([0, 0])), 0)
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad.any() for parameter in task.network.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_weighted_evaluation_loss_does_not_depend_on_the_batches(size, smoothing):
    task = classifier(class_weights=[0.0, 1.0, 0.5], label_smoothing=smoothing)
    logits, targets = torch.randn(6, 3), torch.tensor([0, 0, 1, 0, 2, 1])
    mean = MeanLoss()
    for part, classes in zip(logits.split(size), targets.split(size), strict=True):
        mean.update(task.loss(part, classes), task.counted(classes))
    expected = F.cross_entropy(logits, targets, weight=task.class_weights, label_smoothing=smoothing)
    torch.testing.assert_close(mean.compute(), expected)


def test_a_single_class_is_refused():
    task = classifier(network=LeNet5(1))
    task.facts["labels"] = ["a"]
    with pytest.raises(UserError, match="the data has 1 class; expected 2 or more"):
        task.check()


@pytest.mark.gpu
def test_smoothing_with_class_weights_never_synchronises_with_the_gpu():
    """Like torch's own mean."""
    task = classifier(label_smoothing=0.1, class_weights=[1.0, 2.0, 0.5]).cuda()
    logits, targets = torch.randn(5, 3).cuda(), torch.tensor([0, 1, 2, 2, 1]).cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = task.loss(logits, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "class_weights has 0 factors; expected 3"),
        ([1.0, -1.0, 1.0], "expected factors of 0 or more"),
        ([1.0, math.nan, 1.0], "expected factors of 0 or more"),
        ([0.0, 0.0, 0.0], "and not all 0"),
    ],
)
def test_invalid_class_weights_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        classifier(class_weights=weights).check()


def test_multi_label_loss_is_the_mean_of_weighted_binary_cross_entropies():
    task = classifier(class_weights=[1.0, 3.0, 0.5])
    task.facts["multi_label"] = True
    logits, targets = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    p = logits.sigmoid()
    weight = torch.tensor([1.0, 3.0, 0.5])
    expected = -(weight * targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    torch.testing.assert_close(task.loss(logits, targets), expected)
    torch.testing.assert_close(task.probability(logits), p)


@pytest.mark.parametrize("stage", ["training_step", "validation_step"])
def test_a_weighted_loss_is_counted_by_the_sum_of_its_class_weights(stage):
    """This count combines batches and devices."""
    task, said = classifier(class_weights=[1.0, 3.0, 0.5]), []
    task.mix, task.val_metrics = None, image_classification.metrics(3, False)
    task.log = task.log_dict = lambda *_, **__: None
    task.log_train_loss = lambda loss, count: said.append(count) or loss
    task.log_eval_loss = lambda stage, loss, count: said.append(count)
    getattr(task, stage)((torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 1, 2])), 0)
    assert [float(count) for count in said] == [7.5]


def test_auxiliary_heads_add_to_the_training_loss():
    task = classifier(Linear(), auxiliary_weight=0.7)
    task.mix = None
    task.log = lambda *_, **__: None
    images, targets = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    main, auxiliary = task(images)
    expected = F.cross_entropy(main, targets) + 0.7 * F.cross_entropy(auxiliary, targets)
    torch.testing.assert_close(task.training_step((images, targets), 0), expected)


def test_auxiliary_heads_do_not_add_to_the_validation_loss(tmp_path):
    task = classifier(Linear(), auxiliary_weight=0.7)
    (scores,) = trainer(tmp_path).validate(task, datamodule=Pixels(), verbose=False)
    images, targets = Pixels().set.tensors
    main, _ = task(images)
    assert scores["val/loss"] == pytest.approx(F.cross_entropy(main, targets).item(), rel=1e-5)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixup_and_cutmix_give_each_image_targets_that_sum_to_one(options, tmp_path):
    task = classifier(**options)
    seen, pixels = [], []
    task.loss = lambda logits, targets: seen.append(targets) or logits.sum()
    task.network.register_forward_pre_hook(lambda _, inputs: pixels.append(inputs[0]))
    trainer(tmp_path, limit_val_batches=0).fit(task, datamodule=Pixels())
    assert all(targets.shape == (16, 3) for targets in seen)
    torch.testing.assert_close(torch.cat(seen).sum(-1), torch.ones(48))
    assert any(((targets > 0) & (targets < 1)).any() for targets in seen)
    plain = task.preprocess(Pixels().set.tensors[0])
    assert not torch.equal(torch.cat([batch for batch in pixels if len(batch) == 16]), plain)


# Metrics, against scikit-learn


def test_metrics_of_the_test_split_match_scikit_learn(tmp_path):
    task, data = classifier(), Pixels()
    (results,) = trainer(tmp_path).test(task, data, verbose=False)
    images, targets = data.set.tensors
    with torch.no_grad():
        probability = task(images)[0].softmax(-1).numpy()
    predicted = probability.argmax(-1)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(targets, predicted),
        "f1": sklearn_metrics.f1_score(targets, predicted, average="macro"),
        "precision": sklearn_metrics.precision_score(targets, predicted, average="macro", zero_division=0),
        "recall": sklearn_metrics.recall_score(targets, predicted, average="macro"),
        "roc_auc": sklearn_metrics.roc_auc_score(targets, probability, multi_class="ovr"),
        "top5_accuracy": 1.0,
        "loss": sklearn_metrics.log_loss(targets, probability),
    }
    assert {key.removeprefix("test/"): value for key, value in results.items()} == pytest.approx(expected, abs=1e-5)
    np.testing.assert_array_equal(task.confusion, sklearn_metrics.confusion_matrix(targets, predicted))


def test_multi_label_metrics_of_the_test_split_match_scikit_learn(tmp_path):
    data = Pixels(multi_label=True)
    task = classifier()
    task.facts["multi_label"] = True
    (results,) = trainer(tmp_path).test(task, data, verbose=False)
    images, targets = data.set.tensors
    with torch.no_grad():
        probability = task(images)[0].sigmoid().numpy()
    predicted = probability > 0.5
    assert results["test/accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(targets, predicted))
    assert results["test/f1"] == pytest.approx(
        sklearn_metrics.f1_score(targets, predicted, average="macro", zero_division=0), abs=1e-6
    )
    assert results["test/roc_auc"] == pytest.approx(sklearn_metrics.roc_auc_score(targets, probability), abs=1e-5)
    task.draw(tmp_path / "figures")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["roc.png"]


def test_data_with_a_single_multi_label_class_can_be_tested(tmp_path):
    """torchmetrics returns a scalar for the area under a single curve."""
    data = Pixels(multi_label=True)
    data.labels, data.set.tensors = ["a"], (data.set.tensors[0], data.set.tensors[1][:, :1])
    task = ImageClassifier(preprocess=ImagePreprocess(32, **GREY), network=LeNet5(1), optimizer=sgd)
    (results,) = trainer(tmp_path).test(task, data, verbose=False)
    images, targets = data.set.tensors
    with torch.no_grad():
        probability = task(images)[0].sigmoid()
    assert results["test/roc_auc"] == pytest.approx(sklearn_metrics.roc_auc_score(targets, probability), abs=1e-5)
    task.draw(tmp_path / "figures")


@pytest.mark.parametrize("label", ["$^$", "_background_"])
def test_labels_with_special_meaning_to_matplotlib_are_drawn_literally(label, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure) or figure.draw_without_rendering())
    figures.roc(tmp_path / "roc.png", torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]), [label, "b"])
    legend = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert [text.replace("\\", "").split()[0] for text in legend] == [label, "b"]
    figures.mistakes(tmp_path / "mistakes.png", [(0.9, torch.zeros(1, 4, 4, dtype=torch.uint8), 0, 1)], [label, "b"])


def test_the_legend_of_masks_names_what_is_painted(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    mask = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    pictures = [(torch.zeros(3, 2, 2, dtype=torch.uint8), mask, mask)]
    figures.masks(tmp_path / "masks.png", pictures, ["background", "cat", "dog", "cow"])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["cat", "dog"]


def test_worst_mistakes_are_sorted_by_confidence(tmp_path):
    task = classifier()
    trainer(tmp_path).test(task, Pixels(), verbose=False)
    confidences = [confidence for confidence, *_ in task.mistakes]
    assert confidences == sorted(confidences, reverse=True)
    assert 0 < len(confidences) <= 25
    assert all(predicted != true for _, _, predicted, true in task.mistakes)


def test_classes_without_test_images_are_left_out_of_roc_auc(tmp_path):
    data = Pixels()
    images, targets = data.set.tensors
    data.set = TensorDataset(images[targets < 2], targets[targets < 2])
    task = classifier()
    with pytest.warns(UserWarning, match="No positive samples"):  # from torchmetrics, for the absent class
        (results,) = trainer(tmp_path).test(task, data, verbose=False)
    images, targets = data.set.tensors
    with torch.no_grad():
        probability = task(images)[0].softmax(-1)
    areas = [sklearn_metrics.roc_auc_score(targets == k, probability[:, k]) for k in (0, 1)]
    assert results["test/roc_auc"] == pytest.approx(np.mean(areas), abs=1e-5)


def test_accuracy_averages_over_images_and_not_over_classes():
    probability, targets = torch.rand(50, 8).softmax(1), (torch.arange(50) % 8) * (torch.rand(50) < 0.3)
    found = image_classification.test_metrics(8, False)
    for name, k in (("accuracy", 1), ("top5_accuracy", 5)):
        expected = sklearn_metrics.top_k_accuracy_score(targets, probability, k=k, labels=range(8))
        assert found[name](probability, targets).item() == pytest.approx(expected)


def test_the_top5_accuracy_is_its_own_although_a_first_batch_is_entirely_correct():
    found = image_classification.test_metrics(8, False)
    for targets in (torch.arange(8), (torch.arange(8) + 1) % 8):
        found.update(8 * torch.eye(8).softmax(1) + torch.arange(8) / 100, targets)
    values = found.compute()
    assert (values["accuracy"], values["top5_accuracy"]) == (0.5, 0.75)


def test_mean_loss_accepts_fractional_counts():
    mean = MeanLoss()
    mean.update(torch.tensor(2.0), torch.tensor(0.25))
    mean.update(torch.tensor(4.0), torch.tensor(0.5))
    assert mean.compute().item() == pytest.approx(2.5 / 0.75)


def test_mean_loss_includes_the_loss_of_a_batch_with_count_zero():
    """For example a detector's images without boxes, whose loss is a sum."""
    mean = MeanLoss()
    mean.update(torch.tensor(6.0), 0)
    mean.update(torch.tensor(4.0), 2)
    assert mean.compute().item() == pytest.approx((6 + 2 * 4) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_only_the_ratios_of_class_weights_matter_even_if_images_are_blended(smoothing):
    """Otherwise weights of 0.01 with mixup would train like a learning rate divided by a hundred: not at all."""
    task = classifier(class_weights=[1.0, 3.0, 0.5], label_smoothing=smoothing)
    small = classifier(class_weights=[0.01, 0.03, 0.005], label_smoothing=smoothing)
    logits, classes = torch.randn(2, 3), torch.tensor([0, 2])
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
    shares = (1 - smoothing) * targets + smoothing / 3
    expected = -(shares * task.class_weights * logits.log_softmax(-1)).sum() / (0.5 * 1 + 0.7 * 3 + 0.8 * 0.5)
    torch.testing.assert_close(task.loss(logits, targets), expected)
    torch.testing.assert_close(small.loss(logits, targets), expected)
    torch.testing.assert_close(task.loss(logits, F.one_hot(classes, 3).float()), task.loss(logits, classes))


# Schedules


def rates(schedule, steps, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, steps, **options)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_steps_schedule_can_start_with_a_warmup():
    seen = rates(Steps, 100, milestones=[0.5], warmup=0.04)
    assert seen[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert seen[49:51] == pytest.approx([1, 0.1])


@pytest.mark.parametrize(
    ("task", "needed"),
    [
        (ObjectDetector(preprocess=ImagePreprocess(32, **GREY), network=LeNet5(3), optimizer=sgd), "size, anchors"),
        (Translator(network=LeNet5(3), optimizer=sgd), "encode, step"),
        (LanguageModel(network=LeNet5(3), optimizer=sgd), "logits, attention, context_length"),
    ],
)
def test_a_network_without_methods_its_task_needs_is_refused(task, needed):
    task.trainer = SimpleNamespace(datamodule=None)
    with pytest.raises(
        UserError, match=f"network LeNet5 has no {needed}; expected a network as {type(task).__name__}'s"
    ):
        task.setup("fit")


def test_a_network_that_returns_a_dict_is_refused(unchecked):
    class Named(torch.nn.Linear):
        def forward(self, images):
            return {"out": images}

    with pytest.raises(UserError, match="network returns dict; expected tensors, alone or in a tuple"):
        classifier(network=Named(3, 3)).check()


class Headed(nn.Module):
    """A classifier with an auxiliary head of another width, or one that loses the axis of a single image."""

    def __init__(self, auxiliary=None):
        super().__init__()
        self.fc = nn.Linear(1024, 3)
        self.auxiliary = auxiliary and nn.Linear(1024, auxiliary)

    def forward(self, x):
        logits = self.fc(x.flatten(1))
        return (logits, self.auxiliary(x.flatten(1))) if self.auxiliary else logits.squeeze()


class Regularised(Headed):
    """A classifier that also returns a loss of its own."""

    def forward(self, x):
        logits = self.fc(x.flatten(1))
        return logits, logits.square().mean()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Regularised(), r"network returns \[\]; expected logits \(B, 3\)"),
        (Headed(5), "network returns 5 classes, the data has 3"),
        (Headed(2), "network returns 2 classes, the data has 3"),
        (Headed(), r"network returns \[3\]; expected logits \(B, 3\)"),
    ],
)
def test_every_head_must_have_a_logit_for_each_class_of_each_image(network, message):
    with pytest.raises(UserError, match=message):
        classifier(network=network).check()


def test_an_image_task_without_classes_needs_no_labels():
    task = ImageTask(preprocess=ImagePreprocess(32, **GREY), network=LeNet5(3), optimizer=sgd)
    task.take_facts(SimpleNamespace())
    assert task.facts == {}


class Attentive(nn.Module):
    """Attends to the rows of an image; without batch_first, to the same row of the other images."""

    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=batch_first)
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        rows = x.squeeze(1)
        return self.fc((rows + self.attention(rows, rows, rows)[0]).mean(1))


class Dropped(Headed):
    """A classifier that drops logits in evaluation mode, too."""

    def forward(self, x):
        return F.dropout(self.fc(x.flatten(1)))


@pytest.mark.parametrize(
    "network",
    [
        Attentive(batch_first=False),
        nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(1024, 3)),
        Dropped(),
    ],
)
def test_an_image_must_be_answered_the_same_alone_and_in_a_batch(network):
    torch.manual_seed(0)
    with pytest.raises(UserError, match="outputs for an image change with the other images in its batch"):
        classifier(network=network).check()


def test_attention_within_each_image_is_accepted():
    classifier(network=Attentive(batch_first=True)).check()


def test_probing_a_network_restores_its_mode_and_buffers():
    task = classifier(network=torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout().eval()))
    with task.probing("three numbers", "expected another"):
        task.network(torch.ones(1, 3))  # batch norm refuses a single row in training mode
    assert [module.training for module in task.network.modules()] == [True, True, False]
    assert not task.network[0].running_mean.any()
    with (
        pytest.raises(UserError, match=r"^network rejects five numbers \(.+\); expected another$"),
        task.probing("five numbers", "expected another"),
    ):
        task.network(torch.ones(1, 5))
    assert [module.training for module in task.network.modules()] == [True, True, False]


def test_steps_schedule_divides_the_rate_at_its_milestones():
    assert rates(Steps, 8, milestones=[0.5, 0.75]) == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)


def test_cosine_schedule_without_warmup_matches_torch():
    expected = rates(torch.optim.lr_scheduler.CosineAnnealingLR, 20)
    assert rates(WarmupCosine, 20) == pytest.approx(expected)


def test_polynomial_schedule_matches_torch_and_can_resume_with_a_longer_run():
    assert rates(Polynomial, 20, power=0.9) == pytest.approx(
        rates(torch.optim.lr_scheduler.PolynomialLR, 20, power=0.9)
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    short, longer = Polynomial(optimizer, 10), Polynomial(optimizer, 20)
    for _ in range(10):
        optimizer.step()
        short.step()
    longer.load_state_dict(short.state_dict())
    with pytest.raises(UserError, match=r"not of Polynomial; expected the schedule of its config\.yaml"):
        longer.load_state_dict(torch.optim.lr_scheduler.PolynomialLR(optimizer, 10).state_dict())
    optimizer.step()
    longer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - 11 / 20)


@pytest.mark.parametrize(
    ("schedule", "options", "named"),
    [
        (WarmupCosine, {"warmup": 100}, "warmup 100"),
        (WarmupCosine, {"final": -0.1}, "final -0.1"),
        (Steps, {"milestones": [0.5, 60]}, "milestones 60"),
        (Steps, {"milestones": [0.5], "warmup": 5}, "warmup 5"),
    ],
)
def test_schedule_options_outside_0_to_1_are_refused(schedule, options, named):
    with pytest.raises(ValueError, match=f"{named}; expected a share of the run, 0 to 1"):
        rates(schedule, 10, **options)


def test_cosine_schedule_warms_up_to_the_peak_and_decays_to_the_floor():
    seen = rates(WarmupCosine, 100, warmup=0.1, final=0.2)
    assert seen[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert max(seen) == seen[10] == 1
    assert seen[55] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert seen[-1] == pytest.approx(0.2, abs=1e-3)


def test_cosine_schedule_stays_at_the_floor_after_the_run():
    schedule = WarmupCosine(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 10, final=0.1)
    assert schedule.lr_lambdas[0](15) == pytest.approx(0.1)


def test_a_schedule_advances_once_per_optimiser_step_and_knows_the_run_length(tmp_path):
    task = classifier(lr_scheduler=lambda optimizer, steps: Steps(optimizer, steps, milestones=[0.5]))
    fitted = trainer(tmp_path, max_epochs=2)
    fitted.fit(task, datamodule=Pixels())  # 3 batches, 2 epochs
    assert fitted.lr_scheduler_configs[0].scheduler.last_epoch == 6
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_weight_decay_can_exclude_vectors():
    task = classifier(decay_vectors=False, optimizer=lambda g: torch.optim.SGD(g, lr=0.1, weight_decay=0.5))
    task.trainer = SimpleNamespace(accumulate_grad_batches=1)
    decayed, spared = task.configure_optimizers().param_groups
    assert decayed["weight_decay"] == 0.5
    assert spared["weight_decay"] == 0
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(task.network.parameters()))


# Transfer


def test_loading_weights_keeps_a_fresh_head_when_the_classes_differ(tmp_path, caplog):
    source, network = LeNet5(10), LeNet5(3)
    fresh = network.output.weight.clone()
    torch.save(source.state_dict(), tmp_path / "source.pt")
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    for name in ("source.pt", "source.safetensors"):
        assert load_weights(network, tmp_path / name) == ["output.bias", "output.weight"]
        assert torch.equal(network.output.weight, fresh)
        assert torch.equal(network.c3.weight, source.c3.weight)
        assert "new head for other classes: output.bias, output.weight" in caplog.text
    assert load_weights(LeNet5(10), tmp_path / "source.pt") == []


def test_a_layer_whose_name_only_starts_like_a_heads_is_not_treated_as_a_head(tmp_path):
    source, network = Linear(3), Linear(3)
    source.fc2, network.fc2 = nn.Linear(2, 2), nn.Linear(2, 3)
    torch.save(source.state_dict(), tmp_path / "source.pt")
    with pytest.raises(UserError, match=r"2 tensors do not fit Linear \(fc2"):
        load_weights(network, tmp_path / "source.pt")


def test_weights_are_loaded_when_a_fit_starts(tmp_path):
    source = LeNet5(3)
    torch.save(source.state_dict(), tmp_path / "source.pt")
    still = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0)}
    task = classifier(weights=str(tmp_path / "source.pt"), **still)
    trainer(tmp_path).fit(task, datamodule=Pixels())
    assert torch.equal(task.network.c3.weight, source.c3.weight)


def test_weights_can_be_loaded_from_a_run_folder(tmp_path):
    task = classifier()
    weights = {f"network.{k}": v for k, v in task.network.state_dict().items()}
    state = {"state_dict": weights, "facts": {}}
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "run/checkpoints/best.ckpt")
    network = LeNet5(3)
    assert load_weights(network, tmp_path / "run") == []
    assert torch.equal(network.f6.weight, task.network.f6.weight)


def test_weights_can_be_loaded_from_a_foreign_checkpoint(tmp_path):
    source, network = LeNet5(3), LeNet5(3)
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "foreign.pth")
    assert load_weights(network, tmp_path / "foreign.pth") == []
    assert torch.equal(network.f6.weight, source.f6.weight)


def test_weights_without_batch_norm_counters_can_be_loaded(tmp_path):
    """Some ResNet weights were published before these counters existed."""
    source, network = CifarResNet(20, 3), CifarResNet(20, 3)
    kept = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "published.pth")
    assert load_weights(network, tmp_path / "published.pth") == []
    assert torch.equal(network.fc.weight, source.fc.weight)


def test_bundle_metadata_gives_the_channel_count_of_the_data():
    colour = ImagePreprocess(32, mean=[0.4] * 3, std=[0.2] * 3)
    task = ImageClassifier(network=LeNet5(3, in_channels=3), preprocess=colour, optimizer=sgd)
    task.remember({"labels": ["a", "b", "c"], "multi_label": False, "crop": None})
    for channels in (1, 3):
        pictures = torch.zeros(2, channels, 32, 32, dtype=torch.uint8)
        assert task.deployable((pictures, torch.zeros(2))).metadata["channels"] == channels


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(LeNet5(3).state_dict(), tmp_path / "other.pt")
    torch.save({"a": "b"}, tmp_path / "text.pt")
    torch.save(CifarResNet(20).state_dict() | {"epoch": 3}, tmp_path / "epoch.pt")
    torch.save({"facts": {}, "state_dict": {1: torch.ones(1)}}, tmp_path / "numbers.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")  # code in a pickle
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name, message in {
        "other.pt": "do not fit CifarResNet",
        "text.pt": "not a state dict",
        "epoch.pt": "not a state dict",
        "numbers.pt": "not a state dict",
        "module.pt": "unreadable",
        "noise.pt": "unreadable",
        "noise.safetensors": "unreadable",
        "gone.pt": "not found",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            load_weights(CifarResNet(20), tmp_path / name)
        assert "\n" not in str(error.value)
    wider = LeNet5(3).state_dict()
    wider["c3.weight"] = torch.zeros(16, 7, 5, 5)
    torch.save(wider, tmp_path / "wider.pt")
    with pytest.raises(UserError, match=r" \(c3\.weight \(16, 7, 5, 5\), here \(16, 6, 5, 5\)\); expected the weights"):
        load_weights(LeNet5(3), tmp_path / "wider.pt")


def test_frozen_parameters_and_batch_norm_statistics_do_not_change(tmp_path):
    task = classifier(CifarResNet(20, num_classes=3, in_channels=1), freeze=r"conv1|bn1|layer[12]\.")
    before = {key: value.clone() for key, value in task.network.state_dict().items()}
    trainer(tmp_path).fit(task, datamodule=Pixels())
    frozen = ("conv1", "bn1", "layer1.", "layer2.")
    for key, value in task.network.state_dict().items():
        if key.startswith(frozen):
            assert torch.equal(value, before[key]), key
    assert not torch.equal(task.network.fc.weight, before["fc.weight"])
    assert not torch.equal(task.network.layer3[0].bn1.running_mean, before["layer3.0.bn1.running_mean"])


def test_a_frozen_recurrent_layer_stays_in_training_mode():
    """cuDNN cannot differentiate recurrent layers in evaluation mode, and layers below them may still train."""
    network = nn.ModuleDict({"embeddings": nn.Embedding(3, 4), "rnn": nn.LSTM(4, 4), "norm": nn.BatchNorm1d(4)})
    freeze(network, "rnn|norm")
    assert [module.training for module in network.values()] == [True, True, False]
    assert not any(parameter.requires_grad for parameter in network["rnn"].parameters())


@pytest.mark.parametrize(("scaler", "fused", "limit"), [(None, True, 1.0), (1, False, 1.0), (1, True, None)])
def test_a_fused_optimiser_with_clipping_and_loss_scaling_is_refused(scaler, fused, limit):
    task = classifier(optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=fused))
    known = {"accumulate_grad_batches": 1, "gradient_clip_val": limit}
    task.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), **known)
    task.configure_optimizers()
    known["gradient_clip_val"] = 1.0
    task.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=1), **known)
    task.optimizer = partial(torch.optim.AdamW, fused=True)
    with pytest.raises(UserError, match=r"a fused optimizer with trainer\.gradient_clip_val and 16-mixed"):
        task.configure_optimizers()


def test_freezing_matches_names_from_their_start():
    network = LeNet5(3)
    freeze(network, "c")
    assert [n for n, p in network.named_parameters() if p.requires_grad] == [
        "f6.weight", "f6.bias", "output.weight", "output.bias",
    ]  # fmt: skip


# Facts that a task stores


def test_data_or_a_checkpoint_with_other_labels_is_refused(tmp_path):
    task = classifier()
    with pytest.raises(UserError, match="labels of the data and of the checkpoint differ"):
        trainer(tmp_path).test(task, Pixels(labels="acb"), verbose=False)
    checkpoint = {}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint["facts"] == {"labels": ["a", "b", "c"], "multi_label": False, "crop": None}
    with pytest.raises(UserError, match="same order"):
        classifier().on_load_checkpoint({"facts": {"labels": ["c", "b", "a"]}})


def test_restoring_weights_of_another_network_or_label_order_is_refused(tmp_path):
    fitted = trainer(tmp_path)
    fitted.fit(classifier(), datamodule=Pixels())
    fitted.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(UserError, match="expected weights of this network"):
        classifier(Linear()).restore(tmp_path / "a.ckpt")
    other = classifier()
    other.facts["labels"] = ["c", "b", "a"]
    with pytest.raises(UserError, match="same order"):
        other.restore(tmp_path / "a.ckpt")


def test_results_after_reloading_a_checkpoint_are_identical(tmp_path):
    task, data = classifier(), Pixels()
    fitted = trainer(tmp_path, max_epochs=2)
    fitted.fit(task, datamodule=data)
    (before,) = fitted.test(task, data, verbose=False)
    fitted.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    fresh = classifier()
    (after,) = trainer(tmp_path).test(fresh, data, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert after == before


def test_ema_matches_lightnings_average_with_bias_correction(tmp_path):
    """Over three epochs, the last one resumed from a checkpoint; includes batch norm buffers."""

    class Theirs(EMAWeightAveraging):
        def __init__(self):
            WeightAveraging.__init__(self, use_buffers=True, avg_fn=corrected)
            self.update_every_n_steps, self.update_starting_at_step, self.update_starting_at_epoch = 2, None, None

    def corrected(average, now, count):
        return average + (now - average) * 0.1 / (1 - 0.9 ** (count + 1))

    found = []
    for average in (partial(EMA, decay=0.9, update_every_n_steps=2), Theirs):
        torch.manual_seed(0)
        task, folder = classifier(network=nn.Sequential(nn.Flatten(), nn.Linear(1024, 3), nn.BatchNorm1d(3))), tmp_path
        fitted = trainer(folder, max_epochs=2, callbacks=[average()])
        fitted.fit(task, datamodule=Pixels())
        fitted.save_checkpoint(folder / "a.ckpt", weights_only=False)
        again = trainer(folder, max_epochs=3, callbacks=[average()])
        again.fit(task, datamodule=Pixels(), ckpt_path=folder / "a.ckpt", weights_only=True)
        found.append({name: value.clone() for name, value in task.network.state_dict().items()})
    ours, theirs = found
    assert not torch.equal(ours["1.weight"], ours["1.weight"].round())
    for name, value in ours.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, theirs[name])


def test_weight_average_copies_num_batches_tracked():
    model = nn.BatchNorm1d(2)
    average = Average(model, 0.9, torch.device("cpu"))
    for _ in range(3):
        model(torch.randn(4, 2))
        average.update_parameters(model)
    assert average.module.num_batches_tracked == model.num_batches_tracked == 3


def test_weight_average_weighs_each_update_by_its_age():
    weight = nn.Linear(1, 1, bias=False)
    average = Average(weight, decay=0.9, device=torch.device("cpu"))
    values = [1.0, 2.0, 4.0, 8.0]
    for value in values:
        nn.init.constant_(weight.weight, value)
        average.update_parameters(weight)
    weights = [0.9**age for age in (3, 2, 1, 0)]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert average.module.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_0_to_1_and_updates_every_0_steps_are_refused(decay):
    assert EMA(decay=0.0).decay == 0
    with pytest.raises(ValueError, match=f"decay {decay}; expected 0 to below 1"):
        EMA(decay=decay)
    with pytest.raises(ValueError, match="update_every_n_steps 0; expected 1 or more"):
        EMA(update_every_n_steps=0)


@pytest.mark.parametrize(("said", "mode"), [(True, None), ("graphs", "reduce-overhead")])
def test_compile_network_graphs_compiles_with_reduce_overhead(said, mode, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: seen.append(options))
    trainer(tmp_path).test(classifier(compile_network=said), Pixels(), verbose=False)
    assert seen == [{"mode": mode}]


def test_averaged_weights_stay_in_place_until_the_validation_epoch_ends(tmp_path, monkeypatch):
    """Output of the epoch's end, such as a sample text, uses the validated weights; then training's return."""
    hooks = ("on_train_batch_end", "validation_step", "on_validation_epoch_end", "on_train_epoch_end")
    seen = {hook: [] for hook in hooks}

    class Watched(ImageClassifier):
        pass

    for hook, kept in seen.items():

        def watched(self, *arguments, hook=hook, kept=kept):
            kept.append(self.network.state_dict()["output.bias"].clone())
            return getattr(ImageClassifier, hook)(self, *arguments)

        monkeypatch.setattr(Watched, hook, watched)
    task = classifier()
    task.__class__ = Watched
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, callbacks=[EMA(0.9)]).fit(task, Pixels())
    trained, validated, ended, after = (torch.stack(kept) for kept in seen.values())
    assert torch.equal(ended, validated[:: len(validated) // len(ended)])
    assert torch.equal(after, trained[len(trained) // 2 - 1 :: len(trained) // 2])
    assert (ended != after).any(dim=1).all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch starts with an empty graph
def test_training_with_cuda_graphs_gives_the_same_weights(tmp_path, unchecked):
    fast_steps(torch.device("cuda"))  # as `fit` does; otherwise torch 2.11 warns about float32 matrices
    found = []
    for said in (False, "graphs"):
        torch.manual_seed(0)
        task = classifier(compile_network=said)
        trainer(tmp_path, accelerator="gpu", devices=1, max_epochs=5, callbacks=[EMA(0.5)]).fit(task, Pixels())
        found.append({name: value.cpu() for name, value in task.network.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-2, atol=1e-3)


def test_compile_network_graphs_refuses_gradient_accumulation(tmp_path):
    task = classifier(compile_network="graphs")
    with pytest.raises(UserError, match=r"accumulate_grad_batches 2; expected 1") as error:
        trainer(tmp_path, accumulate_grad_batches=2).fit(task, Pixels())
    assert "\n" not in str(error.value)
    again = classifier(compile_network="graphs")
    trainer(tmp_path, accumulate_grad_batches=2, limit_test_batches=0).test(again, Pixels(), verbose=False)


def test_a_network_compiled_in_place_keeps_its_state_dict_keys(tmp_path, unchecked):
    task = classifier(compile_network=True, channels_last=True)
    assert task.network.c3.weight.is_contiguous(memory_format=torch.channels_last)
    fitted = trainer(tmp_path)
    fitted.test(task, Pixels(), verbose=False)
    compiled = task.network._compiled_call_impl
    assert compiled is not None
    fitted.test(task, Pixels(), verbose=False)
    assert task.network._compiled_call_impl is compiled  # compiled once per process
    plain = classifier()
    assert task.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(task.state_dict())
    images = Pixels().set.tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(task(images)[0], plain.eval()(images)[0], atol=1e-5, rtol=1e-4)


# Pre-processing


def test_preprocess_scales_and_normalises_pixels():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)[None, None].expand(1, 1, 3, 3)
    values = ImagePreprocess(3, **GREY)(images)[0, 0, 0]
    torch.testing.assert_close(values, torch.tensor([-2.0, -1.2, 2.0]))


def test_preprocess_resize_is_antialiased_like_pillows():
    images = torch.randint(0, 256, (1, 1, 96, 96), dtype=torch.uint8)
    found = ImagePreprocess(32, **GREY).resize(images.float())[0, 0].numpy()
    expected = Image.fromarray(images[0, 0].numpy()).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(found, np.asarray(expected), atol=2)


def test_grey_images_are_repeated_to_three_channels_and_rgb_for_one_channel_is_refused():
    grey, rgb = torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    three = ImagePreprocess(4, mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0])
    torch.testing.assert_close(three(grey), three(rgb))
    with pytest.raises(UserError, match="3 channels"):
        ImagePreprocess(4, **GREY)(rgb)


def test_images_already_scaled_are_refused(unchecked):
    with pytest.raises(UserError, match=r"images are torch.float32; expected torch.uint8") as caught:
        ImagePreprocess(4, **GREY)(torch.zeros(1, 1, 4, 4, dtype=torch.uint8) / 255)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (list(np.array(["a", "b", "c"])), "labels of the data: .*; expected plain values of Python"),
        (np.array(["a", "b", "c"]), "expected plain values of Python"),
        ([0, 1, 2], r"labels of the data: \[0, 1, 2\]; expected texts"),
        (..., "labels of the data: none; expected"),
    ],
)
def test_labels_that_a_checkpoint_or_a_figure_cannot_take_are_refused(labels, message):
    task = ImageClassifier(preprocess=ImagePreprocess(32, **GREY), network=LeNet5(3), optimizer=sgd)
    data = SimpleNamespace(multi_label=False, crop=None, **({} if labels is ... else {"labels": labels}))
    with pytest.raises(UserError, match=message) as caught:
        task.take_facts(data)
    one_line(caught.value)


@pytest.mark.parametrize("shape", [(256, 256), (300, 260), (257, 401), (512, 300)])
def test_centre_crop_at_the_edge_matches_resize_and_crop_in_evaluation(shape):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 9, 13, generator=generator)
    images = (255 * F.interpolate(coarse, shape, mode="bicubic").clamp(0, 1)).to(torch.uint8)
    loader = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    preprocess = ImagePreprocess(224, mean=[0.0] * 3, std=[1.0] * 3)
    squares = [centre(image.permute(1, 2, 0).numpy(), StreamedImages().crop) for image in images]
    edge = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    difference = preprocess(edge) - preprocess(loader(images))
    assert difference.abs().mean() < 0.01  # on a scale of 0 to 1, i.e. less than three grey levels


def test_freezing_a_modules_own_parameter_leaves_its_children_in_training_mode():
    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2), nn.Dropout())
            self.scale = nn.Parameter(torch.ones(2))

    network = nn.Sequential(Scaled(), nn.Linear(2, 2))
    freeze(network, "0.scale")
    assert [module.training for module in network.modules()] == [True, False, True, True, True]


def test_differing_weights_for_tied_parameters_are_refused(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.output = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
            self.output.weight = self.embed.weight

    weight = torch.ones(3, 2)
    torch.save({"embed.weight": weight, "output.weight": weight.clone()}, tmp_path / "tied.pth")
    torch.save({"embed.weight": weight, "output.weight": 2 * weight}, tmp_path / "apart.pth")
    network = Tied()
    load_weights(network, tmp_path / "tied.pth")
    assert network.embed.weight.eq(1).all()
    with pytest.raises(
        UserError, match=r"apart\.pth: output\.weight and embed\.weight differ, but this network ties them"
    ):
        load_weights(network, tmp_path / "apart.pth")
    freeze(network, "output")
    assert not network.embed.weight.requires_grad


def test_empty_tensors_are_not_taken_for_tied_ones(tmp_path):
    """All empty tensors have the address 0."""
    network = nn.ParameterDict({"one": torch.empty(0, 2), "other": torch.empty(0, 3)})
    torch.save(network.state_dict(), tmp_path / "empty.pth")
    assert load_weights(network, tmp_path / "empty.pth") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"global_step": True},
        {"optimizer_states": {}},
        {"pytorch-lightning_version": None},
        {"state_dict": {"a": torch.ones(1), 1: torch.ones(1)}},
        None,
    ],
)
def test_only_checkpoints_of_this_project_are_read_as_such(changes, tmp_path):
    known = {"state_dict": {"a": torch.ones(1)}, "global_step": 3, "pytorch-lightning_version": "2.6"}
    known |= {name: {} for name in ("facts", "optimizer", "loops", "callbacks")}
    known |= {"optimizer_states": [], "lr_schedulers": []}
    torch.save(known, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["global_step"] == 3
    torch.save([known] if changes is None else known | changes, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt: not a checkpoint of this version .*model\.init_args\.weights"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_batch_norm_over_a_single_value_is_reported_in_one_line():
    task = classifier(nn.Sequential(nn.Conv2d(1, 3, 32), nn.BatchNorm2d(3), nn.Flatten()))
    task.mix = None
    with pytest.raises(UserError, match=r"a batch of 1: Expected more than 1 value .*; expected a larger batch_size"):
        task.training_step((torch.zeros(1, 1, 32, 32, dtype=torch.uint8), torch.tensor([0])), 0)


def test_gradients_of_a_fused_optimiser_are_clipped_by_norm():
    task = classifier()
    for parameter in task.network.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    task.trainer = SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
    task.configure_gradient_clipping(torch.optim.AdamW(task.network.parameters(), fused=True), 1.0)
    norms = torch.stack([parameter.grad.norm() for parameter in task.network.parameters()])
    assert norms.norm().item() == pytest.approx(1, rel=1e-4)


def test_gradients_of_a_fused_optimiser_are_clipped_by_value_on_request():
    task = classifier()
    for parameter in task.network.parameters():
        parameter.grad = torch.full_like(parameter, -5.0)
    task.trainer = SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
    task.configure_gradient_clipping(torch.optim.AdamW(task.network.parameters(), fused=True), 1.0, "value")
    assert all((parameter.grad == -1).all() for parameter in task.network.parameters())


def test_mixup_and_cutmix_are_each_enabled_by_their_own_alpha():
    assert [type(mixing(*alphas, 3).transforms[0]) for alphas in ((0.4, 0.0), (0.0, 0.4))] == [v2.MixUp, v2.CutMix]


def test_the_most_certain_mistakes_are_kept():
    sure = torch.linspace(0.5, 0.9, 60)
    kept = []
    for part in torch.stack([sure, 1 - sure], 1).split(20):
        kept = worst_mistakes(kept, torch.zeros(20, 1, 2, 2), part, torch.ones(20).long())
    assert [certainty for certainty, *_ in kept] == pytest.approx(sure.flip(0)[:25].tolist())


def test_a_metric_that_validation_does_not_log_is_refused_before_training():
    task = classifier()
    task.metric = "acc"
    logged = {name: torch.tensor(0.5) for name in ("val/accuracy", "val/loss")}
    fit = SimpleNamespace(callbacks=[], callback_metrics=logged)
    preflight = Preflight("val/accuracy", claim=None, tests=False)
    message = error_of(preflight.on_sanity_check_end, fit, task)
    assert message == (
        "ImageClassifier: metric 'val/acc' is not logged in validation; expected one of val/accuracy, val/loss"
    )
    task.metric = "accuracy"
    preflight.on_sanity_check_end(fit, task)
