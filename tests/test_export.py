"""Exported graphs against PyTorch: traced on one shape, compared on others; refused exports."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from handmade import make_bundle
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from refusals import error_of
from test_tasks import Linear, Pixels, classifier, sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlref.export import bundle as bundles
from dlref.export.attempts import FLOAT32, Attempt, Attempts, Recorder, score
from dlref.export.convert import (
    DEBUGGED,
    SAMPLES,
    Plan,
    convert,
    infinity_mask_nodes,
    nodes_beyond_float16,
    postprocessing_nodes,
    static_configuration,
    without_round_trips,
    worst_nodes,
)
from dlref.export.graph import example_at, name_axes, trace_sizes, write_onnx, write_program
from dlref.export.manifest import write_manifest
from dlref.export.targets import TARGETS
from dlref.export.verify import Compared, Reference, Refused, parity
from dlref.models import AlexNet, GoogLeNet, LeNet5, ResNet
from dlref.runtime import UserError, load
from dlref.runtime.bundle import OnnxGraph
from dlref.tasks import ImageClassifier, ImagePreprocess
from dlref.tasks.deployable import Deployable, Graph

CPU = TARGETS["cpu"]


def export(task, data, target, output):
    """Export without the measurement, which takes seconds and has its own tests."""
    return bundles.export(task, data, target, output, contenders=())


NETWORKS = {
    "lenet5": (lambda: LeNet5(3, in_channels=3), 32),
    "resnet50": (lambda: ResNet(50, 3), 64),
    "alexnet": (lambda: AlexNet(3), 64),
    "googlenet": (lambda: GoogLeNet(3), 64),
}


class Photographs(Pixels):
    """Images with three channels and the labels of `classifier`."""

    def __init__(self, size, n=12):
        super().__init__(n=n, size=size)
        images, targets = self.set.tensors
        self.set = TensorDataset(images.expand(-1, 3, -1, -1).contiguous(), targets)

    def val_dataloader(self):
        return DataLoader(self.set, batch_size=5)

    test_dataloader = val_dataloader


@pytest.fixture(params=NETWORKS)
def photographic(request):
    make, size = NETWORKS[request.param]
    preprocess = ImagePreprocess(size, mean=[0.4] * 3, std=[0.2] * 3)
    network = make()
    with torch.no_grad():  # random networks give similar outputs; spread them so that errors show
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    task = ImageClassifier(network=network, preprocess=preprocess, optimizer=sgd).eval()
    return task, Photographs(size)


def test_every_exported_network_matches_pytorch_at_shapes_it_was_not_traced_on(photographic, tmp_path):
    task, data = photographic
    task.take_facts(data)
    graph = task.deployable(next(iter(data.val_dataloader()))).graphs["classify"]
    write_onnx(graph, tmp_path / "classify.onnx", CPU)
    exported = OnnxGraph(tmp_path / "classify.onnx", CPU.provider)
    rows = parity("classify", graph, graph, exported, graph.tolerance, static=False)
    shapes = [tuple(row["shape"]["image"]) for row in rows]
    assert {shape[0] for shape in shapes} == {1, 2, 7}
    assert len({shape[1:3] for shape in shapes}) == 3
    assert max(row["max_abs_error"] for row in rows) <= 1e-5
    # Compare once more without `parity`, at a size not used above.
    image = np.random.default_rng(0).integers(0, 256, (3, 91, 57, 3), dtype=np.uint8)
    np.testing.assert_allclose(exported(image=image)["probability"], graph(image=image)["probability"], atol=1e-5)


def test_manifest_report_and_example_describe_the_bundle(tmp_path):
    task, data = classifier().eval(), Pixels()
    manifest = export(task, data, CPU, tmp_path / "bundle")
    assert manifest == json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["kind"] == "image-classification"
    assert manifest["metadata"] == {"labels": ["a", "b", "c"], "multi_label": False, "crop": None, "channels": 1}
    graph = manifest["graphs"]["classify"]
    assert graph["inputs"] == [{"name": "image", "type": "uint8", "shape": ["batch", "height", "width", 1]}]
    assert graph["outputs"] == [{"name": "probability", "type": "float32", "shape": ["batch", 3]}]
    assert graph["calls"] == 1
    assert set(manifest["files"]) == {"answers.npz", "classify.onnx", "example.npz", "report.md"}
    metric = manifest["verification"]["metric"]
    assert (metric["name"], metric["split"], metric["n"]) == ("accuracy", "validation", 48)
    assert metric["pytorch"] == metric["bundle"]
    report = (tmp_path / "bundle/report.md").read_text()
    assert "Pictures of any size, converted to grey" in report
    assert "3 labels: a, b, c." in report
    assert "| accuracy | validation | 48 |" in report
    model = onnx.load(tmp_path / "bundle/classify.onnx")
    assert (model.ir_version, [o.version for o in model.opset_import if not o.domain]) == (10, [20])
    with np.load(tmp_path / "bundle/example.npz") as example:  # does not reveal a real image
        (image,) = example.values()
        assert not any(np.array_equal(image[0], real.permute(1, 2, 0)) for real in data.set.tensors[0])
        assert image.shape == (1, 32, 32, 1)
    assert b".py" not in (tmp_path / "bundle/classify.onnx").read_bytes()  # no stack traces of the exporting machine


def test_a_multi_label_classifier_is_exported_with_sigmoids(tmp_path):
    task, data = classifier(), Pixels(multi_label=True)
    task.facts["multi_label"] = True
    export(task.eval(), data, CPU, tmp_path / "bundle")
    images = data.set.tensors[0][:2]
    with torch.no_grad():
        expected = task(images)[0].sigmoid().numpy()
    runner = load(tmp_path / "bundle")
    np.testing.assert_allclose(runner.probability(images.permute(0, 2, 3, 1).numpy()), expected, atol=1e-5)
    assert "labels" in runner(images[0].numpy())


# Graphs other than image classifiers


class Step(nn.Module):
    """One step of a recurrent decoder that attends to a memory, similar to translation's."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, token, state, memory):
        state = self.cell(token, state)
        attention = (memory @ state[:, :, None]).softmax(dim=1)
        return (attention * memory).sum(dim=1), state


def recurrent(**options):
    inputs = {"token": torch.randn(5, 3), "state": torch.randn(5, 4), "memory": torch.randn(5, 6, 4)}
    return Graph(
        **{
            "module": Step().eval(),
            "inputs": inputs,
            "outputs": ["context", "next_state"],
            "dynamic_axes": {"token": {0: "batch"}, "state": {0: "batch"}, "memory": {0: "batch", 1: "time"}},
            "sizes": {"batch": (1, 2, 7), "time": (1, 5, 11)},
            **options,
        }
    )


def test_a_recurrent_step_with_two_dynamic_axes_matches_pytorch(tmp_path):
    graph = recurrent()
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    rows = parity("step", graph, graph, OnnxGraph(tmp_path / "step.onnx", CPU.provider), graph.tolerance, False)
    assert [row["shape"]["memory"][:2] for row in rows] == [[1, 1], [2, 5], [7, 11]]
    assert max(row["max_abs_error"] for row in rows) < 1e-5


@pytest.mark.parametrize(("static", "shapes"), [(False, [[1, 5], [2, 11], [7, 5]]), (True, [[1, 5]])])
def test_every_declared_size_is_compared_unless_the_shapes_are_fixed(static, shapes):
    graph = recurrent(sizes={"batch": (1, 2, 7), "time": (5, 11)})
    rows = parity("step", graph, graph, Skewed(graph, lambda array: array), graph.tolerance, static)
    assert [row["shape"]["memory"][:2] for row in rows] == shapes


def test_an_output_that_varies_but_is_declared_with_a_fixed_size_is_refused(tmp_path):
    graph = recurrent()
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    model = onnx.load(tmp_path / "step.onnx")
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 7  # as exporting a layer step by step may leave it
    onnx.save(model, tmp_path / "step.onnx")
    with pytest.raises(Refused, match=r"step at .*, output context: \(1, 4\), but the graph declares \[7, 4\]"):
        parity("step", graph, graph, OnnxGraph(tmp_path / "step.onnx", CPU.provider), graph.tolerance, False)


class Paths(nn.Module):
    """Recurrent layers that run several paths of each row at once, as in sampling forecasts or beam search."""

    def __init__(self, layer: type[nn.Module], **options):
        super().__init__()
        self.rnn = layer(3, 4, batch_first=True, **options)

    def forward(self, inputs, state):
        shape, state, lstm = state.shape[1:3], state.flatten(1, 2), isinstance(self.rnn, nn.LSTM)
        outputs, after = self.rnn(inputs.flatten(0, 1), tuple(state.chunk(2)) if lstm else state)
        after = torch.cat(after) if lstm else after
        again, _ = self.rnn(outputs[..., :3])
        again = again.contiguous().view(*shape, *again.shape[1:])  # valid only for the memory layout seen in tracing
        return again, after.unflatten(1, shape)


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.LSTM, {"num_layers": 1}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    ],
)
def test_recurrent_layers_match_pytorch_at_any_length_and_are_not_decomposed(layer, options, tmp_path):
    module = Paths(layer, **options).eval()
    num_layers = options["num_layers"]
    rows = num_layers * (2 if layer is nn.LSTM else 1) * (2 if "bidirectional" in options else 1)
    free = {0: "batch", 1: "paths", 2: "time"}
    graph = Graph(
        module=module,
        inputs={"inputs": torch.randn(3, 2, 6, 3), "state": torch.randn(rows, 3, 2, 4)},
        outputs=["outputs", "next_state"],
        dynamic_axes={"inputs": free, "state": {1: "batch", 2: "paths"}},
        sizes={"batch": (1, 2, 7), "paths": (1, 5, 3), "time": (9, 1, 33)},
    )
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    compared = parity("step", graph, graph, OnnxGraph(tmp_path / "step.onnx", CPU.provider), graph.tolerance, False)
    assert max(row["max_abs_error"] for row in compared) < 1e-5
    layers = [node for node in onnx.load(tmp_path / "step.onnx").graph.node if node.op_type == layer.__name__]
    assert len(layers) == 2 * num_layers  # not decomposed into matrix products

    write_program(graph, tmp_path / "step.pt2", CPU)
    example = example_at(graph, {"batch": 5, "paths": 1, "time": 9}).values()
    torch.testing.assert_close(torch.export.load(tmp_path / "step.pt2").module()(*example), module(*example))


def test_tracing_uses_sizes_that_verification_does_not():
    sizes = trace_sizes(recurrent())
    assert sizes == {"batch": 3, "time": 4}
    assert example_at(recurrent(), sizes)["memory"].shape == (3, 4, 4)


def test_example_inputs_are_cut_or_repeated_to_the_requested_sizes():
    graph = recurrent()
    memory = graph.inputs["memory"]
    cut = example_at(graph, {"batch": 7, "time": 2})["memory"]
    torch.testing.assert_close(cut[:5], memory[:, :2])
    torch.testing.assert_close(cut[5:], memory[:2, :2])


# Refusals


class Constant(nn.Module):
    """Add a constant whose length is the time axis of one example."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(4, 3))

    def forward(self, x):
        return x + self.bias


def test_a_network_that_would_freeze_a_dynamic_axis_is_refused(tmp_path):
    graph = recurrent(
        module=Constant().eval(),
        inputs={"x": torch.randn(5, 6, 3)},
        outputs=["y"],
        dynamic_axes={"x": {0: "batch", 1: "time"}},
    )
    with pytest.raises(UserError, match=r"step\.onnx: .*static shape of 4"):
        write_onnx(graph, tmp_path / "step.onnx", CPU)
    assert not (tmp_path / "step.onnx").exists()


class Skewed:
    """A graph that changes the outputs of another graph."""

    def __init__(self, graph, change):
        self.graph, self.change, self.shape, self.declared = graph, change, graph.shape, {}

    def __call__(self, **inputs):
        return {name: self.change(array) for name, array in self.graph(**inputs).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a + 2e-4, "differs from PyTorch by 0.0002"),
        (lambda a: a * np.nan, "not a finite number"),
        (lambda a: a[:, :1], "expected float32"),
        (lambda a: a.astype(np.float64), "float64"),
    ],
)
def test_outputs_that_differ_from_pytorchs_are_refused(change, message):
    graph = recurrent()
    with pytest.raises(Refused, match=message):
        parity("step", graph, graph, Skewed(graph, change), graph.tolerance, False)


def test_the_tolerance_is_relative_above_1_and_absolute_below_and_the_largest_difference_is_kept():
    answers = [{"large": [1000.0], "small": [0.001]}, {"large": [1000.0], "small": [0.0]}]
    asked, given = iter(answers), iter([{"large": [1000.5], "small": [0.0015]}, answers[1]])

    def exported():
        return {name: np.array(values) for name, values in next(given).items()}

    exported.shape = exported.declared = {}
    graph = Compared("g", PLAIN, lambda: {n: np.array(v) for n, v in next(asked).items()}, exported, 1e-3)
    assert graph()["large"] == 1000.5  # the bundle's own, for its metric
    graph()
    assert graph.max_abs_error == 0.5
    with pytest.raises(Refused, match=r"large: differs from PyTorch by 0\.002"):
        graph.difference("large", np.array([1002.0]), np.array([1000.0]))
    with pytest.raises(Refused, match=r"small: differs from PyTorch by 0\.002"):
        graph.difference("small", np.array([0.003]), np.array([0.001]))


def test_flips_at_any_declared_size_are_refused():
    graph = recurrent(discrete=["context"])
    changes = iter([0] * 4 + [1, 0])  # of two outputs at three sizes
    with pytest.raises(Refused, match="'time': 11}, outputs context: 28 of 28 differ"):
        parity("step", graph, graph, Skewed(graph, lambda array: array + next(changes)), graph.tolerance, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a + 2e-4, None),
        (lambda a: a[:, :3], None),  # fewer boxes
        (lambda a: a * np.inf, "not a finite number"),
        (lambda a: a[0], "expected float32"),
        (lambda a: a.astype(np.float16), "float16"),
    ],
)
def test_lower_precision_may_change_values_and_lengths_but_not_rank_type_or_finiteness(change, message):
    graph = recurrent(discrete=["next_state"])
    arguments = ("step", graph, graph, Skewed(graph, change), np.inf, False)
    if message is None:
        assert all(row["tolerance"] is None for row in parity(*arguments))
        return
    with pytest.raises(Refused, match=message):
        parity(*arguments)


def test_reference_caches_pytorchs_outputs_while_it_has_room():
    asked = []

    class Asked:
        shape = recurrent().shape

        def __call__(self, token):
            asked.append(token)
            return {"twice": 2 * token}

    reference = Reference(Asked())
    first, second = np.float32([1, 2]), np.float32([1, 3])
    for token in (first, second, first, first.copy(), first[:, None], first.astype(np.float64)):
        np.testing.assert_array_equal(reference(token=token)["twice"], 2 * token)
    assert len(asked) == 4
    reference.room = first.nbytes  # one more answer is cached
    for _ in range(2):
        for token in (np.float32([5, 6]), np.float32([7, 8])):
            reference(token=token)
    assert len(asked) == 7


def test_outputs_on_real_data_are_compared_with_pytorchs_as_well(tmp_path, monkeypatch):
    """Without the checks of `parity`, every output on the splits is still compared with PyTorch's."""
    monkeypatch.setattr("dlref.export.attempts.parity", lambda *_: [])
    run = OnnxGraph.__call__
    monkeypatch.setattr(
        OnnxGraph, "__call__", lambda self, **inputs: {"probability": run(self, **inputs)["probability"] + 1e-3}
    )
    with pytest.raises(Refused, match=r"differs from PyTorch by 0\.001"):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")


def test_a_dynamic_axis_that_is_fixed_in_the_onnx_file_is_refused():
    image = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6, 3])
    answer = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 6, 3])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [image], [answer]))
    name_axes(model, {"x": {0: "batch"}}, "step.onnx")
    assert [d.dim_param for d in model.graph.output[0].type.tensor_type.shape.dim] == ["batch", "", ""]
    with pytest.raises(UserError, match=r"step\.onnx: axis 1 \(time\) of x was frozen to 6"):
        name_axes(model, {"x": {0: "batch", 1: "time"}}, "step.onnx")


def test_export_without_validation_data_is_refused(tmp_path):
    data = Pixels()
    data.val_dataloader = lambda: DataLoader(TensorDataset(torch.zeros(0, 1, 32, 32)))
    with pytest.raises(UserError, match="no validation data"):
        export(classifier().eval(), data, CPU, tmp_path / "bundle")


def test_export_leaves_neighbouring_files_and_folders_alone(tmp_path):
    (tmp_path / "bundle.part").mkdir()
    (tmp_path / "bundle.part/precious").touch()
    export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")
    assert (tmp_path / "bundle.part/precious").exists()
    (tmp_path / "file").touch()
    for output in ("file", "file/bundle"):
        with pytest.raises(UserError, match="file: a file; expected a folder"):
            export(classifier().eval(), Pixels(), CPU, tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.part", "file"]


def test_the_manifest_records_how_often_one_prediction_calls_a_graph(tmp_path):
    task, data = classifier().eval(), Pixels()
    task.take_facts(data)
    served = task.deployable(next(iter(data.val_dataloader())))
    served = replace(served, graphs={"classify": replace(served.graphs["classify"], calls=3)})
    write_onnx(served.graphs["classify"], tmp_path / "classify.onnx", CPU)
    write_manifest(tmp_path, served, CPU, "float32", tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["graphs"]["classify"]["calls"] == 3


@pytest.mark.parametrize(("nodes", "kept"), [(20, [1, 3]), (4, [1, 2])])
def test_the_best_calibration_keeps_more_nodes_in_float_until_the_graph_is_slower(nodes, kept, monkeypatch):
    """Try three calibrations, then a twentieth of the nodes in float, then more nodes, which is slower: stop.

    Of four nodes, a twentieth and 15% are one node, which is tried once.
    """
    monkeypatch.setattr(
        "dlref.export.attempts.worst_nodes", lambda source, converted, feeds: [str(i) for i in range(nodes)]
    )
    losses = iter([3.0, 1.0, 2.0, 0.9, 0.8, 0.0])
    attempts = SimpleNamespace(
        target=TARGETS["x86-64"],
        made=[],
        deployable=SimpleNamespace(graphs={"classify": None, "dynamic": None}),
        calibrated=lambda name: name == "classify",
        quantised_plans=lambda: Attempts.quantised_plans(attempts),
        lookups=lambda: {"dynamic": ("lookup",)},
        source=lambda name: None,
        converted=lambda name, plan: None,
        feeds={"classify": []},
    )
    plans = []
    for plan in Attempts.plans(attempts):
        plans.append(plan)
        attempts.made.append(
            Attempt(plan, Path(), "refused", slower=len(plan.kept.get("classify", ())) > 1, degradation=next(losses))
        )
    assert [plan.calibration for plan in plans] == [*SAMPLES, *[list(SAMPLES)[1]] * 2, None]
    assert [len(plan.kept.get("classify", ())) for plan in plans] == [0, 0, 0, *kept, 0]
    assert [plan.kept.get("dynamic") for plan in plans] == [None] * 3 + [("lookup",)] * 2 + [None]
    assert plans[-1] == FLOAT32


@pytest.mark.parametrize(
    ("slower", "metric", "again"), [(False, {"bundle": 0}, 1), (True, {"bundle": 0}, 0), (False, {}, 0)]
)
def test_a_graph_that_loses_too_much_keeps_its_embeddings_in_float(slower, metric, again, monkeypatch):
    """But not one that is slower anyway, or that cannot be converted and so has no metric."""
    monkeypatch.setattr("dlref.export.attempts.onnx.load", lambda name: SimpleNamespace(graph=name))
    monkeypatch.setattr("dlref.export.attempts.embeddings", {"encode": ("lookup",), "step": ()}.get)
    attempts = SimpleNamespace(
        target=TARGETS["x86-64"],
        made=[],
        deployable=SimpleNamespace(graphs=dict.fromkeys(("encode", "step"))),
        calibrated=lambda name: False,
        source=lambda name: name,
        lookups=lambda: Attempts.lookups(attempts),
    )
    plans = []
    for plan in Attempts.plans(attempts):
        plans.append(plan)
        attempts.made.append(Attempt(plan, Path(), "refused", slower, metric=metric))
    assert plans == [Plan("int8"), *[Plan("int8", kept={"encode": ("lookup",)})] * again, FLOAT32]


def test_an_attempt_is_refused_as_too_slow_unless_it_is_faster_than_float32(monkeypatch):
    monkeypatch.setattr("dlref.export.attempts.can_time", lambda target: True)
    speed = {"int8": 3.0, "float32": 2.0}
    contenders = SimpleNamespace(latencies=lambda *folders: [speed[folder.name] for folder in folders])
    attempts = SimpleNamespace(target=CPU, contenders=contenders, bundle=lambda plan: Path("bundles", str(plan)))
    attempt = Attempt(Plan("int8"), Path("bundles", "int8"))
    refused = "3.000 ms per answer; expected less than float32's 2.000 ms"
    assert (Attempts.not_faster(attempts, attempt), attempt.slower) == (refused, True)
    speed["int8"] = 1.0
    assert (Attempts.not_faster(attempts, attempt), attempt.slower) == ("", False)


def test_inputs_are_recorded_one_sample_at_a_time_along_their_own_batch_axes():
    def exported(**inputs):
        return {"y": inputs["x"]}

    exported.shape = None
    graph = SimpleNamespace(dynamic_axes={"x": {0: "batch", 1: "time"}, "state": {1: "batch"}})
    recorder = Recorder(graph, exported, enough=3)
    inputs = {"x": np.arange(8).reshape(2, 4), "state": np.arange(6).reshape(3, 2), "noise": np.ones(5)}
    assert recorder(**inputs)["y"] is inputs["x"]
    assert not recorder.full
    recorder(**inputs)
    assert recorder.full
    assert len(recorder.feeds) == 3
    for feed, row in zip(recorder.feeds, (0, 1, 0), strict=True):
        np.testing.assert_array_equal(feed["x"], inputs["x"][[row]])
        np.testing.assert_array_equal(feed["state"], inputs["state"][:, [row]])
        assert feed["noise"] is inputs["noise"]
    recorder = Recorder(SimpleNamespace(dynamic_axes={}), exported, enough=3)
    recorder(**inputs)
    assert recorder.feeds == [inputs]


def test_calibration_data_are_the_same_in_every_export_and_enough_for_each_graph():
    """Of a shuffled training set; the second graph is called with every third batch."""
    seen, dataset = [], TensorDataset(torch.arange(100.0))

    def exported(**inputs):
        return inputs

    def evaluate(graphs, batches):
        for number, (batch,) in enumerate(batches):
            for name in ("each", "third")[: 1 + (number % 3 == 2)]:
                graphs[name](x=batch.numpy())

    exported.shape, axes = None, SimpleNamespace(dynamic_axes={"x": {0: "batch"}})
    attempts = SimpleNamespace(
        target=CPU,
        deployable=SimpleNamespace(graphs={"each": axes, "third": axes}, runner=lambda graphs: graphs),
        opened=lambda plan: {"each": exported, "third": exported},
        data=SimpleNamespace(setup=seen.append, train_dataloader=lambda: DataLoader(dataset, 2, shuffle=True)),
        task=SimpleNamespace(evaluate=evaluate),
    )
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(Attempts.feeds.func(attempts))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    assert [len(feeds) for feeds in found[0].values()] == [DEBUGGED, DEBUGGED]
    assert seen == ["fit", "fit"]


@pytest.mark.parametrize(("plan", "where"), [(FLOAT32, CPU.provider), (Plan("float16"), "NPU")])
def test_float32_is_verified_on_the_cpu_and_lower_precision_where_the_target_runs_it(plan, where, monkeypatch):
    monkeypatch.setattr("dlref.export.attempts.provider", lambda target: "NPU")
    monkeypatch.setattr("dlref.export.attempts.read_manifest", lambda folder: {})
    monkeypatch.setattr("dlref.export.attempts.open_graphs", lambda folder, manifest, provider: provider)
    attempts = SimpleNamespace(target=CPU, bundle=lambda plan: Path(), made=[], metric=lambda *_: {})
    assert Attempts.opened(attempts, plan) == where
    assert Attempts.verification(attempts, Attempt(plan, Path()))["provider"] == where


@pytest.mark.parametrize(("plan", "tried"), [(FLOAT32, []), (Plan("float16"), ["NPU"])])
def test_a_bundle_of_lower_precision_runs_once_in_another_process_before_it_is_opened(
    plan, tried, tmp_path, monkeypatch
):
    found = []
    monkeypatch.setattr("dlref.export.attempts.provider", lambda target: "NPU")
    monkeypatch.setattr("dlref.export.attempts.write_manifest", lambda *_: None)
    monkeypatch.setattr("dlref.export.attempts.smoke_test", lambda folder, provider: found.append(provider))
    (tmp_path / "bundles").mkdir()
    attempts = SimpleNamespace(place=tmp_path, target=CPU, deployable=SimpleNamespace(graphs={}), example=dict)
    for _ in range(2):
        assert Attempts.bundle(attempts, plan) == tmp_path / "bundles" / str(plan)
    assert found == tried


def test_the_verification_lists_each_attempt_and_tests_the_chosen_one():
    plans = Plan("int8", "MinMax", {"g": ("a",)}), Plan("int8", "Entropy")
    scores = [{"pytorch": 0.9, "bundle": 0.6}, {"pytorch": 0.9, "bundle": 0.8}]
    refused = Attempt(plans[0], Path(), "30 points lost", degradation=30.0, metric=scores[0])
    chosen = Attempt(plans[1], Path(), degradation=0.1, metric=scores[1], parity=["equal"])
    attempts = SimpleNamespace(target=CPU, made=[refused, chosen], metric=lambda *asked: asked)
    found = Attempts.verification(attempts, chosen)
    assert (found["metric"], found["test"], found["parity"]) == (scores[1], (plans[1], "test"), ["equal"])
    assert [list(attempt.values()) for attempt in found["attempts"]] == [
        ["int8", "MinMax", {"g": ("a",)}, 0.6, "30 points lost"],
        ["int8", "Entropy", {}, 0.8, ""],
    ]


def two_graphs(flips):
    """Attempts whose second graph is 0.5 off in float32, and whose graphs both choose other elements `flips` times."""
    asked = {"y": np.zeros(40), "chosen": np.zeros(40)}
    graph = SimpleNamespace(selected=(), discrete=("chosen",), tolerance=1.0)

    def exported(error):
        def answer():
            return {"y": asked["y"] + error, "chosen": asked["chosen"] + 2 * (np.arange(40) < flips)}

        answer.shape = answer.declared = {}
        return answer

    return SimpleNamespace(
        opened=lambda plan: {"one": exported(0.5), "other": exported(0.25)},
        references=dict.fromkeys(("one", "other"), lambda: asked),
        deployable=SimpleNamespace(graphs={"one": graph, "other": graph}, runner=lambda graphs: graphs.values()),
        loader=lambda split: DataLoader(range(7), batch_size=2),
        task=SimpleNamespace(
            metric="sum", evaluate=lambda graphs, batches: sum(float(graph()["y"][0]) for graph in graphs)
        ),
        pytorch={"validation": 1.0, "test": 2.0},
    )


def test_the_metric_of_a_bundle_is_that_of_its_own_outputs_and_differences_are_of_all_graphs():
    shared = {"name": "sum", "pytorch": 2.0, "bundle": 0.75, "split": "test", "n": 7}
    found = Attempts.metric(two_graphs(flips=1), FLOAT32, "test")
    assert found == shared | {"max_abs_error": 0.5, "flipped": 2, "rows": 80}
    found = Attempts.metric(two_graphs(flips=3), Plan("int8"), "test")  # judged by its metric
    assert found == shared | dict.fromkeys(("max_abs_error", "flipped", "rows"))
    with pytest.raises(Refused, match="one, outputs chosen: 3 of 40 differ"):
        Attempts.metric(two_graphs(flips=3), FLOAT32, "test")


def test_the_score_that_a_bundle_is_compared_with_is_pytorchs():
    attempts = two_graphs(flips=0)
    Attempts.score_pytorch(attempts, "test")
    assert attempts.pytorch == {"validation": 1.0, "test": 0.0}
    attempts.task.evaluate = lambda *_: np.inf
    with pytest.raises(UserError, match="sum of PyTorch on test is inf; expected a finite number"):
        Attempts.score_pytorch(attempts, "test")


def test_an_attempt_is_compared_after_float32_and_refused_without_paths_of_this_machine(tmp_path):
    attempts = SimpleNamespace(
        place=tmp_path,
        exact=["float32"],
        parity=lambda plan: [str(plan)],
        metric=lambda plan, split: {"pytorch": split, "bundle": plan},
        task=SimpleNamespace(degradation=lambda reference, score: 0.25 if reference == "validation" else np.nan),
        deployable=SimpleNamespace(graphs={}),
        too_much_lost=lambda attempt: "",
        not_faster=lambda attempt: "",
    )
    found = Attempts.judged(attempts, Plan("int8"))
    assert (found.parity, found.degradation, found.refused) == (["float32", "int8"], 0.25, "")

    def refuse(plan):
        raise UserError(f"{tmp_path / 'bundles' / 'int8' / 'g.onnx'}: invalid")

    attempts.parity = refuse
    assert Attempts.judged(attempts, Plan("int8")).refused == "g.onnx: invalid"


@pytest.mark.parametrize("quantised", ["one", ""])
def test_one_quantised_graph_makes_a_bundle_int8(quantised, tmp_path, monkeypatch):
    monkeypatch.setattr("dlref.export.attempts.is_quantised", lambda path: path.stem == quantised)
    monkeypatch.setattr("dlref.export.attempts.write_manifest", lambda *_: None)
    monkeypatch.setattr("dlref.export.attempts.smoke_test", lambda *_: None)
    (tmp_path / "bundles").mkdir()
    attempts = SimpleNamespace(
        place=tmp_path,
        target=CPU,
        deployable=SimpleNamespace(graphs={}),
        references={"one": None, "other": None},
        converted=lambda name, plan: Path(name),
        example=dict,
    )
    if quantised:
        assert Attempts.bundle(attempts, Plan("int8")) == tmp_path / "bundles/int8"
        return
    with pytest.raises(UserError, match="onnxruntime quantised no node of any graph"):
        Attempts.bundle(attempts, Plan("int8"))


def test_a_trained_network_whose_answers_depend_on_the_batch_is_refused(tmp_path):
    mixed = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(1024, 3))
    with pytest.raises(UserError, match="outputs for an image change with the other images in its batch"):
        export(classifier(network=mixed).eval(), Pixels(), CPU, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_refused_export_leaves_no_files_and_keeps_the_earlier_bundle(tmp_path, monkeypatch):
    earlier = json.loads((make_bundle(tmp_path / "bundle") / "manifest.json").read_text())
    monkeypatch.setattr(
        OnnxGraph,
        "__call__",
        lambda self, **inputs: {"probability": np.zeros((len(inputs["image"]), 3), np.float32)},
    )
    with pytest.raises(Refused):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert json.loads((tmp_path / "bundle/manifest.json").read_text()) == earlier


def test_exporting_into_another_bundle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "Attempts", None)
    outer = make_bundle(tmp_path / "outer")
    for name in ("arm64", "edge/arm64"):
        with pytest.raises(UserError, match=r"outer, which holds only its own files; expected another place"):
            export(classifier().eval(), Pixels(), CPU, outer / name)
    assert not (outer / "arm64").exists()


def test_a_dynamic_axis_is_refused_for_a_target_with_fixed_shapes(tmp_path, monkeypatch):
    """As if a converter made a fixed axis dynamic."""
    free, fixed = CPU, replace(CPU, static=True)
    monkeypatch.setattr("dlref.export.attempts.write_onnx", lambda graph, path, _: write_onnx(graph, path, free))
    with pytest.raises(UserError, match=r"classify: axes \{'image': .*'batch'.*\} are free; expected fixed ones"):
        export(classifier().eval(), Pixels(), fixed, tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_during_export_is_reported_and_leaves_no_files(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dlref.export.attempts.write_onnx", full)
    with pytest.raises(UserError, match=r"bundle: cannot be written \(No space left on device\); expected free space"):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_full_when_the_bundle_is_to_be_moved_is_reported(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="expected free space"), bundles.staged(tmp_path / "new" / "bundle"):
        monkeypatch.setattr(Path, "mkdir", full)
    assert not any(tmp_path.iterdir())


def test_an_output_path_that_cannot_be_accessed_is_refused_before_the_export(tmp_path):
    (tmp_path / "round").symlink_to("round")
    for name in ("a" * 300, f"new/{'a' * 300}/bundle", "/".join(["a" * 200] * 25), "round"):
        with pytest.raises(UserError, match=r"; expected a folder for the bundle"), bundles.staged(tmp_path / name):
            pytest.fail("it was not refused before the work")
    assert [path.name for path in tmp_path.iterdir()] == ["round"]


@pytest.mark.parametrize("name", ["empty", "link", "new", "new/folder/inside"])
def test_a_bundle_may_be_written_to_an_empty_or_new_folder(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with bundles.staged(tmp_path / name) as place:
        (place / "bundle").mkdir()
        (place / "bundle" / "made").touch()
    assert [path.name for path in (tmp_path / name).iterdir()] == ["made"]
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link", name.partition("/")[0]}  # no other is left
    assert (tmp_path / "link").is_symlink()


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(UserError, match="holds other files"):
        export(classifier().eval(), Pixels(), CPU, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "do not lose me"


def test_a_folder_with_a_foreign_manifest_or_additional_files_is_not_replaced(tmp_path):
    """Web applications have a `manifest.json`, too."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app/manifest.json").write_text('{"name": "my app"}')
    (tmp_path / "app/index.html").write_text("do not lose me")
    with pytest.raises(UserError, match="holds other files"):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "app")
    assert (tmp_path / "app/index.html").read_text() == "do not lose me"
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")
    (tmp_path / "bundle/notes.txt").unlink()
    export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")  # a bundle is replaced


def test_failing_to_create_the_temporary_folder_is_reported(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(UserError, match="No space left on device"):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")


def test_the_earlier_bundle_stays_if_the_new_one_cannot_replace_it(tmp_path, monkeypatch):
    earlier = json.loads((make_bundle(tmp_path / "bundle") / "manifest.json").read_text())
    rename = Path.rename

    def busy(self, target):
        if self.name == bundles.BUNDLE and target == tmp_path / "bundle":
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UserError, match=r"bundle: cannot be replaced \(Device or resource busy\)"):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle/manifest.json").read_text()) == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_interrupted_replacement_puts_the_earlier_bundle_back(tmp_path, monkeypatch):
    made, output, aside = (tmp_path / name for name in ("made", "output", "aside"))
    for folder in (made, output):
        folder.mkdir()
        (folder / folder.name).touch()
    rename = Path.rename

    def interrupted(self, target):
        if self == made:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundles.replace(made, output, aside)
    assert (output / "output").is_file()
    assert not aside.exists()


def test_a_mount_point_as_output_is_refused_before_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    monkeypatch.setattr(bundles, "Attempts", None)
    with pytest.raises(UserError, match="a mount point, which cannot be replaced; expected a folder inside"):
        export(classifier().eval(), Pixels(), CPU, tmp_path)


def test_an_exported_bundle_that_cannot_be_loaded_is_removed(tmp_path, monkeypatch):
    def refuse(folder, provider):
        assert (folder / "manifest.json").is_file()
        raise UserError(f"{folder.name}: refused")

    monkeypatch.setattr(bundles, "load", refuse)
    with pytest.raises(UserError, match="float32: refused"):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("lost", "refused"), [(0.5, False), (0.501, True), (-3.0, False)])
def test_a_bundle_may_lose_at_most_the_points_that_its_targets_gate_allows(lost, refused):
    metric = {"name": "accuracy", "pytorch": 0.9, "bundle": 0.9 - lost / 100}
    attempt = Attempt(Plan("int8"), Path("int8"), degradation=lost, metric=metric)
    attempts = SimpleNamespace(target=replace(CPU, gate=0.5))
    assert bool(Attempts.too_much_lost(attempts, attempt)) is refused


def test_a_validation_metric_of_nan_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageClassifier, "evaluate", lambda *_: float("nan"))
    with pytest.raises(UserError, match="accuracy of PyTorch on validation is nan; expected a finite number"):
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


def test_an_earlier_bundle_that_cannot_be_put_back_is_kept_and_its_place_reported(tmp_path, monkeypatch):
    make_bundle(tmp_path / "bundle")
    rename = Path.rename

    def full(self, target):
        if target == tmp_path / "bundle":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match=r"cannot be replaced .*, the earlier bundle is now ") as error:
        export(classifier().eval(), Pixels(), CPU, tmp_path / "bundle")
    (aside,) = tmp_path.glob(".bundle.*/before")
    assert str(aside) in str(error.value)
    assert (aside / "manifest.json").is_file()


@pytest.mark.parametrize("ends", ["Softmax", "Clip"])
def test_infinity_mask_nodes_end_at_a_softmax_or_clip(ends):
    infinite = helper.make_tensor("infinite", TensorProto.FLOAT, [2], [0.0, -np.inf])
    word = helper.make_tensor("word", TensorProto.STRING, [], [b"inf"])
    masked = helper.make_node("Where", ["seen", "x", "infinite"], ["masked"], "masked")
    ended = helper.make_node(ends, ["masked"], ["ended"], "ended")
    after = helper.make_node("MatMul", ["ended", "x"], ["y"], "after")
    graph = helper.make_graph([masked, ended, after], "mask", [], [], [infinite, word])
    assert infinity_mask_nodes(graph) == ["masked", "ended"]


def test_an_empty_example_is_filled_with_zeros():
    """The first step of a decoder has no previous states."""
    graph = recurrent(
        inputs={"token": torch.randn(5, 3), "state": torch.randn(5, 4), "memory": torch.randn(5, 0, 4)},
    )
    assert example_at(graph, {"batch": 2, "time": 3})["memory"].equal(torch.zeros(2, 3, 4))
    assert example_at(graph, {"batch": 2, "time": 0})["memory"].shape == (2, 0, 4)


def test_equal_infinities_count_as_no_difference():
    graph = recurrent()
    masked = Skewed(graph, lambda a: np.concatenate([a[:, :-1], np.full_like(a[:, :1], -np.inf)], axis=1))
    rows = parity("step", graph, masked, masked, graph.tolerance, False)
    assert max(row["max_abs_error"] for row in rows) == 0


def test_a_graph_with_several_float_inputs_is_converted_to_float16(tmp_path):
    graph = recurrent()
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    convert(tmp_path / "step.onnx", tmp_path / "half.onnx", TARGETS["cuda"], Plan("float16"), [])
    rows = parity("step", graph, graph, OnnxGraph(tmp_path / "half.onnx", CPU.provider), np.inf, False)
    assert 0 < max(row["max_abs_error"] for row in rows) < 1e-2


class Large(nn.Module):
    """A network whose intermediate values exceed the range of float16 and whose outputs do not."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
        nn.init.constant_(self.up.weight, 5e4)
        nn.init.constant_(self.down.weight, 1e-6)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_nodes_whose_values_exceed_the_range_of_float16_stay_float32(tmp_path):
    """Run ONNX's reference implementation: onnxruntime would compute in float32 on a CPU anyway."""
    feed = {"x": np.ones((1, 4), np.float32)}
    graph = Graph(Large().eval(), {"x": torch.ones(2, 4)}, ["y"], {"x": {0: "batch"}}, {"batch": (1, 2)})
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    kept = nodes_beyond_float16(tmp_path / "step.onnx", [feed])
    for nodes, finite in ((kept, True), ([], False)):
        plan = Plan("float16", kept={"step": tuple(nodes)})
        convert(tmp_path / "step.onnx", tmp_path / "half.onnx", TARGETS["cuda"], plan, [])
        with np.errstate(over="ignore"):
            (answer,) = ReferenceEvaluator(str(tmp_path / "half.onnx")).run(None, feed)
        assert np.isfinite(answer).all() == finite
    np.testing.assert_allclose(graph(**feed)["y"], 0.8, rtol=1e-3)


class Directions(nn.Module):
    """Divides by the L2 norm, as SSD does, before a layer that adds up."""

    def __init__(self):
        super().__init__()
        self.sum = nn.Linear(16, 1, bias=False)
        nn.init.ones_(self.sum.weight)

    def forward(self, x):
        return self.sum(nn.functional.normalize(x))


@pytest.mark.parametrize("value", [1e-4, 1.0, 100.0])
def test_the_squares_under_a_norm_may_exceed_the_range_of_float16(value, tmp_path):
    """TensorRT computes a norm as ONNX defines it, with squares in the input's type: 0 of 1e-4, infinite for 100."""
    graph = Graph(Directions().eval(), {"x": torch.ones(2, 16)}, ["y"], {}, {})
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    convert(tmp_path / "step.onnx", tmp_path / "half.onnx", TARGETS["tensorrt"], Plan("float16"), [])
    (answer,) = ReferenceEvaluator(str(tmp_path / "half.onnx")).run(None, {"x": np.full((2, 16), value, np.float32)})
    np.testing.assert_allclose(answer, 4, rtol=1e-2)


class ReduceMean(OpRun):
    """The mean as onnxruntime's CUDA provider computes it: the sum, in the input's type, divided by the number."""

    op_domain = ""

    def _run(self, x, axes, **_):
        number = np.prod([x.shape[axis] for axis in axes], dtype=np.float32)
        return (x.sum(tuple(axes), dtype=np.float32, keepdims=True).astype(x.dtype) / number.astype(x.dtype),)


class Pooled(nn.Module):
    """Averages whole maps, as DeepLabV3 does, between two layers."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
        for value in self.parameters():
            nn.init.ones_(value)

    def forward(self, x):
        return self.after(self.before(x).mean((2, 3), keepdim=True))


@pytest.mark.parametrize(("height", "width"), [(135, 240), (270, 480)])
def test_the_sum_under_a_mean_may_exceed_the_range_of_float16(height, width, tmp_path):
    """At an eighth of their resolution, pictures in Full HD have 135x240 positions, and those in 4K 270x480."""
    x = torch.full((1, 1, height, width), 2.0)
    graph = Graph(Pooled().eval(), {"x": x}, ["y"], {}, {})
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    convert(tmp_path / "step.onnx", tmp_path / "half.onnx", TARGETS["cuda"], Plan("float16"), [])
    with np.errstate(over="ignore", invalid="ignore"):
        evaluator = ReferenceEvaluator(str(tmp_path / "half.onnx"), new_ops=[ReduceMean])
        (answer,) = evaluator.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(answer, 4, rtol=1e-2)


def test_only_casts_to_float16_and_back_are_left_out():
    """A cast to an integer and back truncates, and one to float16 and on to an integer rounds."""
    half, whole, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    pairs = {"round_trip": (half, single), "truncated": (whole, single), "rounded": (half, whole)}
    nodes = []
    for name, (first, second) in pairs.items():
        nodes.append(onnx.helper.make_node("Cast", ["x"], [f"{name}_first"], to=first))
        nodes.append(onnx.helper.make_node("Cast", [f"{name}_first"], [name], to=second, saturate=1))  # as FLOAT is 1
    nodes.append(onnx.helper.make_node("Add", ["truncated", "round_trip"], ["y"]))
    graph = onnx.helper.make_graph(nodes, "casts", [], [])
    without_round_trips(graph)
    read = {node.output[0]: list(node.input) for node in graph.node}
    assert read["round_trip"] == ["x"]
    assert read["truncated"] == ["truncated_first"]
    assert read["rounded"] == ["rounded_first"]
    assert read["y"] == ["truncated", "round_trip"]


@pytest.mark.parametrize(("value", "kept"), [(8000.0, 0), (8200.0, 1)])
def test_nodes_with_values_above_an_eighth_of_the_largest_float16_stay_float32(value, kept, tmp_path):
    graph = Graph(nn.ReLU(), {"x": torch.ones(2, 4)}, ["y"], {"x": {0: "batch"}}, {"batch": (1, 2)})
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    feed = {"x": np.full((1, 4), value, np.float32)}
    assert len(nodes_beyond_float16(tmp_path / "step.onnx", [feed])) == kept


def test_nodes_that_read_or_write_large_numbers_stay_float32_and_those_of_a_mask_do_not(tmp_path):
    """A large number may come from outside, in any sample, or arise on the way; float16 has infinities of its own."""
    constants = {"thousandth": 1e-3, "hidden": -np.inf}
    pairs = [("x", "thousandth"), ("small", "small"), ("large",), ("root", "hidden")]
    steps = zip(["Mul", "Mul", "Sqrt", "Add"], pairs, ["small", "large", "root", "y"], strict=True)
    nodes = [helper.make_node(operator, names, [name], name=f"to {name}") for operator, names, name in steps]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [1], [value]) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], weights),
        opset_imports=[helper.make_opsetid("", CPU.opset)],
        ir_version=CPU.ir_version,
    )
    onnx.save(model, tmp_path / "g.onnx")
    feeds = [{"x": np.float32([value])} for value in (0, -1e5)]
    assert nodes_beyond_float16(tmp_path / "g.onnx", feeds) == ["to small", "to large", "to root"]


def test_a_layer_whose_weights_are_too_large_for_float16_stays_float32(tmp_path):
    """The converter would cut the weights off at 65504, though the layer's inputs and outputs are small."""
    layer, feed = nn.Linear(4, 2, bias=False), {"x": np.full((2, 4), 1e-3, np.float32)}
    nn.init.constant_(layer.weight, 1e5)
    graph = Graph(layer.eval(), {"x": torch.ones(2, 4)}, ["y"], {}, {})
    write_onnx(graph, tmp_path / "step.onnx", CPU)
    plan = Plan("float16", kept={"step": tuple(nodes_beyond_float16(tmp_path / "step.onnx", [feed]))})
    convert(tmp_path / "step.onnx", tmp_path / "half.onnx", TARGETS["cuda"], plan, [])
    answer = OnnxGraph(tmp_path / "half.onnx", CPU.provider)(**feed)
    np.testing.assert_allclose(answer["y"], np.full((2, 2), 400), rtol=1e-2)


def test_the_saved_example_stays_in_the_range_of_each_input():
    """Each categorical input may have its own range, so all become the smallest, which reveals no category."""
    inputs = {"categories": torch.tensor([[7, 1], [3, 0]]), "target": torch.arange(6.0).reshape(2, 3)}
    axes = {"categories": {0: "batch"}, "target": {0: "batch", 1: "time"}}
    graph = Graph(nn.Identity(), inputs, ["y"], axes, {"batch": (1,), "time": (3,)})
    found = Attempts.example(SimpleNamespace(deployable=SimpleNamespace(graphs={"encode": graph})))
    assert found["encode/categories"].tolist() == [[1, 1]]
    assert sorted(found["encode/target"].ravel()) == [0, 1, 2]


@pytest.mark.parametrize("method", SAMPLES)
def test_each_calibration_method_reads_its_own_number_of_samples(method, tmp_path):
    """Histogram methods read fewer, since they keep all activations in memory."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    model = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y]))
    onnx.save(model, tmp_path / "g.onnx")
    feeds = [{"x": np.ones(1, np.float32)}] * 300
    found = static_configuration(tmp_path / "g.onnx", TARGETS["x86-64"], Plan("int8", method), feeds)
    assert sum(1 for _ in iter(found.calibration_data_reader.get_next, None)) == SAMPLES[method]


def test_worst_nodes_starts_with_the_nodes_around_the_noisiest_activation(tmp_path, monkeypatch):
    x, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xc")
    pairs = ("xa", "ab", "bc")
    nodes = [helper.make_node("Add", [before, before], [after], name=f"to {after}") for before, after in pairs]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [c])), tmp_path / "g.prepared.onnx")
    decibels = {"a": {"qdq_err": 40.0}, "b": {"qdq_err": 5.0}}  # signal-to-noise ratio
    tools = "dlref.export.convert.qdq_loss_debug"
    monkeypatch.setattr(f"{tools}.modify_model_output_intermediate_tensors", lambda model, path: path.touch())
    monkeypatch.setattr(f"{tools}.compute_activation_error", lambda matching: decibels)
    for name in ("collect_activations", "create_activation_matching"):
        monkeypatch.setattr(f"{tools}.{name}", lambda *_: {})
    assert worst_nodes(tmp_path / "g.onnx", tmp_path / "int8.onnx", []) == ["to b", "to c", "to a"]


@pytest.mark.parametrize("upstream", [1, 2])  # factor by which the nodes before change the activation
def test_neither_what_a_fused_relu_cuts_off_nor_what_comes_from_upstream_is_noise(upstream, tmp_path, monkeypatch):
    x, b = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xb")
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="to a"),
        helper.make_node("Add", ["a", "a"], ["b"], name="to b"),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [b])), tmp_path / "g.prepared.onnx")
    every, empty = np.linspace(-1, 1, 9, dtype=np.float32), np.zeros(0, np.float32)
    exact = every.clip(0)
    found = {
        "a": {"pre_qdq": [upstream * every, empty], "post_qdq": [upstream * exact, empty], "float": [exact, empty]},
        "b": {"pre_qdq": [every], "post_qdq": [every.round(1)], "float": [every]},
    }
    monkeypatch.setattr("dlref.export.convert.activations_of", lambda *_: {})
    monkeypatch.setattr("dlref.export.convert.qdq_loss_debug.create_activation_matching", lambda *_: found)
    assert worst_nodes(tmp_path / "g.onnx", tmp_path / "int8.onnx", []) == ["to b", "to a"]


def test_what_a_fused_relu_cuts_off_is_not_noise(tmp_path):
    """Of the three activations, only the input is noisy: its range is that of one large sample."""
    network = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.ReLU6(), nn.Conv1d(1, 1, 1, bias=False)).eval()
    for weights in network.parameters():
        nn.init.ones_(weights)
    x = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(0))
    feeds = [{"x": x.numpy()}] * 4 + [{"x": 10 * x.numpy()}]
    target, path = TARGETS["x86-64"], tmp_path / "g.onnx"
    write_onnx(Graph(network, {"x": x}, ["y"], {}, {}), path, target)
    convert(path, tmp_path / "int8.onnx", target, Plan("int8", "MinMax"), feeds)
    kinds = {node.name: node.op_type for node in onnx.load(tmp_path / "g.prepared.onnx").graph.node}
    found = worst_nodes(path, tmp_path / "int8.onnx", feeds)
    assert [kinds[name] for name in found] == ["Conv", "Clip", "Conv"]


def test_data_whose_labels_differ_from_the_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match="labels of the data and of the checkpoint differ"):
        export(classifier(Linear()).eval(), Pixels(labels="xyz"), CPU, tmp_path / "bundle")


# Outputs that are a selection of rows


def rows(count=40, images=10):
    """Return boxes, scores and labels like a detector's, with the last ten places of each image empty."""
    generator = np.random.default_rng(0)
    answer = {
        "boxes": generator.uniform(0, 300, (images, count, 4)).astype(np.float32),
        "scores": -np.sort(-generator.uniform(0.1, 1, (images, count)).astype(np.float32), axis=1),
        "labels": generator.integers(0, 3, (images, count)),
        "count": np.full(images, count - 10),
    }
    for name in ("boxes", "scores", "labels"):
        answer[name][:, -10:] = 0
    return answer


def changed(**changes):
    answer = rows()
    for name, change in changes.items():
        answer[name] = change(answer[name])
    return answer


def swapped(array):
    """Swap two neighbouring rows in every image."""
    order = np.arange(array.shape[1])
    order[[3, 4]] = order[[4, 3]]
    return array[:, order]


def one_row_else(array):
    array[0, 29] = array[0, 29] + 1
    return array


PLAIN = SimpleNamespace(selected=(), discrete=())  # a graph none of whose outputs is a choice


def compared(actual, tolerance=1e-4, expected=None):
    def exported(**inputs):
        return actual

    exported.shape = exported.declared = {}
    expected = rows() if expected is None else expected
    boxes = SimpleNamespace(selected=tuple(expected), discrete=())
    graph = Compared("detect", boxes, lambda **inputs: expected, exported, tolerance)
    graph()
    graph.check_flips()
    return graph


def test_in_lower_precision_each_row_is_compared_with_its_nearest_match():
    """Otherwise, a box that moved by one place would be compared with its neighbour."""
    nearly = changed(boxes=lambda boxes: np.where(boxes > 0, boxes + 0.5, 0))
    found = compared({name: swapped(array) if array.ndim > 1 else array for name, array in nearly.items()}, np.inf)
    assert found.max_abs_error == pytest.approx(0.5, abs=1e-4)
    assert found.flipped == 0
    fewer = changed(**{n: lambda a: np.where(np.arange(40) < 25, a, 0) for n in ("scores", "labels")})
    fewer["boxes"] = np.where((np.arange(40) < 25)[:, None], fewer["boxes"], 0)
    fewer["count"] -= 5
    found = compared(fewer, np.inf)
    assert found.flipped == 50
    assert found.max_abs_error == 0


@pytest.mark.parametrize(
    ("expected", "actual", "unlike"),
    [
        ([np.inf, 1, 1], [np.inf, np.nan, 1], 1),
        ([np.inf, 7, 1], [5, 7, np.inf], 2),
        ([np.nan, 1, 1], [3, 1 + 1e-4, 1 + 1e-6], 2),
        ([1000, 1000, 0.001], [1000.005, 1000.02, 0.00102], 2),  # relative above 1, absolute below
    ],
)
def test_elements_beyond_the_tolerance_or_not_finite_count_as_different_unless_they_are_equal(expected, actual, unlike):
    graph = Compared("draw", PLAIN, lambda: None, SimpleNamespace(shape={}, declared={}), 1e-5)
    assert graph.count_unlike(np.float32(actual), np.float32(expected)) == unlike


def test_an_output_that_is_nan_in_pytorch_too_is_refused():
    graph = Compared("decode", PLAIN, lambda: None, SimpleNamespace(shape={}, declared={}), 1e-5)
    with pytest.raises(Refused, match="differs from PyTorch by nan"):
        graph.difference("logits", np.float32([1, np.nan]), np.float32([1, np.nan]))


@pytest.mark.parametrize("actual", [[np.inf, np.nan], [np.inf, np.inf]])
def test_a_non_finite_element_is_refused_unless_pytorchs_is_infinite_too(actual):
    graph = Compared("draw", PLAIN, lambda: None, SimpleNamespace(shape={}, declared={}), np.inf)
    graph.check_alike("value", np.float32([np.inf, 1]), np.float32([np.inf, 2]))
    with pytest.raises(Refused, match="not a finite number"):
        graph.check_alike("value", np.float32(actual), np.float32([np.inf, 1]))


def test_selected_rows_may_change_their_order_and_a_single_row_may_differ():
    graph = compared(changed(boxes=swapped, scores=swapped, labels=swapped))
    assert (graph.rows, graph.flipped, graph.max_abs_error) == (300, 0, 0)
    graph = compared(changed(labels=one_row_else))
    assert (graph.rows, graph.flipped, graph.max_abs_error) == (300, 1, 0)  # of the rows that match
    graph = compared(changed(scores=lambda s: s + np.float32(5e-5) * (s > 0) * (np.arange(10) == 0)[:, None]))
    assert graph.flipped == 0
    assert graph.max_abs_error == pytest.approx(5e-5, rel=0.1)
    graph = compared(changed(boxes=lambda b: b + np.float32(1e-2) * (b > 200)))  # relative above 1
    assert (graph.flipped, graph.max_abs_error) == (0, pytest.approx(1e-2, rel=0.1))


@pytest.mark.parametrize(("error", "unlike"), [(1e-3, 0), (0.1, 1)])
def test_a_corner_near_the_edge_may_differ_by_as_much_as_any_other(error, unlike):
    """Boxes are computed in fractions of the image, so float32 rounds them all to the same part of a pixel."""
    expected = rows()
    expected["boxes"][0, 0, 0] = 0.5
    found = {name: array.copy() for name, array in expected.items()}
    found["boxes"][0, 0, 0] += error
    assert compared(found, expected=expected).flipped == unlike


@pytest.mark.parametrize(("order", "unlike"), [([2, 0, 1], 0), ([1, 2, 0], 0), ([3, 0, 1, 2], 1), ([1, 2, 3, 0], 1)])
def test_a_row_that_moves_by_more_than_two_places_counts_as_different(order, unlike):
    def moved(array):
        array[0, : len(order)] = array[0, order]
        return array

    assert compared(changed(**dict.fromkeys(ROWS, moved))).flipped == unlike


def test_rows_that_move_up_because_others_are_missing_do_not_count():
    fewer = changed(**dict.fromkeys(ROWS, lambda a: np.concatenate([a[:, 5:], a[:, -5:]], axis=1)))
    assert compared(fewer | {"count": fewer["count"] - 5}, np.inf).flipped == 50


@pytest.mark.parametrize(("kind", "allowed"), [("selected", 20), ("discrete", 10)])
def test_the_share_that_may_differ_depends_on_the_kind_of_choice(kind, allowed):
    chosen = SimpleNamespace(**{"selected": (), "discrete": (), kind: ("y",)})
    graph = Compared("g", chosen, lambda: None, SimpleNamespace(shape={}, declared={}), 1e-5)
    graph.rows, graph.flipped = 10_000, allowed
    graph.check_flips()
    graph.flipped += 1
    with pytest.raises(Refused, match=f"{allowed + 1} of 10000 differ"):
        graph.check_flips()


ROWS = ("boxes", "scores", "labels")


def real(array):
    """Return a mask of the rows that are not padding."""
    return (np.arange(40) < 30).reshape(-1, *[1] * (array.ndim - 2))


def reversed_rows(array):
    return np.concatenate([array[:, 29::-1], array[:, 30:]], axis=1)


def shorter(array):
    return array * (np.arange(40) < 29).reshape(-1, *[1] * (array.ndim - 2))


@pytest.mark.parametrize(
    "actual",
    [
        changed(boxes=lambda b: b + np.float32(0.1) * real(b)),
        changed(scores=lambda s: s * np.float32(1.001)),
        changed(labels=lambda k: np.where(k == 2, 1, k)),
        changed(boxes=lambda b: np.concatenate([b[:-1], b[:1]])),  # the last image has the boxes of the first
        changed(**dict.fromkeys(ROWS, shorter), count=lambda n: n - 1),
        changed(**dict.fromkeys(ROWS, reversed_rows)),
    ],
    ids=["shifted", "scaled", "a class less", "another image's", "a row less each", "reversed"],
)
def test_a_selection_that_differs_in_more_than_a_few_rows_is_refused(actual):
    with pytest.raises(Refused, match=r"outputs boxes, scores, labels, count: \d+ of 300 differ"):
        compared(actual)


def longer(array):
    array[0, 30:38] = 5
    return array


def test_surplus_rows_count_as_different():
    with pytest.raises(Refused, match=": 8 of 300 differ"):
        compared(changed(**dict.fromkeys(ROWS, longer), count=lambda n: n + 8 * (np.arange(10) == 0)))


def test_all_rows_count_as_different_from_none():
    none = changed(**dict.fromkeys((*ROWS, "count"), np.zeros_like))
    with pytest.raises(Refused, match=": 300 of 300 differ"):
        compared(none)
    with pytest.raises(Refused, match=": 300 of 0 differ"):
        compared(rows(), expected=none)


@pytest.mark.parametrize(
    "actual",
    [
        changed(count=lambda n: n * 0),
        changed(count=lambda n: n - 1),
        changed(**dict.fromkeys(ROWS, lambda a: a[:, ::-1])),
        changed(scores=lambda s: np.where(s == 0, np.float32(0.1), s)),
    ],
    ids=["none", "one less", "zeros first", "padding that is none"],
)
def test_a_selection_with_a_wrong_count_or_misplaced_padding_is_refused(actual):
    with pytest.raises(Refused, match="rows of zeros between others"):
        compared(actual)


@pytest.mark.parametrize("kind", ["selected", "discrete"])
def test_a_float32_bundle_that_loses_accuracy_is_refused_if_its_outputs_are_a_choice(kind, tmp_path, monkeypatch):
    task, data = classifier().eval(), Pixels()
    monkeypatch.setattr(task, "deployable", lambda batch, own=task.deployable: chosen(own(batch), kind))
    scores = iter([0.9, 0.9, 0.8])  # PyTorch's on both splits come first
    monkeypatch.setattr(task, "evaluate", lambda runner, batches: next(scores))
    with pytest.raises(Refused, match=r"accuracy 0\.8000, PyTorch's 0\.9000: 10\.00 points lost"):
        export(task, data, CPU, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def chosen(deployable, kind):
    graphs = {name: replace(graph, **{kind: graph.outputs}) for name, graph in deployable.graphs.items()}
    return replace(deployable, graphs=graphs)


def test_a_selection_of_another_type_or_shape_is_refused():
    with pytest.raises(Refused, match="labels: int32"):
        compared(changed(labels=lambda k: k.astype(np.int32)))
    with pytest.raises(Refused, match="boxes: float32"):
        compared(changed(boxes=lambda b: b[:, :-1]))


def test_an_activation_of_the_last_layer_is_no_postprocessing(tmp_path):
    graph = Graph(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), {"x": torch.rand(2, 3, 8, 8)}, ["y"], {}, {})
    write_onnx(graph, tmp_path / "head.onnx", CPU)
    assert postprocessing_nodes(onnx.load(tmp_path / "head.onnx").graph) == []


def test_decoding_in_a_float16_graph_is_not_rounded(tmp_path):
    """Edges of boxes as float16 fractions are off by half a pixel at 1920 pixels."""

    class Decoded(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.head(x) * 0, (x + 1).clamp(0, 9)

    graph = Graph(Decoded(), {"x": torch.rand(2, 3, 8, 8)}, ["y", "z"], {}, {})
    write_onnx(graph, tmp_path / "decoded.onnx", TARGETS["cuda"])
    convert(tmp_path / "decoded.onnx", tmp_path / "half.onnx", TARGETS["cuda"], Plan("float16"), [])
    x = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    (z,) = onnxruntime.InferenceSession(tmp_path / "half.onnx").run(["z"], {"x": x})
    assert np.abs(z - (x + 1)).max() < 1e-6


def test_postprocessing_after_the_last_weights_is_not_quantised(tmp_path):
    class Decoded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.conv(x).relu()
            return (self.head(x + x) + 1).clamp(0, 9)

    inputs = {"x": torch.rand(2, 3, 8, 8)}
    graph = Graph(Decoded(), inputs, ["y"], {"x": {0: "batch"}}, {"batch": (1, 2)})
    write_onnx(graph, tmp_path / "decoded.onnx", CPU)
    model = onnx.load(tmp_path / "decoded.onnx")
    left = {node.op_type for node in model.graph.node if node.name in postprocessing_nodes(model.graph)}
    kept = {node.op_type for node in model.graph.node} - left
    assert {"Add", "Clip"} <= left
    assert {"Conv", "Relu"} <= kept
    adds = [node.name for node in model.graph.node if node.op_type == "Add"]
    assert sum(name in postprocessing_nodes(model.graph) for name in adds) == len(adds) - 1 == 1


@pytest.mark.parametrize("found", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_a_score_may_be_any_number(found):
    value = score(SimpleNamespace(evaluate=lambda runner, batches: found), None, [])
    assert (value, type(value)) == (0.5, float)


@pytest.mark.parametrize("found", [None, {"accuracy": 0.5}, torch.ones(2), "good"])
def test_a_score_that_is_no_number_is_refused(found):
    message = error_of(score, SimpleNamespace(evaluate=lambda runner, batches: found), None, [])
    assert message == f"evaluate of SimpleNamespace returns {type(found).__name__}; expected a number, its metric"


def sound():
    """Return a graph of two inputs that share two axes; a state for a single sample is repeated."""
    axes = {"x": {0: "batch", 1: "time"}, "y": {0: "batch", 1: "time"}}
    inputs = {"x": torch.ones(2, 3), "y": torch.ones(1, 3)}
    return Graph(nn.Identity(), inputs, ["z"], axes, {"batch": (1, 2), "time": (3, 4)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamic_axes": {"image": {0: "batch"}}}, "dynamic_axes image; expected names among x, y"),
        ({"unbounded": ["z"]}, "unbounded z; expected names among x, y"),
        ({"selected": ["x"]}, "selected x; expected names among z"),
        ({"discrete": ["mask"]}, "discrete mask; expected names among z"),
        ({"outputs": ["x"]}, "inputs and outputs x, y, x; expected names that differ"),
        ({"dynamic_axes": {"x": {2: "batch"}}}, "axis 2 (batch) of x: [2, 3]; expected an axis from 0 to 1"),
        ({"dynamic_axes": {"x": {-1: "batch"}}}, "axis -1 (batch) of x: [2, 3]; expected an axis from 0 to 1"),
        ({"sizes": {"batch": (1, 2)}}, "axis 1 (time) of x: no sizes; expected those at which to verify it"),
        (
            {"sizes": {"batch": (1, 2), "time": ()}},
            "axis 1 (time) of x: no sizes; expected those at which to verify it",
        ),
    ],
)
def test_names_and_axes_that_do_not_fit_together_are_refused(changes, message):
    kind, metadata = "image-classification", {}
    Deployable(kind, {"g": sound()}, metadata).checked()
    made = Deployable(kind, {"g": replace(sound(), **changes)}, metadata)
    assert error_of(made.checked) == f"graph g: {message}"


def test_a_network_with_another_number_of_outputs_is_refused():
    graph = Graph(nn.Identity(), {"x": torch.ones(2, 3)}, ["y", "state"], {}, {})
    assert error_of(graph, x=np.ones((2, 3))) == "the network returns 1 tensors; expected y, state"


@pytest.mark.parametrize("value", [{1}, np.float32(1), torch.ones(2), float("nan")])
def test_metadata_that_json_does_not_have_is_refused(value):
    made = Deployable("image-classification", {}, {"labels": ["a"], "mean": value})
    assert error_of(made.checked).startswith("metadata of deployable: ")


def test_metadata_is_verified_as_a_device_reads_it():
    made = Deployable("image-classification", {}, {"names": {0: "a"}, "size": (2, 3)}).checked()
    assert made.metadata == {"names": {"0": "a"}, "size": [2, 3]}


def test_an_unknown_kind_of_runner_is_refused():
    with pytest.raises(UserError, match="bundle kind 'my-kind' is unknown"):
        Deployable("my-kind", {}, {}).checked()
