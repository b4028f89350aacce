"""A float32 graph -> what a target's precision and file format ask for, by onnxruntime's own tools."""

import io
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    StaticQuantConfig,
    qdq_loss_debug,
    quantize,
    quantize_dynamic,
)
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from dlref.export.graph import save, warnings_silenced
from dlref.export.targets import Target
from dlref.runtime import UserError
from dlref.runtime.errors import one_line

Feeds = list[dict[str, np.ndarray]]

# A graph that holds one of these is quantised statically, on real data: what surrounds it stays in integers.
CONVOLUTIONS = {"Conv", "ConvTranspose"}
# Softmax, sigmoids and resizing stay float: 256 levels are too few for a probability or a coordinate.
STATIC = [
    *CONVOLUTIONS,
    "Gemm",
    "MatMul",
    "Add",
    "Relu",
    "Clip",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
]
WEIGHTED = {*CONVOLUTIONS, "Gemm", "MatMul"}
FUSED = {"Relu", "Clip"}  # into the node before: what lies between is never quantised
# Others dynamically. Named, for left alone quantize_dynamic rewrites Attention (opset 23) into an operator that
# nothing runs; and onnxruntime has no integer GRU.
DYNAMIC = ["MatMul", "LSTM"]
QUANTISED = {*WEIGHTED, *DYNAMIC}
# Graphs with these stay float32: few kernels have them otherwise, and what is left around them gains nothing. For
# an NPU, forecasts with 8-bit weights were off by a tenth of a series' mean a step, and the metric hardly saw it.
RECURRENT = {"LSTM", "GRU", "RNN"}
# Operators that turn a mask's infinities into finite numbers; Clip's infinity is only its bound.
FINITE = {"Softmax", "Exp", "Clip"}
# Operators whose answers have a range of their own, whatever they are given.
BOUNDED = {*RECURRENT, "Tanh", "Sigmoid", "Softmax", "LayerNormalization"}
# Histograms keep every activation of every sample in memory, so they see fewer.
SAMPLES = {"MinMax": 256, "Percentile": 32, "Entropy": 32}
DEBUGGED = 4  # samples to look for the worst nodes on
KEPT_FLOAT = (0.05, 0.15, 0.4)  # shares of the nodes to try
LARGE = 65504 / 8  # an eighth of float16's largest number: other data may have larger ones


@dataclass(frozen=True)
class Plan:
    """One way to try: a precision, how its ranges are found, and which nodes of each graph stay float."""

    precision: str
    calibration: str | None = None
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Also the name of its folder."""
        kept = sum(map(len, self.kept.values()))
        return "-".join([self.precision, *filter(None, [self.calibration]), *[f"{kept}-kept"] * bool(kept)])


def is_calibrated(path: Path, target: Target) -> bool:
    """Whether quantising this graph for `target` needs data."""
    if target.quantisation is None:
        return False
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    return bool(kinds & CONVOLUTIONS) or (target.quantisation.qnn and not kinds & RECURRENT)


def convert(source: Path, path: Path, target: Target, plan: Plan, feeds: Feeds, unbounded: Sequence[str] = ()) -> None:
    """Write the float32 graph `source` to `path` as `plan` says, in the ONNX format. Raises UserError.

    `unbounded` are inputs of any size. What is quantised dynamically has one range for all that a call holds: one large
    value would leave no levels to the others, so layers that read such inputs stay float.
    """
    if plan.precision == "float32":
        path.write_bytes(source.read_bytes())
        return
    with quietly(path.name):
        model = onnx.load(source)
        whole = plan.precision == "float16" or target.quantisation.qnn  # not layer by layer
        if whole and any(node.op_type in RECURRENT for node in model.graph.node):
            raise UserError(f"{source.stem}: recurrent layers stay float32; expected a graph without them")
        if plan.precision == "float16":
            save(in_float16(model, plan.kept.get(source.stem, ())), path)
            return
        prepared = source.with_suffix(".prepared.onnx")
        if not prepared.is_file():
            prepare(source, prepared, target)
        if is_calibrated(source, target):
            quantize(prepared, path, static_configuration(prepared, target, plan, feeds))
        else:
            scheme = target.quantisation
            quantize_dynamic(
                prepared,
                path,
                op_types_to_quantize=DYNAMIC,
                nodes_to_exclude=nodes_behind(onnx.load(prepared).graph, unbounded, BOUNDED),
                per_channel=scheme.per_channel,
                reduce_range=scheme.reduce_range,
                weight_type=QuantType[scheme.weight],
            )
        save(tidy(onnx.load(path), target), path)


def in_float16(model: onnx.ModelProto, kept: Sequence[str]) -> onnx.ModelProto:
    """A float32 model in float16, but for inputs and outputs, what decodes, and the nodes `kept`."""
    blocked = [*kept, *postprocessing_nodes(model.graph)]
    lists = {"op_block_list": DEFAULT_OP_BLOCK_LIST, "node_block_list": blocked}
    half = ONNXModel(convert_float_to_float16(model, keep_io_types=True, **lists))
    half.topological_sort()  # the casts of the inputs were appended
    del half.model.graph.value_info[:]  # types from before, where nodes stay float
    without_round_trips(half.model.graph)
    return half.model


def without_round_trips(graph: onnx.GraphProto) -> None:
    """Let nodes that stay float32 read each other's answers: the converter rounds them to float16 in between."""
    writers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        before = writers.get(node.input[0]) if casts(node, TensorProto.FLOAT) else None
        if before is not None and casts(before, TensorProto.FLOAT16):
            node.input[0] = before.input[0]  # of float32: onnxruntime leaves such a cast out


def casts(node: onnx.NodeProto, kind: int) -> bool:
    """Whether a node casts to a type of TensorProto."""
    return node.op_type == "Cast" and any(a.name == "to" and a.i == kind for a in node.attribute)


def is_quantised(path: Path) -> bool:
    """Whether a graph computes with integers anywhere."""
    return any("Quantize" in node.op_type or "Integer" in node.op_type for node in onnx.load(path).graph.node)


def tidy(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """Without what the optimiser leaves: operator sets that no node uses, and notes; in the target's file version."""
    model.ir_version = min(model.ir_version, target.ir_version)
    del model.metadata_props[:]
    used = {node.domain for node in model.graph.node} | {""}
    sets = [(opset.domain, opset.version) for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in sets)
    return model


@contextmanager
def quietly(name: str) -> Iterator[None]:
    """Silence onnxruntime's tools, which print and log as they go, and make any exception of theirs a UserError."""
    try:
        with redirect_stdout(io.StringIO()), warnings_silenced():
            yield
    except UserError:
        raise
    except Exception as error:  # they raise whatever comes up
        raise UserError(f"{name}: onnxruntime cannot convert it ({one_line(error)})") from error


def prepare(source: Path, path: Path, target: Target) -> None:
    """Shapes inferred and constants folded, which the quantisers ask for."""
    fused = path.with_suffix(".fused.onnx")  # before the other, whose notes in the file qnn's cannot read
    first = fused if target.quantisation.qnn and qnn_preprocess_model(source, fused) else source
    # Symbolic inference takes ONNX's Attention for Microsoft's, and fails; ONNX's own inference is enough.
    quant_pre_process(first, path, skip_symbolic_shape=True)
    model = onnx.load(path)
    own_weights(model.graph)
    onnx.save(model, path)


def own_weights(graph: onnx.GraphProto) -> None:
    """Copy the weights that several layers share: onnxruntime cannot make such layers exact where there is no VNNI."""
    weights, taken = {tensor.name: tensor for tensor in graph.initializer}, set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if node.op_type not in QUANTISED or name not in weights:
                continue
            if name in taken:
                node.input[place] = f"{name}_of_{node.name}"
                graph.initializer.add().CopyFrom(weights[name])
                graph.initializer[-1].name = node.input[place]
            taken.add(name)


def static_configuration(source: Path, target: Target, plan: Plan, feeds: Feeds) -> StaticQuantConfig:
    """QDQ with ranges from `feeds`."""
    scheme = target.quantisation
    reader, method = Reader(feeds[: SAMPLES[plan.calibration]]), CalibrationMethod[plan.calibration]
    activation, weight = QuantType[scheme.activation], QuantType[scheme.weight]
    graph = onnx.load(source).graph
    kept = [*plan.kept.get(source.name.split(".")[0], ()), *postprocessing_nodes(graph), *infinity_mask_nodes(graph)]
    if scheme.qnn:
        return get_qnn_qdq_config(source, reader, method, activation, weight, scheme.per_channel, nodes_to_exclude=kept)
    return StaticQuantConfig(
        reader,
        method,
        QuantFormat.QDQ,
        activation,
        weight,
        op_types_to_quantize=STATIC,
        nodes_to_exclude=kept,
        per_channel=scheme.per_channel,
        reduce_range=scheme.reduce_range,
    )


def postprocessing_nodes(graph: onnx.GraphProto) -> list[str]:
    """The nodes after the last layers with weights: they decode, for which 256 levels or 11 bits are too few."""
    writers = {output: node for node in graph.node for output in node.output}
    before: set[str] = set()
    waiting = [node for node in graph.node if node.op_type in WEIGHTED]
    while waiting:
        node = waiting.pop()
        if node.name not in before:
            before.add(node.name)
            waiting += [writers[name] for name in node.input if name in writers]
    return [node.name for node in graph.node if node.name not in before and node.op_type not in FUSED]


def infinity_mask_nodes(graph: onnx.GraphProto) -> list[str]:
    """The nodes that a mask's infinities pass through, up to the softmax that ends them: no range holds one."""
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    infinite = {name for name, value in values.items() if value.dtype.kind == "f" and np.isinf(value).any()}
    return nodes_behind(graph, infinite, FINITE)


def nodes_behind(graph: onnx.GraphProto, tensors: Iterable[str], ends: Container[str]) -> list[str]:
    """The nodes that tensors pass through, up to operators that end it, and these."""
    reached, nodes = set(tensors), []
    for node in graph.node:
        if reached.intersection(node.input):
            nodes.append(node.name)
            reached.update(() if node.op_type in ends else node.output)
    return nodes


class Reader(CalibrationDataReader):
    """The inputs that a graph met on training data."""

    def __init__(self, feeds: Feeds):
        self.remaining = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input, or None."""
        return next(self.remaining, None)


def activations_of(model: Path, feeds: Feeds) -> dict[str, list[np.ndarray]]:
    """The values of every tensor between the nodes of a graph, for the first DEBUGGED samples."""
    augmented = model.with_suffix(".augmented.onnx")
    qdq_loss_debug.modify_model_output_intermediate_tensors(model, augmented)
    activations = qdq_loss_debug.collect_activations(augmented, Reader(feeds[:DEBUGGED]))
    augmented.unlink()
    return activations


def nodes_beyond_float16(source: Path, feeds: Feeds) -> list[str]:
    """Nodes of a float32 graph that read or write numbers too large for float16, or nearly so.

    Running it in float16 on a CPU would not show them: it has few float16 kernels and computes in float32 instead.
    """
    with quietly(source.name):
        activations = activations_of(source, feeds)
    for feed in feeds[:DEBUGGED]:
        activations |= {name: [*activations.get(name, ()), array] for name, array in feed.items()}
    large = {
        name
        for name, arrays in activations.items()
        for array in arrays
        if array.dtype.kind == "f" and np.abs(array[np.isfinite(array)]).max(initial=0) > LARGE
    }
    return [node.name for node in onnx.load(source).graph.node if large.intersection([*node.input, *node.output])]


def worst_nodes(source: Path, quantised: Path, feeds: Feeds) -> list[str]:
    """Quantised nodes, those first around the activation to which quantising adds most noise.

    `source` is the float32 graph that `convert` made `quantised` from.
    """
    prepared = source.with_suffix(".prepared.onnx")
    with quietly(quantised.name):
        float_activations, quantised_activations = (activations_of(model, feeds) for model in (prepared, quantised))
        errors = qdq_loss_debug.compute_activation_error(
            qdq_loss_debug.create_activation_matching(quantised_activations, float_activations)
        )
    # Decibels of signal over noise, of this quantisation alone.
    worst_first = sorted(errors, key=lambda name: errors[name]["qdq_err"])
    graph = onnx.load(prepared).graph
    return list(dict.fromkeys(node for name in worst_first for node in nodes_around(graph, name)))


def nodes_around(graph: onnx.GraphProto, activation: str) -> list[str]:
    """The quantised nodes that write an activation, with the nodes fused into them, and those that read it."""
    writers = {output: node for node in graph.node for output in node.output}
    nodes, name = [], activation
    while name in writers:
        nodes.append(writers[name])
        name = writers[name].input[0] if writers[name].op_type in FUSED else None
    nodes += [node for node in graph.node if activation in node.input]
    return [node.name for node in nodes if node.op_type in STATIC]


def place_in(folder: Path, path: Path, target: Target) -> None:
    """Put a converted graph into a bundle, in the file format of its target.

    Beside an .ort file lies the list of the operators that a small build of onnxruntime needs for it.
    """
    if target.file_format == "onnx":
        shutil.copy(path, folder)
        return
    with quietly(path.name):
        convert_onnx_models_to_ort(path, folder, optimization_styles=[OptimizationStyle.Fixed], target_platform="arm")
    for operators in folder.glob("*.config"):
        lines = operators.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith("#")]  # paths of this machine
        operators.write_text("\n".join(kept) + "\n", encoding="utf-8")
