"""Measure PyTorch beside the bundle: `python -m dlref.export.contender PROGRAMS BUNDLE MODE THREADS DEVICE STARTED`.

It runs the programs that `torch.export` saved, with torch alone: neither the rest of this project nor Lightning is
loaded, so the figures are the least that PyTorch needs. MODE is eager or compiled, STARTED the `time.monotonic()` at
which the process was started. It prints the same figures as `dlref.runtime.bench`, except for the size of the model.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlref.runtime.bench import installed_mb, measure


def programs(folder: Path, mode: str, threads: int, device: str) -> dict[str, Callable]:
    """Load each saved program as a callable that takes named arrays; return them by name."""
    import torch  # here, so that the time to the first prediction includes it

    torch.set_num_threads(threads)
    return {path.stem: program(path, mode, device) for path in sorted(folder.glob("*.pt2"))}


def program(path: Path, mode: str, device: str) -> Callable:
    """Load one program as a callable, whose outputs are moved back to the CPU."""
    import torch

    try:
        exported = torch.export.load(path)
    except RuntimeError:  # the program needs torchvision's operators, which are not loaded yet
        import torchvision  # noqa: F401

        exported = torch.export.load(path)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, device)
    # Skip the guards of each call, which take a third of a LeNet-5's time: the original network has none.
    module = exported.module(check_guards=False).forward
    if mode == "compiled":
        module = torch.compile(module)

    @torch.inference_mode()
    def answer(**inputs: np.ndarray) -> list[np.ndarray]:
        results = module(*(torch.from_numpy(array).to(device) for array in inputs.values()))
        return [result.cpu().numpy() for result in (results if isinstance(results, tuple) else (results,))]

    return answer


def main(arguments: list[str]) -> None:
    """Run the measurement in this process and print its figures as JSON."""
    folder, bundle, mode, threads, device, started = arguments
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # Windows cannot delete loaded libraries
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # the default cache may hold an earlier process's code
        figures = measure(programs(Path(folder), mode, int(threads), device), Path(bundle), float(started))
    package = "torchvision" if "torchvision" in sys.modules else "torch"
    print(json.dumps(figures | {"installed_mb": installed_mb(package)}))


if __name__ == "__main__":
    main(sys.argv[1:])
