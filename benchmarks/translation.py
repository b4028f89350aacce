"""Seq2Seq compared with JoeyNMT's RNN.

JOEYNMT_PYTHON is the interpreter of an environment with joeynmt (its requirements clash with onnx's) and with
importlib_metadata, which joeynmt 2.3.0 imports without requiring it. Both projects train a bidirectional LSTM encoder
and an LSTM decoder with Luong's general attention, of the same sizes, on random sentences as long as Multi30k's. First
they train as users start them, with `joeynmt train` and with Lightning's Trainer, on the same files and with the same
number of tokens per batch; JoeyNMT does not batch sentences of similar length together. Then a bare loop trains both
networks on dlref's batches: forward, smoothed cross entropy, backward, clipping, Adam. By default JoeyNMT feeds the
attentional vector back to the decoder; it is also timed without, like dlref. All sides take turns, and JoeyNMT's turns
each have a process of their own. Last, dlref decodes sentences by beam search in PyTorch and over its float32 and int8
graphs, as a bundle opens them.
"""

import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import Trainer

from benchmarks.forecasting import Clock, runners
from benchmarks.rows import QUIET, NotHere, Row, Rows, figures_in_turns, in_turns, rest, run
from dlref.data import ParallelText
from dlref.data.pairs import Batch, Corpus, TokenBatches
from dlref.models import Seq2Seq
from dlref.runtime.text import BEGIN, END, PAD, SPECIAL
from dlref.tasks import Translator

VOCABULARY, SIZE, DROPOUT, SMOOTHING = 4096, 384, 0.4, 0.1  # those of configs/seq2seq_multi30k_de_en.yaml
BATCH, BATCHES, SENTENCES, BEAM = 1536, 12, 128, 5
PASSES, TURNS = 2, 5  # of the bare loop, and of both comparisons of training
FILES = 2000  # sentences for training as users start it
DEFAULTS, WITHOUT = "JoeyNMT, defaults", "JoeyNMT, without input feeding"
SIDES = ("source", "target")


def joeynmt_python() -> str:
    """Return the interpreter that has joeynmt."""
    if python := os.environ.get("JOEYNMT_PYTHON"):
        return python
    raise NotHere("JOEYNMT_PYTHON is not set to an interpreter that has joeynmt")


def make_batches() -> tuple[Corpus, list[torch.Tensor]]:
    """Return random sentences of 15 tokens on average, as in Multi30k, and some batches of them."""
    source, target = sentences(4000)
    corpus = Corpus([[*row, END] for row in source], [[BEGIN, *row, END] for row in target])
    batches = TokenBatches(corpus.source.lengths, corpus.target.lengths - 1, BATCH)
    return corpus, list(batches.draw(torch.Generator().manual_seed(0)))[:BATCHES]


def sentences(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return sources and targets of random tokens; a target is about as long as its source."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(9, 15 / 9, count), 4, 40)
    sides = (lengths, np.clip(lengths + generator.normal(0, 2, count), 3, 45))
    return tuple([generator.integers(4, VOCABULARY, round(n)).tolist() for n in side] for side in sides)


def write_files(folder: Path) -> int:
    """Write the files on which both programs train. Return their number of target tokens, including ends."""
    for split, count in (("train", FILES), ("val", 16), ("test", 16)):
        sides = sentences(count)
        for ending, rows in zip(("de", "en"), sides, strict=True):
            lines = [" ".join(map(str, row)) for row in rows]
            (folder / f"{split}.{ending}").write_text("\n".join(lines) + "\n")
        if split == "train":
            tokens = sum(len(row) + 1 for row in sides[1])
    return tokens


def run_dlref(folder: Path) -> float:
    """Return the seconds of the second epoch with Lightning's Trainer."""
    clock = Clock()
    options = {"max_epochs": 2, "callbacks": [clock], "gradient_clip_val": 1.0, "limit_val_batches": 0}
    data = ParallelText(str(folder), "de", "en", tokenizer="word", vocabulary_size=VOCABULARY, batch_size=BATCH)
    trainer = Trainer(**options, **QUIET, enable_checkpointing=False, default_root_dir=folder)
    trainer.fit(translator(alone=False), datamodule=data)
    return clock.seconds


def run_joeynmt(python: str, folder: Path, input_feeding: bool) -> float:
    """Return the target tokens per second of an epoch that `joeynmt train` reports, without its first report."""
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
    return statistics.harmonic_mean([float(rate) for rate in rates[1:]])  # each report covers the same number of steps


def programs() -> Rows:
    """Compare target tokens per second of both programs as users start them, in turns."""
    python = joeynmt_python()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_files(folder)
        calls = {
            DEFAULTS: partial(run_joeynmt, python, folder, True),
            WITHOUT: partial(run_joeynmt, python, folder, False),
            "dlref": lambda: tokens / run_dlref(folder),
        }
        rates = figures_in_turns("programs", calls, TURNS)
    return beside_joeynmt(f"training as users start it, LSTMs of {SIZE}", rates)


def beside_joeynmt(title: str, rates: dict[str, list[float]]) -> Rows:
    """Return rows of target tokens per second, compared with JoeyNMT with and without input feeding."""
    peers = {title: DEFAULTS, f"{title}, no input feeding": WITHOUT}
    return {title: Row(rates["dlref"], rates[peer], "target tokens/s", peer, ">= 2") for title, peer in peers.items()}


def translator(alone: bool = True) -> Translator:
    """Return the config's task over words without meaning; `alone`: without data and a trainer."""
    network = Seq2Seq(VOCABULARY, VOCABULARY, "lstm", 1, SIZE, SIZE, attention="general", dropout=DROPOUT)
    task = Translator(network=network, optimizer=torch.optim.Adam, label_smoothing=SMOOTHING, beam=BEAM)
    words = {"kind": "word", "tokens": [*SPECIAL, *map(str, range(VOCABULARY - len(SPECIAL)))]}
    facts = {"source_vocabulary": words, "target_vocabulary": words, "longest": 100, "longest_answer": 20}
    if alone:
        task.remember(facts)
        task.too_long = "error"
        task.log = lambda *arguments, **options: None
    return task


def train(task: Translator, batches: list[Batch]) -> float:
    """Return the mean seconds of a pass over the batches. The first pass does not count."""
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-3)
    task.train()

    def one() -> None:
        for batch in batches:
            task.training_step(batch, 0).backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    one()
    start = time.perf_counter()
    for _ in range(PASSES):
        one()
    return (time.perf_counter() - start) / PASSES


def joeynmt(python: str, path: Path, input_feeding: bool) -> float:
    """Return the same for JoeyNMT, in a process of its own."""
    options = {"vocabulary": VOCABULARY, "size": SIZE, "dropout": DROPOUT, "smoothing": SMOOTHING}
    options |= {"input_feeding": input_feeding, "passes": PASSES, "threads": torch.get_num_threads()}
    program = Path(__file__).with_name("joeynmt_rnn.py")
    command = [python, "-I", str(program), str(path), json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return statistics.mean(json.loads(result.stdout.splitlines()[-1]))


def training() -> Rows:
    """Compare target tokens per second of both networks on the same batches, in turns."""
    python = joeynmt_python()
    corpus, numbers = make_batches()
    batches = [corpus[number] for number in numbers]
    tokens = sum(int((batch.target[:, 1:] != PAD).sum()) for batch in batches)
    arrays = {f"{side}{i}": getattr(batch, side).numpy() for i, batch in enumerate(batches) for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.npz"
        np.savez(path, **arrays)
        calls = {
            WITHOUT: lambda: tokens / joeynmt(python, path, False),
            DEFAULTS: lambda: tokens / joeynmt(python, path, True),
            "dlref": lambda: tokens / train(translator(), batches),
        }
        rates = figures_in_turns("training", calls, TURNS)
    return beside_joeynmt(f"training by a bare loop, LSTMs of {SIZE}", rates)


def decoding() -> Rows:
    """Compare sentences per second, in turns."""
    torch.manual_seed(0)
    corpus, _ = make_batches()
    sources = [row[row != PAD].tolist() for row in corpus[torch.arange(SENTENCES)].source]
    with tempfile.TemporaryDirectory() as folder:
        opened = runners(translator().eval().deployable(corpus[torch.arange(2)]), Path(folder))
        calls = {name: partial(opened[name].search, sources) for name in ("float32", "int8", "PyTorch")}
        seconds = in_turns("decoding", {**calls, "rest": rest})
    rates = {name: [SENTENCES / s for s in found] for name, found in seconds.items()}
    title = f"decoding of {SENTENCES} sentences, beam {BEAM}"
    return {
        f"{title}, {name} bundle": Row(rates[name], rates["PyTorch"], "sentences/s", "dlref in PyTorch", ">= 2")
        for name in ("float32", "int8")
    }


BENCHMARKS = {"translation-programs": programs, "translation-training": training, "translation-decoding": decoding}


if __name__ == "__main__":
    run(BENCHMARKS)
