"""Measure how fast and how large a bundle is on this device: `python -m dlref.runtime bench FOLDER`.

The measured process is `python -m dlref.runtime.bench FOLDER THREADS PROVIDER STARTED`, where STARTED is the time at
which it was started. It predicts for the example input in the bundle and prints one line of JSON:

    latency_ms, latency_p95_ms   one example through every graph, as often as a prediction calls it; median and 95th
                                 percentile
    throughput                   examples per second, eight at once if the graphs have a batch axis
    peak_rss_mb, anonymous_mb    peak resident memory, and the anonymous part after the latency was measured, which
                                 the system cannot reclaim; Linux only, else null
    waited                       share of its threads' runnable time in which they had no core; if it is high,
                                 something else was running, and the speed says little; Linux only
    first_answer_s               from the start of the process to the first prediction
    model_mb, installed_mb       size of the graphs, and of the packages that run them
"""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dlref.runtime import sessions
from dlref.runtime.bundle import LARGEST_FILE, OnnxGraph, open_graphs, read_manifest
from dlref.runtime.errors import UserError, one_line

EXAMPLE = "example.npz"  # the inputs of each graph, one row each, as GRAPH/INPUT
ANSWERS = "answers.npz"  # the outputs for the example at export, as GRAPH/OUTPUT
SEVERAL = 8  # rows for the throughput
SECONDS = 1.0  # minimum duration of a timing, which also makes at least CALLS calls
CALLS = 15
WARMUP = 5

Graphs = Mapping[str, Callable]
Arrays = dict[str, dict[str, np.ndarray]]


def bench(folder: Path, threads: int, provider: str) -> dict:
    """Measure a bundle in a process of its own. Raises UserError if that fails."""
    return in_process([sys.executable, "-m", "dlref.runtime.bench", str(folder), str(threads), provider])


def smoke_test(folder: Path, provider: str) -> None:
    """Open a bundle and run it once in another process, as some graphs crash onnxruntime. Raises UserError."""
    in_process([sys.executable, "-m", "dlref.runtime.bench", str(folder), "1", provider, "once"])


def in_process(command: list[str]) -> dict:
    """Run a contender, pass it its start time, and return the JSON that it printed. Raises UserError."""
    import subprocess  # imported only here: it would add to the memory of the measured process

    result = subprocess.run([*command, repr(time.monotonic())], capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip() or f"its process ended with code {result.returncode}").splitlines()[-1]
        raise UserError(reason.removeprefix("error: "))
    return json.loads(result.stdout.splitlines()[-1])


def measure(graphs: Graphs, folder: Path, started: float) -> dict:
    """Measure the speed and memory of this process on the example of the bundle in `folder`."""
    described = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["graphs"]
    graphs = repeating(graphs, described)
    one = arrays(folder / EXAMPLE)
    answer(graphs, one)
    figures: dict[str, float | None] = {"first_answer_s": time.monotonic() - started}
    before = scheduled()
    times = clock(lambda: answer(graphs, one))
    ran, waited = (after - earlier for after, earlier in zip(scheduled(), before, strict=True))
    figures["waited"] = waited / (ran + waited) if ran + waited else None
    figures |= {"latency_ms": 1e3 * float(np.median(times)), "latency_p95_ms": 1e3 * float(np.percentile(times, 95))}
    figures |= memory()  # before the larger batch
    several = batch_of(one, described)
    rows = SEVERAL if several else 1
    times = clock(lambda: answer(graphs, several or one))
    return figures | {"throughput": rows / float(np.median(times))}


def repeating(graphs: Graphs, described: dict) -> Graphs:
    """Wrap each graph so that it runs as often as a prediction calls it; `described` is the manifest's `graphs`.

    Raises UserError if the manifest lacks a graph or its `calls`.
    """

    def called(graph: Callable, times: int) -> Callable:
        return lambda **inputs: [graph(**inputs) for _ in range(times)]

    try:
        return {name: called(graph, described[name]["calls"]) for name, graph in graphs.items()}
    except KeyError as error:
        raise UserError(f"manifest.json: a graph without {error}; expected one that export.py wrote") from None


def answer(graphs: Graphs, inputs: Arrays) -> None:
    """Call every graph once."""
    for name, graph in graphs.items():
        graph(**inputs[name])


def clock(call: Callable[[], None]) -> list[float]:
    """Return the seconds of each call after the warm-up."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < WARMUP + CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times[WARMUP:]


def open_bundle(folder: Path, manifest: dict, threads: int | None, provider: str) -> dict[str, OnnxGraph]:
    """Open the graphs of a bundle as `load` does. Raises UserError."""
    each, _ = sessions(manifest["kind"], threads, provider)
    return open_graphs(folder, manifest, provider, each)


def difference(folder: Path, threads: int | None, provider: str) -> float:
    """Return the largest difference between the bundle's outputs here and at export. Raises UserError."""
    path, manifest = folder / ANSWERS, read_manifest(folder)
    graphs = open_bundle(folder, manifest, threads, provider)
    inputs, answers = arrays(folder / EXAMPLE), arrays(path)
    shares = []
    try:
        for name, known in answers.items():
            found, chosen = graphs[name](**inputs[name]), manifest["graphs"][name].get("selected")
            selected = [output for output in known if isinstance(chosen, list) and output in chosen]
            shares += [differing(found[output], array) for output, array in known.items() if output not in selected]
            if selected:
                shares.append(unmatched(found, known, selected))
    except KeyError as error:
        raise UserError(f"{path}: {error} is not in this bundle; expected its graphs and outputs") from None
    except ValueError as error:  # arrays of other shapes do not fit side by side
        raise UserError(f"{path}: {one_line(error)}; expected the outputs of this bundle") from None
    if not shares:
        raise UserError(f"{path}: empty; expected the bundle's outputs at export")
    return max(shares)


def differing(found: np.ndarray, known: np.ndarray) -> float:
    """Return how far apart two outputs are: 0 if they are equal, 1 if their shapes or non-finite values differ.

    For floats it is the largest difference, divided by the largest magnitude if that is above 1; for other types it is
    the share of elements that differ.
    """
    if found.shape != known.shape:
        return 1.0
    if known.dtype.kind != "f":
        return float((found != known).mean())
    finite = np.isfinite(known)
    if not np.array_equal(found[~finite], known[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return 1.0
    apart = np.abs(found[finite].astype(np.float64) - known[finite]).max(initial=0)
    return float(apart / np.abs(known[finite], dtype=np.float64).max(initial=1))


def rows_of(answer: Mapping[str, np.ndarray], selected: Sequence[str]) -> np.ndarray:
    """Join outputs (B, D) and (B, D, ...) side by side to (B, D, F). Outputs without a second axis are left out."""
    parts = [answer[name].astype(np.float64) for name in selected if answer[name].ndim > 1]
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=2)


def unmatched(found: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray], selected: Sequence[str]) -> float:
    """Return how far apart the rows (1, D, F) of `selected` are in any order: rounding can swap boxes of equal scores.

    It is the mean of the rows' differences from the most similar row, as `differing` computes them but with at most 1
    for each, and 1 for each row that one side has more than the other. Rows of zeros are padding.
    """
    given, wanted = (rows[0][rows[0].any(axis=1)] for rows in (rows_of(found, selected), rows_of(known, selected)))
    whole = rows_of({name: np.full(known[name].shape, known[name].dtype.kind != "f") for name in selected}, selected)
    if not len(wanted) or not len(given):
        return float(len(wanted) != len(given))
    size = np.where(whole[0, 0], 1, np.maximum(np.abs(wanted), 1))  # classes that differ do so by 1 or more
    apart = (np.abs(given[:, None] - wanted) / size).max(axis=2)  # (given, wanted)
    nearest = np.sort(np.nan_to_num(apart, nan=1).min(axis=0).clip(max=1))[: len(given)]
    return float((nearest.sum() + abs(len(given) - len(wanted))) / max(len(given), len(wanted)))


def arrays(path: Path) -> Arrays:
    """Load arrays by graph and name from a file that calls them GRAPH/NAME. Raises UserError."""
    found: Arrays = {}
    try:
        with np.load(path, allow_pickle=False) as kept:
            if sum(entry.file_size for entry in kept.zip.infolist()) > LARGEST_FILE:
                raise ValueError("too large")
            for key, array in kept.items():
                graph, _, name = key.partition("/")
                found.setdefault(graph, {})[name] = array
    except Exception as error:  # numpy and zipfile raise exceptions of many types
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{path}: unreadable ({reason}); expected the arrays that export.py wrote") from None
    return found


def batch_of(inputs: Arrays, graphs: dict) -> Arrays | None:
    """Repeat the example SEVERAL times along every axis called batch. Return None if a graph has no such axis."""
    batch: Arrays = {}
    for graph, arrays in inputs.items():
        batch[graph] = {}
        for name, array in arrays.items():
            for axis, symbol in graphs[graph]["dynamic_axes"].get(name, {}).items():
                if symbol == "batch":
                    array = np.repeat(array, SEVERAL, axis=int(axis))
            batch[graph][name] = array
        if all(batch[graph][name].size == array.size for name, array in arrays.items()):
            return None
    return batch


def scheduled() -> tuple[float, float]:
    """Return the seconds that this process's threads ran, and waited for a core; 0 if the system reports none."""
    ran = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            of_thread = path.read_text(encoding="ascii").split()
        except OSError:  # a thread that has just ended
            continue
        ran, waited = ran + int(of_thread[0]), waited + int(of_thread[1])
    return ran / 1e9, waited / 1e9


def memory() -> dict[str, float | None]:
    """Return the peak resident and the current anonymous memory of this process in megabytes, or None if unknown."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return {"peak_rss_mb": None, "anonymous_mb": None}
    fields = {"peak_rss_mb": "VmHWM", "anonymous_mb": "RssAnon"}
    found = {key: re.search(rf"{name}:\s+(\d+) kB", status) for key, name in fields.items()}  # gVisor has neither
    return {key: int(match[1]) * 1024 / 1e6 if match else None for key, match in found.items()}


def installed_mb(package: str) -> float | None:
    """Return the megabytes on disk of an installed package and its requirements, without optional extras.

    If another package provides a requirement, such as onnxruntime-gpu for onnxruntime, its size counts. None: not
    installed.
    """
    from importlib.metadata import PackageNotFoundError, distribution, packages_distributions  # lazy: saves memory

    stand_ins = packages_distributions()
    sizes: dict[str, int] = {}
    waiting = [package]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in sizes:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            if name == package:
                return None
            waiting += [other for other in stand_ins.get(name, ()) if other != name]  # none: for another system
            continue
        sizes[name] = sum(path.stat().st_size for file in found.files or () if (path := Path(file.locate())).is_file())
        waiting += [
            re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in found.requires or () if "extra ==" not in line
        ]
    return sum(sizes.values()) / 1e6


def main(arguments: list[str]) -> int:
    """Run the measured process. Arguments: FOLDER THREADS PROVIDER [once] STARTED."""
    place, threads, provider, *once, started = arguments
    folder = Path(place)
    try:
        manifest = read_manifest(folder)
        graphs = open_bundle(folder, manifest, int(threads), provider)
        if once:
            answer(graphs, arrays(folder / EXAMPLE))
            print("{}")
            return 0
        figures = measure(graphs, folder, float(started))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum((folder / graph["file"]).stat().st_size for graph in manifest["graphs"].values())
    print(json.dumps(figures | {"model_mb": size / 1e6, "installed_mb": installed_mb("dlref")}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
