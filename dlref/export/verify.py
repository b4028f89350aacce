"""A bundle answers as the task does, or it is not written."""

from collections.abc import Callable, Iterable

import numpy as np

from dlref.export.graph import example_at
from dlref.runtime import UserError, make_runner


class Refused(UserError):
    """An exported graph that does not answer as PyTorch does."""


class Compared:
    """An exported graph that answers, and holds each answer against the task's own."""

    def __init__(self, name: str, graph, exported: Callable):
        self.name, self.graph, self.exported = name, graph, exported
        self.max_abs_error = 0.0

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The exported graph's answer, once compared."""
        actual, expected = self.exported(**inputs), self.graph(**inputs)
        for name, reference in expected.items():
            self.max_abs_error = max(self.max_abs_error, self.difference(name, actual[name], reference))
        return actual

    def difference(self, output: str, actual: np.ndarray, expected: np.ndarray) -> float:
        """Largest absolute error; raises Refused beyond the graph's tolerance, or for another shape or type."""
        where = f"{self.name}, output {output}"
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise Refused(
                f"{where}: {actual.dtype} {actual.shape}; expected {expected.dtype} {expected.shape} as PyTorch"
            )
        if not expected.size:
            return 0.0
        error = np.abs(actual.astype(np.float64) - expected)
        worst = (error / np.maximum(np.abs(expected), 1)).max()
        if not worst <= self.graph.tolerance:  # also for NaN
            raise Refused(f"{where}: differs from PyTorch by {worst:.2g}; expected at most {self.graph.tolerance:.0e}")
        return float(error.max())


def parity(name: str, graph, exported: Callable) -> list[dict]:
    """Compare at every declared size, on the example inputs cut or repeated to it. Raises Refused."""
    rows = []
    for turn in range(max(map(len, graph.sizes.values()))):
        sizes = {symbol: choices[turn % len(choices)] for symbol, choices in graph.sizes.items()}
        inputs = {key: tensor.numpy() for key, tensor in example_at(graph, sizes).items()}
        compared = Compared(f"{name} at {sizes}", graph, exported)
        compared(**inputs)
        shape = {key: list(array.shape) for key, array in inputs.items()}
        rows.append({"graph": name, "shape": shape, "max_abs_error": compared.max_abs_error})
    return rows


def metric(task, deployable, exported: dict[str, Callable], batches: Iterable, split: str, n: int) -> dict:
    """The task's metric over a whole split, by PyTorch and by the exported graphs, every answer compared."""
    compared = {name: Compared(name, graph, exported[name]) for name, graph in deployable.graphs.items()}
    score = {
        contender: task.evaluate(make_runner(deployable.kind, graphs, deployable.metadata), batches)
        for contender, graphs in (("pytorch", deployable.graphs), ("bundle", compared))
    }
    error = max(graph.max_abs_error for graph in compared.values())
    return {"name": task.metric, **score, "split": split, "n": n, "max_abs_error": error}
