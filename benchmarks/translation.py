"""Seq2Seq beside JoeyNMT's RNN: `python -m benchmarks.translation --joeynmt PYTHON`.

PYTHON is the interpreter of an environment with joeynmt (its requirements clash with onnx's). Both train a
bidirectional LSTM encoder and an LSTM decoder with Luong's general attention, of the same sizes, on the same batches
of random sentences as long as Multi30k's, by a bare loop: forward, smoothed cross entropy, backward, clipping, Adam.
JoeyNMT as it comes feeds the attentional vector back; it is timed without, as dlref's is, too. They take turns, each
turn in a process of its own. Then dlref decodes sentences by beam search in PyTorch and over its graphs as a bundle
opens them, float32 and int8.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from dlref.data.pairs import Batch, Corpus, TokenBatches
from dlref.export.convert import Plan, convert
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.models import Seq2Seq
from dlref.runtime import make_runner
from dlref.runtime.bundle import OnnxGraph, cores
from dlref.runtime.text import BEGIN, END, PAD, SPECIAL
from dlref.tasks import Translator

VOCABULARY, SIZE, DROPOUT, SMOOTHING = 4096, 384, 0.4, 0.1  # those of configs/seq2seq_multi30k_de_en.yaml
BATCH, BATCHES, SENTENCES, BEAM = 1536, 12, 128, 5
PASSES, TURNS = 2, 3
INT8 = TARGETS["x86-64"]


def make_batches() -> tuple[Corpus, list[torch.Tensor]]:
    """Random sentences whose lengths are those of Multi30k on average, 15 tokens, and some batches of them."""
    generator = np.random.default_rng(0)

    def sentences(count: int) -> list[list[int]]:
        lengths = np.clip(generator.gamma(9, 15 / 9, count).round(), 4, 40).astype(int)
        return [generator.integers(len(SPECIAL), VOCABULARY, length).tolist() for length in lengths]

    source, target = sentences(4000), sentences(4000)
    corpus = Corpus([[*row, END] for row in source], [[BEGIN, *row, END] for row in target])
    batches = TokenBatches(corpus.source.lengths, corpus.target.lengths - 1, BATCH)
    torch.manual_seed(0)
    return corpus, list(batches)[:BATCHES]


def translator() -> Translator:
    """The config's, over words without meaning."""
    network = Seq2Seq(VOCABULARY, VOCABULARY, "lstm", 1, SIZE, SIZE, attention="general", dropout=DROPOUT)
    task = Translator(network=network, optimizer=torch.optim.Adam, label_smoothing=SMOOTHING, beam=BEAM)
    words = {"kind": "word", "tokens": [*SPECIAL, *map(str, range(VOCABULARY - len(SPECIAL)))]}
    facts = {"source_vocabulary": words, "target_vocabulary": words, "longest": 100, "longest_answer": 20}
    task.remember({**facts, "too_long": "error"})
    task.log = lambda *arguments, **options: None
    return task


def train(task: Translator, batches: list[Batch]) -> list[float]:
    """Seconds of each pass over the batches, the first left out."""
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-3)
    task.train()
    seconds = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        for batch in batches:
            task.training_step(batch, 0).backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def joeynmt(python: str, path: Path, input_feeding: bool) -> list[float]:
    """The same of JoeyNMT, in a process of its own."""
    options = {"vocabulary": VOCABULARY, "size": SIZE, "dropout": DROPOUT, "smoothing": SMOOTHING}
    options |= {"input_feeding": input_feeding, "passes": PASSES, "threads": torch.get_num_threads()}
    program = Path(__file__).with_name("joeynmt_rnn.py")
    command = [python, str(program), str(path), json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])["seconds"]


def training(python: str | None, folder: Path) -> None:
    """Target tokens a second, in turns."""
    corpus, numbers = make_batches()
    batches = [corpus[number] for number in numbers]
    tokens = sum(int((batch.target[:, 1:] != PAD).sum()) for batch in batches)
    arrays = {f"{side}{i}": getattr(batch, side).numpy() for i, batch in enumerate(batches) for side in SIDES}
    np.savez(folder / "batches.npz", **arrays)
    calls = {}
    if python:
        calls |= {
            "JoeyNMT without input feeding": lambda: joeynmt(python, folder / "batches.npz", False),
            "JoeyNMT as it comes": lambda: joeynmt(python, folder / "batches.npz", True),
        }
    calls["dlref"] = lambda: train(translator(), batches)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(TURNS), "training", console=Console(stderr=True), transient=True):
        for name, call in calls.items():
            rates[name] += [tokens / seconds for seconds in call()]
    show("training", "target tokens/s", rates)


SIDES = ("source", "target")


def decoding(folder: Path) -> None:
    """Sentences a second of the same runner, over PyTorch and over the graphs as a bundle opens them."""
    task = translator().eval()
    corpus, _ = make_batches()
    served = task.deployable(corpus[torch.arange(2)])
    sources = [row[row != PAD].tolist() for row in corpus[torch.arange(SENTENCES)].source]
    rates = {}
    for title, precision in (("dlref, PyTorch", None), ("dlref, float32", "float32"), ("dlref, int8", "int8")):
        graphs = dict(served.graphs)
        for name, graph in served.graphs.items() if precision else ():
            exact, path = folder / f"{name}.onnx", folder / f"{name}.{precision}.onnx"
            write_onnx(graph, exact, INT8)
            convert(exact, path, INT8, Plan(precision), [])
            graphs[name] = OnnxGraph(path, INT8.provider, 1)
        runner = make_runner(served.kind, graphs, served.metadata)
        runner.workers = cores() if precision else 1
        runner.search(sources[:8])
        rates[title] = []
        for _ in track(range(TURNS), title, console=Console(stderr=True), transient=True):
            start = time.perf_counter()
            runner.search(sources)
            rates[title].append(SENTENCES / (time.perf_counter() - start))
    show("decoding", f"sentences/s, beam {BEAM}", rates)


def show(title: str, unit: str, rates: dict[str, list[float]]) -> None:
    """A table: medians, their ratio to the first row's, and the spread."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n| {title} | {unit} | beside the first | from to |\n|---|---|---|---|")
    first = next(iter(medians.values()))
    for name, values in rates.items():
        print(
            f"| {name} | {medians[name]:.0f} | {medians[name] / first:.2f}× | {min(values):.0f} to {max(values):.0f} |"
        )


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--joeynmt", metavar="PYTHON", help="interpreter of an environment with joeynmt; none: left out"
    )
    options = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime"))
    print(
        f"{platform.machine()}, {cores()} cores, {packages}; hidden size {SIZE}, {VOCABULARY} tokens, {BATCH} a batch"
    )
    with tempfile.TemporaryDirectory() as folder:
        training(options.joeynmt, Path(folder))
        decoding(Path(folder))


if __name__ == "__main__":
    main()
