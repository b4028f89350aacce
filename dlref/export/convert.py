"""Convert a float32 graph to a target's precision and file format, with onnxruntime's own tools."""

import io
import shutil
from collections import Counter
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

# Graphs with these operators are quantised statically, on real data: the nodes around them then stay in integers.
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
FUSED = {"Relu", "Clip"}  # into the node before: the activation in between is never quantised
# Other graphs are quantised dynamically. The operators are listed because quantize_dynamic would otherwise rewrite
# Attention (opset 23) into an operator that nothing runs. GRU is missing: onnxruntime has no integer GRU. Of Gather,
# only large embeddings are quantised, which can be half of a language model: each call dequantises what it looks up.
DYNAMIC = ["MatMul", "LSTM", "Gather"]
EMBEDDING = 2**20  # numbers in the smallest table to quantise; that of gpt_python, 3 MB, would cost 1.4% of a call
QUANTISED = ("Quantize", "Dequantize", "Integer")  # in the names of quantised graphs' operators
PRODUCTS = {"MatMul", "LSTM", "Gemm"}  # quantize_dynamic splits each Gemm into a MatMul and an Add
# For float16 and NPU targets, graphs with these operators stay float32: few kernels support them in a lower precision,
# and converting only the nodes around them gains nothing. For an NPU, forecasts with 8-bit weights were off by a tenth
# of a series' mean per step, and the metric hardly showed it.
RECURRENT = {"LSTM", "GRU", "RNN"}
# Operators that turn a mask's infinities into finite numbers; Clip's infinity is only its bound.
FINITE = {"Softmax", "Exp", "Clip"}
# Operators whose outputs have a range of their own, whatever their inputs.
BOUNDED = {*RECURRENT, "Tanh", "Sigmoid", "Softmax", "LayerNormalization"}
# Calibration samples by method. Those with histograms keep every activation in memory, so they get fewer samples.
SAMPLES = {"MinMax": 256, "Percentile": 32, "Entropy": 32}
DEBUGGED = 4  # samples on which to look for the worst nodes, and for values too large for float16
KEPT_FLOAT = (0.05, 0.15, 0.4)  # shares of the nodes to keep in float, tried in turn
# A norm of 256 is the root of 65536, infinite in float16; numbers below 1.7e-4 have squares of 0. onnxruntime's mean on
# a GPU rounds the sum and the number of elements to the input's type before it divides.
NEVER_FLOAT16 = [*DEFAULT_OP_BLOCK_LIST, "ReduceL2", "ReduceMean"]
LARGE = 65504 / 8  # an eighth of float16's largest number: other data may have larger values


@dataclass(frozen=True)
class Plan:
    """One way to convert the graphs: a precision, a calibration method, and the nodes of each graph that stay float."""

    precision: str
    calibration: str | None = None
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the plan's name, which is also the name of its folder."""
        kept = sum(map(len, self.kept.values()))
        return "-".join([self.precision, *filter(None, [self.calibration]), *[f"{kept}-kept"] * bool(kept)])


def is_calibrated(path: Path, target: Target) -> bool:
    """Return whether quantising a graph for `target` needs calibration data."""
    if target.quantisation is None:
        return False
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    return bool(kinds & CONVOLUTIONS) or (target.quantisation.qnn and not kinds & RECURRENT)


def embeddings(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Return the nodes that look up an input of a graph, such as tokens, in a large table of weights."""
    inputs = {value.name for value in graph.input}
    tables = {tensor.name for tensor in graph.initializer if np.prod(tensor.dims) >= EMBEDDING}
    gathers = [node for node in graph.node if node.op_type == "Gather"]
    return tuple(node.name for node in gathers if node.input[0] in tables and node.input[1] in inputs)


def convert(source: Path, path: Path, target: Target, plan: Plan, feeds: Feeds, unbounded: Sequence[str] = ()) -> None:
    """Convert the float32 graph `source` by `plan` and write it to `path` as ONNX. Raises UserError.

    `unbounded` names inputs whose values may be arbitrarily large: neither calibrated ranges nor float16 hold them.
    Dynamic quantisation uses a single range per call, so one large value would leave the others too few levels; layers
    that read these inputs stay float.
    """
    if plan.precision == "float32":
        path.write_bytes(source.read_bytes())
        return
    with quietly(path.name):
        model = onnx.load(source)
        whole = plan.precision == "float16" or target.quantisation.qnn  # the whole graph, not layer by layer
        if whole and any(node.op_type in RECURRENT for node in model.graph.node):
            raise UserError(f"{source.stem}: recurrent layers stay float32; expected a graph without them")
        if unbounded and (whole or is_calibrated(source, target)):
            raise UserError(
                f"{source.stem}: the values of {', '.join(unbounded)} have no bound; expected inputs of a known range"
            )
        if plan.precision == "float16":
            save(in_float16(model, plan.kept.get(source.stem, ())), path)
            return
        prepared = source.with_suffix(".prepared.onnx")
        if not prepared.is_file():
            prepare(source, prepared, target)
        if is_calibrated(source, target):
            quantize(prepared, path, static_configuration(prepared, target, plan, feeds))
        else:
            scheme, graph = target.quantisation, onnx.load(prepared).graph
            gathers = {node.name for node in graph.node if node.op_type == "Gather"}
            kept = [*gathers.difference(embeddings(graph)), *plan.kept.get(source.stem, ())]
            floats = nodes_behind(graph, unbounded, BOUNDED)
            quantize_dynamic(
                prepared,
                path,
                op_types_to_quantize=DYNAMIC,
                nodes_to_exclude=[*kept, *floats, *(f"{name}_MatMul" for name in floats)],  # as for PRODUCTS
                per_channel=scheme.per_channel,
                reduce_range=scheme.reduce_range,
                weight_type=QuantType[scheme.weight],
            )
        save(tidy(onnx.load(path), target), path)


def in_float16(model: onnx.ModelProto, kept: Sequence[str]) -> onnx.ModelProto:
    """Convert a float32 model to float16, except for its inputs and outputs, decoding nodes and the nodes `kept`."""
    blocked = [*kept, *postprocessing_nodes(model.graph)]
    lists = {"op_block_list": NEVER_FLOAT16, "node_block_list": blocked}
    half = ONNXModel(convert_float_to_float16(model, keep_io_types=True, **lists))
    half.topological_sort()  # the converter appends the casts of the inputs
    del half.model.graph.value_info[:]  # outdated types around the nodes that stay float
    without_round_trips(half.model.graph)
    return half.model


def without_round_trips(graph: onnx.GraphProto) -> None:
    """Connect nodes that stay float32 directly: the converter rounds the values between them to float16."""
    writers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        before = writers.get(node.input[0]) if casts(node, TensorProto.FLOAT) else None
        if before is not None and casts(before, TensorProto.FLOAT16):
            node.input[0] = before.input[0]  # now float32 to float32: onnxruntime drops such casts


def casts(node: onnx.NodeProto, kind: int) -> bool:
    """Return whether a node is a cast to `kind`, a type of TensorProto."""
    return node.op_type == "Cast" and any(a.name == "to" and a.i == kind for a in node.attribute)


def is_quantised(path: Path) -> bool:
    """Return whether any node of a graph is quantised, or dequantised after a lookup in a table of integers."""
    return any(word in node.op_type for node in onnx.load(path).graph.node for word in QUANTISED)


def tidy(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """Remove leftovers of the optimiser (unused operator sets, metadata) and set the target's IR version."""
    model.ir_version = min(model.ir_version, target.ir_version)
    del model.metadata_props[:]
    used = {node.domain for node in model.graph.node} | {""}
    sets = [(opset.domain, opset.version) for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in sets)
    return model


@contextmanager
def quietly(name: str) -> Iterator[None]:
    """Silence onnxruntime's tools, which print and log, and turn any exception of theirs into a UserError."""
    try:
        with redirect_stdout(io.StringIO()), warnings_silenced():
            yield
    except UserError:
        raise
    except Exception as error:  # the tools raise exceptions of any type
        raise UserError(f"{name}: onnxruntime cannot convert it ({one_line(error)})") from error


def prepare(source: Path, path: Path, target: Target) -> None:
    """Infer shapes and fold constants, as the quantisers require."""
    fused = path.with_suffix(".fused.onnx")  # QNN's step comes first: it cannot read the other's metadata
    first = fused if target.quantisation.qnn and qnn_preprocess_model(source, fused) else source
    # Symbolic inference mistakes ONNX's Attention for Microsoft's and fails; ONNX's own inference is enough.
    quant_pre_process(first, path, skip_symbolic_shape=True)
    model = onnx.load(path)
    own_weights(model.graph, STATIC if is_calibrated(source, target) else PRODUCTS)
    onnx.save(model, path)


def own_weights(graph: onnx.GraphProto, quantised: Container[str]) -> None:
    """Give each node of `quantised` operators its own copy of shared weights and constants, such as a hard swish's 3.

    Without VNNI, onnxruntime cannot make the integer sums of graphs with shared ones exact.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        for place, name in enumerate(node.input):
            if node.op_type not in quantised or name not in weights or readers[name] == 1:
                continue
            readers[name] -= 1
            node.input[place] = f"{name}_{place}_of_{node.name}"
            graph.initializer.add().CopyFrom(weights[name])
            graph.initializer[-1].name = node.input[place]


def static_configuration(source: Path, target: Target, plan: Plan, feeds: Feeds) -> StaticQuantConfig:
    """Return the configuration of static quantisation (QDQ), with ranges from `feeds`."""
    scheme = target.quantisation
    reader, method = Reader(feeds[: SAMPLES[plan.calibration]]), CalibrationMethod[plan.calibration]
    activation, weight = QuantType[scheme.activation], QuantType[scheme.weight]
    graph = onnx.load(source).graph
    floats = [*postprocessing_nodes(graph), *infinity_mask_nodes(graph), *nodes_with_sizes(graph)]
    kept = [*plan.kept.get(source.name.split(".")[0], ()), *floats]
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
    """Return the nodes after the last layers with weights: for decoding, 256 levels or 11 bits are too few."""
    writers = {output: node for node in graph.node for output in node.output}
    before: set[str] = set()
    waiting = [node for node in graph.node if node.op_type in WEIGHTED]
    while waiting:
        node = waiting.pop()
        if node.name not in before:
            before.add(node.name)
            waiting += [writers[name] for name in node.input if name in writers]
    after: list[str] = []
    written: set[str] = set()
    for node in graph.node:
        fused = node.op_type in FUSED and node.input[0] not in written  # part of a layer with weights
        if node.name not in before and not fused:
            after.append(node.name)
            written.update(node.output)
    return after


def infinity_mask_nodes(graph: onnx.GraphProto) -> list[str]:
    """Return the nodes that a mask's infinities pass through, up to the softmax: no quantised range holds infinity."""
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    infinite = {name for name, value in values.items() if value.dtype.kind == "f" and np.isinf(value).any()}
    return nodes_behind(graph, infinite, FINITE)


def nodes_with_sizes(graph: onnx.GraphProto) -> list[str]:
    """Return the nodes that read what is computed from the sizes of inputs alone, such as 1/n for an average of n.

    Its range in the calibration data is that of their sizes: at others, it would be cut off.
    """
    behind = set(nodes_behind(graph, [value.name for value in graph.input], {"Shape"}))
    sizes = {name for node in graph.node if node.name not in behind or node.op_type == "Shape" for name in node.output}
    return [node.name for node in graph.node if sizes.intersection(node.input)]


def nodes_behind(graph: onnx.GraphProto, tensors: Iterable[str], ends: Container[str]) -> list[str]:
    """Return the nodes that depend on `tensors`, up to and including the first operators in `ends`."""
    reached, nodes = set(tensors), []
    for node in graph.node:
        if reached.intersection(node.input):
            nodes.append(node.name)
            reached.update(() if node.op_type in ends else node.output)
    return nodes


class Reader(CalibrationDataReader):
    """The calibration inputs of a graph, recorded on training data."""

    def __init__(self, feeds: Feeds):
        self.remaining = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input, or None at the end."""
        return next(self.remaining, None)


def activations_of(model: Path, feeds: Feeds) -> dict[str, list[np.ndarray]]:
    """Return the values of all float inputs and activations of a graph, for the first DEBUGGED samples."""
    augmented = model.with_suffix(".augmented.onnx")
    qdq_loss_debug.modify_model_output_intermediate_tensors(model, augmented)
    activations = qdq_loss_debug.collect_activations(augmented, Reader(feeds[:DEBUGGED]))
    augmented.unlink()
    return activations


def nodes_beyond_float16(source: Path, feeds: Feeds) -> list[str]:
    """Return the nodes of a float32 graph that read or write numbers too large for float16, or nearly so.

    Running the graph in float16 on a CPU would not show them: a CPU has few float16 kernels and computes in float32.
    Larger weights would be cut off without a word.
    """
    with quietly(source.name):
        values = activations_of(source, feeds)
    graph = onnx.load(source).graph
    values |= {tensor.name: [onnx.numpy_helper.to_array(tensor)] for tensor in graph.initializer}
    large = {
        name
        for name, arrays in values.items()
        for array in arrays
        if array.dtype.kind == "f" and np.abs(array[np.isfinite(array)]).max(initial=0) > LARGE
    }
    return [node.name for node in graph.node if large.intersection([*node.input, *node.output])]


def worst_nodes(source: Path, quantised: Path, feeds: Feeds) -> list[str]:
    """Return the quantised nodes, starting around the activation to which quantisation adds the most noise.

    `source` is the float32 graph that `convert` made `quantised` from.
    """
    prepared = source.with_suffix(".prepared.onnx")
    with quietly(quantised.name):
        float_activations, quantised_activations = (activations_of(model, feeds) for model in (prepared, quantised))
        matched = qdq_loss_debug.create_activation_matching(quantised_activations, float_activations)
        graph = onnx.load(prepared).graph
        fused = {node.output[0] for node in graph.node if node.op_type in FUSED}
        for values in (matched[name] for name in fused & matched.keys()):  # what a ReLU cuts off is not noise
            for place in ("pre_qdq", "post_qdq"):
                pairs = zip(values[place], values["float"], strict=True)
                values[place] = [x.clip(exact.min(), exact.max()) if exact.size else x for x, exact in pairs]
        errors = qdq_loss_debug.compute_activation_error(matched)
    # The signal-to-noise ratio in decibels of each activation's own quantisation.
    worst_first = sorted(errors, key=lambda name: errors[name]["qdq_err"])
    return list(dict.fromkeys(node for name in worst_first for node in nodes_around(graph, name)))


def nodes_around(graph: onnx.GraphProto, activation: str) -> list[str]:
    """Return the quantised nodes that write an activation, with the nodes fused into them, and those that read it."""
    writers = {output: node for node in graph.node for output in node.output}
    nodes, name = [], activation
    while name in writers:
        nodes.append(writers[name])
        name = writers[name].input[0] if writers[name].op_type in FUSED else None
    nodes += [node for node in graph.node if activation in node.input]
    return [node.name for node in nodes if node.op_type in STATIC]


def place_in(folder: Path, path: Path, target: Target) -> None:
    """Put a converted graph into a bundle, in the target's file format.

    An .ort file comes with a list of the operators that a small build of onnxruntime needs for it.
    """
    if target.file_format == "onnx":
        shutil.copy(path, folder)
        return
    with quietly(path.name):
        convert_onnx_models_to_ort(path, folder, optimization_styles=[OptimizationStyle.Fixed], target_platform="arm")
    for operators in folder.glob("*.config"):
        lines = operators.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith("#")]  # comments hold paths of this machine
        operators.write_text("\n".join(kept) + "\n", encoding="utf-8")
