"""manifest.json and report.md of a bundle."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import onnx

from dlref import __version__
from dlref.export.report import report
from dlref.export.targets import Target
from dlref.runtime.bundle import FORMAT, MANIFEST, sha256


def write_manifest(
    folder: Path,
    deployable,
    target: Target,
    precision: str,
    signatures: Path,
    verification: dict | None = None,
    measurement: dict | None = None,
) -> dict:
    """Write report.md and manifest.json; the manifest lists every other file with its hash.

    `signatures` is the folder of the graphs as ONNX files, whatever their format in the bundle.
    """
    manifest = {
        "format": FORMAT,
        "kind": deployable.kind,
        "target": asdict(target),
        "precision": precision,
        "graphs": {
            name: {"file": f"{name}.{target.file_format}"}
            | describe(signatures / f"{name}.onnx")
            | {"calls": graph.calls, "selected": list(graph.selected)}
            for name, graph in deployable.graphs.items()
        },
        "metadata": dict(deployable.metadata),
        "versions": {
            "dlref": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        },
        "verification": verification or {},
        "measurement": measurement or {},
    }
    if verification:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / "report.md").write_text(report(manifest, sizes), encoding="utf-8")
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest["files"] = {path.name: sha256(path) for path in files}
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def describe(path: Path) -> dict:
    """Return the signature of the graph in an ONNX file; each axis is a size, or a name if it is dynamic."""
    graph = onnx.load(path, load_external_data=False).graph

    def side(values) -> list[dict]:
        return [
            {
                "name": value.name,
                "type": onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    inputs = side(graph.input)
    axes = {v["name"]: {str(a): s for a, s in enumerate(v["shape"]) if isinstance(s, str)} for v in inputs}
    return {
        "inputs": inputs,
        "outputs": side(graph.output),
        "dynamic_axes": {name: symbols for name, symbols in axes.items() if symbols},
    }
