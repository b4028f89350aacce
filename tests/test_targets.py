"""The bundle of every target, and the fallback from its precision to float32."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from onnx import helper, numpy_helper
from test_export import Photographs
from test_tasks import Pixels, classifier, sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlref.export.bundle import export
from dlref.export.convert import SAMPLES, Plan, convert, embeddings, is_quantised, place_in, prepare
from dlref.export.graph import write_onnx
from dlref.export.measure import can_time, provider, provider_works
from dlref.export.targets import TARGETS
from dlref.models import CifarResNet
from dlref.models.pspnet import averages
from dlref.runtime import UserError, load
from dlref.runtime.bundle import OnnxGraph
from dlref.runtime.machine import PRODUCT, saturates
from dlref.tasks import ImageClassifier, ImagePreprocess
from dlref.tasks.deployable import Graph

NETWORKS = {
    "lenet5": lambda: (classifier().eval(), Pixels()),
    "resnet20": lambda: (
        ImageClassifier(
            network=CifarResNet(20, 3), preprocess=ImagePreprocess(32, mean=[0.4] * 3, std=[0.2] * 3), optimizer=sgd
        ).eval(),
        Photographs(32, n=6),
    ),
}


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """Start and time no process: pretend that lower precision is faster."""
    monkeypatch.setattr("dlref.export.measure.Contenders.latencies", lambda *_: [1.0, 2.0])


def made(task, data, target, folder):
    return export(task, data, target, folder, contenders=())


# Files


# A residual network for targets that convert convolutions in a way of their own.
@pytest.mark.parametrize(
    ("name", "network"),
    [
        (name, "resnet20" if name in ("x86-64", "x86-64-avx2", "arm64", "qualcomm", "cuda", "web") else "lenet5")
        for name in TARGETS
    ],
)
def test_every_targets_bundle_loads_and_matches_pytorch(name, network, tmp_path):
    task, data = NETWORKS[network]()
    target = replace(TARGETS[name], gate=100.0)  # untrained networks have no accuracy to lose
    manifest = made(task, data, target, tmp_path / "bundle")
    assert manifest["precision"] == target.precision
    assert manifest["target"]["name"] == name
    assert manifest["verification"]["attempts"][-1]["refused"] == ""
    assert {row["precision"] for row in manifest["verification"]["parity"]} == {"float32", target.precision}
    described = manifest["graphs"]["classify"]
    assert described["file"] == f"classify.{target.file_format}"
    assert {value["type"] for value in described["outputs"]} == {"float32"}
    runner = load(tmp_path / "bundle", provider="CPUExecutionProvider")
    image = data.set.tensors[0][0].permute(1, 2, 0).numpy()
    answer = runner.probability(image[None])
    with torch.no_grad():
        expected = task(data.set.tensors[0][:1])[0].softmax(-1).numpy()
    np.testing.assert_allclose(answer, expected, atol=1e-5 if target.precision == "float32" else 0.05)
    assert len(runner([image, image[:20, :25]])) == 2  # images are resized for a graph with fixed shapes
    structure = {"qualcomm": fixed_and_16_bits, "mobile": small_build, "cuda": half, "tensorrt": half}
    structure |= {"arm64": eight_bits(np.int8), "x86-64": eight_bits(np.uint8), "x86-64-avx2": seven_bit_weights}
    structure |= {"cpu": plain, "web": eight_bits(np.uint8)}
    structure[name](tmp_path / "bundle")
    assert f"`{name}`" in (ROOT / "docs" / "edge.md").read_text()


def loaded(bundle):
    model = onnx.load(bundle / "classify.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert {opset.domain for opset in model.opset_import} == {""}
    return model


def plain(bundle):
    """Check for an opset that any onnxruntime since 1.17 reads, including the one in browsers."""
    (opset,) = loaded(bundle).opset_import
    assert opset.version == 20


def shapes(model):
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return [v.type.tensor_type.shape for v in (*inferred.input, *inferred.output, *inferred.value_info)]


def fixed_and_16_bits(bundle):
    model = loaded(bundle)
    assert model.opset_import[0].version == 21
    assert all(dim.dim_value > 0 and not dim.dim_param for shape in shapes(model) for dim in shape.dim)
    assert np.uint16 in activation_types(model)
    assert "Resize" not in {node.op_type for node in model.graph.node}  # nothing is left to resize


def small_build(bundle):
    assert (bundle / "classify.ort").read_bytes()[4:8] == b"ORTM"
    text = (bundle / "classify.required_operators.config").read_text()
    operators = {line.split(";")[0]: line.split(";")[2] for line in text.splitlines()}
    assert "QLinearConv" in operators["com.microsoft"]
    assert "Softmax" in text.replace("\n", ",").split(",")
    assert str(bundle) not in text
    assert "/" not in text


def half(bundle):
    model = loaded(bundle)
    kernels = {c.dtype for c in constants(model).values() if c.ndim == 4 and c.dtype != np.int64}
    assert kernels == {np.dtype(np.float16)}
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def eight_bits(activation):
    def check(bundle):
        plain(bundle)
        model = loaded(bundle)
        assert activation_types(model) == {activation}
        assert {weight.dtype for weight, _ in weights(model)} == {np.dtype(np.int8)}
        assert all(scale.size == len(weight) for weight, scale in weights(model) if weight.ndim == 4)  # per channel

    return check


def seven_bit_weights(bundle):
    eight_bits(np.uint8)(bundle)
    assert max(np.abs(weight).max() for weight, _ in weights(loaded(bundle))) <= 64


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def weights(model):
    """Return every quantised weight with its scale."""
    known = constants(model)
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in known]
    return [(known[n.input[0]], known[n.input[1]]) for n in nodes if known[n.input[0]].dtype == np.int8]


def activation_types(model):
    known = constants(model)
    return {known[node.input[2]].dtype.type for node in model.graph.node if node.op_type == "QuantizeLinear"}


class Summing(nn.Module):
    """Layers with equal weights, for 32 equal inputs; a layer that occurs twice shares its weights."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        for weights in self.parameters():
            nn.init.constant_(weights, 0.01 if weights.ndim > 1 else 0)

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


class Shifted(nn.Module):
    """ReLU around -3. The constant is shared by nodes that are quantised, and by one that stays in float."""

    def forward(self, x):
        return (x + 3).relu() - 3


SUMMING = {
    "Conv": (nn.Sequential(*[nn.Conv1d(32, 32, 1)] * 2), [1, 32, 3]),
    "Add": (nn.Sequential(*[nn.Conv1d(32, 32, 1), Shifted()] * 2, nn.Conv1d(32, 32, 1)), [1, 32, 3]),
    "MatMul": (nn.Sequential(*[nn.Linear(32, 32)] * 2), [1, 3, 32]),
    "LSTM": (nn.LSTM(32, 2, batch_first=True), [1, 3, 32]),
}


@pytest.mark.parametrize("name", ["x86-64", "arm64", "mobile"])
@pytest.mark.parametrize("operator", SUMMING)
def test_sums_of_8_bit_products_do_not_saturate(operator, name, tmp_path):
    """Without VNNI, x86-64 by default adds pairs of products of up to 255 x 127 in 16 bits."""
    layer, shape = SUMMING[operator]
    graph = Graph(Summing(layer).eval(), {"x": torch.ones(shape)}, ["y"], {}, {})
    feeds = [{"x": np.ones(shape, np.float32)}]
    write_onnx(graph, tmp_path / "sum.onnx", TARGETS[name])
    convert(tmp_path / "sum.onnx", tmp_path / "int8.onnx", TARGETS[name], Plan("int8", "MinMax"), feeds)
    assert is_quantised(tmp_path / "int8.onnx")
    (tmp_path / "bundle").mkdir()
    place_in(tmp_path / "bundle", tmp_path / "int8.onnx", TARGETS[name])
    answer = OnnxGraph(tmp_path / f"bundle/int8.{TARGETS[name].file_format}", "CPUExecutionProvider")(**feeds[0])
    np.testing.assert_allclose(answer["y"], graph(**feeds[0])["y"], rtol=0.02)


class Masked(nn.Module):
    """Layers with the same mask after each."""

    def __init__(self, layers, shape):
        super().__init__()
        self.layers, self.mask = layers, nn.Parameter(torch.rand(shape))

    def forward(self, x):
        for layer in self.layers:
            x = (layer(x) + self.mask).relu()
        return x


@pytest.mark.parametrize(("operator", "copies"), [("Conv", 2), ("MatMul", 1)])
def test_a_constant_is_copied_only_for_nodes_that_are_quantised(operator, copies, tmp_path):
    """Dynamic quantisation leaves additions in float: copies of a large mask could outweigh the layers."""
    layers, shape = SUMMING[operator]
    graph = Graph(Masked(layers, shape).eval(), {"x": torch.ones(shape)}, ["y"], {}, {})
    write_onnx(graph, tmp_path / "sum.onnx", TARGETS["x86-64"])
    prepare(tmp_path / "sum.onnx", tmp_path / "prepared.onnx", TARGETS["x86-64"])
    constants = onnx.load(tmp_path / "prepared.onnx").graph.initializer
    assert sum(list(tensor.dims) == shape for tensor in constants) == copies


def written(nodes, weights, shapes, path):
    """Write a graph from `x` to `y` for x86-64."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes[name]) for name in "xy")
    constants = [numpy_helper.from_array(np.full(shape, 0.1, np.float32), name) for name, shape in weights.items()]
    opsets = [helper.make_opsetid("", TARGETS["x86-64"].opset)]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_between_the_layers_of_a_graph_for_a_cpu_every_value_is_8_bits(tmp_path):
    """An operator left in float, such as a pooling, costs a conversion before and after it."""
    steps = {
        "Conv": {},
        "MaxPool": {"kernel_shape": [2, 2]},
        "AveragePool": {"kernel_shape": [2, 2]},
        "Add": {},
        "Concat": {"axis": 1},
        "GlobalAveragePool": {},
        "Flatten": {},
        "MatMul": {},
        "Gemm": {},
    }
    second = {"Conv": "kernel", "MatMul": "first", "Gemm": "last", "Add": "AveragePool", "Concat": "AveragePool"}
    nodes, before = [], "x"
    for kind, options in steps.items():
        after = "y" if kind == "Gemm" else kind
        inputs = [before, *([second[kind]] if kind in second else [])]
        nodes.append(helper.make_node(kind, inputs, [after], name=kind, **options))
        before = after
    weights = {"kernel": (4, 3, 1, 1), "first": (8, 5), "last": (5, 2)}
    written(nodes, weights, {"x": [1, 3, 8, 8], "y": [1, 2]}, tmp_path / "g.onnx")
    feeds = [{"x": np.random.default_rng(0).random((1, 3, 8, 8), np.float32)}]
    convert(tmp_path / "g.onnx", tmp_path / "int8.onnx", TARGETS["x86-64"], Plan("int8", "MinMax"), feeds)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    writers = {output: node.op_type for node in graph.node for output in node.output}
    read = {node.op_type: {writers[name] for name in node.input} for node in graph.node if node.op_type in steps}
    assert read == {kind: {"DequantizeLinear"} for kind in steps}


def test_a_phones_graph_has_only_operators_of_any_processor(tmp_path):
    """onnxruntime's optimiser writes layers with blocked channels for x86-64, which no phone has."""
    conv = helper.make_node("Conv", ["x", "kernel"], ["y"], name="Conv")
    written([conv], {"kernel": (32, 32, 1, 1)}, {name: [1, 32, 8, 8] for name in "xy"}, tmp_path / "g.onnx")
    place_in(tmp_path, tmp_path / "g.onnx", TARGETS["mobile"])
    assert (tmp_path / "g.required_operators.config").read_text().splitlines() == ["ai.onnx;11;Conv"]


def test_the_saturation_check_runs_a_product_of_8_bit_numbers():
    types = {
        "a": (onnx.TensorProto.UINT8, "mk"),
        "b": (onnx.TensorProto.INT8, "kn"),
        "y": (onnx.TensorProto.INT32, "mn"),
    }
    a, b, y = (helper.make_tensor_value_info(name, kind, list(axes)) for name, (kind, axes) in types.items())
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "s", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=5)
    assert onnx.load_model_from_string(PRODUCT) == model


def exact(a, b):
    return a.astype(np.int32) @ b.astype(np.int32)


def in_pairs_of_16_bits(a, b):
    products = a.astype(np.int32)[:, :, None] * b
    return (products[:, ::2] + products[:, 1::2]).clip(-(2**15), 2**15 - 1).sum(1)


def no_kernel(a, b):
    raise RuntimeError("NOT_IMPLEMENTED")


@pytest.mark.parametrize(("product", "found"), [(exact, False), (in_pairs_of_16_bits, True), (no_kernel, True)])
def test_saturates_detects_a_processor_whose_8_bit_sums_saturate(product, found, monkeypatch):
    session = SimpleNamespace(run=lambda outputs, inputs: [product(**inputs)])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    assert saturates.__wrapped__() == found


@pytest.mark.parametrize(("found", "entry"), [(True, "1"), (False, None)])
def test_exact_8_bit_sums_are_enabled_only_on_processors_that_saturate(found, entry, monkeypatch, tmp_path):
    """On other processors, exact sums would take more than twice the time."""
    monkeypatch.setattr("dlref.runtime.bundle.saturates", lambda: found)
    (tmp_path / "product.onnx").write_bytes(PRODUCT)
    options = OnnxGraph(tmp_path / "product.onnx", "CPUExecutionProvider").session.get_session_options()
    try:
        assert options.get_session_config_entry("session.x64quantprecision") == entry
    except RuntimeError:  # no such entry
        assert entry is None


def test_dynamically_quantised_weights_have_one_scale_per_output(tmp_path):
    weight = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3, n]) for name, n in (("x", 32), ("y", 16)))
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph([product], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    opsets = [helper.make_opsetid("", TARGETS["x86-64"].opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "product.onnx")
    convert(tmp_path / "product.onnx", tmp_path / "int8.onnx", TARGETS["x86-64"], Plan("int8"), [])
    (scale,) = (c for name, c in constants(onnx.load(tmp_path / "int8.onnx")).items() if name.endswith("_scale"))
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=0) / 127, rtol=0.02)
    convert(tmp_path / "product.onnx", tmp_path / "int7.onnx", TARGETS["x86-64-avx2"], Plan("int8"), [])
    for name, largest in (("int8", 127), ("int7", 64)):
        (eight,) = (c for c in constants(onnx.load(tmp_path / f"{name}.onnx")).values() if c.shape == weight.shape)
        assert largest - 1 <= np.abs(eight.astype(int)).max() <= largest


class Embedded(nn.Module):
    """A layer over two embedded inputs, which share a table, and what is computed from them, which has its own."""

    def __init__(self, rows):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.others, self.layer = nn.Embedding(rows, 8), nn.Embedding(rows, 8), nn.Linear(8, 4)

    def forward(self, tokens, before):
        return self.layer(self.tokens(tokens) + self.tokens(before) + self.others(tokens.clamp(max=9)))


@pytest.mark.parametrize(("rows", "kept"), [(2**17, False), (2**17, True), (2**17 - 1, False)])
def test_of_a_dynamically_quantised_graphs_tables_the_large_ones_of_tokens_become_integers(rows, kept, tmp_path):
    tokens = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(0))
    graph = Graph(Embedded(rows).eval(), inputs := {"tokens": tokens, "before": tokens.flip(1)}, ["y"], {}, {})
    write_onnx(graph, tmp_path / "step.onnx", TARGETS["x86-64"])
    lookups = embeddings(onnx.load(tmp_path / "step.onnx").graph)
    assert len(lookups) == 2 * (rows == 2**17)
    plan = Plan("int8", kept={"step": lookups} if kept else {})
    convert(tmp_path / "step.onnx", tmp_path / "int8.onnx", TARGETS["x86-64"], plan, [])
    tables = [c for c in constants(onnx.load(tmp_path / "int8.onnx")).values() if c.shape == (rows, 8)]
    small = rows < 2**17
    assert sorted(table.dtype.name for table in tables) == ["float32", "float32" if kept or small else "uint8"]
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    answer = OnnxGraph(tmp_path / "int8.onnx", "CPUExecutionProvider")(**feeds)
    np.testing.assert_allclose(answer["y"], graph(**feeds)["y"], atol=0.08)


class Alike(nn.Module):
    """How alike two embedded inputs are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2**17, 8)

    def forward(self, one, other):
        return (self.table(one) * self.table(other)).sum(1)


def test_a_graph_of_embeddings_alone_is_quantised(tmp_path):
    graph = Graph(Alike().eval(), dict.fromkeys(("one", "other"), torch.arange(3)), ["y"], {}, {})
    write_onnx(graph, tmp_path / "step.onnx", TARGETS["x86-64"])
    convert(tmp_path / "step.onnx", tmp_path / "int8.onnx", TARGETS["x86-64"], Plan("int8"), [])
    assert not is_quantised(tmp_path / "step.onnx")
    assert is_quantised(tmp_path / "int8.onnx")


class Normalised(nn.Module):
    """Between two convolutions, operators that only an NPU runs in integers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 2, 1)

    def forward(self, x):
        return self.last(nn.functional.normalize(self.first(x).softmax(1), dim=-1))


def test_between_the_layers_of_a_graph_for_an_npu_every_value_is_quantised(tmp_path):
    """A node in float would run on the CPU; a normalisation is one operator, as the NPU has it."""
    graph, target = Graph(Normalised().eval(), {"x": torch.rand(1, 3, 8)}, ["y"], {}, {}), TARGETS["qualcomm"]
    write_onnx(graph, tmp_path / "step.onnx", target)
    feeds = [{"x": np.random.default_rng(0).random((1, 3, 8), np.float32)}]
    convert(tmp_path / "step.onnx", tmp_path / "int16.onnx", target, Plan("int16", "MinMax"), feeds)
    nodes = onnx.load(tmp_path / "int16.onnx").graph.node
    writers = {output: node.op_type for node in nodes for output in node.output}
    computing = [node for node in nodes if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert [node.op_type for node in computing] == ["Conv", "Softmax", "LpNormalization", "Conv"]
    assert {writers[name] for node in computing for name in node.input} == {"DequantizeLinear"}
    answer = OnnxGraph(tmp_path / "int16.onnx", "CPUExecutionProvider")(**feeds[0])
    np.testing.assert_allclose(answer["y"], graph(**feeds[0])["y"], atol=0.02)


def test_no_two_calibration_methods_share_a_folder():
    """Otherwise the second one would be judged by the bundle of the first."""
    assert len({str(Plan("int8", method)) for method in SAMPLES}) == len(SAMPLES)


class Averaged(nn.Module):
    """PSPNet's average over the image, between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
        for weights in self.parameters():
            nn.init.ones_(weights)

    def forward(self, x):
        return self.last(averages(self.first(x), 1))


def test_the_average_of_a_smaller_image_than_in_training_is_as_exact_in_int8(tmp_path):
    """One of its factors is 1 / n, n the number of rows or columns: a calibrated range would cut it off."""
    graph = Graph(Averaged().eval(), {"x": torch.ones(1, 1, 8, 8)}, ["y"], {"x": {2: "height"}}, {"height": (8, 2)})
    write_onnx(graph, tmp_path / "mean.onnx", TARGETS["arm64"])
    feeds = [{"x": graph.inputs["x"].numpy()}]
    convert(tmp_path / "mean.onnx", tmp_path / "int8.onnx", TARGETS["arm64"], Plan("int8", "MinMax"), feeds)
    assert is_quantised(tmp_path / "int8.onnx")
    answer = OnnxGraph(tmp_path / "int8.onnx", "CPUExecutionProvider")(x=np.ones((1, 1, 2, 8), np.float32))
    np.testing.assert_allclose(answer["y"], 3, rtol=0.02)


# The fallback to float32


class Spiked(nn.Module):
    """Classify the brightness of an image; a second channel, which the head ignores, explodes at pure white."""

    def __init__(self):
        super().__init__()
        self.harmless = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(7)))
        self.features = nn.Conv2d(1, 2, 1)
        self.pool = nn.AvgPool2d(32)
        self.head = nn.Conv2d(2, 3, 1)
        centres = torch.tensor([1.47, 2.73, 3.98])  # of the three classes of `Pixels`, after features
        with torch.no_grad():
            for layer in self.harmless:
                layer.weight.fill_(1)
                layer.bias.zero_()
            self.features.weight.copy_(torch.tensor([1.0, 1e6]).reshape(2, 1, 1, 1))
            self.features.bias.copy_(torch.tensor([3.0, -1.999e6]))
            self.head.weight.copy_(5 * torch.stack([centres, torch.zeros(3)], dim=1)[:, :, None, None])
            self.head.bias.copy_(-5 * centres**2 / 2)

    def forward(self, x):
        return self.head(self.pool(self.features(self.harmless(x)).relu())).flatten(1)


class WhiteInTraining(Pixels):
    """A white image in the training data, and therefore in the calibration data."""

    def train_dataloader(self):
        images, targets = (tensor.clone() for tensor in self.set.tensors)
        images[9] = 255
        return DataLoader(TensorDataset(images, targets), batch_size=16)


@pytest.fixture
def spiked():
    return classifier(Spiked()).eval(), WhiteInTraining()


def test_int8_that_loses_accuracy_is_refused_until_the_worst_nodes_stay_in_float(spiked, tmp_path, capsys):
    manifest = made(*spiked, TARGETS["x86-64"], tmp_path / "bundle")
    *refused, held = manifest["verification"]["attempts"]
    assert [attempt["calibration"] for attempt in refused[:3]] == list(SAMPLES)
    assert all("points lost; expected at most 0.5" in attempt["refused"] for attempt in refused)
    assert manifest["precision"] == "int8"
    kept = held["kept_float"]["classify"]
    model = onnx.load(tmp_path / "bundle/classify.onnx")
    by_name = {node.name: node for node in model.graph.node}
    assert any(by_name[name].op_type == "Conv" for name in kept)
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)  # not everything
    metric = manifest["verification"]["metric"]
    assert metric["pytorch"] - metric["bundle"] <= 0.005
    report = (tmp_path / "bundle/report.md").read_text()
    assert "Tried for int8 and refused:" in report
    assert f"Kept in float: {', '.join(f'classify/{name}' for name in kept)}." in report
    assert "int8-MinMax refused: accuracy" in capsys.readouterr().err.replace("\n", " ")


def test_a_float16_bundle_keeps_the_nodes_in_float_whose_values_are_too_large(spiked, tmp_path):
    """On a CPU its metric would not show them: few of its kernels compute in float16."""
    manifest = made(*spiked, TARGETS["cuda"], tmp_path / "bundle")
    (attempt,) = manifest["verification"]["attempts"]
    kinds = {node.name: node.op_type for node in onnx.load(tmp_path / "bundle/classify.onnx").graph.node}
    assert [kinds[name] for name in attempt["kept_float"]["classify"]] == ["Conv", "Relu"]
    assert manifest["precision"] == "float16"


def test_an_attempt_with_a_nan_score_is_refused_and_its_score_recorded_as_none(tmp_path, monkeypatch):
    task, data = NETWORKS["lenet5"]()
    # PyTorch on both splits, calibration, two attempts, and the second one on the test split.
    scores, evaluate = iter([0.9, 0.9, None, float("nan"), 0.9, 0.9]), task.evaluate

    def scored(runner, batches):
        score = next(scores)
        return evaluate(runner, batches) if score is None else score

    monkeypatch.setattr(task, "evaluate", scored)
    manifest = made(task, data, TARGETS["arm64"], tmp_path / "bundle")
    first, second = manifest["verification"]["attempts"]
    assert first["score"] is None
    assert "inf points lost" in first["refused"]
    assert (second["score"], manifest["precision"]) == (0.9, "int8")


def test_export_falls_back_to_float32_if_the_worst_nodes_cannot_be_found(spiked, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("classify: bad allocation")

    monkeypatch.setattr("dlref.export.attempts.SAMPLES", {"MinMax": 256})
    monkeypatch.setattr("dlref.export.attempts.worst_nodes", refuse)
    assert made(*spiked, TARGETS["x86-64"], tmp_path / "bundle")["precision"] == "float32"
    assert "cannot find the nodes that lose the most precision: classify: bad allocation" in capsys.readouterr().err


def test_a_vendors_simulation_on_the_cpu_is_not_used_as_its_npu(monkeypatch):
    kinds = onnxruntime.OrtHardwareDeviceType
    for there, expected in (([kinds.CPU], "CPUExecutionProvider"), ([kinds.CPU, kinds.NPU], "QNNExecutionProvider")):
        found = [SimpleNamespace(device=SimpleNamespace(type=kind)) for kind in there]
        monkeypatch.setattr("dlref.export.measure.plugin_devices", lambda provider, found=found: found)
        monkeypatch.setattr("dlref.export.measure.OnnxGraph", lambda *_: None)
        provider_works.cache_clear()
        assert provider(TARGETS["qualcomm"]) == expected
    provider_works.cache_clear()


def test_provider_is_the_cpu_if_the_targets_provider_package_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime_qnn.py").write_text("def get_library_path(): return 'none.so'")
    monkeypatch.syspath_prepend(tmp_path)
    provider_works.cache_clear()
    assert provider(TARGETS["qualcomm"]) == "CPUExecutionProvider"
    provider_works.cache_clear()
    sys.modules.pop("onnxruntime_qnn")


def test_provider_is_the_cpu_if_the_targets_provider_does_not_start(monkeypatch):
    known = [*onnxruntime.get_available_providers(), "QNNExecutionProvider"]  # as if this build included it
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    provider_works.cache_clear()
    with pytest.warns(UserWarning, match="not in available"):
        assert provider(TARGETS["qualcomm"]) == "CPUExecutionProvider"
    assert provider(TARGETS["cpu"]) == "CPUExecutionProvider"
    provider_works.cache_clear()


def test_export_falls_back_to_float32_after_all_int8_attempts_and_reports_it(spiked, tmp_path, monkeypatch):
    monkeypatch.setattr("dlref.export.attempts.KEPT_FLOAT", ())
    manifest = made(*spiked, TARGETS["x86-64"], tmp_path / "bundle")
    assert manifest["precision"] == "float32"
    attempts = manifest["verification"]["attempts"]
    assert [attempt["precision"] for attempt in attempts] == ["int8"] * 3 + ["float32"]
    assert manifest["verification"]["metric"]["max_abs_error"] < 1e-5
    assert ": float32, CPUExecutionProvider" in (tmp_path / "bundle/report.md").read_text()


def test_int8_that_is_not_faster_falls_back_to_float32_without_further_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr("dlref.export.measure.Contenders.latencies", lambda *_: [2.0, 2.0])
    monkeypatch.setattr("dlref.export.attempts.can_time", lambda target: True)
    task, data = NETWORKS["lenet5"]()
    manifest = made(task, data, replace(TARGETS["arm64"], gate=100.0), tmp_path / "bundle")
    first, last = manifest["verification"]["attempts"]
    assert first["refused"] == "2.000 ms per answer; expected less than float32's 2.000 ms"
    assert (last["precision"], manifest["precision"]) == ("float32", "float32")


def test_speed_is_not_judged_on_a_machine_unlike_the_target(tmp_path, monkeypatch):
    monkeypatch.setattr("dlref.export.measure.Contenders.latencies", lambda *_: [2.0, 2.0])
    task, data = NETWORKS["lenet5"]()
    target = replace(TARGETS["arm64"], machines=("abacus",), gate=100.0)
    manifest = export(task, data, target, tmp_path / "bundle")
    assert manifest["precision"] == "int8"
    assert manifest["measurement"]["contenders"] == {}
    assert "says nothing about this device" in (tmp_path / "bundle/report.md").read_text()
    assert can_time(TARGETS["cpu"])
    assert not can_time(TARGETS["qualcomm"])  # its processor executes nothing on this machine


def test_export_falls_back_to_float32_if_onnxruntime_cannot_convert_the_graph(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such\nscheme")

    measured = {"threads": 1, "processor": "", "contenders": {}}
    monkeypatch.setattr("dlref.export.convert.quantize", refuse)
    monkeypatch.setattr(
        "dlref.export.measure.Contenders.measurement",
        lambda self, bundle, names: measured | {"not_run": {"bundle": bundle.name}},
    )
    task, data = NETWORKS["lenet5"]()
    manifest = made(task, data, TARGETS["x86-64"], tmp_path / "bundle")
    assert manifest["precision"] == manifest["measurement"]["not_run"]["bundle"] == "float32"
    assert manifest["verification"]["attempts"][0]["refused"].endswith("cannot convert it (no such scheme)")
    assert json.loads((tmp_path / "bundle/manifest.json").read_text()) == manifest


def test_calibration_uses_only_training_data(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("dlref.export.attempts.convert", lambda *arguments: seen.append(arguments) or real(*arguments))
    from dlref.export.convert import convert as real

    task, data = NETWORKS["lenet5"]()
    training = torch.randint(0, 256, (300, 1, 32, 32), dtype=torch.uint8)
    data.train_dataloader = lambda: DataLoader(TensorDataset(training, torch.zeros(300).long()), batch_size=100)
    made(task, data, replace(TARGETS["x86-64"], gate=100.0), tmp_path / "bundle")
    (feeds,) = [feeds for *_, feeds, _ in seen if feeds]
    images = np.concatenate([feed["image"] for feed in feeds])
    np.testing.assert_array_equal(images, training[: SAMPLES["MinMax"]].permute(0, 2, 3, 1).numpy())
