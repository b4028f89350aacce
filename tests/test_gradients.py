"""Gradients of every loss and every network against finite differences, in float64.

A loss is checked in full by torch's `gradcheck`. A network is checked along a random direction through its parameters
and inputs: autograd's derivative against central differences of two step lengths. A kink (of a ReLU or a max-pool)
between the points of a difference makes the two differ, so such a direction fails and cannot pass by chance.
"""

import inspect
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from test_detection import detector
from test_forecasting import forecaster, window_of
from test_segmentation import segmenter
from test_segmentation_networks import stirred
from test_seq2seq import sentences
from test_tasks import classifier, sgd
from test_translation import PAIRS, translator
from test_translation import batch_of as pairs
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from dlref import models
from dlref.models import ActivationName, make_activation
from dlref.models.gpt import Past
from dlref.tasks import Beta, Deterministic, Gaussian, LanguageModel, NegativeBinomial, StudentT
from dlref.tasks.image_classification import mixing
from dlref.tasks.semantic_segmentation import VOID

STEPS = (2e-8, 1e-8)  # relative to each tensor's size: as short as rounding (1e-16) allows, so that kinks are rare
TOLERANCE = 1e-6  # of the difference, relative to the tensors' contributions to the derivative
ENTRIES = 1000  # maximum number of entries of a tensor that change at once


@pytest.fixture(autouse=True)
def _float_is_double(monkeypatch):
    """Losses convert half precision to float32 by `float()`, which would round float64 outputs."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


# Losses


class Given(nn.Module):
    """A network that returns a given output."""

    def forward(self, *_):
        return self.answer


def alone(task):
    """Convert a task to float64 and silence its logging."""
    task.double().log = task.log_dict = lambda *_, **__: None
    return task


def loss_of(task, batch, packed=lambda *answers: answers if len(answers) > 1 else answers[0]):
    """Return the loss of a training step as a function of the network's outputs."""
    alone(task)

    def loss(*answers):
        torch.manual_seed(1)  # draws the same mixup or cutmix at each call
        task.network.answer = packed(*answers)
        return task.training_step(batch, 0)

    return loss


def pictures(count, size):
    return torch.randint(0, 256, (count, 3 if size != 32 else 1, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "class_weights": [1.0, 2.0, 0.5]}, {"mixup": 0.4}, {"cutmix": 1.0}],
    ids=lambda options: "+".join(options) or "plain",
)
def test_gradients_of_the_classification_loss(options, heads):
    task = classifier(Given(), **options)
    task.mix = mixing(task.mixup, task.cutmix, 3)
    loss = loss_of(task, (pictures(5, 32), torch.tensor([0, 1, 2, 2, 1])))
    assert gradcheck(loss, [numbers(5, 3) for _ in range(heads)])


def test_gradients_of_the_multi_label_classification_loss():
    task = classifier(Given(), class_weights=[1.0, 3.0, 0.5])
    task.facts["multi_label"], task.mix = True, None
    assert gradcheck(loss_of(task, (pictures(4, 32), torch.randint(0, 2, (4, 3)).double())), [numbers(4, 3)])


@pytest.mark.parametrize("class_weights", [None, [1.0, 0.3, 2.0]])
def test_gradients_of_the_segmentation_loss(class_weights):
    masks = torch.randint(0, 3, (2, 6, 8), dtype=torch.uint8)
    masks[0, :2], masks[1, :, 3] = VOID, VOID
    loss = loss_of(segmenter(Given(), class_weights=class_weights), (torch.zeros(2, 3, 6, 8, dtype=torch.uint8), masks))
    assert gradcheck(loss, (numbers(2, 3, 3, 4), numbers(2, 3, 2, 2)))


def test_gradients_of_the_detection_loss():
    """Two images with boxes and one without; only the hardest negatives count, so the others have no gradient."""
    network = Given()
    network.size, cells = 8, (torch.arange(4) + 0.5) / 4
    centres = torch.stack(torch.meshgrid(cells, cells, indexing="ij"), dim=-1).flatten(0, 1)
    network.anchors = torch.cat([centres, torch.full((16, 2), 0.25)], dim=1).double()
    boxes = torch.tensor([[[0.0, 0.0, 0.3, 0.2], [0.5, 0.4, 0.9, 0.8]], [[0.7, 0.7, 1.0, 0.9]] * 2, [[0.0] * 4] * 2])
    targets = {"boxes": boxes.double(), "labels": torch.tensor([[0, 1], [1, -1], [-1, -1]])}
    loss, heads = loss_of(detector(network), (pictures(3, 8), targets)), (numbers(3, 16, 4), numbers(3, 16, 3))
    assert gradcheck(loss, heads)
    loss(*heads).backward()
    offsets, logits = ((head.grad != 0).any(2).sum(1) for head in heads)
    assert offsets[0] >= 2
    assert offsets[2] == 0
    torch.testing.assert_close(logits, 4 * offsets + 3 * (offsets == 0))


@pytest.mark.parametrize("distribution", [StudentT(), Gaussian(), NegativeBinomial(), Beta(), Deterministic()])
def test_gradients_of_the_forecasting_loss(distribution):
    values = torch.rand(3, 10) if isinstance(distribution, Beta) else torch.randint(1, 30, (3, 10))
    window = window_of(values, observed=torch.rand(3, 10) < 0.8)
    window = window._replace(values=window.values.double())
    task = forecaster(distribution, network=Given())
    assert gradcheck(loss_of(task, window, lambda raw: (raw, None)), [numbers(3, 10, distribution.parameters)])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradients_of_the_translation_loss(label_smoothing):
    batch = pairs(*PAIRS[:2])  # half of the second target is padding
    task = translator(label_smoothing=label_smoothing)
    task.network = Given()
    assert gradcheck(loss_of(task, batch), [numbers(2, batch.target.shape[1] - 1, 64)])


# Networks


def of_all(answers) -> Tensor:
    """Return a number that depends on all outputs."""
    answers = list(answers) if isinstance(answers, tuple | list) else [answers]
    generator = torch.Generator().manual_seed(2)
    weighed = [(x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).mean() for x in answers]
    return sum(weighed)


def assert_derivative(tensors, loss):
    """Assert that autograd's derivative of `loss()` along a random direction of all `tensors` matches differences."""
    gradients = torch.autograd.grad(loss(), tensors)
    flat = [x.detach().view(-1) for x in tensors]
    places = [torch.arange(len(x)) if len(x) <= ENTRIES else torch.randint(len(x), (ENTRIES,)) for x in flat]
    sizes = [x.square().mean().sqrt() for x in flat]
    moves = [size * torch.randn(len(place), dtype=x.dtype) for x, place, size in zip(flat, places, sizes, strict=True)]
    parts = [(g.reshape(-1)[place] * move).sum() for g, place, move in zip(gradients, places, moves, strict=True)]
    parts = torch.stack(parts)
    assert parts.isfinite().all()

    def at(step):
        for x, place, move in zip(flat, places, moves, strict=True):
            x.index_add_(0, place, step * move)
        with torch.no_grad():
            found = loss()
        for x, place, move in zip(flat, places, moves, strict=True):
            x.index_add_(0, place, -step * move)
        return found

    allowed = TOLERANCE * parts.norm().item()
    assert allowed > 0
    for step in STEPS:
        difference = (at(step) - at(-step)) / (2 * step)
        torch.testing.assert_close(difference, parts.sum(), atol=allowed, rtol=0)


def ready(network):
    """Return the network in float64, with weights for which outputs depend on all layers, away from their kinks."""
    stirred(network)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return network.double()


def assert_gradients(network, answers, *inputs):
    tensors = [parameter for parameter in network.parameters() if parameter.requires_grad] + list(inputs)
    assert_derivative(tensors, lambda: of_all(answers(*inputs)))


def eighth(width):
    return width // 8 if width >= 32 and width % 8 == 0 else width


def narrowed(layer, widths):
    """Return the class `layer` with its first `widths` arguments, which are widths, divided by eight."""

    class Narrow(layer):
        def __init__(self, *sizes, **options):
            super().__init__(*map(eighth, sizes[:widths]), *sizes[widths:], **options)
            if hasattr(self, "out_channels"):  # SSD reads it from a convolution to build the norm after it
                self.out_channels = sizes[1]

    return Narrow


@pytest.fixture
def narrow(monkeypatch):
    """Build layers with an eighth of their width, for speed; the networks' code is unchanged."""
    for layer, widths in ((nn.Conv2d, 2), (nn.Linear, 2), (nn.BatchNorm2d, 1)):
        monkeypatch.setattr(nn, layer.__name__, narrowed(layer, widths))


def ssd_vgg(size):
    network = models.SSDVGG16(2, size)
    network.backbone.scale_weight = nn.Parameter(torch.full((64,), 20.0))
    return network


# Network and side of the smallest images it accepts.
SMALL = {
    "LeNet5 tanh": (lambda: models.LeNet5(3, 3), 32),
    "LeNet5 maxout": (lambda: models.LeNet5(3, 3, activation="maxout"), 32),
    "CifarResNet": (lambda: models.CifarResNet(20, 3), 8),
    "FCNCifarResNet": (lambda: models.FCNCifarResNet(20, 3), 9),
    "DeepLabV3": (lambda: models.DeepLabV3(18, 3, output_stride=16), 33),
}
WIDE = {
    "AlexNet": (lambda: models.AlexNet(3), 63),
    "VGG": (lambda: models.VGG(11, 3), 32),
    "ResNet 18": (lambda: models.ResNet(18, 3), 33),
    "ResNet 50": (lambda: models.ResNet(50, 3), 33),
    "ResNet cifar stem": (lambda: models.ResNet(18, 3, stem="cifar"), 9),
    "GoogLeNet": (lambda: models.GoogLeNet(3), 15),
    "SSDVGG16 300": (lambda: ssd_vgg(300), 300),
    "SSDResNet 96": (lambda: models.SSDResNet(18, 2, 96), 96),
    "SSDResNet 300": (lambda: models.SSDResNet(18, 2, 300), 300),
    "FCNVGG16 8s": (lambda: models.FCNVGG16(3, 8), 33),
    "FCNVGG16 32s": (lambda: models.FCNVGG16(3, 32), 33),
    "FCNResNet": (lambda: models.FCNResNet(18, 3), 33),
    "PSPNet": (lambda: models.PSPNet(18, 3), 49),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_small_image_networks(name):
    make, side = SMALL[name]
    network = ready(make())
    assert_gradients(network, network, numbers(2, 3, side, side))


@pytest.mark.parametrize("name", WIDE)
def test_gradients_of_image_networks_at_reduced_width(name, narrow):
    make, side = WIDE[name]
    network = ready(make())
    assert_gradients(network, network, numbers(1, 3, side, side))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_deepar(cell):
    network = ready(models.DeepAR(3, 2, [4, 2], cell=cell, num_cells=5))
    categories, scale = torch.tensor([[3, 0], [1, 1]]), (torch.rand(2).double() + 0.5).requires_grad_()
    inputs = numbers(2, 6, 3), numbers(2, 6, 2), scale, numbers(4 if cell == "lstm" else 2, 2, 5)
    assert_gradients(
        network, lambda lagged, known, scale, state: network(lagged, known, categories, scale, state), *inputs
    )


@pytest.mark.parametrize(
    "options",
    [
        {"cell": "gru", "num_layers": 2, "residual": True},
        {"cell": "lstm", "initial": "avg", "attention": "general"},
        {"cell": "lstm", "input_feeding": True, "attention": "dot", "tied": True},
        {"encoder": "unidirectional", "attention": "none", "num_layers": 2},
        {"encoder": "convolutional", "initial": "zero", "num_layers": 2},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_gradients_of_seq2seq(options):
    network = ready(models.Seq2Seq(11, 13, hidden_size=6, embedding_size=6, **options))
    source, lengths, target = sentences()
    assert_gradients(network, lambda: network(source, lengths, target))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "qk_norm": True}], ids=["plain", "norm"])
def test_gradients_of_gpt_with_and_without_a_past(positions, options):
    network = ready(models.GPT(13, 12, n_layer=2, n_head=2, n_embd=8, positions=positions, **options))
    tokens = torch.randint(13, (2, 9))

    def answers():
        hidden, keys, values = network(tokens[:, :5])
        after, *_ = network(tokens[:, 5:], Past(keys, values, torch.tensor([5, 3])))
        return network.logits(hidden), network.logits(after)

    assert_gradients(network, answers)


def test_gradients_of_the_language_model_loss_through_its_network():
    task = alone(LanguageModel(network=ready(models.GPT(13, 12, n_layer=2, n_head=2, n_embd=8)), optimizer=sgd))
    batch = torch.randint(13, (3, 13))
    assert_derivative(list(task.parameters()), lambda: task.training_step(batch, 0))


@pytest.mark.parametrize("name", get_args(ActivationName))
def test_gradients_of_activations(name):
    inputs = torch.tensor([-3.0, -0.7, -0.01, 0.02, 0.9, 4.0], dtype=torch.double, requires_grad=True)
    module = make_activation(name).double()
    names, parameters = [name for name, _ in module.named_parameters()], tuple(module.parameters())

    def activation(inputs, *parameters):
        return functional_call(module, dict(zip(names, parameters, strict=True)), inputs)

    assert gradcheck(activation, (inputs, *parameters))


def test_gradients_of_each_public_network_are_checked():
    """New networks must be added to this file."""
    checked = {name.partition(" ")[0] for name in SMALL | WIDE} | {"DeepAR", "Seq2Seq", "GPT"}
    assert checked == {name for name in models.__all__ if inspect.isclass(getattr(models, name))}


# Wrong gradients are detected


@pytest.mark.parametrize("wrong", [lambda gradient: 2 * gradient, torch.zeros_like], ids=["doubled", "detached"])
def test_the_check_detects_a_wrong_gradient_of_any_tensor_of_a_network(wrong, narrow):
    network = ready(models.ResNet(18, 3))
    image = numbers(1, 3, 33, 33)
    for tensor in [image, *network.parameters()]:
        handle = tensor.register_hook(wrong)
        with pytest.raises(AssertionError):
            assert_gradients(network, network, image)
        handle.remove()
    assert_gradients(network, network, image)


@pytest.mark.parametrize("wrong", [lambda x: 2 * x - x.detach(), lambda x: x.detach() + 0 * x])
def test_gradcheck_detects_a_wrong_gradient_of_a_loss(wrong):
    task = classifier(Given())
    task.mix = None
    loss = loss_of(task, (pictures(4, 32), torch.tensor([0, 1, 2, 0])))
    assert gradcheck(loss, [numbers(4, 3)])
    assert not gradcheck(lambda logits: loss(wrong(logits)), [numbers(4, 3)], raise_exception=False)


def test_the_check_detects_a_kink_between_its_points():
    for near, found in ((1e-3, False), (1e-9, True)):
        x = torch.tensor([near, 1.0], dtype=torch.double, requires_grad=True)
        with pytest.raises(AssertionError) if found else nullcontext():
            assert_derivative([x], lambda x=x: x.abs().sum())
