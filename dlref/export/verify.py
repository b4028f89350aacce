"""Verify that a bundle's outputs match PyTorch's; a bundle that fails is not written."""

import hashlib
from collections.abc import Callable
from math import inf

import numpy as np

from dlref.export.graph import example_at
from dlref.runtime import UserError
from dlref.runtime.bench import rows_of
from dlref.runtime.bundle import OnnxGraph
from dlref.runtime.errors import one_line

REMEMBERED = 1 << 29  # bytes of PyTorch's outputs to cache
FLIPPED = 0.002  # share of the rows of `Graph.selected` outputs that rounding may change
MISPLACED = 0.001  # share of the elements of `Graph.discrete` outputs that rounding may change
FEW = 2  # rows or elements that may always differ; also places by which a row may move


class Refused(UserError):
    """The outputs of an exported graph, or its metric, differ too much from PyTorch's."""


class Reference:
    """A graph in PyTorch that caches its outputs, since it is the slow side of each comparison."""

    def __init__(self, graph):
        self.graph, self.shape = graph, graph.shape
        self.known: dict[bytes, dict[str, np.ndarray]] = {}
        self.room = REMEMBERED

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the graph's outputs, from the cache if they are known."""
        digest = hashlib.blake2b()
        for name, array in inputs.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        key = digest.digest()
        if key in self.known:
            return self.known[key]
        answer = self.graph(**inputs)
        size = sum(array.nbytes for array in answer.values())
        if size <= self.room:
            self.room -= size
            self.known[key] = answer
        return answer


class Compared:
    """An exported graph that compares each of its outputs with PyTorch's.

    `tolerance` is relative to outputs above 1 and absolute below, in a choice to the largest of a column. It is
    infinite for a graph of lower precision, which is judged by the task's metric: only a wrong rank, type or
    padding, or a value that is not finite, is then refused, since rounding can change the number of boxes or
    tokens. Outputs that are a choice (`Graph.selected`) are compared as a set of rows, discrete outputs such as
    argmax (`Graph.discrete`) by the number of elements that differ.
    """

    def __init__(self, name: str, graph, reference: Callable, exported: OnnxGraph, tolerance: float):
        self.name, self.reference, self.exported, self.tolerance = name, reference, exported, tolerance
        self.shape, self.declared = exported.shape, exported.declared
        self.selected, self.discrete = graph.selected, graph.discrete
        self.max_abs_error = 0.0
        self.rows = self.flipped = 0

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the exported graph's outputs, once compared. Raises Refused, or UserError if the network fails."""
        try:
            expected = self.reference(**inputs)
        except (RuntimeError, IndexError) as error:
            wanted = "expected it to accept every size that its task declares"
            raise UserError(f"{self.name}: the network fails ({one_line(error)}); {wanted}") from error
        try:
            actual = self.exported(**inputs)
        except UserError as error:
            reason = str(error).removeprefix(f"{self.exported.path}: ")  # a path in a temporary folder
            raise Refused(f"{self.name}: {reason}; expected the same outputs as PyTorch") from None
        self.check_declared(actual)
        for name, reference in expected.items():
            self.check_alike(name, actual[name], reference)
            if name in self.discrete and actual[name].shape == reference.shape:
                self.rows += reference.size
                self.flipped += self.count_unlike(actual[name], reference)
            elif name not in self.selected:
                self.max_abs_error = max(self.max_abs_error, self.difference(name, actual[name], reference))
        if self.selected:
            self.compare_sets(actual, expected)
        return actual

    def check_declared(self, actual: dict[str, np.ndarray]) -> None:
        """Raise Refused for an output whose shape differs from the declared one: export froze one of its axes.

        onnxruntime returns the output all the same; runtimes that plan memory by the declared shapes would fail.
        """
        for name, declared in self.declared.items():
            sizes = zip(declared, actual[name].shape, strict=False)  # empty for an unknown rank
            if any(isinstance(size, int) and size != own for size, own in sizes):
                raise Refused(
                    f"{self.name}, output {name}: {actual[name].shape}, but the graph declares {declared}; expected "
                    "axes that vary to be declared as dynamic"
                )

    def compare_sets(self, actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
        """Match the rows of each sample in `expected` to rows of `actual` near the same places; count mismatches."""
        self.check_padding(actual)
        for found, wanted in zip(rows_of(actual, self.selected), rows_of(expected, self.selected), strict=True):
            found, wanted = found[found.any(axis=1)], wanted[wanted.any(axis=1)]
            self.rows += len(wanted)
            unlike = abs(len(found) - len(wanted))
            if len(found) and len(wanted):
                # A corner is no more exact near the edge of an image than elsewhere: relative to all of its column.
                size = np.abs(np.where(np.isfinite(wanted), wanted, 0)).max(axis=0).clip(min=1)
                with np.errstate(invalid="ignore"):  # inf - inf; equal infinities count as 0
                    error = np.where(found[:, None] == wanted, 0, np.abs(found[:, None] - wanted))  # (found, wanted, F)
                    relative = (error / size).max(axis=2)
                nearest, places = relative.argmin(axis=0), np.arange(len(wanted))
                same = relative[nearest, places] <= self.tolerance
                if self.tolerance == inf:  # rows match if each is the other's nearest; others come or go
                    same &= relative.argmin(axis=1)[nearest] == places
                unlike = max(len(found), len(wanted)) - int(same.sum())
                unlike += int((np.abs(nearest - places)[same] > FEW + unlike).sum())
                worst = error[nearest, places].max(axis=1)[same].max(initial=0)
                self.max_abs_error = max(self.max_abs_error, float(worst))
            self.flipped += unlike

    def check_padding(self, actual: dict[str, np.ndarray]) -> None:
        """Raise Refused if rows of zeros come before others, or if an output of one axis is not the number of rows."""
        there = rows_of(actual, self.selected).any(axis=2)
        number = there.sum(axis=1)
        first = np.arange(there.shape[1]) < number[:, None]
        counts = {name: actual[name] for name in self.selected if actual[name].ndim == 1}
        if not np.array_equal(there, first) or not all(np.array_equal(array, number) for array in counts.values()):
            raise Refused(
                f"{self.name}: rows of zeros between others, or a wrong {', '.join(counts) or 'number of rows'}; "
                "expected zeros only after the last row"
            )

    def check_flips(self) -> None:
        """After all comparisons: raise Refused if more rows or elements differ than rounding may change."""
        share = FLIPPED if self.selected else MISPLACED
        if self.tolerance < inf and self.flipped > max(FEW, share * self.rows):
            outputs = ", ".join([*self.selected, *self.discrete])
            raise Refused(
                f"{self.name}, outputs {outputs}: {self.flipped} of {self.rows} differ from PyTorch's; expected at "
                f"most {share:.1%}"
            )

    def count_unlike(self, actual: np.ndarray, expected: np.ndarray) -> int:
        """Count the elements that differ by more than the tolerance; in lower precision, those that differ at all."""
        allowed = self.tolerance if self.tolerance < inf else 0
        with np.errstate(invalid="ignore"):  # inf - inf; NaN always counts as unlike
            error = np.abs(actual.astype(np.float64) - expected)
            near = error <= allowed * np.maximum(np.abs(np.where(np.isfinite(expected), expected, 0)), 1)
        return int((~near & (actual != expected)).sum())

    def check_alike(self, output: str, actual: np.ndarray, expected: np.ndarray) -> None:
        """Raise Refused for another shape (in lower precision: rank) or type, or for values that are not finite."""
        where = f"{self.name}, output {output}"
        alike = actual.shape == expected.shape or (self.tolerance == inf and actual.ndim == expected.ndim)
        if not alike or actual.dtype != expected.dtype:
            raise Refused(
                f"{where}: {actual.dtype} {actual.shape}; expected {expected.dtype} {expected.shape}, as in PyTorch"
            )
        finite = np.isfinite(expected)
        if (~np.isfinite(actual) & (finite if actual.shape == expected.shape else finite.all())).any():
            raise Refused(f"{where}: not a finite number; expected finite numbers, as in PyTorch")

    def difference(self, output: str, actual: np.ndarray, expected: np.ndarray) -> float:
        """Return the largest absolute error. Raises Refused beyond the tolerance."""
        if actual.shape != expected.shape or not expected.size:
            return 0.0
        with np.errstate(invalid="ignore"):  # inf - inf; equal infinities, as in masks, count as 0
            error = np.where(actual == expected, 0, np.abs(actual.astype(np.float64) - expected))
            worst = (error / np.maximum(np.abs(expected), 1)).max()
        if not worst <= self.tolerance:  # also for NaN
            raise Refused(
                f"{self.name}, output {output}: differs from PyTorch by {worst:.2g}; expected at most "
                f"{self.tolerance:.0e}"
            )
        return float(error.max())


def parity(name: str, graph, reference: Callable, exported: OnnxGraph, tolerance: float, static: bool) -> list[dict]:
    """Compare a graph at every declared size, on the example inputs cut or repeated to it. Raises Refused.

    An exported graph with `static` axes is compared only at its own sizes.
    """
    rows = []
    for turn in range(1 if static else max(map(len, graph.sizes.values()), default=1)):
        sizes = {symbol: choices[turn % len(choices)] for symbol, choices in graph.sizes.items()}
        inputs = {key: tensor.numpy() for key, tensor in example_at(graph, sizes).items()}
        compared = Compared(f"{name} at {sizes}", graph, reference, exported, tolerance)
        compared(**inputs)
        compared.check_flips()
        shape = {key: list(array.shape) for key, array in inputs.items()}
        allowed = tolerance if np.isfinite(tolerance) else None
        flips = {"flipped": compared.flipped, "rows": compared.rows}
        found = {"max_abs_error": compared.max_abs_error, "tolerance": allowed, **flips}
        rows.append({"graph": name, "shape": shape, **found})
    return rows
