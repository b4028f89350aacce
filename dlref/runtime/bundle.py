"""A bundle on disk: its manifest, the hashes of its files, its graphs."""

import hashlib
import json
import threading
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dlref.runtime.errors import UserError, one_line
from dlref.runtime.machine import saturates
from dlref.runtime.memory import returned_to_the_system
from dlref.runtime.text import is_unicode

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64 << 20  # bytes; a vocabulary of a million tokens fits
LARGEST_FILE = (2 << 30) - 1  # bytes; the limit of a protobuf
LARGEST_INPUT = 1 << 28  # elements of one input: 9,000 × 9,000 pixels in colour
KEYS = {
    "format": int,
    "kind": str,
    "target": dict,
    "graphs": dict,
    "metadata": dict,
    "files": dict,
    "verification": dict,
}
# The allowed providers and their options: a manifest from elsewhere must not choose which library is loaded.
PROVIDERS = {
    "CPUExecutionProvider": {},
    "CUDAExecutionProvider": {"use_tf32": "0"},  # bundles are verified in float32
    "TensorrtExecutionProvider": {"trt_engine_cache_enable": "0"},
    "QNNExecutionProvider": {"backend_type": "htp"},
}
# Providers that run the nodes which another one does not support, before the CPU does.
BEHIND = {"TensorrtExecutionProvider": ("CUDAExecutionProvider",)}
# Providers that are separate packages and must be registered with onnxruntime.
PLUGINS = {"QNNExecutionProvider": "onnxruntime_qnn"}
REGISTERING = threading.Lock()

# For processors on which sums of 8-bit products would silently saturate.
EXACT = "session.x64quantprecision", "1"
# A provider from a separate package may silently fail to start; this records whether it runs any node.
ASSIGNED = "session.record_ep_graph_assignment_info", "1"
CPU = "CPUExecutionProvider"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict:
    """Read the manifest of a bundle and check every file in the folder against it. Raises UserError."""
    path = folder / MANIFEST
    try:
        if path.is_symlink():
            raise UserError(f"{path}: a symbolic link; expected the file itself, inside the bundle")
        if not path.is_file():
            raise UserError(f"{path}: not found; expected the folder of a bundle that export.py wrote")
        if path.stat().st_size > LARGEST_MANIFEST:
            raise UserError(f"{path}: {path.stat().st_size} bytes; expected at most {LARGEST_MANIFEST}")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); expected JSON") from None
    if not isinstance(manifest, dict) or not all(type(manifest.get(key)) is KEYS[key] for key in KEYS):
        raise UserError(f"{path}: not a manifest; expected {', '.join(f'{k} ({KEYS[k].__name__})' for k in KEYS)}")
    if manifest["format"] != FORMAT:
        raise UserError(f"{path}: format {manifest['format']}; this version of dlref.runtime reads {FORMAT}")
    provider, threads = (manifest["target"].get(key) for key in ("provider", "threads"))
    check_provider(path, provider)
    if threads is not None and (type(threads) is not int or threads < 0):
        raise UserError(f"{path}: threads {threads!r}; expected a number, 0 for all")
    try:
        check_files(folder, manifest)
    except (OSError, ValueError) as error:  # an invalid file name, or a file without read permission
        raise UserError(f"{folder}: unreadable ({error}); expected the files of a bundle") from None
    return manifest


def check_provider(where: str | Path, provider: object) -> None:
    """Raise UserError, naming `where`, if a provider is not one of PROVIDERS."""
    if not (isinstance(provider, str) and provider in PROVIDERS):
        raise UserError(f"{where}: provider {provider!r}; expected one of {', '.join(PROVIDERS)}")


def plugin_devices(provider: str) -> list:
    """Return the devices that a provider from a separate package can use; none for others, or if it is missing."""
    import onnxruntime

    if provider not in PLUGINS or find_spec(PLUGINS[provider]) is None:
        return []
    with REGISTERING:
        if all(device.ep_name != provider for device in onnxruntime.get_ep_devices()):  # not registered by the caller
            register(provider)
    graphics = onnxruntime.OrtHardwareDeviceType.GPU  # QNN lists GPUs too, but not for this backend
    found = (device for device in onnxruntime.get_ep_devices() if device.ep_name == provider)
    return [device for device in found if device.device.type != graphics]


@cache
def register(provider: str) -> None:
    """Register a provider's package with onnxruntime. Raises UserError if they are incompatible."""
    import onnxruntime

    try:
        library = import_module(PLUGINS[provider]).get_library_path()
        onnxruntime.register_execution_provider_library(provider, library)
    except Exception as error:  # onnxruntime's own types have no public base
        raise UserError(f"{PLUGINS[provider]}: onnxruntime refuses it ({one_line(error)})") from None


def check_files(folder: Path, manifest: dict) -> None:
    """Raise UserError if a bundle's files are not as they were written, or if the bundle points outside its folder.

    Files that the manifest does not list are refused too: a graph could read its weights from one.
    """
    for name, expected in manifest["files"].items():
        if Path(name).name != name or "\\" in name:
            raise UserError(f"{folder / MANIFEST}: file {name!r}; expected a plain name inside the bundle")
        path = folder / name
        shown = f"{folder}: file {name!r}"  # quoted, as the name may contain anything
        if path.is_symlink():
            raise UserError(f"{shown} is a symbolic link; expected the file itself, inside the bundle")
        if not path.is_file():
            raise UserError(f"{shown} is missing; expected the file that the manifest lists")
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{shown} has {path.stat().st_size} bytes; expected less than 2 GB")
        if sha256(path) != expected:
            raise UserError(f"{shown}: SHA-256 differs from the manifest's; expected the file as exported")
    for path in folder.iterdir():
        if path.name != MANIFEST and path.name not in manifest["files"]:
            raise UserError(
                f"{folder}: file {path.name!r} is not in the manifest; expected only the files that export.py wrote"
            )
    for graph in manifest["graphs"].values():
        if not (isinstance(graph, dict) and str(graph.get("file")) in manifest["files"]):
            raise UserError(f"{folder / MANIFEST}: a graph whose file has no hash; expected one in files")


def open_session(path: Path, provider: str, threads: int | None):
    """Open an onnxruntime session that `provider` executes. Raises UserError if that fails."""
    check_provider(path, provider)
    import onnxruntime  # imported here: it must not add to PyTorch's measured memory

    devices = plugin_devices(provider)
    if not devices and provider not in onnxruntime.get_available_providers():
        raise UserError(
            f"{path}: needs {provider}, which this onnxruntime lacks; expected a build with it, or another provider"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: onnxruntime uses every core
    options.log_severity_level = 4  # errors are raised as exceptions
    if saturates():
        options.add_session_config_entry(*EXACT)
    # A memory arena and plan pay off only for fixed shapes, and keep the originals of repacked weights alive.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    try:
        with returned_to_the_system():
            if devices:
                options.add_provider_for_devices(devices, PROVIDERS[provider])
                options.add_session_config_entry(*ASSIGNED)
            chain = (provider, *BEHIND.get(provider, ()))
            asked = None if devices else [(name, PROVIDERS[name]) for name in chain]
            # A fallback would print, and replace the session while other threads use it.
            model = path if is_unicode(str(path)) else path.read_bytes()  # pybind11 accepts no other names
            session = onnxruntime.InferenceSession(model, options, providers=asked, enable_fallback=False)
        taken = {part.ep_name for part in session.get_provider_graph_assignment_info()} if devices else ()
    except Exception as error:  # onnxruntime's own types have no public base
        raise UserError(f"{path}: onnxruntime refuses it ({one_line(error)})") from None
    if session.get_providers()[0] != provider or (devices and provider not in taken):
        raise UserError(
            f"{path}: {provider} does not start, onnxruntime would silently use the CPU; expected its driver and "
            "libraries, or another provider"
        )
    return session


class OnnxGraph:
    """A graph in onnxruntime: named arrays in, a dict of named arrays out.

    `shape` gives the axes of each input: a size, or the name of a free axis. `declared` gives those of each output.
    """

    def __init__(self, path: Path, provider: str, threads: int | None = None):
        self.path, self.session = path, open_session(path, provider, threads)
        self.declared = {output.name: output.shape for output in self.session.get_outputs()}
        self.outputs = list(self.declared)
        self.shape = {value.name: value.shape for value in self.session.get_inputs()}
        for name, shape in self.shape.items():
            if np.prod([size for size in shape if isinstance(size, int)], dtype=float) > LARGEST_INPUT:
                raise UserError(f"{path}: input {name} of {shape}; expected at most {LARGEST_INPUT} elements")

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run the graph."""
        for name, array in inputs.items():
            if array.size > LARGEST_INPUT:
                raise UserError(
                    f"{self.path}: input {name} of {array.shape}; expected at most {LARGEST_INPUT} elements"
                )
        try:
            return dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))
        except Exception as error:
            raise UserError(f"{self.path}: onnxruntime refuses the input ({one_line(error)})") from None


def open_graphs(folder: Path, manifest: dict, provider: str, threads: int | None = None) -> dict[str, OnnxGraph]:
    """Open every graph of a bundle and return them by name. Raises UserError."""
    graphs = {}
    for name, described in manifest["graphs"].items():
        graph = graphs[name] = OnnxGraph(folder / str(described["file"]), provider, threads)
        if signature(described) != [*graph.shape, *graph.outputs]:
            raise UserError(
                f"{graph.path}: has inputs and outputs {', '.join([*graph.shape, *graph.outputs])}; expected those of "
                f"the manifest, {', '.join(map(str, signature(described))) or 'which names none'}"
            )
    return graphs


def signature(described: dict) -> list[str]:
    """Return the names of a graph's inputs and outputs in the manifest; none if the entry is malformed."""
    try:
        return [value["name"] for side in ("inputs", "outputs") for value in described[side]]
    except (KeyError, TypeError):
        return []
