"""Measure what keeps a bundle's memory small, each option in its own processes: `python -m benchmarks.memory BUNDLE`.

BUNDLE is one of image classification. The table has the peak of resident memory after 100 predictions for its example
and after 40 images of other sizes, and the median time of a prediction. Each option runs in several processes, because
the allocator's behaviour varies.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy as np

from dlref.runtime.bench import EXAMPLE, arrays, memory
from dlref.runtime.bundle import read_manifest
from dlref.runtime.memory import returned_to_the_system

IN_PLACE = {"session.use_memory_mapped_ort_model": "1", "session.use_ort_model_bytes_for_initializers": "1"}
LEVERS = {  # file, arena and memory plan, freed blocks are returned, session entries
    "onnxruntime's defaults": ("onnx", True, False, {}),
    "no arena, no plan": ("onnx", False, False, {}),
    "the same, and freed blocks leave the process (`dlref.runtime`)": ("onnx", False, True, {}),
    "the same, weights not repacked": ("onnx", False, True, {"session.disable_prepacking": "1"}),
    "`.ort` for amd64, read": ("ort", False, True, {}),
    "`.ort` for amd64, mapped and used in place": ("ort", False, True, IN_PLACE),
}


def measured(folder: Path, path: Path, lever: str, threads: int) -> dict:
    """Measure one process: open the graph at `path` by a lever, predict, and read memory and clock."""
    import onnxruntime

    _, reserve, leave, entries = LEVERS[lever]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = options.enable_mem_pattern = reserve
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    with returned_to_the_system() if leave else nullcontext():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (inputs,) = arrays(folder / EXAMPLE).values()
    times = []
    for _ in range(100):
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - start)
    figures = {"ms": 1e3 * statistics.median(times), "fixed": memory()["peak_rss_mb"]}
    generator = np.random.default_rng(0)
    channels = inputs["image"].shape[-1]
    for height, width in generator.integers(50, 800, (40, 2)):
        session.run(None, {"image": generator.integers(0, 256, (1, height, width, channels), dtype=np.uint8)})
    return figures | {"varied": memory()["peak_rss_mb"]}


def main() -> None:
    """Run every lever several times and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # path, lever: the measured process
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.bundle, Path(options.child[0]), options.child[1], options.threads)))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Start the measured processes, which must not contain the imports of this one."""
    import subprocess
    import tempfile
    from io import StringIO

    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort
    from rich.console import Console
    from rich.progress import track

    from dlref.export.report import table

    (graph,) = read_manifest(options.bundle)["graphs"].values()
    command = [sys.executable, "-m", "benchmarks.memory", str(options.bundle), "--threads", str(options.threads)]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        files = {"onnx": options.bundle / graph["file"], "ort": (Path(folder) / graph["file"]).with_suffix(".ort")}
        with redirect_stdout(StringIO()):
            style = [OptimizationStyle.Fixed]
            convert_onnx_models_to_ort(files["onnx"], Path(folder), style, target_platform="amd64")
        for lever in track(LEVERS, "measuring", console=Console(stderr=True), transient=True):
            child = [*command, "--child", str(files[LEVERS[lever][0]]), lever]
            runs = [
                json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
                for _ in range(options.processes)
            ]
            peaks = [[run[key] for run in runs] for key in ("fixed", "varied")]
            spans = [f"{min(peak):.0f} to {max(peak):.0f}" for peak in peaks]
            lines.append([lever, *spans, f"{statistics.median(run['ms'] for run in runs):.1f}"])
    print(table(["", "peak MB, one size", "peak MB, many sizes", "ms"], lines))


if __name__ == "__main__":
    main()
