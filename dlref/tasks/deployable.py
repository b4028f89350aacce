"""What a task answers to `deployable()`: all that the export step learns of its graphs.

Beside it, export asks a task for `metric`, `evaluate` and `degradation`, and tells it of the data by `take_facts`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dlref.runtime import make_runner


@dataclass(frozen=True)
class Graph:
    """One network to export, with every axis that may change at run time.

    Args:
        module: takes the inputs in the order given, answers a tensor or a tuple of tensors.
        inputs: example tensors by name, real data where there is some.
        outputs: a name for each output.
        dynamic_axes: input name -> axis -> symbol ("batch", "time", "height", ...); an axis that is not
            named here is fixed to its example's size.
        sizes: symbol -> the sizes at which the exported graph has to equal the module. The first ones are
            those of a single answer: what is timed, and what a device that needs fixed shapes gets.
        tolerance: largest error allowed, relative to outputs above 1 and absolute below.
        selected: outputs that are a choice, such as the boxes that suppression leaves: a rounding can change which rows
            (second axis) there are and their order. Together they are compared as a set of rows for each sample, and
            all but a few have to be found again, near their places. Rows of zeros, at the end, are none; an output of
            one axis is the number of rows.
        discrete: outputs that jump where a score changes in its last digit, such as the class of each pixel, or a
            count. All but a few elements have to be within the tolerance.
        unbounded: inputs that may be of any size beside each other, such as the values of series over their scales.
        calls: how often an answer calls it, for the measurement.
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
        """For each input its axes: a size, or the symbol of a dynamic one."""
        return {
            name: [self.dynamic_axes.get(name, {}).get(axis, size) for axis, size in enumerate(tensor.shape)]
            for name, tensor in self.inputs.items()
        }

    @torch.inference_mode()
    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """The module's own answer: the reference that every exported form is checked against."""
        device = next(self.module.parameters(), torch.empty(0)).device
        results = self.module(*(torch.from_numpy(arrays[name]).to(device) for name in self.inputs))
        results = results if isinstance(results, tuple) else (results,)
        return {name: result.cpu().numpy() for name, result in zip(self.outputs, results, strict=True)}


@dataclass(frozen=True)
class Deployable:
    """The graphs of a task, the runner that serves them and what the runner has to know.

    Args:
        kind: names the runner, `dlref/runtime/runners/<kind>.py` with underscores.
        graphs: by the names that the runner calls them.
        metadata: plain JSON values: labels, vocabulary, quantile levels, ...
    """

    kind: str
    graphs: Mapping[str, Graph]
    metadata: Mapping[str, object]

    def runner(self, graphs: Mapping[str, Callable] | None = None):
        """The runner that a device uses, over these graphs in PyTorch, or over others of the same names."""
        return make_runner(self.kind, self.graphs if graphs is None else graphs, self.metadata)
