"""PyTorch beside the bundle: `python -m dlref.export.contender PROGRAMS BUNDLE MODE THREADS DEVICE`.

It runs what `torch.export` traced and saved, with torch alone: neither the rest of this project nor Lightning is
loaded, so what is measured is the least that PyTorch takes. MODE is eager or compiled. It prints what
`dlref.runtime.bench` prints, but for the size of the model.
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
    """Each saved program as a callable from named arrays."""
    import torch  # here, so that the time to the first answer has it

    torch.set_num_threads(threads)
    return {path.stem: program(path, mode, device) for path in sorted(folder.glob("*.pt2"))}


def program(path: Path, mode: str, device: str) -> Callable:
    """One program, ready to answer; its answers are back on the CPU."""
    import torch

    try:
        exported = torch.export.load(path)
    except RuntimeError:  # operators of torchvision, which nothing has loaded yet
        import torchvision  # noqa: F401

        exported = torch.export.load(path)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, device)
    # Past the checks of each call, a third of a LeNet-5's time: the network as it was written has none.
    module = exported.module(check_guards=False).forward
    if mode == "compiled":
        module = torch.compile(module)

    @torch.inference_mode()
    def answer(**inputs: np.ndarray) -> list[np.ndarray]:
        results = module(*(torch.from_numpy(array).to(device) for array in inputs.values()))
        return [result.cpu().numpy() for result in (results if isinstance(results, tuple) else (results,))]

    return answer


def main(arguments: list[str]) -> None:
    """The measured process."""
    folder, bundle, mode, threads, device, started = arguments
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # Windows keeps libraries that are loaded
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what an earlier process compiled would be found elsewhere
        figures = measure(lambda: programs(Path(folder), mode, int(threads), device), Path(bundle), float(started))
    package = "torchvision" if "torchvision" in sys.modules else "torch"
    print(json.dumps(figures | {"installed_mb": installed_mb(package)}))


if __name__ == "__main__":
    main(sys.argv[1:])
