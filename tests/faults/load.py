"""One runner shared by many threads: predictions as in a single thread, and constant memory.

    python -m tests.faults.load [--requests 10000] [--threads 8] [BUNDLE...]

Without BUNDLE, a tiny bundle of each family is trained and exported first. Each bundle is opened once, in a separate
process that never imported torch. Inputs of different sizes and lengths, some of them lists, are predicted one at a
time; then the threads request them in random order, and each prediction must be identical to the last bit. One request
in 100 is malformed and must raise the same UserError as on its own.

Memory is the resident set, sampled after every 500 requests. It counts as flat if it grows by less than 3 MB over the
second half of the requests: with 10,000 requests, by 0.6 kB for each. During the first half, the allocator's arenas,
one per thread, reach their sizes. The exit code is 1 if any check fails.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import string
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from dlref.runtime import UserError, load
from dlref.runtime.arguments import positive
from dlref.runtime.bundle import read_manifest
from dlref.runtime.runner import Runner

ROOT = Path(__file__).parents[2]
GROWTH = 3  # MB
EVERY = 500  # requests between samples of the memory
MALFORMED = 100  # one in this many requests is malformed
INPUTS, LISTS = 45, 5
LETTERS = list(string.ascii_letters + string.digits + " .-")
REFUSED = "UserError: "

DATA, NETWORK = "data.init_args", "model.init_args.network.init_args"
FEW = {
    **{"max_epochs": 1, "limit_train_batches": 3, "check_val_every_n_epoch": 1, "log_every_n_steps": 1},
    **{"precision": "32-true", "enable_progress_bar": False, "enable_model_summary": False},
}
TINY = {  # configs, and the options that make their data and predictions small
    "lenet5_digits": {},
    "ssd_digit_scenes": {DATA: {"train": 32, "held_out": 8}},
    "fcn_digit_scenes": {DATA: {"train": 32, "held_out": 8, "image_size": 32}},
    "deepar_synthetic": {DATA: {"count": 8, "length": 400, "prediction_length": 6}, NETWORK: {"num_cells": 12}},
    "seq2seq_dates": {
        DATA: {"train": 300, "val": 20, "test": 20, "batch_size": 100, "tokenizer": "bpe", "vocabulary_size": 300},
        NETWORK: {"source_vocabulary": 320, "target_vocabulary": 320, "hidden_size": 32},
    },
    "gpt_python": {
        DATA: {"root": ROOT / "dlref", "vocabulary_size": 300, "context_length": 32},
        NETWORK: {"vocabulary": 320, "context_length": 32, "n_embd": 48},
    },
}


# Requests


class Written(NamedTuple):
    """A prompt whose continuation is streamed."""

    prompt: str


def pictures(runner: Runner, folder: Path) -> tuple[list, list]:
    """Return noise images of various sizes, as arrays and as files."""
    generator, channels = np.random.default_rng(0), runner.metadata["channels"]
    good: list[Any] = [
        generator.integers(0, 256, (*size, channels), dtype=np.uint8) for size in generator.integers(8, 80, (INPUTS, 2))
    ]
    for i in range(0, INPUTS, 2):
        Image.fromarray(good[i].squeeze()).save(path := folder / f"{i}.png")
        good[i] = path
    empty, many = np.zeros((0, 4, channels), np.uint8), np.zeros((9, 9, 9, channels), np.uint8)
    return good, [np.zeros((4, 4)), empty, many, folder / "none.png", __file__]


def series(runner: Runner, folder: Path) -> tuple[list, list]:
    """Return series of various lengths, alone and in requests for sample paths."""
    generator, known = np.random.default_rng(0), runner.metadata

    def one(points: int) -> dict:
        target = (100 * generator.random(points)).tolist()
        target[generator.integers(points)] = None
        cat = [
            int(generator.choice([k for k in range(size) if k not in unseen]))
            for size, unseen in zip(known["cardinality"], known["unseen"], strict=True)
        ]
        ahead = generator.random((known["dynamic_features"], points + known["prediction_length"])).tolist()
        static = generator.random(known["static_features"]).tolist()
        start = f"2024-01-0{generator.integers(1, 6)}"  # Monday to Friday
        return {"start": start, "target": target, "cat": cat, "dynamic_feat": ahead, "feat_static_real": static}

    good = [one(points) for points in generator.integers(2, 200, INPUTS)]
    for i in range(0, INPUTS, 3):
        configuration = {"num_samples": 10 + i, "seed": i, "output_types": ["samples"]}
        good[i] = {"instances": [good[i], *good[1:i:3]][:4], "configuration": configuration}
    bad = [{}, good[1] | {"start": "never"}, good[1] | {"target": [None]}, {"instances": []}]
    return good, [*bad, {"instances": good[1:2], "configuration": {"num_samples": 0}}]


def words(length: int, seed: int) -> str:
    """Return a text of random letters; most tokenisers know some of them."""
    return "".join(np.random.default_rng(seed).choice(LETTERS, length)) + "a"


def sentences(runner: Runner, folder: Path) -> tuple[list, list]:
    """Return texts, alone and in SageMaker's requests."""
    most = min(runner.longest, 60) - 2
    good: list[Any] = [words(1 + i * most // INPUTS, i) for i in range(INPUTS)]
    for i in range(0, INPUTS, 5):
        good[i] = {"instances": [{"data": text} for text in good[i : i + 4] if isinstance(text, str)]}
    return good, ["", "\ud800", 7, {"source": 7}, {"instances": []}]


def prompts(runner: Runner, folder: Path) -> tuple[list, list]:
    """Return requests with settings, and prompts whose continuation is streamed."""
    good: list[Any] = [words(i, i) for i in range(INPUTS)]
    for i, text in enumerate(good):
        settings = {"max_new_tokens": 1 + i % 20, "top_k": i % 4, "temperature": i % 3, "stop": ["e"] * (i % 2)}
        good[i] = {"inputs": text, "parameters": settings | {"seed": i}}
    bad = [{"inputs": "a", "parameters": {name: ""}} for name in ("temperature", "stop")]
    return [*good, *(Written(words(i, i)) for i in range(LISTS))], ["\ud800", 7, {"inputs": 7}, *bad]


MAKERS: dict[str, Callable[[Runner, Path], tuple[list, list]]] = {
    "image-classification": pictures,
    "object-detection": pictures,
    "semantic-segmentation": pictures,
    "forecasting": series,
    "translation": sentences,
    "language": prompts,
}


def sources(kind: str, runner: Runner, folder: Path) -> tuple[list, list]:
    """Return valid and invalid inputs for a runner, both including lists; files are written to `folder`."""
    good, bad = MAKERS[kind](runner, folder)
    lists = [good[i : i + 2 + i // LISTS] for i in range(0, LISTS * LISTS, LISTS)]
    return good + lists, [*bad, [good[1], bad[0]]]


# Load


class Result(NamedTuple):
    """Counts of the outcomes of requests, samples of the memory in MB, and an example of a wrong outcome, if any."""

    requests: int
    threads: int
    unequal: int
    malformed: int
    refused: int
    memory: list[float]
    example: str

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return not self.unequal and self.refused == self.malformed and self.flat

    @property
    def flat(self) -> bool:
        """Whether memory did not grow over the second half."""
        return self.memory[-1] - self.half < GROWTH

    @property
    def half(self) -> float:
        """Memory in MB after the first half."""
        return self.memory[(len(self.memory) - 1) // 2]


def hammer(
    runner: Runner, good: list, bad: list, requests: int, threads: int, watched: Callable[[Iterable], Iterable] = iter
) -> Result:
    """Send requests to a runner from several threads; `watched` wraps the loop over samples, to show progress."""
    asked = [*good, *bad]
    alone = [outcome(runner, source) for source in asked]
    if [told.startswith(REFUSED) for told in alone] != [False] * len(good) + [True] * len(bad):
        raise AssertionError(f"good ones that are refused, or bad ones that are answered: {alone}")
    order, malformed = mixed(len(good), len(bad), requests)

    def differs(i: int) -> str:
        told = outcome(runner, asked[i])
        return "" if told == alone[i] else f"{told} in the place of {alone[i]}"

    wrong, memory = [], []
    with ThreadPoolExecutor(threads) as pool:
        for part in watched(np.split(order, range(EVERY, requests, EVERY))):
            wrong += [(i, told) for i, told in zip(part, pool.map(differs, part), strict=True) if told]
            memory.append(resident())
    unequal = [told for i, told in wrong if i < len(good)]
    refused = malformed - (len(wrong) - len(unequal))
    example = wrong[0][1] if wrong else ""
    return Result(requests, threads, len(unequal), malformed, refused, memory, example)


def mixed(good: int, bad: int, requests: int) -> tuple[np.ndarray, int]:
    """Return the source of each request, with bad sources numbered after good ones, and the number of bad requests."""
    generator, malformed = np.random.default_rng(0), requests // MALFORMED
    order = generator.integers(good, size=requests)
    order[generator.choice(requests, malformed, replace=False)] = generator.integers(good, good + bad, malformed)
    return order, malformed


def outcome(runner: Runner, source: Any) -> str:
    """Return a prediction or an error as text, which is equal only if all values are."""
    try:
        answer = list(runner.written(source.prompt)) if isinstance(source, Written) else runner(source)
    except Exception as error:  # count any error caused by threads, without stopping the others
        return f"{type(error).__name__}: {error}"
    return json.dumps(answer, default=lambda array: f"{array.dtype}{array.shape} {sha256(array)}")


def sha256(array: np.ndarray) -> str:
    """Return the hash of an array's values; masks have too many to print."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def resident() -> float:
    """Return the memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# The command


def make(name: str, folder: Path) -> Path:
    """Train and export a config of TINY, in a process that may import torch."""
    from dlref.cli import load_run, train
    from dlref.export.bundle import export
    from dlref.export.targets import TARGETS

    changes = TINY[name] | {"trainer": FEW}
    options = [f"--{part}.{key}={value}" for part, values in changes.items() for key, value in values.items()]
    config, run = f"{ROOT}/configs/{name}.yaml", folder / "run"
    sys.argv = sys.argv[:1]  # the command line reads it too
    if train(["fit", f"--config={config}", f"--run={run}", "--final_test=false", *options]):
        raise UserError(f"{config}: not trained; expected options that it has in TINY")
    export(*load_run(run, []), TARGETS["cpu"], folder / "bundle", contenders=())
    return folder / "bundle"


def loaded(bundle: Path, requests: int, threads: int) -> tuple[str, Result]:
    """Return the kind of a bundle and the result of requests to it."""
    kind, runner = read_manifest(bundle)["kind"], load(bundle)
    with tempfile.TemporaryDirectory() as folder:
        good, bad = sources(kind, runner, Path(folder))
        return kind, hammer(runner, good, bad, requests, threads, lambda parts: track(parts, kind, console=console))


def apart(function: Callable, *arguments: Any) -> Any:
    """Call a function in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def table(results: list[tuple[str, Result]]) -> Table:
    """Return a table with a row for each bundle."""
    titles = ("family", "requests", "threads", "unequal", "refused", "first MB", "half MB", "end MB", "")
    drawn = Table(*(Column(title, no_wrap=True) for title in titles), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for kind, one in results:
        counts = [f"{one.requests:,}", str(one.threads), str(one.unequal), f"{one.refused} of {one.malformed}"]
        memory = [f"{size:.1f}" for size in (one.memory[0], one.half, one.memory[-1])]
        drawn.add_row(kind, *counts, *memory, "passed" if one.passed else "FAILED")
    return drawn


console = Console(stderr=True)


def main() -> int:
    """Return 0, or 1 if a prediction or error differs or memory grows, or 2 if a bundle is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="(default: tiny ones, made here)")
    parser.add_argument("--requests", type=positive, default=10_000)
    parser.add_argument("--threads", type=positive, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            bundles = options.bundles or [apart(make, name, Path(folder) / name) for name in TINY]
            results = [apart(loaded, bundle, options.requests, options.threads) for bundle in bundles]
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    Console(width=100).print(table(results))
    for kind, one in results:
        if one.example:
            print(f"{kind}: {one.example[:500]}", file=sys.stderr)
    return 0 if all(one.passed for _, one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
