"""Find the precision of a bundle: the target's, or float32 if the target's loses too much or is not faster.

Each attempt is a whole bundle, opened and judged as a device would open it. A lower precision is refused if the task's
metric worsens by more than the target's gate, or if the bundle is not faster than float32. If it worsens too much,
other ways to find the ranges are tried, then the worst nodes or the embeddings stay float. The last resort is a float32
bundle, whose report lists the refused attempts and the reasons.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from math import inf
from pathlib import Path

import numpy as np
import onnx
import torch

from dlref.export.convert import (
    DEBUGGED,
    KEPT_FLOAT,
    SAMPLES,
    Feeds,
    Plan,
    convert,
    embeddings,
    is_calibrated,
    is_quantised,
    nodes_beyond_float16,
    place_in,
    worst_nodes,
)
from dlref.export.graph import example_at, first_sizes, write_onnx
from dlref.export.manifest import describe, write_manifest
from dlref.export.measure import CPU, Contenders, can_time, provider
from dlref.export.progress import say, watched
from dlref.export.targets import Target
from dlref.export.verify import Compared, Reference, Refused, parity
from dlref.runtime import UserError
from dlref.runtime.bench import ANSWERS, EXAMPLE, arrays, open_bundle, smoke_test
from dlref.runtime.bundle import OnnxGraph, open_graphs, read_manifest

FLOAT32 = Plan("float32")


@dataclass
class Attempt:
    """A bundle and its verdict: `refused` holds the reason for a refusal, and is empty for an accepted bundle."""

    plan: Plan
    folder: Path
    refused: str = ""
    slower: bool = False
    degradation: float = inf
    parity: list[dict] = field(default_factory=list)
    metric: dict = field(default_factory=dict)


class Attempts:
    """All attempts of one export.

    Args:
        task: the trained task, which has taken the facts of its data.
        data: its data module, set up.
        deployable: the task's `deployable()` for a validation batch.
        target: the device.
        place: an empty folder to work in.
    """

    def __init__(self, task, data, deployable, target: Target, place: Path):
        self.task, self.data, self.deployable, self.target = task, data, deployable, target
        self.place = place
        self.references = {name: Reference(graph) for name, graph in deployable.graphs.items()}
        self.pytorch: dict[str, float] = {}
        self.made: list[Attempt] = []
        for folder in ("programs", "sources", "converted", "bundles"):
            (place / folder).mkdir()
        for name, graph in deployable.graphs.items():
            say(f"exporting {name}")
            write_onnx(graph, self.source(name), target)
        self.contenders = Contenders(target, deployable.graphs, place / "programs", self.bundle(FLOAT32))

    def source(self, name: str) -> Path:
        """Return the path of the ONNX file that PyTorch wrote for a graph."""
        return self.place / "sources" / f"{name}.onnx"

    # From plan to plan

    def find_best(self) -> Attempt:
        """Try plans, best first, until one is not refused. Raises Refused if even float32 is not good enough."""
        self.exact = self.parity(FLOAT32)  # first: the metric that judges a lower precision hides small errors
        for split in ("validation", "test"):
            self.score_pytorch(split)
        for plan in self.plans():
            attempt = self.judged(plan)
            self.made.append(attempt)
            if not attempt.refused:
                return attempt
            say(f"{plan} refused: {attempt.refused}")
        raise AssertionError("float32 holds, or has raised Refused")

    def plans(self) -> Iterator[Plan]:
        """Yield the next plan to try, given the attempts refused so far."""
        if any(map(self.calibrated, self.deployable.graphs)):
            yield from self.quantised_plans()
        elif self.target.precision == "float16":
            yield Plan("float16", kept=self.too_large())
        elif self.target.precision != "float32":
            yield Plan(self.target.precision)
            kept = self.lookups()
            if kept and self.made[-1].metric and not self.made[-1].slower:  # it lost too much
                yield Plan(self.target.precision, kept=kept)
        yield FLOAT32

    def quantised_plans(self) -> Iterator[Plan]:
        """Yield a plan for each calibration method, then the best one with more and more of the worst nodes in float.

        Stop after an attempt that is not faster than float32: no other plan would be.
        """
        for method in SAMPLES:
            yield Plan(self.target.precision, method)
            if self.made[-1].slower:
                return
        best = min(self.made, key=lambda attempt: attempt.degradation)
        if best.degradation == inf:
            return
        try:
            ranked = {
                name: worst_nodes(self.source(name), self.converted(name, best.plan), self.feeds[name])
                for name in filter(self.calibrated, self.deployable.graphs)
            }
        except UserError as error:  # it keeps all activations in memory
            say(f"cannot find the nodes that lose the most precision: {error}")
            return
        for share in KEPT_FLOAT:
            worst = {name: tuple(nodes[: max(1, round(share * len(nodes)))]) for name, nodes in ranked.items()}
            kept = worst | self.lookups()
            plan = Plan(self.target.precision, best.plan.calibration, kept)
            if plan == self.made[-1].plan:  # with few nodes, two shares can round to the same number
                continue
            yield plan
            if self.made[-1].slower:
                return

    def lookups(self) -> dict[str, tuple[str, ...]]:
        """Return the nodes of each dynamically quantised graph that look up large embeddings."""
        sources = {name: self.source(name) for name in self.deployable.graphs if not self.calibrated(name)}
        return {name: found for name, path in sources.items() if (found := embeddings(onnx.load(path).graph))}

    def too_large(self) -> dict[str, tuple[str, ...]]:
        """Return the nodes of each graph whose values are too large for float16."""
        try:
            feeds = {name: feeds for name, feeds in self.feeds.items() if feeds}
            found = {name: tuple(nodes_beyond_float16(self.source(name), some)) for name, some in feeds.items()}
        except UserError as error:
            say(f"cannot check for values too large for float16: {error}")
            return {}
        return {name: nodes for name, nodes in found.items() if nodes}

    def calibrated(self, name: str) -> bool:
        """Return whether quantising a graph needs calibration data."""
        return is_calibrated(self.source(name), self.target)

    # One attempt

    def judged(self, plan: Plan) -> Attempt:
        """Build a bundle and check it against PyTorch. Raises Refused if even float32 fails."""
        exact = plan == FLOAT32
        attempt = Attempt(plan, self.place / "bundles" / str(plan))
        try:
            attempt.parity = self.exact if exact else self.exact + self.parity(plan)
            attempt.metric = self.metric(plan, "validation")
            degradation = self.task.degradation(attempt.metric["pytorch"], attempt.metric["bundle"])
            attempt.degradation = degradation if np.isfinite(degradation) else inf
            lost = self.too_much_lost(attempt)
            if not exact:
                attempt.refused = lost or self.not_faster(attempt)
            elif lost and any(graph.selected or graph.discrete for graph in self.deployable.graphs.values()):
                raise Refused(lost)
        except UserError as error:
            if exact:
                raise
            attempt.refused = str(error).replace(f"{attempt.folder}{os.sep}", "")  # no paths of this machine
        return attempt

    def too_much_lost(self, attempt: Attempt) -> str:
        """Return how many points of its metric an attempt loses, if more than the gate; otherwise an empty string."""
        if attempt.degradation <= self.target.gate:
            return ""
        name, pytorch, bundle = (attempt.metric[key] for key in ("name", "pytorch", "bundle"))
        return (
            f"{name} {bundle:.4f}, PyTorch's {pytorch:.4f}: {attempt.degradation:.2f} points lost"
            f"{' with inputs of one fixed shape' * self.target.static}; expected at most {self.target.gate}"
        )

    def not_faster(self, attempt: Attempt) -> str:
        """Return why an attempt is too slow, or an empty string. Speed counts only on a machine like the device."""
        if not can_time(self.target):
            return ""
        own, float32 = self.contenders.latencies(attempt.folder, self.bundle(FLOAT32))
        attempt.slower = own >= float32
        return f"{own:.3f} ms per answer; expected less than float32's {float32:.3f} ms" if attempt.slower else ""

    def bundle(self, plan: Plan) -> Path:
        """Return the folder of `plan`'s bundle; if it does not exist yet, build it without verifying it."""
        folder = self.place / "bundles" / str(plan)
        if folder.is_dir():
            return folder
        folder.mkdir()
        for name, graph in self.deployable.graphs.items():
            path = self.converted(name, plan)
            path.parent.mkdir(exist_ok=True)
            feeds = self.feeds.get(name, []) if plan.calibration else []
            convert(self.source(name), path, self.target, plan, feeds, graph.unbounded)
            place_in(folder, path, self.target)
            if self.target.static and (free := describe(path)["dynamic_axes"]):
                raise UserError(f"{name}: axes {free} are free; expected fixed ones")
        if plan.precision.startswith("int") and not any(
            is_quantised(self.converted(name, plan)) for name in self.references
        ):
            raise UserError("onnxruntime quantised no node of any graph; expected at least one")
        np.savez(folder / EXAMPLE, **self.example())
        write_manifest(folder, self.deployable, self.target, plan.precision, self.place / "converted" / str(plan))
        if plan != FLOAT32:
            smoke_test(folder, provider(self.target))
        return folder

    def converted(self, name: str, plan: Plan) -> Path:
        """Return the path of a graph's ONNX file, converted by `plan`."""
        return self.place / "converted" / str(plan) / f"{name}.onnx"

    def example(self) -> dict[str, np.ndarray]:
        """Return inputs for a single prediction, by graph and name: real values, shuffled.

        Shuffled values keep a realistic range and do not reveal the original input. Integers with no dynamic axis
        besides the batch, such as categories, may each have a range of their own: all become the smallest of them.
        """
        shuffled, arrays = np.random.default_rng(0).permutation, {}
        for name, graph in self.deployable.graphs.items():
            for key, tensor in example_at(graph, first_sizes(graph)).items():
                array, free = tensor.numpy(), {*graph.dynamic_axes.get(key, {}).values()} - {"batch"}
                mixed = free or array.dtype.kind == "f" or not array.size
                arrays[f"{name}/{key}"] = (
                    shuffled(array.ravel()).reshape(array.shape) if mixed else np.full_like(array, array.min())
                )
        return arrays

    def complete(self, plan: Plan, **results: dict) -> dict:
        """Save the bundle's outputs for its example input, for comparison on a device, and its manifest; return that.

        `results` are its verification and its measurement.
        """
        folder = self.bundle(plan)
        graphs = open_bundle(folder, read_manifest(folder), self.target.threads, provider(self.target))
        inputs = arrays(folder / EXAMPLE)
        answers = {name: graph(**inputs[name]) for name, graph in graphs.items()}
        named = {f"{name}/{output}": a for name, outputs in answers.items() for output, a in outputs.items()}
        np.savez(folder / ANSWERS, **named)
        signatures = self.place / "converted" / str(plan)
        return write_manifest(folder, self.deployable, self.target, plan.precision, signatures, **results)

    def opened(self, plan: Plan) -> dict[str, OnnxGraph]:
        """Open the graphs of a bundle as a device does; float32 always on the CPU, since a GPU rounds differently."""
        folder = self.bundle(plan)
        return open_graphs(folder, read_manifest(folder), CPU if plan == FLOAT32 else provider(self.target))

    # Comparison with PyTorch

    def parity(self, plan: Plan) -> list[dict]:
        """Compare every graph with PyTorch at every declared size. Raises Refused."""
        rows, graphs = [], self.opened(plan)
        for name, graph in self.deployable.graphs.items():
            tolerance = graph.tolerance if plan == FLOAT32 else inf
            rows += parity(name, graph, self.references[name], graphs[name], tolerance, self.target.static)
        return [{"precision": plan.precision, **row} for row in rows]

    def loader(self, split: str) -> Iterable:
        """Return the data loader of a split."""
        return {"validation": self.data.val_dataloader, "test": self.data.test_dataloader}[split]()

    def score_pytorch(self, split: str) -> None:
        """Compute PyTorch's metric on a whole split. Raises UserError if the metric is not a finite number."""
        batches = watched(self.loader(split), f"PyTorch on {split}")
        self.pytorch[split] = score(self.task, self.deployable.runner(self.references), batches)
        if not np.isfinite(self.pytorch[split]):
            found = f"{self.task.metric} of PyTorch on {split} is {self.pytorch[split]}"
            raise UserError(f"{found}; expected a finite number, from data on which the metric is defined")

    def metric(self, plan: Plan, split: str) -> dict:
        """Return PyTorch's and a bundle's metric on a whole split. In float32, also compare every single output."""
        graphs, exact = self.opened(plan), plan == FLOAT32
        loader, compared = self.loader(split), graphs
        if exact:
            compared = {
                name: Compared(name, graph, self.references[name], graphs[name], graph.tolerance)
                for name, graph in self.deployable.graphs.items()
            }
        batches = watched(loader, f"the bundle on {split}")
        bundle = score(self.task, self.deployable.runner(compared), batches)
        found = {
            "name": self.task.metric,
            "pytorch": self.pytorch[split],
            "bundle": bundle,
            "split": split,
            "n": len(loader.dataset),
        }
        if not exact:
            return found | dict.fromkeys(("max_abs_error", "flipped", "rows"))
        for graph in compared.values():
            graph.check_flips()
        return found | {
            "max_abs_error": max(graph.max_abs_error for graph in compared.values()),
            "flipped": sum(graph.flipped for graph in compared.values()),
            "rows": sum(graph.rows for graph in compared.values()),
        }

    def verification(self, chosen: Attempt) -> dict:
        """Return the manifest's verification: parity, the metric on both splits, and every attempt."""
        attempts = [
            {
                "precision": attempt.plan.precision,
                "calibration": attempt.plan.calibration,
                "kept_float": attempt.plan.kept,
                "score": attempt.metric.get("bundle") if attempt.degradation < inf else None,  # JSON has no NaN
                "refused": attempt.refused,
            }
            for attempt in self.made
        ]
        return {
            "provider": CPU if chosen.plan == FLOAT32 else provider(self.target),
            "parity": chosen.parity,
            "metric": chosen.metric,
            "test": self.metric(chosen.plan, "test"),
            "attempts": attempts,
        }

    # Calibration data

    @cached_property
    def feeds(self) -> dict[str, Feeds]:
        """The inputs of each graph, recorded while the task's runner predicts training batches."""
        self.data.setup("fit")
        graphs = self.opened(FLOAT32)
        enough = DEBUGGED if self.target.quantisation is None else max(SAMPLES.values())
        recorders = {name: Recorder(graph, graphs[name], enough) for name, graph in self.deployable.graphs.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loader = self.data.train_dataloader()
            batches = takewhile(lambda _: not all(recorder.full for recorder in recorders.values()), loader)
            self.task.evaluate(self.deployable.runner(recorders), watched(batches, "calibrating"))
        return {name: recorder.feeds for name, recorder in recorders.items()}


def score(task, runner, batches: Iterable) -> float:
    """Return the metric of a task's runner over batches. Raises UserError unless it is a number."""
    found = task.evaluate(runner, batches)
    try:
        return float(found)  # also of a tensor of one element
    except (TypeError, ValueError, RuntimeError):
        owner, kind = type(task).__name__, type(found).__name__
        raise UserError(f"evaluate of {owner} returns {kind}; expected a number, its metric") from None


class Recorder:
    """A graph that records its inputs, one sample at a time, until it has `enough`."""

    def __init__(self, graph, exported: Callable, enough: int):
        self.exported, self.shape, self.axes, self.enough = exported, exported.shape, graph.dynamic_axes, enough
        self.feeds: Feeds = []

    @property
    def full(self) -> bool:
        """Whether enough samples are recorded."""
        return len(self.feeds) >= self.enough

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Record the inputs and return the graph's outputs."""
        batch = {name: axis for name, axes in self.axes.items() for axis, symbol in axes.items() if symbol == "batch"}
        rows = {inputs[name].shape[axis] for name, axis in batch.items()} or {1}
        for row in range(max(rows)):
            if not self.full:
                sample = {name: inputs[name].take([row], axis) for name, axis in batch.items()}
                self.feeds.append(inputs | sample)
        return self.exported(**inputs)
