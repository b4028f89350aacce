"""Known bugs that spoil an export without an error, planted here and caught by verification."""

import os
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from test_tasks import Pixels, classifier
from torch import nn

from dlref.export.bundle import export
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.export.verify import Refused
from dlref.runtime import UserError
from dlref.tasks import ImageClassifier
from dlref.tasks.deployable import Deployable, Graph

CPU = TARGETS["cpu"]


class Reader(nn.Module):
    """Read an image as a sequence of rows: a recurrent or attention layer, its mean over time, a head."""

    def __init__(self, layer, features):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(features, 3)

    def forward(self, image):
        sequence = self.layer((image[..., 0].float() - 127) / 64)
        sequence = sequence[0] if isinstance(sequence, tuple) else sequence
        return self.head(sequence.mean(dim=1)).softmax(dim=-1)


class Attention(nn.Module):
    """Self-attention over rows of 32 pixels."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 3 * 32)

    def forward(self, rows):
        heads = self.project(rows).reshape(rows.shape[0], rows.shape[1], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(rows.shape)


class ReadingTask(ImageClassifier):
    """An image classifier with a `Reader`; `axes` names the dynamic axes of the image."""

    axes = ("batch",)

    def deployable(self, batch):
        """Return a graph whose time axis is the image's height."""
        image = batch[0].permute(0, 2, 3, 1).contiguous()
        graph = Graph(
            module=self.network.eval(),
            inputs={"image": image},
            outputs=["probability"],
            dynamic_axes={"image": dict(enumerate(self.axes))},
            sizes={"batch": (1, 2, 7), "height": (32, 5, 40)},
        )
        return Deployable("image-classification", {"classify": graph}, {**self.facts, "channels": image.shape[3]})


def reading(layer, features, axes=("batch",)):
    torch.manual_seed(3)
    task = classifier(Reader(layer, features)).eval()
    task.__class__ = ReadingTask
    task.axes = axes
    return task


def planted(monkeypatch, change):
    """Apply a change to the ONNX model that the exporter writes."""

    def write(graph, path, target):
        program = write_onnx(graph, path, target)
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)
        return program

    monkeypatch.setattr("dlref.export.attempts.write_onnx", write)


def made(task, folder, target=CPU):
    return export(task, Pixels(), target, folder, contenders=())


class Frozen(nn.Module):
    """A network that runs at any length but is correct at only one."""

    def __init__(self, network, length):
        super().__init__()
        self.network, self.length = network, length

    def forward(self, image):
        return self.network(F.pad(image, (0, 0, 0, 0, 0, self.length))[:, : self.length])


def test_an_lstm_frozen_at_the_examples_length_is_refused_if_its_length_is_dynamic(tmp_path, monkeypatch):
    """pytorch#191855: the file declares a dynamic length and accepts any, but treats each as the example's."""
    task = reading(nn.LSTM(32, 6, batch_first=True, bidirectional=True), 12)
    made(task, tmp_path / "honest")  # the length is declared as fixed

    def freeze(graph, path, target):
        return write_onnx(replace(graph, module=Frozen(graph.module, 32)), path, target)

    monkeypatch.setattr("dlref.export.attempts.write_onnx", freeze)
    made(task, tmp_path / "frozen")  # correct, since the length is still declared as fixed
    task.axes = ("batch", "height")
    with pytest.raises(UserError, match=r"classify at .*'height': 5.* differs from PyTorch"):
        made(task, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_gru_exported_without_linear_before_reset_is_refused(tmp_path, monkeypatch):
    """PyTorch applies the reset gate after the recurrent product; ONNX's default is before it."""
    task = reading(nn.GRU(32, 6, batch_first=True), 6)
    made(task, tmp_path / "honest")

    def forget(model):
        (gru,) = [node for node in model.graph.node if node.op_type == "GRU"]
        (attribute,) = [attribute for attribute in gru.attribute if attribute.name == "linear_before_reset"]
        assert attribute.i == 1
        gru.attribute.remove(attribute)

    planted(monkeypatch, forget)
    with pytest.raises(Refused, match="differs from PyTorch by"):
        made(task, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("factor", "target"), [(1.01, "cpu"), (0.999, "cpu"), (255.0, "cpu"), (0.999, "x86-64"), (0.999, "cuda")]
)
def test_a_wrong_normalisation_constant_is_refused_at_every_precision(factor, target, tmp_path, monkeypatch):
    """At lower precision, the metric alone might tolerate the error."""

    def blunder(model):
        (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == "preprocess.scale"]
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(factor), scale.name))

    planted(monkeypatch, blunder)
    with pytest.raises(Refused, match="differs from PyTorch by"):
        made(classifier().eval(), tmp_path / "bundle", TARGETS[target])


@pytest.fixture
def attending(monkeypatch):
    """A task whose graph contains the Attention operator, and a target that quantises it dynamically."""
    monkeypatch.setattr("dlref.export.measure.Contenders.latencies", lambda *_: [1.0, 2.0])
    target = replace(TARGETS["x86-64"], opset=23, ir_version=11, gate=100.0)
    return reading(Attention(), 32), target


def operators(bundle):
    return {f"{node.domain}.{node.op_type}" for node in onnx.load(bundle / "classify.onnx").graph.node}


def test_the_attention_operator_is_kept_by_dynamic_quantisation(attending, tmp_path):
    task, target = attending
    manifest = made(task, tmp_path / "bundle", target)
    assert manifest["precision"] == "int8"
    assert {".Attention", ".MatMulInteger"} <= operators(tmp_path / "bundle")


def test_unrestricted_dynamic_quantisation_writes_an_unusable_operator_and_is_refused(attending, tmp_path, monkeypatch):
    """The reason, recorded in the bundle, contains no path of this machine."""
    monkeypatch.setattr("dlref.export.convert.DYNAMIC", None)  # every operator it supports
    task, target = attending
    manifest = made(task, tmp_path / "bundle", target)
    assert manifest["precision"] == "float32"
    assert "QAttention" in manifest["verification"]["attempts"][0]["refused"]
    assert ".Attention" in operators(tmp_path / "bundle")
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "bundle").iterdir())


def test_lstms_are_quantised_and_grus_stay_in_float(tmp_path, monkeypatch):
    monkeypatch.setattr("dlref.export.measure.Contenders.latencies", lambda *_: [1.0, 2.0])
    target = replace(TARGETS["x86-64"], gate=100.0)
    made(reading(nn.LSTM(32, 6, batch_first=True), 6), tmp_path / "lstm", target)
    assert "com.microsoft.DynamicQuantizeLSTM" in operators(tmp_path / "lstm")
    made(reading(nn.GRU(32, 6, batch_first=True), 6), tmp_path / "gru", target)
    assert {".GRU", ".MatMulInteger"} <= operators(tmp_path / "gru")  # only the head's product is quantised


def test_a_graph_with_recurrent_layers_is_not_converted_to_float16(tmp_path):
    manifest = made(reading(nn.LSTM(32, 6, batch_first=True), 6), tmp_path / "bundle", TARGETS["cuda"])
    refused, held = manifest["verification"]["attempts"]
    assert refused["refused"].endswith("recurrent layers stay float32; expected a graph without them")
    assert held["precision"] == manifest["precision"] == "float32"


def test_a_graph_that_crashes_onnxruntime_does_not_crash_the_export(tmp_path, monkeypatch):
    """The process that first opens the bundle is killed by a signal."""
    dies = "import os, signal, sys\nif 'once' in sys.orig_argv: os.kill(os.getpid(), signal.SIGSEGV)\n"
    (tmp_path / "sitecustomize.py").write_text(dies)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    manifest = made(classifier().eval(), tmp_path / "bundle", TARGETS["cuda"])
    refused, held = manifest["verification"]["attempts"]
    assert refused["precision"] == "float16"
    assert "its process ended with code -11" in refused["refused"]
    assert held["precision"] == manifest["precision"] == "float32"


class GruAlone(nn.Module):
    """A GRU of three cells and no other layer."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(32, 3, batch_first=True)

    def forward(self, image):
        return self.gru((image[..., 0].float() - 127) / 64)[0].mean(dim=1).softmax(dim=-1)


def test_a_graph_without_quantisable_nodes_is_not_called_int8(tmp_path):
    task = reading(None, 1)
    task.network = GruAlone()
    manifest = made(task, tmp_path / "bundle", replace(TARGETS["arm64"], gate=100.0))
    assert manifest["precision"] == "float32"
    assert "onnxruntime quantised no node" in manifest["verification"]["attempts"][0]["refused"]
