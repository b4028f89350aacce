"""A trained task -> a verified bundle for one target: export, check, verify, write."""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import onnx
from rich.console import Console
from rich.progress import track

from dlref import __version__
from dlref.export.graph import write_onnx
from dlref.export.report import report
from dlref.export.targets import Target
from dlref.export.verify import metric, parity
from dlref.runtime import UserError, load
from dlref.runtime.bundle import FORMAT, MANIFEST, OnnxGraph, sha256

console = Console(stderr=True)


def export(task, data, target: Target, output: Path) -> dict:
    """Write the bundle of a trained `task` to the folder `output` and return its manifest.

    `data` is the task's data module: it gives real inputs and the metric. The folder appears complete or
    not at all. Raises UserError, and Refused where the bundle does not answer as PyTorch does.
    """
    data.prepare_data()
    data.setup("validate")
    data.setup("test")
    task.learn(data)
    batch = next(iter(data.val_dataloader()), None)
    if batch is None:
        raise UserError("no validation data; expected some, to verify the bundle on")
    deployable = task.deployable(batch)
    with staged(output) as folder:
        exported = {}
        for name, graph in deployable.graphs.items():
            console.print(f"exporting {name}")
            write_onnx(graph, folder / f"{name}.onnx", target)
            exported[name] = OnnxGraph(folder / f"{name}.onnx", target.provider)
        rows = [row for name, graph in deployable.graphs.items() for row in parity(name, graph, exported[name])]
        scores = {
            split: metric(
                task,
                deployable,
                exported,
                Progress(loader, f"comparing on {split}"),
                split,
                len(loader.dataset),
            )
            for split, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader()))
        }
        verification = {"parity": rows, "metric": scores["validation"], "test": scores["test"]}
        manifest = write_manifest(folder, deployable, target, verification)
        load(folder)  # what was written is what a device will open
    return manifest


class Progress:
    """A loader that shows how far each pass over it is."""

    def __init__(self, loader, title: str):
        self.loader, self.title = loader, title

    def __iter__(self) -> Iterator:
        return iter(track(self.loader, self.title, console=console, transient=True))


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when all went well and vanishes otherwise."""
    output = output.resolve()
    nearest = next(path for path in (output, *output.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest}: a file; expected a folder for the bundle")
    if nearest == output and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UserError(f"{output}: holds other files; expected no folder, an empty one or an earlier bundle")
    beside = output.parent if nearest == output else nearest
    part = beside / f".{output.name}.{os.getpid()}"
    part.mkdir()
    try:
        yield part
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output, ignore_errors=True)
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_manifest(folder: Path, deployable, target: Target, verification: dict) -> dict:
    """Write report.md and manifest.json; the manifest lists every other file with its hash."""
    manifest = {
        "format": FORMAT,
        "kind": deployable.kind,
        "target": asdict(target),
        "graphs": {name: describe(folder / f"{name}.onnx", graph) for name, graph in deployable.graphs.items()},
        "metadata": dict(deployable.metadata),
        "versions": {
            "dlref": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        },
        "verification": verification,
    }
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "report.md").write_text(report(manifest, sizes), encoding="utf-8")
    manifest["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def describe(path: Path, graph) -> dict:
    """The signature of a graph, read from its file."""
    model = onnx.load(path).graph

    def side(values) -> list[dict]:
        return [
            {
                "name": value.name,
                "type": onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    axes = {name: {str(axis): symbol for axis, symbol in axes.items()} for name, axes in graph.dynamic_axes.items()}
    return {
        "file": path.name,
        "inputs": side(model.input),
        "outputs": side(model.output),
        "dynamic_axes": axes,
    }
