"""The bundle beside what it replaces: each contender in a process of its own, on this machine."""

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

TURNS = 3  # where two are compared: a shared machine's clock wanders
CONTENDERS = ("pytorch-eager", "pytorch-compiled", "onnx-float32", "bundle")


def provider(target: Target) -> str:
    """What executes the target's graphs here: its own provider, or the CPU in its stead."""
    return target.provider if provider_works(target.provider, target.opset, target.ir_version) else CPU


@cache
def provider_works(provider: str, opset: int, ir_version: int) -> bool:
    """Whether a provider runs a graph here: onnxruntime also lists one whose driver or libraries are missing."""
    if provider == CPU:
        return True
    try:
        devices = plugin_devices(provider)
    except UserError:
        return False
    if devices and all(one.device.type == onnxruntime.OrtHardwareDeviceType.CPU for one in devices):
        return False  # the maker's simulation, seconds a call
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
    """Whether timings on this machine say anything about the target device."""
    return provider(target) == target.provider and platform.machine() in (target.machines or (platform.machine(),))


def threads(target: Target) -> int:
    """As many as the device gives, where this machine has them."""
    return min(target.threads or cores(), cores())


def weights_mb(graphs: Mapping) -> float:
    """Megabytes of the graphs' parameters and buffers, once each, however many graphs share them."""
    tensors = {t.data_ptr(): t.nbytes for graph in graphs.values() for t in graph.module.state_dict().values()}
    return sum(tensors.values()) / 1e6


class Contenders:
    """What can be measured of one export, each once.

    Args:
        target: the device.
        graphs: those of the task by name, which PyTorch is measured by.
        programs: folder for what torch.export saves of them, once they are asked for.
        float32: folder of the bundle as it came from PyTorch.
        python: the interpreter that PyTorch is measured by.
    """

    def __init__(self, target: Target, graphs: Mapping, programs: Path, float32: Path, python: str = sys.executable):
        self.target, self.graphs, self.programs, self.float32 = target, graphs, programs, float32
        self.python = python
        self.known: dict[Path, dict] = {}

    def of_bundle(self, folder: Path, again: bool = False) -> dict:
        """A bundle's figures, measured once unless `again`. Raises UserError."""
        if again or folder not in self.known:
            self.known[folder] = self.measured(folder)
        return self.known[folder]

    def measured(self, folder: Path) -> dict:
        """A bundle's figures, measured now."""
        return bench(folder, min(self.target.threads, cores()), provider(self.target))  # 0: as `load` has it, all

    def latencies(self, one: Path, other: Path) -> list[float]:
        """Milliseconds of two bundles measured in turns, the middle of TURNS. Raises UserError."""
        turns = [(self.measured(one), self.measured(other)) for _ in range(TURNS)]
        for folder, runs in zip((one, other), zip(*turns, strict=True), strict=True):
            self.known[folder] = sorted(runs, key=lambda run: run["latency_ms"])[TURNS // 2]
        return [self.known[folder]["latency_ms"] for folder in (one, other)]

    def pytorch(self, mode: str) -> dict:
        """PyTorch's figures, eager or compiled. Raises UserError."""
        device = "cuda" if provider(self.target) in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"
        for name, graph in self.graphs.items():
            if not (program := self.programs / f"{name}.pt2").exists():
                write_program(graph, program, self.target)
        module = [self.python, "-m", "dlref.export.contender"]
        figures = in_process([*module, str(self.programs), str(self.float32), mode, str(threads(self.target)), device])
        return figures | {"model_mb": weights_mb(self.graphs)}

    def measurement(self, bundle: Path, names: tuple[str, ...]) -> dict:
        """The figures of the contenders called `names`; why one is missing is said under `not_run`."""
        measured = {"threads": threads(self.target), "processor": processor(), "contenders": {}, "not_run": {}}
        if not can_time(self.target):
            here = f"{platform.machine()} with {provider(self.target)} says nothing of this device"
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
        """A contender's figures, measured again while something else holds it up; the least disturbed ones."""
        runs = []
        while len(runs) < TURNS and (not runs or held_up(runs[-1])):
            if name.startswith("pytorch"):
                runs.append(self.pytorch(name.removeprefix("pytorch-")))
            else:
                runs.append(self.of_bundle(bundle if name == "bundle" else self.float32, again=bool(runs)))
        return min(runs, key=lambda run: run["waited"] or 0)
