"""The return value of a task's `deployable()`: all that the export step knows of its graphs.

The export step also uses a task's `metric`, `evaluate` and `degradation`, and passes it the data by `take_facts`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from dlref.runtime import UserError, make_runner, runner_of
from dlref.runtime.errors import one_line


@dataclass(frozen=True)
class Graph:
    """A network to export, with every axis that may change at run time.

    Args:
        module: takes the inputs in the given order and returns a tensor or a tuple of tensors.
        inputs: example tensors by name, from real data where available.
        outputs: name of each output.
        dynamic_axes: input name -> axis -> symbol ("batch", "time", "height", ...); an axis that is not
            listed is fixed to the size of the example.
        sizes: symbol -> sizes at which the exported graph must equal the module. The first size is that of
            a single prediction, which is timed and which a device that needs fixed shapes gets.
        tolerance: largest allowed error, relative for outputs above 1 and absolute below. In `selected` outputs it is
            relative to the largest number in the same place of all rows of a sample.
        selected: outputs that result from a selection, such as the boxes left by suppression: rounding can change which
            rows (second axis) there are and their order. These outputs are compared together, as a set of rows for each
            sample, and all but a few rows must be found again near their places. Trailing rows of zeros are padding; an
            output with one axis is the number of rows.
        discrete: outputs that can jump when a score changes in its last digit, such as the class of each pixel, or a
            count. All but a few elements must be within the tolerance.
        unbounded: inputs whose values may differ in size without bound within a call, such as those of several series.
            Dynamic quantisation has one range per call, so the layers that read these inputs stay float; where ranges
            come from calibration, or in float16, the whole bundle does.
        calls: number of calls per prediction, for the measurement.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    sizes: Mapping[str, Sequence[int]]
    tolerance: float = 1e-5
    selected: Sequence[str] = ()
    discrete: Sequence[str] = ()
    unbounded: Sequence[str] = ()
    calls: int = 1

    @property
    def shape(self) -> dict[str, list[int | str]]:
        """The axes of each input: a size, or the symbol of a dynamic axis."""
        return {
            name: [self.dynamic_axes.get(name, {}).get(axis, size) for axis, size in enumerate(tensor.shape)]
            for name, tensor in self.inputs.items()
        }

    def check(self, name: str) -> None:
        """Raise UserError if the names, axes and sizes of this graph, called `name`, do not fit together.

        Examples may differ in the size of a shared axis: export cuts or repeats each of them.
        """
        every = [*self.inputs, *self.outputs]
        if len(set(every)) < len(every):
            raise UserError(f"graph {name}: inputs and outputs {', '.join(every)}; expected names that differ")
        names = {"dynamic_axes": self.inputs, "unbounded": self.inputs}
        names |= {"selected": self.outputs, "discrete": self.outputs}
        for field, known in names.items():
            if unknown := [key for key in getattr(self, field) if key not in known]:
                raise UserError(f"graph {name}: {field} {', '.join(unknown)}; expected names among {', '.join(known)}")
        for key, axes in self.dynamic_axes.items():
            shape = self.inputs[key].shape
            for axis, symbol in axes.items():
                where = f"graph {name}: axis {axis} ({symbol}) of {key}"
                if axis not in range(len(shape)):
                    raise UserError(f"{where}: {list(shape)}; expected an axis from 0 to {len(shape) - 1}")
                if not self.sizes.get(symbol):
                    raise UserError(f"{where}: no sizes; expected those at which to verify it")

    @torch.inference_mode()
    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs of the module, the reference that every exported form is checked against."""
        device = next(self.module.parameters(), torch.empty(0)).device
        results = self.module(*(torch.from_numpy(arrays[name]).to(device) for name in self.inputs))
        results = results if isinstance(results, tuple) else (results,)
        if len(results) != len(self.outputs):
            raise UserError(f"the network returns {len(results)} tensors; expected {', '.join(self.outputs) or 'none'}")
        return {name: result.cpu().numpy() for name, result in zip(self.outputs, results, strict=True)}


@dataclass(frozen=True)
class Deployable:
    """The graphs of a task, the runner that serves them and the metadata that the runner needs.

    Args:
        kind: name of the runner, `dlref/runtime/runners/<kind>.py` with underscores.
        graphs: graphs by the names that the runner uses.
        metadata: plain JSON values: labels, vocabulary, quantile levels, ...
    """

    kind: str
    graphs: Mapping[str, Graph]
    metadata: Mapping[str, object]

    def checked(self) -> "Deployable":
        """Return the same with its metadata as a device reads it. Raises UserError for what export cannot write."""
        runner_of(self.kind)
        for name, graph in self.graphs.items():
            graph.check(name)
        try:
            metadata = json.loads(json.dumps(dict(self.metadata), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"metadata of deployable: {one_line(error)}; expected values that JSON has") from None
        return replace(self, metadata=metadata)

    def runner(self, graphs: Mapping[str, Callable] | None = None):
        """Return the runner that a device uses, over these graphs in PyTorch, or over others of the same names."""
        return make_runner(self.kind, self.graphs if graphs is None else graphs, self.metadata)
