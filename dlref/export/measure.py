"""Measure the bundle and the contenders that it replaces on this machine, each in a process of its own."""

import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto, helper

from dlref.export.graph import write_program
from dlref.export.progress import say
from dlref.export.report import held_up
from dlref.export.targets import Target
from dlref.runtime import UserError
from dlref.runtime.bench import bench, in_process
from dlref.runtime.bundle import CPU, OnnxGraph, plugin_devices
from dlref.runtime.machine import cores, processor

TURNS = 3  # measurements of a contender: the speed of a shared machine varies
CONTENDERS = ("pytorch-eager", "pytorch-compiled", "onnx-float32", "bundle")


def provider(target: Target) -> str:
    """Return the provider that runs the target's graphs here: the target's own, or the CPU if that does not work."""
    return target.provider if provider_works(target.provider, target.opset, target.ir_version) else CPU


@cache
def provider_works(provider: str, opset: int, ir_version: int) -> bool:
    """Return whether a provider runs a graph here: onnxruntime also lists providers without driver or libraries."""
    if provider == CPU:
        return True
    try:
        devices = plugin_devices(provider)
    except UserError:
        return False
    if devices and all(one.device.type == onnxruntime.OrtHardwareDeviceType.CPU for one in devices):
        return False  # the vendor's simulator, which takes seconds per call
    if not devices and provider not in onnxruntime.get_available_providers():
        return False
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", *sides)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, path := Path(folder) / "identity.onnx")
        try:
            OnnxGraph(path, provider)
        except UserError:
            return False
    return True


def can_time(target: Target) -> bool:
    """Return whether timings on this machine say anything about the target device."""
    return provider(target) == target.provider and platform.machine() in (target.machines or (platform.machine(),))


def threads(target: Target) -> int:
    """Return the number of threads that the device gives to the model, at most this machine's cores."""
    return min(target.threads or cores(), cores())


def weights_mb(graphs: Mapping) -> float:
    """Return the megabytes of the graphs' parameters and buffers; those shared by several graphs count once."""
    tensors = {t.data_ptr(): t.nbytes for graph in graphs.values() for t in graph.module.state_dict().values()}
    return sum(tensors.values()) / 1e6


class Contenders:
    """The contenders of one export and their figures.

    Args:
        target: the device.
        graphs: the task's graphs by name, for measuring PyTorch.
        programs: folder for the programs that torch.export saves from the graphs, written on first use.
        float32: folder of the float32 bundle.
        python: the interpreter in which PyTorch is measured.
    """

    def __init__(self, target: Target, graphs: Mapping, programs: Path, float32: Path, python: str = sys.executable):
        self.target, self.graphs, self.programs, self.float32 = target, graphs, programs, float32
        self.python = python
        self.known: dict[Path, dict] = {}

    def measured(self, folder: Path) -> dict:
        """Measure a bundle, and keep and return its figures. Raises UserError."""
        given = min(self.target.threads, cores())  # 0: all, as in `load`
        self.known[folder] = bench(folder, given, provider(self.target))
        return self.known[folder]

    def latencies(self, one: Path, other: Path) -> list[float]:
        """Measure two bundles in turns and return the median latency of each in milliseconds. Raises UserError."""
        turns = [(self.measured(one), self.measured(other)) for _ in range(TURNS)]
        for folder, runs in zip((one, other), zip(*turns, strict=True), strict=True):
            self.known[folder] = sorted(runs, key=lambda run: run["latency_ms"])[TURNS // 2]
        return [self.known[folder]["latency_ms"] for folder in (one, other)]

    def pytorch(self, mode: str) -> dict:
        """Measure PyTorch, eager or compiled, and return its figures. Raises UserError."""
        device = "cuda" if provider(self.target) in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"
        for name, graph in self.graphs.items():
            if not (program := self.programs / f"{name}.pt2").exists():
                write_program(graph, program, self.target)
        module = [self.python, "-m", "dlref.export.contender"]
        figures = in_process([*module, str(self.programs), str(self.float32), mode, str(threads(self.target)), device])
        return figures | {"model_mb": weights_mb(self.graphs)}

    def measurement(self, bundle: Path, names: tuple[str, ...]) -> dict:
        """Measure the contenders in `names`; `not_run` gives the reason for each one that is missing."""
        measured = {"threads": threads(self.target), "processor": processor(), "contenders": {}, "not_run": {}}
        if not can_time(self.target):
            here = f"speed on {platform.machine()} with {provider(self.target)} says nothing about this device"
            return measured | {"not_run": dict.fromkeys(names, here)}
        for name in names:
            say(f"measuring {name}")
            try:
                measured["contenders"][name] = figures = self.undisturbed(name, bundle)
                if held_up(figures):
                    say(f"{name} waited for a core {figures['waited']:.0%} of the time: this machine is busy")
            except UserError as error:
                measured["not_run"][name] = str(error).replace(f"{self.programs.parent}{os.sep}", "")
        return measured

    def undisturbed(self, name: str, bundle: Path) -> dict:
        """Measure a contender, up to TURNS times if other programs hold it up; return the least disturbed figures."""
        folder, runs = bundle if name == "bundle" else self.float32, []
        while len(runs) < TURNS and (not runs or held_up(runs[-1])):
            if name.startswith("pytorch"):
                runs.append(self.pytorch(name.removeprefix("pytorch-")))
            elif not runs and folder in self.known:
                runs.append(self.known[folder])
            else:
                runs.append(self.measured(folder))
        return min(runs, key=lambda run: run["waited"] or 0)
