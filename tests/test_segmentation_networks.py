"""FCN, PSPNet and DeepLabV3 against torchvision, against each other and against interpolation."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models as published
from torchvision.models import segmentation

from dlref.models import FCNVGG16, CifarResNet, DeepLabV3, FCNCifarResNet, FCNResNet, PSPNet, ResNet
from dlref.models.fcn import bilinear
from dlref.models.pspnet import BINS, PyramidPooling, averages
from dlref.runtime import UserError
from dlref.training.weights import load_weights


def count(network):
    return sum(p.numel() for p in network.parameters())


def stirred(network):
    """Give batch norms random statistics and affine weights, unlike those of new ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def fcn_resnet50():
    torch.manual_seed(0)
    return stirred(segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True))


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_outputs_match_torchvision_with_the_same_weights(name):
    torch.manual_seed(0)
    make = getattr(segmentation, name)
    theirs = stirred(make(weights=None, weights_backbone=None, num_classes=5, aux_loss=True))
    own = {"fcn_resnet50": FCNResNet, "deeplabv3_resnet50": DeepLabV3}[name](50, 5).eval()
    own.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        expected, found = theirs(images), own(images)
    for key, logits in zip(("out", "aux"), found, strict=True):
        logits = F.interpolate(logits, (65, 97), mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, expected[key], atol=1e-4, rtol=0)
        assert expected[key].std() > 0.01


@pytest.mark.parametrize(("own", "name"), [(FCNResNet, "fcn_resnet50"), (DeepLabV3, "deeplabv3_resnet50")])
def test_dropout_drops_the_same_units_as_torchvision(own, name):
    """With the same seed, both heads drop the same units."""
    torch.manual_seed(0)
    theirs = stirred(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5, aux_loss=True))
    own = own(50, 5).eval()
    own.load_state_dict(theirs.state_dict())
    images, found = torch.randn(1, 3, 64, 64), []
    for network in (own, theirs):
        for module in network.modules():
            module.training = isinstance(module, nn.Dropout)
        torch.manual_seed(1)
        with torch.no_grad():
            answers = network(images)
        found.append(tuple(answers.values()) if isinstance(answers, dict) else answers)
    ours = tuple(F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False) for logits in found[0])
    torch.testing.assert_close(ours, found[1], atol=1e-4, rtol=0)


def test_pspnet_has_dropout_of_a_tenth_before_the_last_layer():
    with torch.device("meta"):
        network = PSPNet(18, 5)
    for head in (network.classifier, network.aux_classifier):
        assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [0.1]
        assert isinstance(head[-2], nn.Dropout)


@pytest.mark.parametrize(
    ("network", "name", "parameters"),
    [
        (FCNResNet, "fcn_resnet50", 35_322_218),
        (FCNResNet, "fcn_resnet101", 54_314_346),
        (DeepLabV3, "deeplabv3_resnet50", 42_004_074),
        (DeepLabV3, "deeplabv3_resnet101", 60_996_202),
    ],
)
def test_parameters_and_keys_match_torchvision(network, name, parameters):
    with torch.device("meta"):
        theirs = getattr(segmentation, name)(weights=None, weights_backbone=None, aux_loss=True)
        own = network(int(name[-3:].lstrip("t")))
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (theirs, own)]
    assert shapes[0] == shapes[1]
    assert count(own) == count(theirs) == parameters


def test_an_auxiliary_head_can_be_left_out():
    with torch.device("meta"):
        theirs = segmentation.fcn_resnet50(weights=None, weights_backbone=None)
        own = FCNResNet(50, auxiliary=False)
    assert own.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("depth", [18, 50])
def test_dilated_maps_equal_strided_ones_at_every_fourth_pixel(depth):
    """With the same weights, these pixels do not change, for any size and up to the border."""
    plain, dilated = ResNet(depth), ResNet(depth, replace_stride_with_dilation=(False, True, True))
    dilated.load_state_dict(stirred(plain).state_dict())
    images = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        (*_, coarse), (*_, fine) = plain.stages(images), dilated.eval().stages(images)
    assert (coarse.shape[2:], fine.shape[2:]) == ((4, 5), (13, 17))
    torch.testing.assert_close(fine[..., ::4, ::4], coarse, atol=1e-5 * coarse.max().item(), rtol=0)


def test_dilated_maps_of_a_small_resnet_equal_strided_ones_at_every_second_pixel():
    plain, dilated = CifarResNet(20), CifarResNet(20, replace_stride_with_dilation=(False, True))
    dilated.load_state_dict(stirred(plain).state_dict())
    images = torch.randn(1, 3, 21, 35)
    with torch.no_grad():
        (*_, coarse), (*_, fine) = plain.stages(images), dilated.eval().stages(images)
    # The padded shortcuts subsample with the stride, so pixels stay in place here too.
    torch.testing.assert_close(fine[..., ::2, ::2], coarse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "stride"),
    [
        (lambda: FCNResNet(18, 3, output_stride=8), 8),
        (lambda: FCNResNet(34, 3, output_stride=16), 16),
        (lambda: FCNResNet(18, 3, output_stride=32), 32),
        (lambda: PSPNet(18, 3, output_stride=16), 16),
        (lambda: DeepLabV3(18, 3, output_stride=16), 16),
        (lambda: FCNCifarResNet(20, 3, output_stride=1), 1),
        (lambda: FCNCifarResNet(20, 3, output_stride=2), 2),
        (lambda: FCNCifarResNet(20, 3, output_stride=4), 4),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (51, 33), (1, 1)])
def test_logits_have_the_image_size_divided_by_the_stride_and_rounded_up(network, stride, height, width):
    with torch.no_grad():
        logits = network().eval()(torch.randn(1, 3, height, width))
    logits = logits[0] if isinstance(logits, tuple) else logits
    assert logits.shape == (1, 3, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize(("stride", "rates"), [(16, {6, 12, 18}), (8, {12, 24, 36})])
def test_the_pyramid_has_the_papers_rates(stride, rates):
    """Chen et al. 2017, section 3.3: doubled when the output stride is 8."""
    convolutions = [m for m in DeepLabV3(18, 3, output_stride=stride).classifier[0].modules() if type(m) is nn.Conv2d]
    assert {m.dilation[0] for m in convolutions if m.kernel_size == (3, 3)} == rates


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: FCNResNet(50, output_stride=4), "no output_stride of 4: expected 8, 16 or 32"),
        (lambda: PSPNet(50, output_stride=64), "no output_stride of 64: expected 8, 16 or 32"),
        (lambda: DeepLabV3(50, output_stride=32), "no output_stride of 32: expected 8 or 16"),
        (lambda: FCNCifarResNet(20, output_stride=8), "no output_stride of 8: expected 1, 2 or 4"),
        (lambda: FCNVGG16(stride=4), "no FCN with a stride of 4: expected 8, 16 or 32"),
        (lambda: FCNResNet(20), "no ResNet of depth 20"),
    ],
)
def test_invalid_depths_and_strides_are_refused(unchecked, network, message):
    with pytest.raises(ValueError, match=message):
        network()


# PSPNet


@pytest.mark.parametrize("size", [(1, 1), (6, 6), (5, 13), (60, 45)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_averages_match_adaptive_pooling(bins, size):
    x = torch.randn(2, 4, *size)
    torch.testing.assert_close(averages(x, bins), F.adaptive_avg_pool2d(x, bins), atol=1e-6, rtol=1e-5)


def test_averages_are_computed_in_float32_under_autocast():
    x, pooling, seen = torch.randn(2, 8, 60, 45), PyramidPooling(8), []
    for level in pooling.levels:
        level.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        pooling(x)
    for found, bins in zip(seen, BINS, strict=True):
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(x, bins), atol=1e-6, rtol=1e-5)


def test_pspnet_has_the_parameter_count_of_the_papers_parts():
    """ResNet-50, four 1x1 convolutions to 512, a 3x3 from 4096 to 512, and the heads, with two vectors per norm."""
    with torch.device("meta"):
        network, base = PSPNet(50, 21), ResNet(50)
    trunk = count(base) - (2048 * 1000 + 1000)
    pyramid = 4 * (2048 * 512 + 2 * 512)
    heads = (9 * 4096 * 512 + 2 * 512 + 512 * 21 + 21) + (9 * 1024 * 256 + 2 * 256 + 256 * 21 + 21)
    assert count(network) == trunk + pyramid + heads == 48_957_802


def test_only_the_coarsest_pyramid_level_sees_the_whole_image():
    """A change in one corner reaches the opposite corner only through the level with a single bin."""
    network = stirred(PSPNet(18, 3))
    maps = torch.rand(1, 512, 12, 12)
    changed = maps.clone()
    changed[..., :2, :2] += 1
    with torch.no_grad():
        difference = (network.classifier[0](changed) - network.classifier[0](maps)).abs()[0, :, -1, -1]
    same, *levels = difference.split([512, 128, 128, 128, 128])
    assert not same.any()
    assert levels[0].any()
    assert not levels[1].any()
    assert not levels[3].any()


# FCN on VGG-16


@contextmanager
def thin(layer):
    """To save time, make layers of this type with 8 channels instead of the 4,096 of VGG-16's fc6 and fc7."""

    class Thin(layer):
        def __init__(self, *channels, **options):
            super().__init__(*(8 if count == 4096 else count for count in channels), **options)

    with patch.object(nn, layer.__name__, Thin):
        yield


def thin_fcn(*arguments):
    with thin(nn.Conv2d):
        return FCNVGG16(*arguments)


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    with thin(nn.Linear):
        network = published.vgg16().eval()
    nn.init.normal_(network.classifier[3].weight)  # torchvision's weights give tiny outputs with few channels
    return network


@pytest.mark.parametrize("stride", [2, 8, 16, 32])
def test_transposed_convolutions_are_initialised_to_bilinear_interpolation(stride):
    x = torch.randn(1, 3, 5, 7)
    expected = F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False)
    inside = (..., slice(stride, -stride), slice(stride, -stride))  # beyond the border, the convolution sees zeros
    torch.testing.assert_close(bilinear(3, stride)(x)[inside], expected[inside])


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_fcn_on_vgg_matches_torchvisions_vgg_with_summed_scores(vgg, stride):
    """Build the paper's figure 3 from torchvision's layers and interpolation."""
    network = thin_fcn(3, stride).eval()
    network.load_state_dict(network.state_dict() | network.of_base(vgg.state_dict()))
    for name in ("score_fr", "score_pool4", "score_pool3"):
        if hasattr(network, name):
            nn.init.normal_(getattr(network, name).weight, std=0.1)
    image = torch.randn(1, 3, 160, 192)

    def double(x, factor=2):
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    with torch.no_grad():
        pool3 = vgg.features[:17](image)
        pool4 = vgg.features[17:24](pool3)
        fc6, fc7 = vgg.classifier[0], vgg.classifier[3]
        x = F.conv2d(vgg.features[24:](pool4), fc6.weight.view(8, 512, 7, 7), fc6.bias, padding=3).relu()
        x = network.score_fr(F.conv2d(x, fc7.weight.view(8, 8, 1, 1), fc7.bias).relu())
        if stride <= 16:
            x = double(x) + network.score_pool4(pool4)
        if stride == 8:
            x = double(x) + network.score_pool3(pool3)
        expected, found = double(x, stride), network(image)
    assert found.shape == (1, 3, 160, 192)
    assert found.std() > 0.01
    torch.testing.assert_close(found[..., 56:-56, 56:-56], expected[..., 56:-56, 56:-56], atol=1e-5, rtol=1e-4)


def test_fcn_8s_has_the_papers_parameter_count():
    with torch.device("meta"):
        network = FCNVGG16(21)
    assert count(network) == 134_489_759  # table 1: 134M
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["upscore.weight"]


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (71, 33), (1, 1)])
def test_fcn_on_vgg_returns_logits_for_each_pixel(stride, size):
    with torch.device("meta"):
        assert FCNVGG16(2, stride)(torch.empty(1, 3, *size)).shape == (1, 2, *size)


def test_scores_start_at_zero_and_receive_gradients():
    network = thin_fcn(2)
    logits = network(torch.randn(1, 3, 32, 32))
    assert not logits.any()
    F.cross_entropy(logits, torch.ones(1, 32, 32, dtype=torch.long)).backward()
    assert network.score_fr.weight.grad.any()
    assert network.score_pool3.weight.grad.any()


def test_published_vgg_weights_load_into_the_base(vgg, tmp_path):
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    network = thin_fcn(3)
    fresh = load_weights(network, tmp_path / "vgg16.pth")
    assert {name.split(".")[0] for name in fresh} == set(network.class_layers)
    torch.testing.assert_close(network.fc6.weight.flatten(1), vgg.classifier[0].weight)


def test_weights_of_a_coarser_fcn_load_and_those_of_a_finer_one_are_refused(tmp_path):
    """The paper goes from FCN-32s through FCN-16s to FCN-8s; the other direction would leave layers unused."""
    torch.save(thin_fcn(2, 32).state_dict(), tmp_path / "32.pth")
    torch.save(thin_fcn(2, 8).state_dict(), tmp_path / "8.pth")
    torch.save({**thin_fcn(2, 8).state_dict(), "extra": torch.zeros(1)}, tmp_path / "extra.pth")
    fresh = load_weights(thin_fcn(2, 16), tmp_path / "32.pth")
    assert fresh == ["score_pool4.bias", "score_pool4.weight", "upscore.weight", "upscore2.weight"]
    for name, stride in (("8", 16), ("8", 32), ("extra", 8)):
        with pytest.raises(UserError, match="tensors do not fit FCNVGG16"):
            load_weights(thin_fcn(2, stride), tmp_path / f"{name}.pth")


def test_a_vgg_with_another_classifier_is_refused(vgg, tmp_path):
    features = {key: value for key, value in vgg.state_dict().items() if key.startswith("features.")}
    linear = {"classifier.0.weight": torch.zeros(64, 512), "classifier.0.bias": torch.zeros(64)}
    torch.save(features | linear, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="tensors do not fit FCNVGG16"):
        load_weights(thin_fcn(2), tmp_path / "vgg.pth")


# Weights


@pytest.mark.parametrize("network", [FCNResNet, PSPNet, DeepLabV3])
def test_published_resnet_weights_load_into_the_backbone(network, tmp_path):
    theirs = published.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    own = network(18, 3)
    fresh = load_weights(own, tmp_path / "resnet18.pth")
    assert {name.split(".")[0] for name in fresh} == {"classifier", "aux_classifier"}
    torch.testing.assert_close(own.backbone.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    with pytest.raises(UserError, match=r"resnet18\.pth: \d+ tensors do not fit"):
        load_weights(network(34, 3), tmp_path / "resnet18.pth")


def test_published_weights_for_other_classes_get_new_last_layers(fcn_resnet50, tmp_path, caplog):
    torch.save(fcn_resnet50.state_dict(), tmp_path / "fcn.pth")
    network = FCNResNet(50, 3)
    fresh = load_weights(network, tmp_path / "fcn.pth")
    heads = [f"{head}.4.{kind}" for head in ("aux_classifier", "classifier") for kind in ("bias", "weight")]
    assert fresh == heads
    torch.testing.assert_close(network.classifier[0].weight, fcn_resnet50.classifier[0].weight)
    assert "new head for other classes: aux_classifier.4.bias" in caplog.text
    with pytest.raises(UserError, match="tensors do not fit DeepLabV3"):
        load_weights(DeepLabV3(50, 3), tmp_path / "fcn.pth")


def test_a_pspnet_in_bfloat16_returns_bfloat16_logits():
    images = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    assert PSPNet(18, 3).eval().bfloat16()(images)[0].dtype == torch.bfloat16
