"""A bundle on disk: its manifest, the hashes of its files, its graphs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime

from dlref.runtime.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
KEYS = {
    "format": int,
    "kind": str,
    "target": dict,
    "graphs": dict,
    "metadata": dict,
    "files": dict,
    "verification": dict,
}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict:
    """The manifest of a bundle, every file it lists checked against its hash. Raises UserError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected the folder of a bundle that export.py wrote") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); expected JSON") from None
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), KEYS[key]) for key in KEYS):
        raise UserError(f"{path}: not a manifest; expected {', '.join(f'{k} ({KEYS[k].__name__})' for k in KEYS)}")
    if manifest["format"] != FORMAT:
        raise UserError(f"{path}: format {manifest['format']}; this version of dlref.runtime reads {FORMAT}")
    check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: dict) -> None:
    """Refuse a bundle whose files are not the ones that were written, or that points outside its folder."""
    for name, expected in manifest["files"].items():
        if Path(name).name != name:
            raise UserError(f"{folder / MANIFEST}: file {name!r}; expected a plain name inside the bundle")
        path = folder / name
        if path.is_symlink():
            raise UserError(f"{path}: a symbolic link; expected the file itself, inside the bundle")
        if not path.is_file():
            raise UserError(f"{path}: missing; expected the file that the manifest lists")
        if sha256(path) != expected:
            raise UserError(f"{path}: SHA-256 differs from the manifest's; expected the file as exported")
    for graph in manifest["graphs"].values():
        if not isinstance(graph, dict) or graph.get("file") not in manifest["files"]:
            raise UserError(f"{folder / MANIFEST}: a graph whose file has no hash; expected one in files")


class OnnxGraph:
    """A graph in onnxruntime: named arrays in, a dict of named arrays out."""

    def __init__(self, path: Path, provider: str, threads: int | None = None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: onnxruntime takes every core
        if provider not in onnxruntime.get_available_providers():
            raise UserError(f"{path}: needs {provider}, which this onnxruntime lacks; expected a build with it")
        self.path = path
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except Exception as error:  # onnxruntime's own types have no public base
            raise UserError(f"{path}: onnxruntime refuses it ({' '.join(str(error).split())})") from None
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run the graph."""
        try:
            return dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))
        except Exception as error:
            raise UserError(f"{self.path}: onnxruntime refuses the input ({' '.join(str(error).split())})") from None


def open_graphs(folder: Path, manifest: dict, threads: int | None = None) -> dict[str, OnnxGraph]:
    """Every graph of a bundle, by name."""
    provider = manifest["target"].get("provider")
    return {name: OnnxGraph(folder / graph["file"], provider, threads) for name, graph in manifest["graphs"].items()}
