"""Seq2Seq beside JoeyNMT's RNN: `python -m benchmarks.translation --joeynmt PYTHON`.

PYTHON is the interpreter of an environment with joeynmt (its requirements clash with onnx's). Both train a
bidirectional LSTM encoder and an LSTM decoder with Luong's general attention, of the same sizes, on random sentences
as long as Multi30k's. First as a user does, `joeynmt train` beside Lightning's Trainer, on the same files with batches
of the same tokens; JoeyNMT's batches are not of sentences of about a length. Then both networks on dlref's batches by a
bare loop: forward, smoothed cross entropy, backward, clipping, Adam. JoeyNMT as it comes feeds the attentional vector
back; it is timed without, as dlref's is, too. They take turns, each of JoeyNMT's in a process of its own. Last, dlref
decodes sentences by beam search in PyTorch and over its graphs as a bundle opens them, float32 and int8.
"""

import argparse
import json
import logging
import platform
import re
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import track

from dlref.data import ParallelText
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
FILES = 2000  # sentences of the programs
INT8 = TARGETS["x86-64"]


def make_batches() -> tuple[Corpus, list[torch.Tensor]]:
    """Random sentences whose lengths are those of Multi30k on average, 15 tokens, and some batches of them."""
    source, target = sentences(4000)
    corpus = Corpus([[*row, END] for row in source], [[BEGIN, *row, END] for row in target])
    batches = TokenBatches(corpus.source.lengths, corpus.target.lengths - 1, BATCH)
    return corpus, list(batches.draw(torch.Generator().manual_seed(0)))[:BATCHES]


def sentences(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Sources and targets of random tokens; a target is about as long as its source."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(9, 15 / 9, count), 4, 40)
    sides = (lengths, np.clip(lengths + generator.normal(0, 2, count), 3, 45))
    return tuple([generator.integers(4, VOCABULARY, round(n)).tolist() for n in side] for side in sides)


class Clock(Callback):
    """Seconds of each epoch but the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, task) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, task) -> None:
        """Stop."""
        if trainer.current_epoch:
            self.seconds.append(time.perf_counter() - self.start)


def write_files(folder: Path) -> int:
    """The files that both programs train on; how many target tokens they have, ends among them."""
    for split, count in (("train", FILES), ("val", 16), ("test", 16)):
        sides = sentences(count)
        for ending, rows in zip(("de", "en"), sides, strict=True):
            lines = [" ".join(map(str, row)) for row in rows]
            (folder / f"{split}.{ending}").write_text("\n".join(lines) + "\n")
        if split == "train":
            tokens = sum(len(row) + 1 for row in sides[1])
    return tokens


def run_dlref(folder: Path) -> list[float]:
    """Seconds of an epoch by Lightning's Trainer, the first left out."""
    clock = Clock()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 2, "callbacks": [clock], "gradient_clip_val": 1.0, "limit_val_batches": 0}
    data = ParallelText(str(folder), "de", "en", tokenizer="word", vocabulary_size=VOCABULARY, batch_size=BATCH)
    trainer = Trainer(**options, **quiet, enable_checkpointing=False, default_root_dir=folder)
    trainer.fit(translator(alone=False), datamodule=data)
    return clock.seconds


def run_joeynmt(python: str, folder: Path, input_feeding: bool) -> list[float]:
    """Target tokens a second that `joeynmt train` reports of an epoch, the first report left out."""
    side = {"max_length": 100, "level": "word", "voc_limit": VOCABULARY - 4, "voc_min_freq": 1}
    layers = {"type": "recurrent", "rnn_type": "lstm", "num_layers": 1, "dropout": DROPOUT}
    table = {"embedding_dim": SIZE, "scale": False, "dropout": DROPOUT}
    decoder = {"hidden_size": SIZE, "attention": "luong", "init_hidden": "bridge", "hidden_dropout": DROPOUT}
    training = {"optimizer": "adam", "learning_rate": 0.001, "clip_grad_norm": 1.0, "label_smoothing": SMOOTHING}
    training |= {
        "batch_size": BATCH,
        "batch_type": "token",
        "epochs": 1,
        "scheduling": "exponential",
        "logging_freq": 5,
        "validation_freq": 10_000,
    }
    config = {
        "name": "benchmark",
        "model_dir": str(folder / "joeynmt"),
        "use_cuda": False,
        "data": {
            "train": str(folder / "train"),
            "dev": str(folder / "val"),
            "dataset_type": "plain",
            "src": {"lang": "de", **side},
            "trg": {"lang": "en", **side},
        },
        "training": {**training, "overwrite": True},
        "testing": {},
        "model": {
            "encoder": {**layers, "embeddings": table, "hidden_size": SIZE // 2, "bidirectional": True},
            "decoder": {**layers, "embeddings": table, **decoder, "input_feeding": input_feeding},
        },
    }
    path = folder / "joeynmt.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [python, "-m", "joeynmt", "train", str(path), "--skip-test"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rates = re.findall(r"Tokens per Sec:\s+([0-9]+)", result.stdout + result.stderr)
    return [float(rate) for rate in rates[1:]]


def programs(python: str | None, folder: Path) -> None:
    """Target tokens a second of the programs as users start them, in turns."""
    tokens = write_files(folder)
    calls = {}
    if python:
        calls |= {
            "`joeynmt train`": lambda: run_joeynmt(python, folder, True),
            "`joeynmt train` without input feeding": lambda: run_joeynmt(python, folder, False),
        }
    calls["dlref, Lightning's Trainer"] = lambda: [tokens / seconds for seconds in run_dlref(folder)]
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(TURNS), "programs", console=Console(stderr=True), transient=True):
        for name, call in calls.items():
            rates[name] += call()
    show("training, programs", "target tokens/s", rates)


def translator(alone: bool = True) -> Translator:
    """The config's, over words without meaning; `alone`: without data and a trainer."""
    network = Seq2Seq(VOCABULARY, VOCABULARY, "lstm", 1, SIZE, SIZE, attention="general", dropout=DROPOUT)
    task = Translator(network=network, optimizer=torch.optim.Adam, label_smoothing=SMOOTHING, beam=BEAM)
    words = {"kind": "word", "tokens": [*SPECIAL, *map(str, range(VOCABULARY - len(SPECIAL)))]}
    facts = {"source_vocabulary": words, "target_vocabulary": words, "longest": 100, "longest_answer": 20}
    if alone:
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
    show("training, dlref's batches, bare loop", "target tokens/s", rates)


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
    """Every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--joeynmt", metavar="PYTHON", help="interpreter of an environment with joeynmt; none: left out"
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # Lightning's, at every start
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime"))
    print(
        f"{platform.machine()}, {cores()} cores, {packages}; hidden size {SIZE}, {VOCABULARY} tokens, {BATCH} a batch"
    )
    with tempfile.TemporaryDirectory() as folder:
        programs(options.joeynmt, Path(folder))
        training(options.joeynmt, Path(folder))
        decoding(Path(folder))


if __name__ == "__main__":
    main()
