"""Networks compared with the numbers of their papers and, with the same weights, with torchvision's."""

import math
from functools import partial
from typing import get_args

import jaxtyping
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from dlref.models import VGG, ActivationName, AlexNet, CifarResNet, GoogLeNet, LeNet5, ResNet, make_activation
from dlref.models.activations import Maxout
from dlref.models.resnet import PaddedShortcut

ACTIVATIONS = get_args(ActivationName)
TORCHVISION_RESNETS = {
    18: torchvision.models.resnet18,
    34: torchvision.models.resnet34,
    50: torchvision.models.resnet50,
    101: torchvision.models.resnet101,
    152: torchvision.models.resnet152,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise_batch_norms(network: nn.Module) -> nn.Module:
    """Move statistics and weights away from 0 and 1, so that a swapped or lost one is noticed."""
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.0)
            nn.init.normal_(m.bias, std=0.1)
    return network


def assert_same(actual, expected):
    assert expected.std() > 1e-3  # equal constants would prove nothing
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# --- against torchvision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_equals_torchvision(depth):
    theirs = randomise_batch_norms(TORCHVISION_RESNETS[depth]())
    ours = ResNet(depth)
    ours.load_state_dict(theirs.state_dict())
    assert count(ours) == count(theirs)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same(ours.eval()(x), theirs.eval()(x))
        assert_same(ours.train()(x), theirs.train()(x))
    for key, statistics in theirs.named_buffers():  # updated by the batch in training mode
        torch.testing.assert_close(ours.get_buffer(key), statistics)


def test_alexnet_equals_torchvision():
    theirs = torchvision.models.alexnet(dropout=0.0)
    ours = AlexNet(dropout=0.0)
    ours.load_state_dict(theirs.state_dict())
    assert count(ours) == count(theirs) == 61_100_840
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same(ours.eval()(x), theirs.eval()(x))
        assert_same(ours.train()(x), theirs.train()(x))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (AlexNet, torchvision.models.alexnet),
        (partial(VGG, 11), torchvision.models.vgg11),
        (GoogLeNet, partial(torchvision.models.GoogLeNet, init_weights=False)),
    ],
    ids=["alexnet", "vgg11", "googlenet"],
)
def test_dropout_drops_the_same_units_as_torchvision(ours, theirs):
    """With the default rates and the same seed, the same units are dropped in the same places."""
    ours, theirs = ours(num_classes=7), theirs(num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    x, found = torch.randn(2, 3, 96, 96), []
    for network in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(network(x))
    if isinstance(found[1], tuple):  # torchvision's heads are in another order
        found[1] = (found[1].logits, found[1].aux_logits1, found[1].aux_logits2)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_googlenet_equals_torchvision(training):
    theirs = torchvision.models.GoogLeNet(init_weights=False, dropout=0.0, dropout_aux=0.0)
    randomise_batch_norms(theirs)
    ours = GoogLeNet(dropout=0.0, aux_dropout=0.0)
    ours.load_state_dict(theirs.state_dict())
    assert count(ours) == count(theirs) == 13_004_888
    ours.train(training)
    theirs.train(training)
    theirs.training = True  # only its own flag decides whether it returns the auxiliary logits
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        logits, aux1, aux2 = ours(x)
        expected = theirs(x)
    assert_same(logits, expected.logits)
    assert_same(aux1, expected.aux_logits1)
    assert_same(aux2, expected.aux_logits2)


def test_googlenet_weights_are_initialised_from_a_truncated_normal():
    network = GoogLeNet(num_classes=10)
    for m in network.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            assert m.weight.abs().max() <= 0.02
    std = network.aux1.fc1.weight.std().item()
    assert std == pytest.approx(0.0088, rel=0.01)  # 0.88 of 0.01: the tails are cut


def test_vgg_weights_are_initialised_as_in_torchvision():
    convolution, linear = VGG(11, 7).features[18], VGG(11, 7).classifier[3]
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.02)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not convolution.bias.any()
    assert not linear.bias.any()


@pytest.mark.parametrize("depth", [34, 101, 152])
def test_deeper_resnets_have_the_weight_names_and_shapes_of_torchvision(depth):
    with torch.device("meta"):
        theirs, ours = TORCHVISION_RESNETS[depth](), ResNet(depth)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_resnet200_has_torchvisions_parameter_count():
    bottleneck = torchvision.models.resnet.Bottleneck
    with torch.device("meta"):
        theirs = torchvision.models.resnet.ResNet(bottleneck, [3, 24, 36, 3])
        ours = ResNet(200)
    assert count(ours) == count(theirs) == 64_673_832
    assert ours.state_dict().keys() == theirs.state_dict().keys()


class ShortcutA(nn.Module):
    """Option A as in fb.resnet.torch: 1x1 average pooling, then as many zero channels appended."""

    def forward(self, x):
        x = F.avg_pool2d(x, 1, stride=2)
        return torch.cat([x, torch.zeros_like(x)], dim=1)


def test_cifar_resnet_equals_a_network_of_torchvisions_blocks():
    ours = randomise_batch_norms(CifarResNet(20))
    block = torchvision.models.resnet.BasicBlock
    layer1 = nn.Sequential(block(16, 16), block(16, 16), block(16, 16))
    layer2 = nn.Sequential(block(16, 32, 2, ShortcutA()), block(32, 32), block(32, 32))
    layer3 = nn.Sequential(block(32, 64, 2, ShortcutA()), block(64, 64), block(64, 64))
    conv1, bn1, fc = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Linear(64, 10)
    names = ("conv1", "bn1", "layer1", "layer2", "layer3", "fc")
    theirs = nn.ModuleDict(zip(names, (conv1, bn1, layer1, layer2, layer3, fc), strict=True))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        with torch.no_grad():
            maps = layer3(layer2(layer1(torch.relu(bn1(conv1(x))))))
            assert_same(ours(x), fc(maps.mean(dim=(2, 3))))


def test_resnet_weights_have_kaiming_initialisation_with_fan_out():
    for weight in (ResNet(18, 10).layer4[0].conv1.weight, CifarResNet(20).layer3[0].conv1.weight):
        fan_out = weight.shape[0] * 3 * 3
        assert weight.shape[0] == 2 * weight.shape[1]  # so fan-in would give another value
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)


# --- against the papers' numbers ---------------------------------------------------------------------------


def test_lenet_layers_have_the_expected_parameter_counts():
    network = LeNet5()
    layers = {name: count(module) for name, module in network.named_children() if count(module)}
    # LeCun et al., 1998, section II.B gives C1, C5 and F6; its C3, with table I's connections, has 1,516.
    assert layers == {"c1": 156, "c3": 2_416, "c5": 48_120, "f6": 10_164, "output": 850}
    assert count(network) == 61_706
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_lenet_matches_a_computation_by_hand():
    """Compute figure 2 with means over 2x2 windows and C5 as a dot product, which it is at 32x32."""
    network = LeNet5()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        c1 = torch.tanh(F.conv2d(x, network.c1.weight, network.c1.bias))
        s2 = c1.reshape(2, 6, 14, 2, 14, 2).mean(dim=(3, 5))
        c3 = torch.tanh(F.conv2d(s2, network.c3.weight, network.c3.bias))
        s4 = c3.reshape(2, 16, 5, 2, 5, 2).mean(dim=(3, 5))
        c5 = torch.tanh(s4.flatten(1) @ network.c5.weight.flatten(1).T + network.c5.bias)
        f6 = torch.tanh(c5 @ network.f6.weight.T + network.f6.bias)
        assert_same(network(x), f6 @ network.output.weight.T + network.output.bias)


def cifar_resnet_count(n: int) -> int:
    """Section 4.2's table: 2n layers of 3x3 convolutions at each of 16, 32 and 64 filters; K = 10."""
    convolutions = 9 * (3 * 16 + (2 * n) * 16 * 16)
    convolutions += 9 * (16 * 32 + (2 * n - 1) * 32 * 32)
    convolutions += 9 * (32 * 64 + (2 * n - 1) * 64 * 64)
    batch_norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    return convolutions + batch_norms + 65 * 10


@pytest.mark.parametrize(
    ("depth", "exact", "paper"),
    [
        (20, 269_722, 0.27),
        (32, 464_154, 0.46),
        (44, 658_586, 0.66),
        (56, 853_018, 0.85),
        (110, 1_727_962, 1.7),
    ],
)
def test_cifar_resnets_have_the_papers_parameter_counts_and_depths(depth, exact, paper):
    network = CifarResNet(depth)
    assert count(network) == exact == cifar_resnet_count((depth - 2) // 6)
    digits = 1 if depth == 110 else 2  # as many as table 6 prints
    assert round(exact / 1e6, digits) == paper
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == depth


def test_padded_shortcut_subsamples_and_pads_with_zero_channels():
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    y = PaddedShortcut(2, 5, stride=2)(x)
    assert y[0, 0].tolist() == [[0, 2], [8, 10]]
    assert y[0, 1].tolist() == [[16, 18], [24, 26]]
    assert y.shape == (1, 5, 2, 2)
    assert not y[0, 2:].any()
    kinds = [type(m) for name, m in CifarResNet(20).named_modules() if name.endswith("downsample")]
    assert kinds == [nn.Identity] * 3 + [PaddedShortcut, nn.Identity, nn.Identity] * 2


def test_blocks_with_zero_weights_pass_their_shortcut_through():
    """With F(x) = 0, only the shortcuts remain: the last maps are the first ones, subsampled twice."""
    network = CifarResNet(20).eval()
    for name, p in network.named_parameters():
        if name.startswith("layer"):
            nn.init.zeros_(p)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = network.stages(x)[-1]
        first = torch.relu(network.bn1(network.conv1(x)))
    assert torch.equal(maps[:, :16], first[:, :, ::4, ::4])
    assert not maps[:, 16:].any()


def test_the_cifar_stem_keeps_the_resolution_and_has_a_smaller_convolution():
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert ResNet(18, 10).stages(x)[-1].shape == (1, 512, 2, 2)
        assert ResNet(18, 10, stem="cifar").stages(x)[-1].shape == (1, 512, 8, 8)
    with torch.device("meta"):
        saved = count(ResNet(18)) - count(ResNet(18, stem="cifar"))
    assert saved == 64 * 3 * (7 * 7 - 3 * 3)


# --- properties of every network ---------------------------------------------------------------------------

NETWORKS = {
    "lenet5": lambda **kw: LeNet5(**{"in_channels": 3, **kw}),
    "resnet18": lambda **kw: ResNet(18, **kw),
    "resnet50_cifar": lambda **kw: ResNet(50, stem="cifar", **kw),
    "cifar_resnet20": lambda **kw: CifarResNet(20, **kw),
    "alexnet": lambda **kw: AlexNet(**kw),
    "vgg11": lambda **kw: VGG(11, **kw),
    "googlenet": lambda **kw: GoogLeNet(**kw),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_class_layers_are_the_layers_that_depend_on_num_classes(name):
    with torch.device("meta"):
        few, many = (NETWORKS[name](num_classes=k) for k in (7, 9))
    shapes = {key: p.shape for key, p in few.named_parameters()}
    changed = {key.rpartition(".")[0] for key, p in many.named_parameters() if p.shape != shapes[key]}
    assert changed == set(many.class_layers)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_have_one_column_per_class_for_one_and_three_channels(name, channels):
    size = 32 if name == "lenet5" else 224
    with torch.device("meta"):
        network = NETWORKS[name](num_classes=7, in_channels=channels)
        outputs = network(torch.empty(2, channels, size, size))
    for output in outputs if name == "googlenet" else [outputs]:
        assert output.shape == (2, 7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["lenet5", "resnet18_cifar"])
def test_every_activation_gives_finite_gradients(name, activation):
    if name == "lenet5":
        network = LeNet5(in_channels=3, activation=activation)
    else:
        network = ResNet(18, 10, stem="cifar", activation=activation)
    size = 32 if name == "lenet5" else 8
    loss = network(torch.randn(2, 3, size, size)).square().sum()
    loss.backward()
    assert loss.isfinite()
    for key, p in network.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["alexnet", "googlenet", "resnet50_cifar", "cifar_resnet20"])
@pytest.mark.parametrize("activation", ["prelu", "maxout"])
def test_each_layer_has_its_own_learned_activation(name, activation):
    with torch.device("meta"):
        plain = count(NETWORKS[name](num_classes=10))
        network = NETWORKS[name](num_classes=10, activation=activation)
        network(torch.empty(2, 3, 64, 64))
    layers = {"alexnet": 7, "googlenet": 3 + 9 * 6 + 2 * 2, "resnet50_cifar": 49, "cifar_resnet20": 19}
    assert count(network) - plain == layers[name] * {"prelu": 1, "maxout": 4}[activation]


@pytest.mark.parametrize("name", ["lenet5", "cifar_resnet20"])
def test_networks_overfit_one_batch(name):
    network = NETWORKS[name](num_classes=10)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    first = F.cross_entropy(network(x), y).item()
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
    assert first > 1.5
    assert loss.item() < 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last_gives_the_same_outputs(name):
    network = randomise_batch_norms(NETWORKS[name](num_classes=10)).eval()
    x = torch.randn(2, 3, *((32, 32) if name == "lenet5" else (64, 64)))
    with torch.no_grad():
        expected = network(x)
        actual = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


def test_maxout_keeps_channels_last():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert make_activation("maxout")(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ["relu", "maxout", "step"])
@pytest.mark.parametrize("name", ["lenet5", "cifar_resnet20"])
def test_networks_can_be_exported_with_a_dynamic_batch(name, activation):
    network = randomise_batch_norms(NETWORKS[name](num_classes=10, activation=activation)).eval()
    batch = torch.export.Dim("B")
    program = torch.export.export(network, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        x = torch.randn(size, 3, 32, 32)
        torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnet18"])  # others cover its blocks and stem
def test_networks_compile_in_place_without_graph_breaks(name):
    network = randomise_batch_norms(NETWORKS[name](num_classes=10)).eval()
    keys = network.state_dict().keys()
    x = torch.randn(2, 3, *((32, 32) if name == "lenet5" else (64, 64)))
    with torch.no_grad():
        expected = network(x)
        network.compile(backend="eager", fullgraph=True)  # fullgraph: a graph break is an error
        actual = network(x)
    torch.testing.assert_close(actual, expected)
    assert network.state_dict().keys() == keys


# --- arguments ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNet(19), "19.*18, 34, 50, 101, 152, 200"),
        (lambda: CifarResNet(18), "18.*20, 32, 44, 56, 110"),
        (lambda: ResNet(18, stem="mnist"), "mnist.*imagenet or cifar"),
        (lambda: LeNet5(activation="relu6"), "relu6.*identity, step, .*maxout"),
        (lambda: make_activation("softmax"), "for the output only"),
    ],
)
def test_invalid_arguments_are_refused_with_the_expected_values(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_shape_annotations_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        CifarResNet(20)(torch.randn(3, 32, 32))
    with pytest.raises(jaxtyping.TypeCheckError):
        LeNet5()(torch.randn(2, 1, 28, 28))


# --- activations -------------------------------------------------------------------------------------------

# name: value and derivative in closed form, at any x except a kink
CLOSED_FORMS = {
    "identity": (lambda x: x, lambda x: 1),
    "step": (lambda x: float(x > 0), lambda x: 0),
    "sigmoid": (lambda x: 1 / (1 + math.exp(-x)), lambda x: math.exp(-x) / (1 + math.exp(-x)) ** 2),
    "tanh": (lambda x: 1 - 2 / (math.exp(2 * x) + 1), lambda x: 1 / math.cosh(x) ** 2),
    "relu": (lambda x: max(0, x), lambda x: float(x > 0)),
    "leaky_relu": (lambda x: max(0.01 * x, x), lambda x: 1 if x > 0 else 0.01),
    "prelu": (lambda x: max(0.25 * x, x), lambda x: 1 if x > 0 else 0.25),
    "elu": (lambda x: x if x > 0 else math.exp(x) - 1, lambda x: 1 if x > 0 else math.exp(x)),
    "silu": (
        lambda x: x / (1 + math.exp(-x)),
        lambda x: (1 + math.exp(-x) + x * math.exp(-x)) / (1 + math.exp(-x)) ** 2,
    ),
    "maxout": (lambda x: max(0.01 * x + 0.0099, x), lambda x: 1 if x > 0.01 else 0.01),
}


def test_every_activation_has_a_closed_form_here():
    assert set(CLOSED_FORMS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_the_values_and_derivatives_of_their_closed_forms(name):
    value, derivative = CLOSED_FORMS[name]
    points = [-3.0, -1.0, -0.1, 0.1, 0.5, 1.0, 3.0]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    y = make_activation(name).double()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    close = {"atol": 1e-6, "rtol": 1e-6}  # parameters such as 0.01 started as float32
    torch.testing.assert_close(y.detach(), torch.tensor([value(p) for p in points]).double(), **close)
    torch.testing.assert_close(slope, torch.tensor([derivative(p) for p in points]).double(), **close)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_do_not_change_their_input(name):
    x = torch.linspace(-2, 2, 9)
    before = x.clone()
    make_activation(name)(x)
    assert torch.equal(x, before)


def test_step_at_zero_is_zero():
    assert make_activation("step")(torch.zeros(1)).item() == 0


def test_maxout_matches_values_computed_by_hand():
    maxout = Maxout(pieces=3)
    with torch.no_grad():
        maxout.weight.copy_(torch.tensor([-1.0, 0.0, 2.0]))
        maxout.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    y = maxout(x)
    assert y.tolist() == [2, 1, 5]  # -x, 1 and 2x - 1 in turn
    y.sum().backward()
    assert x.grad.tolist() == [-1, 0, 2]
    assert maxout.weight.grad.tolist() == [-2, 0, 3]  # each piece learns from the input that it wins
    assert maxout.bias.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_maxout_starts_near_relu_with_every_piece_in_use(pieces):
    maxout = Maxout(pieces)
    x = torch.linspace(-3, 3, 1001)
    y = maxout(x)
    assert (y - torch.relu(x)).abs().max() <= 0.26
    y.sum().backward()
    assert (maxout.bias.grad > 0).all()
