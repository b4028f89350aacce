"""Export one graph of a task to one ONNX file. `graph` is always a `Graph` from the task's `deployable()`."""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import onnx
import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table

from dlref.export.targets import Target
from dlref.runtime import UserError
from dlref.runtime.bundle import LARGEST_FILE
from dlref.runtime.errors import one_line


def write_onnx(graph, path: Path, target: Target) -> None:
    """Export `graph` to the single file `path`; its declared axes are dynamic unless the target's are static.

    Raises UserError if the graph cannot be exported.
    """
    axes = {name: {} if target.static else dict(graph.dynamic_axes.get(name, {})) for name in graph.inputs}
    inputs = example_at(graph, first_sizes(graph) if target.static else trace_sizes(graph))
    torch.compiler.reset()  # torch 2.14 compiles an LSTM's loop, and fails to compare it with those of earlier exports
    try:
        with warnings_silenced(), recurrent_layers_whole(graph.module):
            exported = torch.onnx.export(
                graph.module.eval(),
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=dynamic_shapes(graph, axes),
                opset_version=target.opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{path.name}: torch.export refuses the graph: {reason}") from error
    forget_origin(exported.model)
    model = exported.model_proto
    model.ir_version = min(model.ir_version, target.ir_version)
    name_axes(model, axes, path.name)
    save(model, path)


def write_program(graph, path: Path, target: Target) -> None:
    """Save `graph` for PyTorch alone, at the sizes of a single prediction; the batch is dynamic unless axes are static.

    Raises UserError if the graph cannot be traced.
    """
    batch = {
        name: {axis: symbol for axis, symbol in graph.dynamic_axes.get(name, {}).items() if symbol == "batch"}
        for name in ({} if target.static else graph.inputs)
    }
    sizes = first_sizes(graph)
    if any(batch.values()):
        sizes["batch"] = trace_sizes(graph)["batch"]
    inputs = example_at(graph, sizes)
    shapes = dynamic_shapes(graph, batch)
    module, arguments = graph.module.eval(), tuple(inputs.values())
    try:
        with warnings_silenced(), recurrent_layers_whole(module):
            program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
            torch.export.save(program, path)
    except Exception as error:  # torch.export's errors have no base class
        raise UserError(f"{path.name}: torch.export refuses the graph: {one_line(error)}") from error


def dynamic_shapes(graph, axes: dict[str, dict[int, str]]) -> tuple:
    """Return the dynamic axes of each input in torch.export's format, which nests those of *arguments in a tuple."""
    shapes = [dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in graph.inputs]
    parameters = inspect.signature(graph.module.forward).parameters.values()
    named = sum(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return (*shapes[:named], *[tuple(shapes[named:])] * (named < len(parameters)))


@contextmanager
def warnings_silenced() -> Iterator[None]:
    """Silence torch's exporter and onnxruntime's tools: they warn about their own code, and their output is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def recurrent_layers_whole(module: nn.Module) -> Iterator[None]:
    """Trace LSTMs and GRUs by their shapes alone: torch would unroll the time steps, which fixes their number.

    The traced graph holds each layer as one operator either way. In torch 2.11, unrolling also gives the last state of
    an LSTM an extra axis.
    """
    recurrent = any(isinstance(layer, nn.LSTM | nn.GRU) for layer in module.modules())
    with ExitStack() as stack:
        for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input) if recurrent else ():
            # Where torch looks up the unrolling: for dynamic sizes, for fixed sizes, and in its cache of exports.
            stack.enter_context(patch.dict(decomposition_table, {operator: recurrent_shapes}))
            stack.enter_context(patch.dict(operator.py_kernels, dict.fromkeys(operator.py_kernels, recurrent_shapes)))
            stack.enter_context(patch.dict(operator._dispatch_cache, clear=True))
        yield


def recurrent_shapes(inputs, before, weights, biases, num_layers, dropout, train, bidirectional, batch_first) -> tuple:
    """Return uninitialised outputs and last states, like `torch.ops.aten.gru.input` (one) and `lstm.input` (two)."""
    states = before if isinstance(before, list | tuple) else [before]
    first, second, width = *inputs.shape[:2], states[0].shape[2] * (2 if bidirectional else 1)
    # In memory, time comes first either way; operators traced later depend on that.
    outputs = (
        inputs.new_empty(second, first, width).transpose(0, 1)
        if batch_first
        else inputs.new_empty(first, second, width)
    )
    return outputs, *(torch.empty_like(state) for state in states)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Check a model and write it as one file. Raises UserError if it is too large."""
    if model.ByteSize() > LARGEST_FILE:
        raise UserError(f"{path.name}: {model.ByteSize()} bytes; expected less than 2 GB in a single file")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def forget_origin(model) -> None:
    """Clear the exporter's metadata in an onnx_ir model: it holds stack traces with paths of this machine."""
    graphs = [model.graph, *model.functions.values()]
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    nodes = [node for graph in graphs for node in graph.all_nodes()]
    for noted in (model, *graphs, *nodes, *values, *(value for node in nodes for value in node.outputs)):
        noted.metadata_props.clear()


def trace_sizes(graph) -> dict[str, int]:
    """Choose a size to trace at for each symbol, unlike those of other symbols and all sizes to be verified.

    Equal sizes could be mistaken for one axis, and sizes 0 and 1 for constants.
    """
    taken = {size for sizes in graph.sizes.values() for size in sizes}
    chosen = {}
    for symbol, sizes in graph.sizes.items():
        chosen[symbol] = next(size for size in count(sizes[0] + 1) if size > 1 and size not in taken)
        taken.add(chosen[symbol])
    return chosen


def first_sizes(graph) -> dict[str, int]:
    """Return the size of each symbol in a single prediction."""
    return {symbol: sizes[0] for symbol, sizes in graph.sizes.items()}


def example_at(graph, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the example inputs, cut or repeated from their start to `sizes` along their dynamic axes.

    An axis that is empty in the example is filled with zeros.
    """
    inputs = {}
    for name, tensor in graph.inputs.items():
        for axis, symbol in graph.dynamic_axes.get(name, {}).items():
            if not tensor.shape[axis]:  # such as a past that is still empty
                tensor = tensor.new_zeros([*tensor.shape[:axis], 1, *tensor.shape[axis + 1 :]])
            tensor = tensor.index_select(axis, torch.arange(sizes[symbol]) % tensor.shape[axis])
        inputs[name] = tensor
    return inputs


def name_axes(model: onnx.ModelProto, axes: dict[str, dict[int, str]], name: str) -> None:
    """Give the dynamic axes the task's names. Raises UserError for an axis that the exporter froze."""
    symbols = {}
    for value in model.graph.input:
        for axis, symbol in axes[value.name].items():
            dimension = value.type.tensor_type.shape.dim[axis]
            if not dimension.dim_param:
                raise UserError(
                    f"{name}: axis {axis} ({symbol}) of {value.name} was frozen to {dimension.dim_value}; expected "
                    "it to stay dynamic"
                )
            symbols[dimension.dim_param] = symbol
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in symbols:
                dimension.dim_param = symbols[dimension.dim_param]
