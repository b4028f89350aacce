"""Load a bundle and predict, with numpy, onnxruntime and pillow. No torch.

    runner = dlref.runtime.load("bundles/lenet5_digits")
    runner("seven.png")                       # {"label": "7", "probability": 0.998, "top": [...]}
    runner([array, "eight.png"])              # a list in, a list out

The manifest's `kind` names the module of `dlref.runtime.runners` whose `Runner` serves the bundle:
`image-classification` is `dlref/runtime/runners/image_classification.py`. A new kind adds one module.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from dlref.runtime.bundle import CPU, MANIFEST, open_graphs, read_manifest
from dlref.runtime.errors import UserError
from dlref.runtime.machine import cores
from dlref.runtime.runner import Runner, whole_number

__all__ = ["UserError", "kinds", "load", "make_runner", "runner_of", "sessions"]


def load(folder: str | Path, threads: int | None = None, provider: str | None = None) -> Runner:
    """Open a bundle, check every file against its hash, and return the runner of its kind.

    `threads` limits the number of cores (default: the target's, or all); `provider` is an execution provider of
    onnxruntime (default: the target's). Raises UserError if the folder is not a bundle, if a file is missing or was
    changed, or if this version does not support the kind.
    """
    if threads is not None and (whole_number(threads) or 0) < 1:
        raise UserError(f"threads {threads!r}; expected a whole number from 1")
    manifest = read_manifest(Path(folder))
    provider = manifest["target"]["provider"] if provider is None else provider
    threads = threads or manifest["target"].get("threads")
    each, workers = sessions(manifest["kind"], threads, provider)
    graphs = open_graphs(Path(folder), manifest, provider, each)
    try:
        runner = make_runner(manifest["kind"], graphs, manifest["metadata"])
    except UserError as error:
        raise UserError(f"{Path(folder) / MANIFEST}: {error}") from None
    runner.workers = workers
    return runner


def sessions(kind: str, threads: int | None, provider: str) -> tuple[int | None, int]:
    """Return, for a kind, the threads of each graph (None: all) and how many parts of a batch run side by side.

    Neither exceeds the number of cores, so that a mistyped number, or one from another machine, does no harm.
    """
    given = min(int(threads or cores()), cores())
    if runner_of(kind).spreads and provider == CPU:
        return 1, given
    # By default onnxruntime pins a thread to every core of the machine, even to cores this process may not use.
    return (given if threads or cores() != os.cpu_count() else None), 1


def make_runner(kind: str, graphs: Mapping[str, Any], metadata: dict[str, Any]) -> Runner:
    """Return the runner of `kind` over `graphs`: name -> callable from named arrays to a dict of named arrays.

    A runner does not know what executes its graphs, so the export step runs the same code over PyTorch.
    """
    return runner_of(kind)(graphs, metadata)


def kinds() -> list[str]:
    """Return every kind of bundle that this version supports."""
    from dlref.runtime import runners

    return sorted(module.name.replace("_", "-") for module in iter_modules(runners.__path__))


def runner_of(kind: str) -> type[Runner]:
    """Return the class that serves bundles of a kind. Raises UserError if this version does not support the kind."""
    if kind not in kinds():
        raise UserError(f"bundle kind {kind!r} is unknown to this version of dlref.runtime; upgrade dlref")
    return import_module(f"dlref.runtime.runners.{kind.replace('-', '_')}").Runner
