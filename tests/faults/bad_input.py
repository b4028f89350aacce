"""A corpus of malformed inputs for six families, each given to a whole command: `python -m tests.faults.bad_input`.

A source is valid data and the command that takes it: a minimal fit with a config of configs/, the export of a run, or a
bundle on a device. A case breaks one thing in a copy of the data. The command must then end as described in
CONTRIBUTING.md: exit code 2, no traceback, unchanged files, and a single line on stderr that begins with "error: ", is
the last line and has the words listed by the case (the file, the line or record, the field). Other lines before the
error, such as Lightning's and warnings, are permitted.
"""

import argparse
import gzip
import importlib.util
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tests import each other by name, as under pytest

import numpy as np
import test_box_listings as boxes
import test_mask_listings as masks
import torch
from handmade import make_bundle
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from test_data import write_cifar, write_idx, write_images
from test_pairs import packed, recordio
from test_readers import idx_bytes
from test_series import parquet

from dlref.cli import load_run, train
from dlref.data.make_tokens import main as make_tokens
from dlref.data.vocabulary import make_exact
from dlref.export.graph import write_onnx
from dlref.export.manifest import write_manifest
from dlref.export.targets import TARGETS
from dlref.runtime.__main__ import main as device
from dlref.runtime.bundle import sha256
from dlref.runtime.text import SPECIAL

ROOT = Path(__file__).resolve().parents[2]

# Commands


def export(arguments: list[str]) -> int:
    """Run `export.py`, which reads sys.argv and sets its own handler of SIGTERM."""
    specification = importlib.util.spec_from_file_location("export", ROOT / "export.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    before, sys.argv[1:] = signal.getsignal(signal.SIGTERM), arguments
    try:
        return module.main()
    finally:
        signal.signal(signal.SIGTERM, before)


class Source(NamedTuple):
    """A function that writes valid input into the current folder, and the command that takes it there.

    `needs` names what must exist there before: nothing, or the family's "run" or "bundle".
    """

    make: Callable[[], object]
    command: Callable[[list[str]], int]
    arguments: list[str]
    needs: str = ""


def options(prefix: str, values: dict) -> list[str]:
    """Return keys of a config as command-line arguments."""
    words = [
        (f"--{prefix}.{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in values.items()
    ]
    return [word for pair in words for word in pair]


SHORT = {
    "check_val_every_n_epoch": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "precision": "32-true",
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "callbacks": None,
}
TINY = {"batch_size": 2}


def settings(**limit: int) -> list[str]:
    """Return the arguments of a short fit; `limit` sets its length."""
    return [*options("trainer", SHORT | limit), "--final_test", "false", "--run", "run"]


def fit(config: str, make: Callable[[], object], network: dict, data: dict, kind: str = "") -> Source:
    """Return the source for a fit of one step. `kind` names a data module other than the config's."""
    chosen = ["--data", f"dlref.data.{kind}"] if kind else []
    changes = options("model.init_args.network.init_args", network) + chosen + options("data.init_args", data)
    changes += options("model.init_args", {"compile_network": False, "weights": None})
    if "image_size" in data:
        changes += options("model.init_args.preprocess.init_args", {"size": data["image_size"]})
    return Source(
        make, train, ["fit", "--config", str(ROOT / f"configs/{config}.yaml"), *settings(max_epochs=1), *changes]
    )


# Breakers: they break files of the current folder and may return further arguments


def put(name: str, content: str | bytes) -> Callable[[], None]:
    """Replace or add a file."""

    def breaker() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return breaker


def drop(*names: str) -> Callable[[], None]:
    """Remove files or folders."""

    def breaker() -> None:
        for name in names:
            shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()

    return breaker


def cut(name: str, size: int) -> Callable[[], None]:
    """Truncate a file to `size` bytes or, if `size` is negative, by as many bytes."""

    def breaker() -> None:
        Path(name).write_bytes(Path(name).read_bytes()[:size])

    return breaker


def add(name: str, content: bytes) -> Callable[[], None]:
    """Append to a file."""

    def breaker() -> None:
        Path(name).write_bytes(Path(name).read_bytes() + content)

    return breaker


def swap(name: str, old: str | bytes, new: str | bytes) -> Callable[[], None]:
    """Replace the first occurrence of a text."""
    old, new = (part.encode() if isinstance(part, str) else part for part in (old, new))

    def breaker() -> None:
        content = Path(name).read_bytes()
        assert old in content, f"{name} has no {old!r} to break"
        Path(name).write_bytes(content.replace(old, new, 1))

    return breaker


def byte(name: str, place: int, value: int) -> Callable[[], None]:
    """Change the byte at a place."""

    def breaker() -> None:
        content = bytearray(Path(name).read_bytes())
        assert content[place] != value
        content[place] = value
        Path(name).write_bytes(content)

    return breaker


def line(name: str, number: int, content: str | bytes) -> Callable[[], None]:
    """Replace a line, counted from 1."""

    def breaker() -> None:
        lines = Path(name).read_bytes().splitlines()
        lines[number - 1] = content.encode() if isinstance(content, str) else content
        Path(name).write_bytes(b"\n".join(lines) + b"\n")

    return breaker


def edit(name: str, change: Callable[[dict], object], number: int = 1) -> Callable[[], None]:
    """Change the JSON object of a file or of one of its lines."""

    def breaker() -> None:
        text = Path(name).read_text(encoding="utf-8")
        lines = text.splitlines() if name.endswith(("jsonl", "manifest")) else [text]
        known = json.loads(lines[number - 1])
        change(known)
        lines[number - 1] = json.dumps(known)
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return breaker


def field(name: str, key: str, value: object, number: int = 1) -> Callable[[], None]:
    """Set a key of a JSON object."""
    return edit(name, lambda known: known.update({key: value}), number)


def lack(name: str, key: str, number: int = 1) -> Callable[[], None]:
    """Remove a key of a JSON object."""
    return edit(name, lambda known: known.pop(key), number)


def say(*words: str) -> Callable[[], list[str]]:
    """Leave the files valid, but append arguments to those of the source."""
    return lambda: list(words)


def ask(key: str, value: object) -> Callable[[], list[str]]:
    """Set an argument of the data module."""
    return say(*options("data.init_args", {key: value}))


def start(name: str) -> Callable[[], list[str]]:
    """Set the weights to start from."""
    return say("--model.init_args.weights", name)


def both(*breakers: Callable[[], list[str] | None]) -> Callable[[], list[str]]:
    """Combine several breakers, which together make one mistake."""
    return lambda: [word for breaker in breakers for word in breaker() or []]


def picture(mode: str, size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    """Return a picture of one colour."""
    return masks.encode(Image.new(mode, size), kind)


def rows(*objects: dict) -> str:
    """Return objects as JSON Lines."""
    return "".join(json.dumps(one) + "\n" for one in objects)


# Image classification


def class_folders() -> None:
    """Write two pictures of each of two classes in each split."""
    for split in ("train", "val", "test"):
        write_images(Path(split), *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(2)), size=(20, 24))


PLACES = [(f"{name}/{i}.png", label) for label, name in enumerate(("cat", "dog")) for i in range(2)]


def image_lists() -> None:
    """Write the class folders and MXNet's lists of their pictures."""
    class_folders()
    for split in ("train", "val"):
        lines = [f"{i}\t{label}\t{split}/{place}\n" for i, (place, label) in enumerate(PLACES)]
        Path(f"{split}.lst").write_text("".join(lines))


def image_manifests() -> None:
    """Write the class folders and SageMaker's augmented manifests of their pictures."""
    class_folders()
    for split in ("train", "val"):
        entries = [
            {"source-ref": f"{split}/{place}", "pet": label, "pet-metadata": {"class-name": place[:3]}}
            for place, label in PLACES
        ]
        Path(f"{split}.manifest").write_text(rows(*entries))


def own_config() -> None:
    """Write a user's own config."""
    shutil.copy(ROOT / "configs/lenet5_digits.yaml", "mine.yaml")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
SMALL = {"image_size": 16, "resize": 16, "num_workers": 0} | TINY
RESNET = {"depth": 18, "num_classes": 2}
DIGITS = fit(
    "lenet5_mnist", lambda: write_idx(Path(), zipped=False), {}, {"root": ".", "validation": 10, "batch_size": 8}
)
CLASSIFICATION = {
    "idx": DIGITS,
    "cifar": fit("resnet20_cifar10", lambda: write_cifar(Path()), {}, {"root": ".", "validation": 4}),
    "cifar folders": fit("resnet20_cifar10", class_folders, {"num_classes": 2}, {"root": ".", "validation": 2}),
    "folders": fit("resnet50_imagefolder", class_folders, RESNET, {"root": ".", "trivial_augment": False} | SMALL),
    "lst": fit(
        "resnet50_imagefolder",
        image_lists,
        RESNET,
        {"root": ".", "train": "train.lst", "val": "val.lst"} | SMALL,
        "ImageList",
    ),
    "manifest": fit(
        "resnet50_imagefolder",
        image_manifests,
        RESNET,
        {"root": ".", "train": "train.manifest", "val": "val.manifest"} | SMALL,
        "ImageManifest",
    ),
    "config": Source(own_config, train, ["fit", "--config", "mine.yaml", *settings(max_steps=1)]),
}


# Object detection


def voc_boxes() -> None:
    """Write pictures and annotations as in VOC."""
    boxes.write(Path(), "voc")
    Path("ImageSets/Main").mkdir(parents=True)
    Path("train.txt").rename("ImageSets/Main/train.txt")


def coco_boxes() -> None:
    """Write pictures and annotations as in COCO."""
    boxes.write(Path(), "coco")
    Path("JPEGImages").rename("train")
    Path("annotations").mkdir()
    Path("coco.json").rename("annotations/instances_train.json")


def sagemaker_boxes() -> None:
    """Write pictures and annotations as in SageMaker's channels."""
    boxes.write(Path(), "sagemaker")
    Path("JPEGImages").rename("train")
    Path("json").rename("train_annotation")


def box_manifest() -> None:
    """Write an augmented manifest next to its pictures."""
    boxes.write(Path(), "manifest")
    Path(boxes.MANIFEST).rename("JPEGImages/train.manifest")


def detect(config: str, make: Callable[[], None], listed: str, **data: object) -> Source:
    """Return the source for a fit whose training and validation pictures are the same."""
    kind, network = data.pop("kind", ""), {"depth": 18, "num_classes": 2, "size": 96}
    data = {
        "root": ".",
        "train": listed,
        "val": listed,
        "test": None,
        "on_bad_box": "error",
        "image_size": 96,
        "num_workers": 0,
    } | data
    source = fit(config, make, network, data | TINY, kind)
    return source._replace(arguments=source.arguments + options("model.init_args", {"preprocess.init_args.size": 96}))


VOC_LIST, COCO = "ImageSets/Main/train.txt", "annotations/instances_train.json"
DETECTION = {
    "voc": detect("ssd300_resnet50_bccd", voc_boxes, VOC_LIST),
    "coco": detect("ssd300_resnet50_coco", coco_boxes, COCO),
    "folders": detect("ssd300_resnet50_bccd", sagemaker_boxes, "train_annotation", kind="SageMakerBoxes"),
    "manifest": detect("ssd300_resnet50_bccd", box_manifest, "JPEGImages/train.manifest", kind="ManifestBoxes"),
}

# Semantic segmentation


def masked() -> None:
    """Write two pictures and their masks, as folders, as a list and as in VOC, and a label map."""
    masks.write(Path())
    Path("map.json").write_text('{"map": {"0": 0, "1": 1, "2": 2}}')


def segment(config: str, listed: str, classes: list[str] | None, **data: object) -> Source:
    """Return the source for a fit whose training and validation pictures are the same."""
    kind, network = data.pop("kind", ""), {"num_classes": len(classes or masks_of_voc)}
    if config != "fcn_digit_scenes":
        network["depth"] = 18
    sizes = {"crop_size": 16, "base_size": 16, "num_workers": 0} | TINY
    data = {"root": ".", "train": listed, "val": listed, "class_names": classes} | sizes | data
    return fit(config, masked, network, data, kind)


masks_of_voc = range(21)
THREE = ["sky", "road", "car"]
VOC_MASKS = "ImageSets/Segmentation/train.txt"
FOLDERS = {"pictures": "JPEGImages", "masks": "SegmentationClass"}
SEGMENTATION = {
    "list": segment("fcn_digit_scenes", "train.txt", THREE, kind="MaskLists"),
    "folders": segment("fcn_digit_scenes", "train", THREE, kind="MaskFolders", **FOLDERS),
    "label map": segment("fcn_digit_scenes", "train", THREE, kind="MaskFolders", label_map="map.json", **FOLDERS),
    "camvid": segment("fcn_resnet50_camvid", "train.txt", THREE, test=None),
    "voc": segment("fcn_resnet50_voc", VOC_MASKS, None),
}

# Forecasting

DAY = "2024-01-01"
HOURS = [f"{DAY[:-2]}{day:02} {hour:02}:00:00" for day in range(1, 8) for hour in range(24)]
VALUES = [float(i % 24) for i in range(len(HOURS))]


def series_of(category: int, more: int = 0) -> dict:
    """Return an hourly series of a week, with a category and a feature that is known for `more` further hours."""
    promoted = [float(i % 2) for i in range(len(VALUES) + more)]
    return {"start": DAY, "target": VALUES, "cat": [category], "dynamic_feat": [promoted]}


def json_series() -> None:
    """Write SageMaker's channels as JSON Lines: series for training, and the same series to predict."""
    Path("train.jsonl").write_text(rows(*map(series_of, range(3))))
    Path("predict.jsonl").write_text(rows(*(series_of(i, more=4) for i in range(3))))


def parquet_series() -> None:
    """Write the series for training as Parquet."""
    columns = {key: [series_of(i)[key] for i in range(3)] for key in series_of(0)}
    Path("train.parquet").write_bytes(parquet(**columns))


def wide_series() -> None:
    """Write a table with a column for each series."""
    Path("wide.txt").write_text("".join(f"{value},{value + 1},7\n" for value in VALUES))


def dated_series() -> None:
    """Write a table with a date and two series."""
    lines = [f"{hour},{value},{value + 1}\n" for hour, value in zip(HOURS, VALUES, strict=True)]
    Path("dated.csv").write_text("date,oil,gas\n" + "".join(lines))


def row_series() -> None:
    """Write tables as in M4: the beginning of each series, and the values that follow."""
    for name, values in (("train.csv", VALUES), ("test.csv", VALUES[:4])):
        header = ",".join(f"V{i}" for i in range(1, 2 + len(values)))
        lines = ["".join([key, *(f",{value}" for value in values)]) for key in ("H1", "H2", "H3")]
        Path(name).write_text("\n".join([header, *lines]) + "\n")


def long_series() -> None:
    """Write a table with a row for each value."""
    lines = [f"{key},{hour},{value}\n" for key in "ab" for hour, value in zip(HOURS, VALUES, strict=True)]
    Path("long.csv").write_text("item_id,timestamp,target\n" + "".join(lines))


CUT = {"frequency": "1H", "prediction_length": 4, "context_length": 8, "batch_size": 4, "batches": 1}
CELLS = {"num_cells": 8, "num_layers": 1}
HELD = {"val_windows": 1, "test_windows": 1, "points": None}
FORECASTING = {
    "json": fit(
        "deepar_synthetic",
        json_series,
        CELLS | {"cardinality": [3]},
        CUT | {"train": "train.jsonl", "predict": "predict.jsonl"},
        "SageMakerSeries",
    ),
    "parquet": fit(
        "deepar_synthetic",
        parquet_series,
        CELLS | {"cardinality": [3]},
        CUT | {"train": "train.parquet"},
        "SageMakerSeries",
    ),
    "wide": fit(
        "deepar_electricity", wide_series, CELLS | {"cardinality": [3]}, CUT | HELD | {"path": "wide.txt", "start": DAY}
    ),
    "dated": fit(
        "deepar_ett_hourly", dated_series, CELLS | {"cardinality": [2]}, CUT | HELD | {"paths": ["dated.csv"]}
    ),
    "rows": fit("deepar_m4_hourly", row_series, CELLS, CUT | {"train": "train.csv", "test": "test.csv"}),
    "long": fit("deepar_m4_hourly", long_series, CELLS, CUT | {"path": "long.csv"}, "LongSeries"),
}

# Translation

NUMERALS = {"de": ("eins", "zwei", "drei"), "en": ("one", "two", "three")}
SENTENCES = {side: [f"{a} {b}" for a in words for b in words] for side, words in NUMERALS.items()}
VOCABULARY = {token: number for number, token in enumerate([*SPECIAL, "a", "b", "c"])}


def parallel() -> None:
    """Write parallel files with a sentence on each line."""
    for split in ("train", "val", "test_2016_flickr"):
        for side, lines in SENTENCES.items():
            Path(f"{split}.{side}").write_text("\n".join(lines) + "\n")


def tabs() -> None:
    """Write files with a sentence, a tab and its translation on each line."""
    for name in ("train.tsv", "val.tsv"):
        Path(name).write_text("".join(f"{a}\t{b}\n" for a, b in zip(*SENTENCES.values(), strict=True)))


def objects() -> None:
    """Write files with an object of a sentence and its translation on each line."""
    pairs = [{"source": a, "target": b} for a, b in zip(*SENTENCES.values(), strict=True)]
    for name in ("train.jsonl", "val.jsonl"):
        Path(name).write_text(rows(*pairs))


GOOD_RECORD = packed([4, 5], [5, 6])


def records() -> None:
    """Write SageMaker's records of tokens and their vocabularies."""
    for name in ("train.rec", "val.rec"):
        Path(name).write_bytes(recordio(*[GOOD_RECORD] * 8))
    for side in ("src", "trg"):
        Path(f"vocab.{side}.json").write_text(json.dumps(VOCABULARY))


SEQ2SEQ = {"source_vocabulary": 300, "target_vocabulary": 300, "hidden_size": 8, "embedding_size": 8}
SEQ2SEQ |= {"encoder": "convolutional"}  # its export takes a tenth of the time
TWO = {"train": "train.tsv", "val": "val.tsv", "test": None, "vocabulary_size": 300}
TRANSLATION = {
    "parallel": fit("seq2seq_multi30k_de_en", parallel, SEQ2SEQ, {"root": ".", "vocabulary_size": 300, "longest": 20}),
    "tsv": fit("seq2seq_multi30k_de_en", tabs, SEQ2SEQ, TWO, "PairFiles"),
    "jsonl": fit(
        "seq2seq_multi30k_de_en", objects, SEQ2SEQ, TWO | {"train": "train.jsonl", "val": "val.jsonl"}, "PairFiles"
    ),
    "recordio": fit(
        "seq2seq_multi30k_de_en",
        records,
        SEQ2SEQ,
        {"train": "train.rec", "validation": "val.rec", "test": None, "vocab": "."},
        "SageMakerTokens",
    ),
}

# Language modelling

MODULES = 99  # assigned to the splits by their names
STORY = "The cat sat on the mat. A dog, fast, ran: 1 2 3!\n" * 30


def text() -> None:
    """Write a text."""
    Path("input.txt").write_text(STORY)


def stories() -> None:
    """Write JSON Lines with a text on each line."""
    Path("train.jsonl").write_text(rows(*[{"text": STORY}] * 3))


def tokenised() -> None:
    """Write a text, its tokeniser and files of tokens."""
    text()
    described = make_exact([STORY], "bpe", 300)
    Path("tokenizer.json").write_text(json.dumps(described))
    for name in ("train.bin", "val.bin"):
        np.arange(200, dtype=np.uint16).tofile(name)


def sources() -> None:
    """Write Python modules with enough names for every split."""
    for i in range(MODULES):
        put(f"library/module{i}.py", STORY)()


GPT = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 32}
BATCHES = {"context_length": 32, "batches": 1} | TINY
WRITE = ["tokens", "--train", "input.txt", "--val", "input.txt", "--vocabulary-size", "300"]
LANGUAGE = {
    "text": fit("gpt_shakespeare_char_cpu", text, GPT, {"root": "."} | BATCHES),
    "jsonl": fit("gpt_shakespeare_char_cpu", stories, GPT, {"root": ".", "train": "train.jsonl"} | BATCHES),
    "tokeniser": fit(
        "gpt2_finetune", tokenised, GPT | {"vocabulary": 300}, {"root": ".", "tokenizer": "tokenizer.json"} | BATCHES
    ),
    "tokens": fit("gpt2_124m", tokenised, GPT | {"vocabulary": 300}, {"root": "."} | BATCHES),
    "sources": fit(
        "gpt_python", sources, GPT | {"vocabulary": 300}, {"root": "library", "vocabulary_size": 300} | BATCHES
    ),
    "make tokens": Source(text, make_tokens, WRITE),
}

# Runs, and bundles on a device


def nothing() -> None:
    """Write nothing: the command's input exists already."""


EXPORT = Source(nothing, export, ["run", "--target", "cpu", "--output", "bundle"], needs="run")
TEST = Source(nothing, train, ["test", "--config", "run/config.yaml"], needs="run")


def on_device(make: Callable[[], object], *inputs: str) -> Source:
    """Return the source for a bundle and its inputs."""
    return Source(make, device, ["bundle", *inputs], needs="bundle")


def pictured() -> None:
    """Write a picture to predict."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    put("picture.png", masks.encode(Image.fromarray(noise)))()


def handmade() -> None:
    """Write a picture and the bundle that needs no training."""
    pictured()
    make_bundle(Path("bundle"))


def asked_series() -> None:
    """Write a series, a request and lines of series."""
    Path("series.json").write_text(json.dumps(series_of(1, more=4)))
    Path("request.json").write_text(json.dumps({"instances": [series_of(0, more=4), series_of(1, more=4)]}))
    Path("lines.jsonl").write_text(rows(*(series_of(i, more=4) for i in range(3))))


def asked_sentences() -> None:
    """Write lines of text, a request and lines of requests."""
    Path("lines.txt").write_text("eins zwei\ndrei vier\n")
    Path("request.json").write_text(json.dumps({"instances": [{"data": "eins"}, {"data": "zwei"}]}))
    Path("lines.jsonl").write_text(rows({"source": "eins"}, {"source": "zwei"}))


def asked_prompts() -> None:
    """Write lines of requests and a prompt."""
    asked = {"inputs": "The cat", "parameters": {"max_new_tokens": 3}}
    Path("lines.jsonl").write_text(rows(asked, asked))
    Path("prompt.txt").write_text("The cat")


CLASSIFICATION |= {
    "export": EXPORT,
    "test": TEST,
    "device": Source(handmade, device, ["bundle", "picture.png"]),
}
DETECTION |= {"export": EXPORT, "test": TEST, "device": on_device(pictured, "picture.png")}
SEGMENTATION |= {
    "export": EXPORT,
    "test": TEST,
    "device": on_device(pictured, "picture.png", "--output", "mask.png", "--overlay", "drawn.png"),
}
FORECASTING |= {
    "export": EXPORT,
    "test": TEST,
    "device": on_device(asked_series, "series.json", "request.json", "lines.jsonl"),
}
TRANSLATION |= {
    "export": EXPORT,
    "test": TEST,
    "device": on_device(asked_sentences, "lines.txt", "request.json", "lines.jsonl"),
}
LANGUAGE |= {"export": EXPORT, "test": TEST, "device": on_device(asked_prompts, "lines.jsonl", "--max-new-tokens", "3")}
SOURCES = {
    "image classification": CLASSIFICATION,
    "object detection": DETECTION,
    "semantic segmentation": SEGMENTATION,
    "forecasting": FORECASTING,
    "translation": TRANSLATION,
    "language modelling": LANGUAGE,
}
# The source whose run is tested, exported and made into the bundle.
RUNS = dict(zip(SOURCES, ("idx", "voc", "list", "json", "parallel", "text"), strict=True))


# Cases: family -> source -> a name, what is broken, and words that must be in the error

Row = tuple
MANIFEST, BEST, CONFIG = "bundle/manifest.json", "run/checkpoints/best.ckpt", "run/config.yaml"


def saved(name: str, content: object) -> Callable[[], None]:
    """Write a file with torch.save."""
    return lambda: torch.save(content, name)


def hashed(name: str) -> Callable[[], None]:
    """Put the hash of a changed file into the manifest, as if both had the same author."""
    return edit(MANIFEST, lambda known: known["files"].update({name: sha256(Path("bundle", name))}))


def metadata(key: str, value: object = None) -> Callable[[], None]:
    """Set a key of a bundle's metadata or, without a value, remove it."""

    def change(known: dict) -> None:
        known["metadata"].pop(key)
        if value is not None:
            known["metadata"][key] = value

    return edit(MANIFEST, change)


def damaged(graph: str, key: str, wrong: object) -> list[Row]:
    """Return the cases for every bundle; `wrong` is an invalid value for the `key` of its metadata."""
    file = f"bundle/{graph}.onnx"
    return [
        ("a graph cut off", cut(file, -10), f"{graph}.onnx", "SHA-256 differs"),
        ("a graph cut off by who wrote the manifest", both(cut(file, -10), hashed(f"{graph}.onnx")), file, "refuses"),
        ("no graph", drop(file), f"{graph}.onnx", "missing"),
        ("a manifest cut off", cut(MANIFEST, 40), MANIFEST, "expected JSON"),
        ("another kind", field(MANIFEST, "kind", "image-location"), "bundle", "image-location", "unknown"),
        ("no metadata of a key", metadata(key), "bundle", key),
        ("metadata of another type", metadata(key, wrong), "bundle", key),
    ]


def pictures_at_the_edge() -> list[Row]:
    """Return the cases of a picture given to a device."""
    return [
        ("no such picture", drop("picture.png"), "picture.png", "not found"),
        ("an empty picture", put("picture.png", b""), "picture.png", "cannot be decoded"),
        ("a text for a picture", put("picture.png", "a text"), "picture.png", "cannot be decoded"),
        ("a picture cut off", cut("picture.png", 60), "picture.png", "cannot be decoded"),
        ("an endless picture", put("picture.png", masks.raw_png(30_000, 30_000, 1, 0, b"")), "picture.png", "decoded"),
        ("a folder without pictures", both(drop("picture.png"), lambda: Path("picture.png").mkdir()), "picture.png"),
        ("pixels of 32 bits", put("picture.png", picture("F", kind="TIFF")), "picture.png", "F pixels"),
    ]


# A row takes one or two lines.
# fmt: off
CASES: dict[str, dict[str, list[Row]]] = {
    "image classification": {
        "idx": [
            ("no images", drop(IMAGES), IMAGES, "no such file"),
            ("a folder for the labels", both(drop(LABELS), lambda: Path(LABELS).mkdir()), LABELS, "no such file"),
            ("an empty file", put(IMAGES, b""), IMAGES, "0 bytes", "header"),
            ("a header cut off", cut(IMAGES, 10), IMAGES, "10 bytes", "header"),
            ("labels for images", byte(IMAGES, 3, 1), IMAGES, "magic number"),
            ("images cut off", cut(IMAGES, -7), IMAGES, "only 793 bytes"),
            ("bytes after the images", add(IMAGES, b"more"), IMAGES, "more than 800"),
            ("sizes of nothing", byte(IMAGES, 11, 0), IMAGES, "at least one"),
            ("fewer labels", put(LABELS, struct.pack(">2I", 0x801, 3) + b"abc"), LABELS, "3 labels", "40"),
            ("a label that is no class", byte(LABELS, 8 + 3, 12), LABELS, "label 12", "image 3"),
            ("no gzip", both(drop(IMAGES), put(f"{IMAGES}.gz", b"no gzip")), f"{IMAGES}.gz", "gzip"),
            ("a gzip cut off",
             both(drop(IMAGES), put(f"{IMAGES}.gz", gzip.compress(idx_bytes(np.zeros((9, 9, 9), np.uint8)))[:-9])),
             f"{IMAGES}.gz", "unreadable"),
            ("more to hold out than there is", ask("validation", 40), "validation", "40"),
            ("weights that are text", both(put("w.pt", "text"), start("w.pt")), "w.pt"),
            ("weights of safetensors cut off",
             both(put("w.safetensors", b"\x40" + bytes(9)), start("w.safetensors")), "w.safetensors"),
            ("weights that are code",
             both(saved("w.pt", torch.nn.Linear(1, 1)), start("w.pt")), "w.pt", "holds code"),
            ("weights of another network",
             both(saved("w.pt", {"conv.weight": torch.zeros(3)}), start("w.pt")), "w.pt", "do not fit LeNet5"),
            ("a checkpoint that is text", both(put("c.ckpt", "text"), say("--ckpt_path", "c.ckpt")), "c.ckpt"),
        ],
        "config": [
            ("no config", drop("mine.yaml"), "mine.yaml"),
            ("a folder for a config", both(drop("mine.yaml"), lambda: Path("mine.yaml").mkdir()), "mine.yaml"),
            ("brackets that nothing closes", swap("mine.yaml", "{metric", "{{metric"), "mine.yaml", "line"),
            ("tabs", swap("mine.yaml", "  init_args", "\tinit_args"), "mine.yaml", "line"),
            ("not UTF-8", put("mine.yaml", b"best: \xe9"), "mine.yaml", "not UTF-8"),
            ("a control character", put("mine.yaml", b"best: \x00"), "mine.yaml"),
            ("a list", put("mine.yaml", "- a\n- b\n"), "mine.yaml"),
            ("an empty config", put("mine.yaml", ""), "mine.yaml"),
            ("brackets without end", put("mine.yaml", "[" * 20_000), "mine.yaml"),
            ("an unknown key", swap("mine.yaml", "pad_crop", "crop_pad"), "crop_pad"),
            ("a class that is code", swap("mine.yaml", "dlref.models.LeNet5", "os.system"), "os.system"),
            ("a class that is not there", swap("mine.yaml", "models.LeNet5", "models.LeNet6"), "LeNet6"),
            ("text for a number", swap("mine.yaml", "max_epochs: 100", "max_epochs: many"), "trainer.max_epochs",
             "many"),
            ("a network for a task", swap("mine.yaml", "tasks.ImageClassifier", "models.LeNet5"), "LeNet5"),
        ],
        "cifar": [
            ("a batch cut off", cut("data_batch_2.bin", -5), "data_batch_2.bin", "bytes", "3073"),
            ("an empty batch", put("test_batch.bin", b""), "test_batch.bin", "0 bytes"),
            ("a label that is no class", byte("test_batch.bin", 2 * 3073, 10), "test_batch.bin", "image 2",
             "label 10"),
            ("nine names", put("batches.meta.txt", "a " * 9), "batches.meta.txt", "9 class names"),
            ("names that are no text", put("batches.meta.txt", b"\xff"), "batches.meta.txt", "not UTF-8"),
            ("a batch that is not there", drop("data_batch_4.bin"), "data_batch_4.bin"),
        ],
        "cifar folders": [
            ("another size", put("train/dog/1.png", picture("RGB")), "train/dog/1.png", "8 x 6", "24 x 20"),
            ("no picture", put("test/cat/0.png", "text"), "test/cat/0.png", "cannot be decoded"),
            ("a class that training lacks", put("test/horse/0.png", picture("RGB")), "test/horse", "class of train"),
            ("a class without pictures", drop("train/dog/0.png", "train/dog/1.png"), "train/dog", "no images"),
        ],
        "folders": [
            ("no folder", drop("train"), "train", "No such file"),
            ("a file for a folder", both(drop("train"), put("train", "text")), "train", "Not a directory"),
            ("a folder without classes", both(drop("val"), put("val/a.png", picture("RGB"))), "val", "no folders"),
            ("a class that training lacks", put("val/horse/0.png", picture("RGB")), "val/horse", "class of train"),
            ("a class without pictures", both(drop("val/cat"), put("val/cat/a.txt", "")), "val/cat", "no images"),
            ("a picture cut off", cut("val/cat/0.png", 45), "val/cat/0.png", "cannot be decoded"),
            ("an empty picture", put("val/cat/0.png", b""), "val/cat/0.png", "cannot be decoded"),
            ("text for a picture", put("val/cat/1.png", "text"), "val/cat/1.png", "cannot be decoded"),
            ("a training picture cut off", both(*(cut(f"train/{p}", 60) for p, _ in PLACES)), "train/", "decoded"),
            ("a name of two lines", put("val/cat/!\nb.png", "text"), "b.png", "cannot be decoded"),
            ("a class of two lines", put("val/a\nb/0.png", picture("RGB")), "a class name"),
        ],
        "lst": [
            ("no list", drop("train.lst"), "train.lst", "No such file"),
            ("an empty list", put("train.lst", "\n"), "train.lst", "no lines"),
            ("not UTF-8", line("train.lst", 2, b"1\t0\t\xff.png"), "train.lst:2", "not UTF-8"),
            ("two fields", line("train.lst", 2, "1\ttrain/cat/1.png"), "train.lst:2", "2 tab-separated fields"),
            ("an index that is text", line("train.lst", 3, "x\t1\ta.png"), "train.lst:3", "index 'x'"),
            ("a label that is text", line("train.lst", 3, "2\tdog\ta.png"), "train.lst:3", "label", "dog"),
            ("a label below zero", line("train.lst", 3, "2\t-1\ta.png"), "train.lst:3", "label", "-1"),
            ("a label of its own kind", line("train.lst", 3, "2\t0\t1\ta.png"), "train.lst:3", "label"),
            ("a label of millions", line("train.lst", 3, "2\t99999999\ta.png"), "train.lst:3", "label"),
            ("a label that training lacks", line("val.lst", 2, "1\t7\ta.png"), "val.lst:2", "label 7"),
            ("a path with a null", line("train.lst", 1, "0\t0\ta\0.png"), "train.lst:1", "image"),
            ("a picture that is not there", line("val.lst", 1, "0\t0\tgone.png"), "gone.png", "no such file"),
        ],
        "manifest": [
            ("no JSON", line("train.manifest", 2, "{"), "train.manifest:2", "JSON object"),
            ("a list", line("train.manifest", 2, "[1]"), "train.manifest:2", "JSON object"),
            ("deep nesting", line("train.manifest", 2, "[" * 100_000), "train.manifest:2", "JSON object"),
            ("no picture", lack("train.manifest", "source-ref", 2), "train.manifest:2", "source-ref"),
            ("a picture far away", field("train.manifest", "source-ref", "s3://a/b", 2), "train.manifest:2",
             "source-ref"),
            ("no label", lack("train.manifest", "pet"), "train.manifest:1", "attributes"),
            ("two labels", field("train.manifest", "more", 1), "train.manifest:1", "attributes", "more"),
            ("a label below zero", field("train.manifest", "pet", -1, 3), "train.manifest:3", "pet", "-1"),
            ("a label that is true", field("train.manifest", "pet", True, 3), "train.manifest:3", "pet", "True"),
            ("metadata that is text", field("train.manifest", "pet-metadata", "x", 3), "train.manifest:3", "metadata"),
            ("a class of two names", field("train.manifest", "pet-metadata", {"class-name": "cow"}, 4), ":4", "cow"),
            ("a class that training lacks", field("val.manifest", "pet", 2, 4), "val.manifest:4", "label 2"),
        ],
        "export": [
            ("no checkpoint", drop(BEST), BEST, "not found"),
            ("a checkpoint cut off", cut(BEST, 1000), BEST, "unreadable"),
            ("an empty checkpoint", put(BEST, b""), BEST, "unreadable"),
            ("a checkpoint that is code", saved(BEST, torch.nn.Linear(1, 1)), BEST, "holds code"),
            ("a checkpoint of something else", saved(BEST, {"state_dict": {}}), BEST, "not a checkpoint"),
            ("facts of something else", saved(BEST, {"state_dict": {}, "facts": {}}), BEST),
            ("a state dict that is a list", saved(BEST, {"state_dict": [], "facts": {}}), BEST),
            ("no config", drop(CONFIG), CONFIG, "No such file"),
            ("a config cut off", put(CONFIG, "model: ["), CONFIG, "expected the config of a run"),
            ("a config that is a list", put(CONFIG, "[]"), CONFIG, "expected the config of a run"),
            ("a config without data", swap(CONFIG, "\ndata:", "\nsome:"), CONFIG, "data"),
            ("a class that is code", swap(CONFIG, "dlref.models.LeNet5", "os.system"), "os.system"),
            ("an unknown key", say("--data.init_args.rot", "x"), "rot"),
            ("another network", say("--model.init_args.network.init_args.num_classes", "7"), BEST),
            ("data that is gone", drop(IMAGES), IMAGES, "no such file"),
            ("no run", drop("run"), "run", "no checkpoint"),
            ("an unknown target", say("--target", "abacus"), "abacus", "expected one of"),
            ("a target without a name", say("--target"), "--target"),
            ("a file in the way", put("bundle", "text"), "bundle", "a file"),
            ("other files in the way", put("bundle/notes.txt", "text"), "bundle", "holds other files"),
        ],
        "test": [
            ("a checkpoint cut off", cut(BEST, 1000), BEST, "unreadable"),
            ("data cut off", cut("t10k-images-idx3-ubyte", -7), "t10k-images-idx3-ubyte", "bytes"),
            ("another network", say("--model.init_args.network.init_args.num_classes", "7"), BEST),
        ],
        "device": [
            *pictures_at_the_edge(),
            ("one of two pictures", both(put("b.png", "text"), say("b.png")), "b.png", "1 of 2 inputs"),
            ("a name of two lines", both(drop("picture.png"), put("picture.png/a\nb.png", "text")), "b.png", "decoded"),
            ("no cores", say("--threads", "0"), "--threads", "0"),
            ("an unknown form", say("--form", "neo"), "--form neo"),
            ("an unknown provider", say("--provider", "Abacus"), "Abacus"),
            ("an option of another kind", say("--beam", "3"), "--beam"),
            ("no bundle", drop("bundle"), MANIFEST, "not found"),
            *damaged("classify", "labels", [1, 2]),
        ],
    },
    "object detection": {
        "voc": [
            ("no list", drop(VOC_LIST), VOC_LIST, "No such file"),
            ("an empty list", put(VOC_LIST, "\n \n"), VOC_LIST, "no lines"),
            ("not UTF-8", put(VOC_LIST, b"two\n\xff\n"), f"{VOC_LIST}:2", "not UTF-8"),
            ("two names on a line", line(VOC_LIST, 2, "none -1"), f"{VOC_LIST}:2", "2 fields"),
            ("a name twice", line(VOC_LIST, 4, "two"), f"{VOC_LIST}:4", "two"),
            ("no annotation", line(VOC_LIST, 2, "three"), f"{VOC_LIST}:2", "three.xml"),
            ("an empty annotation", put(boxes.TWO, ""), boxes.TWO, "well-formed"),
            ("an annotation cut off", cut(boxes.TWO, -30), boxes.TWO, "well-formed"),
            ("an annotation that is not UTF-8", put(boxes.TWO, b"<annotation>\xff"), boxes.TWO, "not UTF-8"),
            ("a tag that another closes", swap(boxes.TWO, "</object>", "</objekt>"), f"{boxes.TWO}:4",
             "mismatched tag"),
            ("entities", swap(boxes.TWO, "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>'), boxes.TWO,
             "entity"),
            ("another root", put(boxes.TWO, "<annotations/>"), boxes.TWO, "annotations"),
            ("another size", swap(boxes.TWO, "<width>40", "<width>30"), boxes.TWO, "30 x 30", "40 x 30"),
            ("a size that is text", swap(boxes.TWO, "<width>40", "<width>wide"), boxes.TWO, "size/width", "wide"),
            ("no class", swap(boxes.TWO, "<name>cat</name>", ""), boxes.TWO, "object 2", "name"),
            ("difficult beyond 1", swap(boxes.TWO, "<difficult>1", "<difficult>2"), boxes.TWO, "object 2", "difficult"),
            ("no side", swap(boxes.TWO, "<xmax>40</xmax>", ""), boxes.TWO, "object 2", "bndbox/xmax"),
            ("a side that is text", swap(boxes.TWO, "<xmax>40", "<xmax>far"), boxes.TWO, "object 2", "bndbox/xmax",
             "far"),
            ("a side that is no number", swap(boxes.TWO, "<xmax>40", "<xmax>nan"), boxes.TWO, "object 2", "not finite"),
            ("a box outside", swap(boxes.TWO, "<xmax>40", "<xmax>41"), boxes.TWO, "object 2", "outside the picture"),
            ("a box of no area", swap(boxes.TWO, "<xmax>11", "<xmax>1"), boxes.TWO, "object 1", "no area"),
            ("no picture", drop("JPEGImages/two.png"), boxes.TWO, "JPEGImages/two.png", "no such file"),
            ("text for a picture", put("JPEGImages/two.png", "text"), boxes.TWO, "JPEGImages/two.png", "decoded"),
            ("a picture cut off", cut("JPEGImages/two.png", 60), "JPEGImages/two.png", "cannot be decoded"),
            ("a picture of two annotations", swap(boxes.ONE, "one.png", "two.png"), boxes.ONE, "two.png again"),
            ("a class that is not asked for", ask("class_names", ["cat"]), boxes.TWO, "object 1", "dog"),
            ("classes of one name", ask("class_names", ["cat", "cat"]), "class_names", "cat"),
            ("an unknown remedy", ask("on_bad_box", "mend"), "on_bad_box", "mend"),
            ("nothing to hold out", both(ask("val", None)), "held_out", "0.1 of 3"),
        ],
        "coco": [
            ("no JSON", put(COCO, '{\n"images": [}'), f"{COCO}:2", "JSON object"),
            ("a file cut off", cut(COCO, -20), COCO, "JSON object"),
            ("not UTF-8", put(COCO, b'{"images": "\xff"}'), COCO, "not UTF-8"),
            ("deep nesting", put(COCO, "[" * 100_000), COCO, "nested too deeply"),
            ("a list", put(COCO, "[1]"), COCO, "JSON object"),
            ("no images", lack(COCO, "images"), COCO, "images"),
            ("images that are text", field(COCO, "images", "all"), COCO, "images", "all"),
            ("an image without an id", edit(COCO, lambda k: k["images"][1].pop("id")), COCO, "images[1]", "id"),
            ("an id twice", edit(COCO, lambda k: k["images"][1].update(id=7)), COCO, "images[1]", "id 7 again"),
            ("a name that is a number", edit(COCO, lambda k: k["images"][0].update(file_name=3)), COCO, "images[0]",
             "3"),
            ("a picture that is not there", drop("train/one.png"), COCO, "images[2]", "train/one.png"),
            ("another width", edit(COCO, lambda k: k["images"][0].update(width=9)), COCO, "images[0]", "9 x 30"),
            ("a width that is text", edit(COCO, lambda k: k["images"][0].update(width="w")), COCO, "images[0]",
             "width"),
            ("a category of two ids", edit(COCO, lambda k: k["categories"][1].update(name="dog")), "categories[1]",
             "dog"),
            ("no categories", field(COCO, "categories", []), COCO, "no categories"),
            ("three sides", edit(COCO, lambda k: k["annotations"][1]["bbox"].pop()), COCO, "annotations[1]", "bbox"),
            ("a crowd of two", edit(COCO, lambda k: k["annotations"][1].update(iscrowd=2)), "annotations[1]",
             "iscrowd 2"),
            ("an unknown image", edit(COCO, lambda k: k["annotations"][0].update(image_id=9)), "[0]", "image_id 9"),
            ("an unknown class", edit(COCO, lambda k: k["annotations"][0].update(category_id=5)), "[0]", "class 5"),
            ("a box outside", edit(COCO, lambda k: k["annotations"][1].update(bbox=[0, 0, 21, 9])), "[1]", "outside"),
        ],
        "folders": [
            ("no folder", drop("train_annotation"), "train_annotation", "No such file"),
            ("an empty folder", drop(*(f"train_annotation/{i}.json" for i in range(3))), "train_annotation",
             "no .json"),
            ("no JSON", put("train_annotation/1.json", "{"), "train_annotation/1.json:1", "JSON object"),
            ("no picture", lack("train_annotation/0.json", "file"), "train_annotation/0.json", "image None"),
            ("no boxes", lack("train_annotation/0.json", "annotations"), "train_annotation/0.json", "annotations None"),
            ("a class below zero", edit("train_annotation/0.json", lambda k: k["annotations"][1].update(class_id=-1)),
             "train_annotation/0.json", "annotations[1]", "class_id -1"),
            ("no side", edit("train_annotation/0.json", lambda k: k["annotations"][1].pop("left")),
             "train_annotation/0.json", "annotations[1]", "left"),
            ("two sizes", edit("train_annotation/0.json", lambda k: k["image_size"].append(k["image_size"][0])),
             "train_annotation/0.json", "image_size"),
            ("a class of two names", edit("train_annotation/1.json", lambda k: k["categories"][0].update(name="cow")),
             "train_annotation/1.json", "class 0", "cow"),
        ],
        "manifest": [
            ("no JSON", line("JPEGImages/train.manifest", 2, "{"), "train.manifest:2", "JSON object"),
            ("no picture", lack("JPEGImages/train.manifest", "source-ref", 3), "train.manifest:3", "source-ref"),
            ("boxes that are a list", field("JPEGImages/train.manifest", "pets", [], 3), "train.manifest:3",
             "'pets' []"),
            ("names that are a list", field("JPEGImages/train.manifest", "pets-metadata", [], 1), ":1", "metadata []"),
            ("a class that is text",
             field("JPEGImages/train.manifest", "pets-metadata", {"class-map": {"one": "cat"}}), ":1", "class 'one'"),
            ("a picture twice", line("JPEGImages/train.manifest", 2, boxes.manifest("two.png")), ":2", "two.png again"),
        ],
        "export": [
            ("a checkpoint cut off", cut(BEST, 1000), BEST, "unreadable"),
            ("data that is gone", drop(VOC_LIST), VOC_LIST, "No such file"),
            ("other classes", ask("class_names", ["dog", "cat"]), "labels"),
        ],
        "test": [("a picture cut off", cut("JPEGImages/two.png", 60), "JPEGImages/two.png", "cannot be decoded")],
        "device": [*pictures_at_the_edge(), *damaged("detect", "channels", "3")],
    },
    "semantic segmentation": {
        "list": [
            ("no list", drop("train.txt"), "train.txt", "No such file"),
            ("an empty list", put("train.txt", "\n"), "train.txt", "no lines"),
            ("not UTF-8", put("train.txt", b"\xff\xfe"), "train.txt:1", "not UTF-8"),
            ("one field", put("train.txt", "\na.jpg"), "train.txt:2", "1 fields"),
            ("a path with a null", put("train.txt", "a\0.jpg a.png"), "train.txt:1", "image"),
            ("no picture", drop("JPEGImages/b.jpg"), "train.txt:3", "JPEGImages/b.jpg", "no such file"),
            ("no mask", drop(masks.MASK), "train.txt:1", masks.MASK, "no such file"),
            ("a line twice", put("train.txt", (masks.SET["train.txt"].decode() + "\n") * 2), "train.txt:4", "again"),
            ("an empty mask", put(masks.MASK, b""), masks.MASK, "cannot be decoded"),
            ("a mask cut off", cut(masks.MASK, -20), masks.MASK, "cannot be decoded"),
            ("a bit of a mask", put(masks.MASK, masks.FLIPPED), masks.MASK, "cannot be decoded"),
            ("a mask as JPEG", put(masks.MASK, masks.PICTURE), masks.MASK, "cannot be decoded"),
            ("a mask in colours", put(masks.MASK, picture("RGB")), masks.MASK, "RGB colours"),
            ("a mask of 16 bits", put(masks.MASK, picture("I;16")), masks.MASK, "16 bits"),
            ("an endless mask", put(masks.MASK, masks.BOMB), masks.MASK, "pixels"),
            ("a mask of another size", put(masks.MASK, picture("L", (6, 8))), masks.MASK, "6 x 8", "8 x 6"),
            ("a value that is no class", put(masks.MASK, masks.png(masks.A + 19)), masks.MASK, "value 18"),
            ("a picture cut off", cut("JPEGImages/b.jpg", 300), "JPEGImages/b.jpg", "cannot be decoded"),
            ("void beyond a byte", ask("void", 300), "void", "300"),
            ("one class", ask("class_names", ["sky"]), "1 classes"),
            ("classes of one name", ask("class_names", ["sky", "sky", "car"]), "classes[1]", "sky again"),
            ("factors in disorder", ask("scales", [2, 1]), "scales"),
        ],
        "folders": [
            ("no folder", drop("SegmentationClass"), "SegmentationClass", "No such file"),
            ("a picture alone", put("JPEGImages/c.jpg", masks.PICTURE), "JPEGImages/c.jpg", "no mask of the same name"),
            ("a mask alone", put("SegmentationClass/c.png", masks.WHOLE), "c.png", "no picture of the same name"),
            ("a name twice", put("JPEGImages/a.png", masks.WHOLE), "JPEGImages/a.png", "same name as"),
            ("another file", put("JPEGImages/Thumbs.db", b""), "JPEGImages/Thumbs.db", "file"),
            ("a name of two lines", put("JPEGImages/c\nd.jpg", masks.PICTURE), "JPEGImages", "name of one line"),
            ("an empty folder", drop("JPEGImages/a.jpg", "JPEGImages/b.jpg"), "JPEGImages", "no files"),
        ],
        "label map": [
            ("no JSON", put("map.json", "{"), "map.json:1", "JSON object"),
            ("neither scale nor map", put("map.json", "{}"), "map.json", "scale and map"),
            ("no scale at all", put("map.json", '{"scale": 0}'), "map.json", "scale 0"),
            ("a map that is a list", put("map.json", '{"map": []}'), "map.json", "map []"),
            ("a class left out", put("map.json", '{"map": {"0": 0, "2": 2}}'), "map.json", "no class 1"),
            ("a value of two classes", put("map.json", '{"map": {"0": 0, "1": 0}}'), "map.json", "value 0"),
            ("a value beyond a byte", put("map.json", '{"map": {"0": 300}}'), "map.json", "class 0", "300"),
            ("a value outside of the map", put("map.json", '{"map": {"0": 0, "1": 1}}'), masks.MASK, "value 2"),
        ],
        "camvid": [("a mask cut off", cut(masks.MASK, -20), "train.txt:1", masks.MASK, "cannot be decoded")],
        "voc": [
            ("no list", drop(VOC_MASKS), VOC_MASKS, "No such file"),
            ("two stems on a line", line(VOC_MASKS, 3, "b c"), f"{VOC_MASKS}:3", "2 fields"),
            ("a stem twice", line(VOC_MASKS, 3, "a"), f"{VOC_MASKS}:3", "again"),
            ("no picture", line(VOC_MASKS, 3, "c"), f"{VOC_MASKS}:3", "JPEGImages/c.jpg"),
            ("a value that is no class", put(masks.MASK, masks.png(masks.A + 19)), masks.MASK, "value 21"),
        ],
        "export": [
            ("a checkpoint cut off", cut(BEST, 1000), BEST, "unreadable"),
            ("masks that are gone", drop("SegmentationClass"), "train.txt:1", masks.MASK),
            ("other classes", ask("class_names", ["sky", "road", "cars"]), "labels"),
        ],
        "test": [("a mask cut off", cut(masks.MASK, -20), masks.MASK, "cannot be decoded")],
        "device": [
            *pictures_at_the_edge(),
            ("a mask inside the bundle", say("--output", "bundle/mask.png"), "bundle/mask.png", "inside the bundle"),
            ("a mask over the picture", say("--output", "picture.png"), "picture.png", "overwritten"),
            ("a place below a file", say("--output", "picture.png/mask.png"), "picture.png/mask.png", "written"),
            ("one mask for two pictures", both(put("b/a.png", picture("L")), say("b/a.png")), "mask.png", "a folder"),
            *damaged("segment", "labels", "abc"),
        ],
    },
    "forecasting": {
        "json": [
            ("no file", drop("train.jsonl"), "train.jsonl", "No such file"),
            ("an empty file", put("train.jsonl", "\n"), "train.jsonl", "no records"),
            ("no JSON", line("train.jsonl", 2, "{"), "train.jsonl:2", "JSON object"),
            ("not UTF-8", line("train.jsonl", 2, b"\xc3("), "train.jsonl:2", "not UTF-8"),
            ("no start", lack("train.jsonl", "start", 2), "train.jsonl:2", "start"),
            ("a start of another form", field("train.jsonl", "start", "1.1.2024", 2), "train.jsonl:2", "start",
             "1.1.2024"),
            ("a day that is none", field("train.jsonl", "start", "2023-02-29", 2), "train.jsonl:2", "start"),
            ("no target", lack("train.jsonl", "target", 3), "train.jsonl:3", "target"),
            ("a target that is text", field("train.jsonl", "target", "1,2", 3), "train.jsonl:3", "target", "1,2"),
            ("a value that is text", edit("train.jsonl", lambda k: k["target"].insert(5, "x"), 3), ":3", "target[5]",
             "x"),
            ("a value without end", edit("train.jsonl", lambda k: k["target"].insert(5, 1e39), 3), ":3", "target[5]"),
            ("a category below zero", field("train.jsonl", "cat", [-1], 2), "train.jsonl:2", "cat[0]", "-1"),
            ("a category more", field("train.jsonl", "cat", [1, 2], 2), "train.jsonl:2", "cat"),
            ("a feature that is flat", field("train.jsonl", "dynamic_feat", [1], 1), "train.jsonl:1", "dynamic_feat"),
            ("a feature cut off", edit("train.jsonl", lambda k: k["dynamic_feat"][0].pop(), 2), ":2", "dynamic_feat",
             "167"),
            ("a hole in a feature", edit("train.jsonl", lambda k: k["dynamic_feat"][0].insert(3, None), 2), ":2",
             "[0][3]"),
            ("only missing values", field("train.jsonl", "target", [None] * 168, 2), "train.jsonl:2", "all missing"),
            ("too few values", put("train.jsonl", rows(series_of(0))), "train.jsonl:1", "168 values observed"),
            ("a future cut off", line("predict.jsonl", 2, json.dumps(series_of(1))), "predict.jsonl:2", "dynamic_feat"),
            ("a category that training lacks", field("predict.jsonl", "cat", [7], 2), "predict.jsonl:2", "cat[0]", "7"),
            ("fewer categories than the network", ask("cardinality", [2]), "train.jsonl:3", "cat[0]"),
            ("an unknown frequency", ask("frequency", "5X"), "frequency", "5X"),
            ("nothing to forecast", ask("prediction_length", 0), "prediction_length", "0"),
            ("another extension", ask("train", "train.txt"), "train.txt", "extension"),
            ("no gzip", both(put("t.json.gz", "no gzip"), ask("train", "t.json.gz")), "t.json.gz", "gzip"),
        ],
        "parquet": [
            ("a file cut off", cut("train.parquet", -9), "train.parquet", "Parquet"),
            ("text", put("train.parquet", "text"), "train.parquet", "Parquet"),
            ("no records", put("train.parquet", parquet(start=[], target=[])), "train.parquet", "no records"),
            ("no target", put("train.parquet", parquet(start=[DAY])), "train.parquet:1", "target"),
            ("no start", put("train.parquet", parquet(start=[DAY, None], target=[[1], [1]])), "train.parquet:2",
             "start"),
            ("categories as text", put("train.parquet", parquet(start=[DAY], target=[[1]], cat=[["a"]])), ":1",
             "cat[0]"),
        ],
        "wide": [
            ("no file", drop("wide.txt"), "wide.txt", "No such file"),
            ("an empty file", put("wide.txt", ""), "wide.txt", "no series"),
            ("a cell less", line("wide.txt", 2, "1,2"), "wide.txt:2", "2 cells"),
            ("a cell that is text", line("wide.txt", 3, "1,x,2"), "wide.txt:3", "column 2", "x"),
            ("semicolons", line("wide.txt", 1, "1;2;3"), "wide.txt:1", "1;2;3"),
            ("a line without cells", line("wide.txt", 4, ""), "wide.txt:4", "blank line"),
            ("Latin letters", line("wide.txt", 2, b"1,\xe9,2"), "wide.txt:2", "not UTF-8"),
            ("a quote that nothing closes", line("wide.txt", 168, '1,"2,3'), "wide.txt:168", "cells"),
            ("a start of another form", ask("start", "1990"), "start", "1990"),
            ("more held out than there is", ask("val_windows", 999), "val", "too short"),
        ],
        "dated": [
            ("no header", swap("dated.csv", "date,oil,gas\n", ""), "dated.csv:1", "header"),
            ("a name twice", swap("dated.csv", "oil,gas", "oil,oil"), "dated.csv:1", "column 3", "oil again"),
            ("a date of another form", line("dated.csv", 3, "1.1.2024,1,2"), "dated.csv:3", "date", "1.1.2024"),
            ("an hour twice", line("dated.csv", 3, f"{HOURS[0]},1,2"), "dated.csv:3", "date", "in order"),
            ("half an hour", line("dated.csv", 3, f"{DAY} 00:30:00,1,2"), "dated.csv:3", "date", "whole steps"),
            ("a gap of centuries", line("dated.csv", 169, "2424-01-01,1,2"), "dated.csv:169", "date", "steps after"),
            ("a cell that is text", line("dated.csv", 5, f"{HOURS[3]},1,x"), "dated.csv:5", "gas", "x"),
            ("no tables", ask("paths", []), "paths"),
        ],
        "rows": [
            ("a series twice", swap("train.csv", "H2", "H1"), "train.csv:3", "H1 again"),
            ("a series without a future", swap("test.csv", "H2", "H9"), "test.csv", "series H2"),
            ("more cells than the header", swap("test.csv", "H2", "H2,1"), "test.csv:3", "5 values"),
            ("a cell that is text", swap("test.csv", "H2,0.0", "H2,x"), "test.csv:3", "V2", "x"),
        ],
        "long": [
            ("another column", swap("long.csv", "timestamp", "when"), "long.csv:1", "timestamp"),
            ("no name", line("long.csv", 4, f",{HOURS[2]},1"), "long.csv:4", "item_id"),
            ("a date of another form", line("long.csv", 4, "a,noon,1"), "long.csv:4", "timestamp", "noon"),
            ("a value that is text", line("long.csv", 4, f"a,{HOURS[2]},x"), "long.csv:4", "target", "x"),
        ],
        "export": [
            ("a checkpoint cut off", cut(BEST, 1000), BEST, "unreadable"),
            ("data that is gone", drop("train.jsonl"), "train.jsonl", "No such file"),
            ("another context", ask("context_length", 9), "context_length"),
        ],
        "test": [
            ("a value that is text", edit("train.jsonl", lambda k: k["target"].insert(5, "x"), 3), ":3", "target[5]")
        ],
        "device": [
            ("no file", drop("series.json"), "series.json", "No such file"),
            ("no JSON", put("series.json", "{"), "series.json", "JSON object"),
            ("not UTF-8", put("series.json", b"\xff"), "series.json", "not UTF-8"),
            ("no start", lack("series.json", "start"), "series.json", "start"),
            ("a value that is text", edit("series.json", lambda k: k["target"].insert(5, "x")), "series.json",
             "target[5]"),
            ("only missing values", field("series.json", "target", [None] * 168), "series.json", "target",
             "all missing"),
            ("no categories", lack("series.json", "cat"), "series.json", "cat"),
            ("a category that training lacks", field("series.json", "cat", [3]), "series.json", "cat[0]", "3"),
            ("a future cut off", edit("series.json", lambda k: k["dynamic_feat"][0].pop()), "series.json",
             "dynamic_feat"),
            ("no series", field("request.json", "instances", []), "request.json", "instances"),
            ("a series that is a number", edit("request.json", lambda k: k["instances"].append(3)), "request.json",
             "[2]"),
            ("an unknown wish", field("request.json", "configuration", {"seeds": 1}), "request.json", "seeds"),
            ("no samples", field("request.json", "configuration", {"num_samples": 0}), "request.json", "num_samples"),
            ("a quantile of one", field("request.json", "configuration", {"quantiles": ["1.5"]}), "request.json",
             "quantiles"),
            ("a seed below zero", field("request.json", "configuration", {"seed": -1}), "request.json", "seed"),
            ("a line that is no JSON", line("lines.jsonl", 2, "{"), "lines.jsonl:2", "JSON object"),
            ("a line without a target", lack("lines.jsonl", "target", 3), "lines.jsonl:3", "target"),
            *damaged("step", "lags", [0]),
        ],
    },
    "translation": {
        "parallel": [
            ("no file", drop("train.de"), "train.de", "No such file"),
            ("a line less", put("train.en", "one\n"), "train.en", "1 lines", "9"),
            ("a line without text", line("train.de", 3, " "), "train.de:3", "empty"),
            ("not UTF-8", line("val.en", 4, b"\xff"), "val.en:4", "not UTF-8"),
            ("empty files", both(put("val.de", ""), put("val.en", "")), "val.de", "no line"),
            ("no gzip", both(drop("val.en"), put("val.en.gz", "no gzip")), "val.en.gz", "unreadable"),
            ("an endless sentence", line("train.de", 5, "eins " * 99), "train.de:5", "source", "tokens"),
            ("an endless translation", line("train.en", 5, "one " * 99), "train", ":5", "target", "tokens"),
            ("a vocabulary of nothing", ask("vocabulary_size", 5), "vocabulary_size", "5"),
            ("an unknown tokeniser", ask("tokenizer", "letters"), "tokenizer", "letters"),
        ],
        "tsv": [
            ("no tab", line("train.tsv", 2, "eins one"), "train.tsv:2", "1 columns"),
            ("two tabs", line("train.tsv", 2, "eins\tone\tuno"), "train.tsv:2", "3 columns"),
            ("no target", line("train.tsv", 2, "eins\t "), "train.tsv:2", "target", "empty"),
            ("an empty file", put("val.tsv", ""), "val.tsv", "no line"),
            ("not UTF-8", line("val.tsv", 3, b"a\t\xff"), "val.tsv:3", "not UTF-8"),
        ],
        "jsonl": [
            ("no JSON", line("train.jsonl", 2, "{"), "train.jsonl:2", "JSON object"),
            ("no target", lack("train.jsonl", "target", 2), "train.jsonl:2", "target", "NoneType"),
            ("a source that is a number", field("train.jsonl", "source", 3, 2), "train.jsonl:2", "source", "int"),
            ("half a letter", field("train.jsonl", "target", "\ud800", 2), "train.jsonl:2", "target", "surrogate"),
        ],
        "recordio": [
            ("no file", drop("train.rec"), "train.rec", "No such file"),
            ("no record", put("train.rec", b""), "train.rec", "no record"),
            ("a record cut off", cut("train.rec", -4), "train.rec", "record 8"),
            ("another magic number", byte("train.rec", 0, 1), "train.rec", "record 1"),
            ("a length beyond the file", byte("train.rec", 7, 127), "train.rec", "record 1"),
            ("no protobuf", put("val.rec", recordio(GOOD_RECORD, b"\xff" * 12)), "val.rec", "record 2"),
            ("no source", put("val.rec", recordio(packed([], [5]))), "val.rec", "record 1", "source"),
            ("a token beyond the vocabulary", put("val.rec", recordio(packed([4], [9]))), "record 1", "target",
             "token 9"),
            ("a token that fills up", put("val.rec", recordio(packed([0], [5]))), "record 1", "source", "token 0"),
            ("no vocabulary", drop("vocab.src.json"), "vocab.src.json", "No such file"),
            ("a vocabulary cut off", cut("vocab.trg.json", -5), "vocab.trg.json:1", "JSON object"),
            ("a vocabulary that is a list", put("vocab.trg.json", "[]"), "vocab.trg.json", "JSON object"),
            ("a number left out", field("vocab.src.json", "c", 9), "vocab.src.json", "have gaps or repeat"),
            ("other first tokens", put("vocab.src.json", '{"a": 0, "b": 1}'), "vocab.src.json", "begins with"),
        ],
        "export": [
            ("a checkpoint cut off", cut(BEST, 1000), BEST, "unreadable"),
            ("data that is gone", drop("val.de"), "val.de", "No such file"),
            ("another vocabulary", ask("tokenizer", "word"), "vocabulary"),
        ],
        "test": [("a line without text", line("test_2016_flickr.de", 2, ""), "test_2016_flickr.de:2", "empty")],
        "device": [
            ("a line without text", line("lines.txt", 2, ""), "lines.txt:2", "empty"),
            ("an endless line", line("lines.txt", 2, "eins " * 99), "lines.txt:2", "tokens"),
            ("not UTF-8", line("lines.txt", 2, b"\xff"), "lines.txt", "UTF-8"),
            ("an empty text", say(""), "input", "empty"),
            ("no JSON", line("lines.jsonl", 2, "{"), "lines.jsonl:2", "JSON object"),
            ("no source", line("lines.jsonl", 2, '{"data": "a"}'), "lines.jsonl:2", "source"),
            ("no instances", field("request.json", "instances", []), "request.json", "instances"),
            ("an instance without text", edit("request.json", lambda k: k["instances"][1].pop("data")), "[1]", "data"),
            ("an unknown key", edit("request.json", lambda k: k["instances"][1].update(more=1)), "request.json", "[1]"),
            ("half a letter", edit("request.json", lambda k: k["instances"][1].update(data="\ud800")), "[1]",
             "surrogate"),
            ("more hypotheses than there are", say("--beam", "99"), "beam", "99"),
            ("no hypotheses", say("--beam", "0"), "--beam", "0"),
            ("an option of another kind", say("--temperature", "1"), "--temperature"),
            *damaged("step", "longest", 0),
        ],
    },
    "language modelling": {
        "text": [
            ("no file", drop("input.txt"), "input.txt", "no such file"),
            ("an empty file", put("input.txt", ""), "input.txt", "no text"),
            ("not UTF-8", put("input.txt", b"abc\xffd"), "input.txt", "byte 3", "0xff"),
            ("a text that is too short", put("input.txt", "abc"), "input.txt", "tokens"),
            ("no gzip", both(put("a.txt.gz", "no gzip"), ask("train", "a.txt.gz")), "a.txt.gz", "unreadable"),
            ("a gzip cut off", both(put("a.txt.gz", gzip.compress(STORY.encode())[:-9]), ask("train", "a.txt.gz")),
             "a.txt.gz", "unreadable"),
            ("a pattern of no files", ask("train", "none/*.txt"), "none/*.txt", "no such file"),
            ("an unknown tokeniser", ask("tokenizer", "words"), "tokenizer", "words"),
            ("a vocabulary of nothing", ask("vocabulary_size", 3), "vocabulary_size", "3"),
            ("a window of nothing", ask("context_length", 1), "context_length", "1"),
        ],
        "jsonl": [
            ("no JSON", line("train.jsonl", 2, "no"), "train.jsonl:2", "JSON object"),
            ("no text", line("train.jsonl", 2, '{"body": "x"}'), "train.jsonl:2", "text"),
            ("a text that is a number", field("train.jsonl", "text", 3, 2), "train.jsonl:2", "text", "int"),
            ("half a letter", field("train.jsonl", "text", "\ud83d", 2), "train.jsonl:2", "surrogate"),
            ("not UTF-8", line("train.jsonl", 2, b'{"text": "\xff"}'), "train.jsonl:2", "byte 10"),
        ],
        "tokeniser": [
            ("no JSON", put("tokenizer.json", "{"), "tokenizer.json", "tokenizers"),
            ("a list", put("tokenizer.json", "[]"), "tokenizer.json", "tokenizers"),
            ("a tokeniser cut off", cut("tokenizer.json", -99), "tokenizer.json", "tokenizers"),
            ("not UTF-8", put("tokenizer.json", b"\xff"), "tokenizer.json", "not UTF-8"),
            ("one that changes texts", field("tokenizer.json", "exact", False), "tokenizer.json", "changes texts"),
            ("a model that is none", field("tokenizer.json", "model", "{}"), "tokenizer.json", "tokenizers"),
            ("an unknown kind", field("tokenizer.json", "kind", "runes"), "tokenizer.json", "runes"),
            ("no tokeniser", drop("tokenizer.json"), "tokenizer.json", "expected"),
        ],
        "tokens": [
            ("no file", drop("train.bin"), "train.bin", "No such file"),
            ("no tokeniser", drop("tokenizer.json"), "tokenizer.json", "not found"),
            ("an empty file", put("val.bin", b""), "val.bin", "0 bytes"),
            ("half a token", cut("val.bin", -1), "val.bin", "399 bytes"),
            ("a token beyond the vocabulary", byte("val.bin", 2 * 7 + 1, 9), "val.bin", "token 7"),
            ("a file that is too short", cut("train.bin", 20), "train.bin", "10 tokens"),
        ],
        "sources": [
            ("no folder", drop("library"), "library", "no sources"),
            ("not UTF-8", both(*(put(f"library/module{i}.py", b"\xff") for i in range(MODULES))), "library",
             "no sources"),
        ],
        "make tokens": [
            ("no text", drop("input.txt"), "input.txt", "no such file"),
            ("not UTF-8", put("input.txt", b"abc\xff"), "input.txt", "byte 3"),
            ("a vocabulary of nothing", say("--vocabulary-size", "9"), "vocabulary_size", "9"),
            ("a vocabulary that is text", say("--vocabulary-size", "many"), "--vocabulary-size", "many"),
            ("an unknown tokeniser", say("--tokenizer", "words"), "words"),
            ("a file for a folder", put("tokens", "text"), "tokens", "folder"),
            ("a text to validate on that is gone", say("--val", "gone.txt"), "gone.txt", "no such file"),
        ],
        "export": [
            ("a checkpoint cut off", cut(BEST, 1000), BEST, "unreadable"),
            ("data that is gone", drop("input.txt"), "input.txt", "no such file"),
            ("another text", put("input.txt", "xyz" * 999), "vocabulary"),
        ],
        "test": [("not UTF-8", put("input.txt", b"abc\xffd"), "input.txt", "byte 3")],
        "device": [
            ("no JSON", line("lines.jsonl", 2, "{"), "lines.jsonl:2", "JSON object"),
            ("no prompt", lack("lines.jsonl", "inputs", 2), "lines.jsonl:2", "inputs"),
            ("a prompt that is a number", field("lines.jsonl", "inputs", 3, 2), "lines.jsonl:2", "inputs"),
            ("an unknown key", field("lines.jsonl", "input", "a", 2), "lines.jsonl:2", "inputs"),
            ("parameters that are a list", field("lines.jsonl", "parameters", [], 2), "lines.jsonl:2", "parameters"),
            ("an unknown parameter", field("lines.jsonl", "parameters", {"heat": 1}, 2), "lines.jsonl:2", "heat"),
            ("heat that is text", field("lines.jsonl", "parameters", {"temperature": "a"}, 2), ":2", "temperature"),
            ("no new tokens", field("lines.jsonl", "parameters", {"max_new_tokens": 0}, 2), ":2", "max_new_tokens"),
            ("a share above one", field("lines.jsonl", "parameters", {"top_p": 2}, 2), ":2", "top_p"),
            ("an endless number", line("lines.jsonl", 2, '{"inputs": "a", "parameters": {"seed": 1e999}}'), ":2",
             "seed"),
            ("an end without text", field("lines.jsonl", "parameters", {"stop": [""]}, 2), "lines.jsonl:2", "stop"),
            ("half a letter", field("lines.jsonl", "inputs", "\ud800", 2), "lines.jsonl:2", "surrogate"),
            ("not UTF-8", both(put("prompt.txt", b"\xff"), say("prompt.txt")), "prompt.txt", "UTF-8"),
            ("heat below zero", say("--temperature", "-1"), "--temperature", "-1"),
            ("a drawing", say("--overlay", "drawn.png"), "cannot be drawn"),
            ("a prompt and inputs", say("--prompt", "a"), "--prompt"),
            *damaged("decode", "context_length", 1),
        ],
    },
}
# fmt: on


class Case(NamedTuple):
    """A row of the table, with its family and source."""

    family: str
    source: str
    name: str
    breaker: Callable[[], list[str] | None]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.family}: {self.source}: {self.name}"


def every_case() -> list[Case]:
    """Return the rows of the table."""
    return [
        Case(family, source, name, breaker, tuple(words))
        for family, sources in CASES.items()
        for source, known in sources.items()
        for name, breaker, *words in known
    ]


# Running them


class Outcome(NamedTuple):
    """The exit code of a command, its output on stderr and the files that it changed."""

    code: object
    said: str
    changed: list[str]


@contextmanager
def captured() -> Iterator[Path]:
    """Redirect stdout and stderr, of Python and of native libraries, and yield the file with stderr."""
    with tempfile.TemporaryDirectory() as folder:
        kept = [os.dup(descriptor) for descriptor in (1, 2)]
        with open(Path(folder, "out"), "w") as out, open(Path(folder, "err"), "w", buffering=1) as err:
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                with redirect_stdout(out), redirect_stderr(err):
                    yield Path(folder, "err")
            finally:
                for descriptor, before in zip((1, 2), kept, strict=True):
                    os.dup2(before, descriptor)
                    os.close(before)


def call(command: Callable[[list[str]], int], arguments: list[str]) -> tuple[object, str]:
    """Return the exit code of a command and its output on stderr, including the traceback of an exception."""
    before, sys.argv = sys.argv, ["command"]
    with captured() as err:
        try:
            code = command(arguments)
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic of a Rust library is not an Exception
            traceback.print_exc()
            code = 1
        finally:
            sys.argv = before
        return code, err.read_text(errors="replace")


def screen() -> Console:
    """Return a console for the terminal that works while stderr is captured."""
    return Console(file=os.fdopen(os.dup(2), "w"))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file in a folder with its bytes, and every subfolder."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


class Larder:
    """Valid inputs, each made once: those of every source, and the run and the bundle of every family."""

    def __init__(self, scratch: Path):
        self.scratch = scratch

    def good(self, family: str, name: str) -> Path:
        """Return a folder with valid input for a source."""
        folder, source = self.scratch / family / name, SOURCES[family][name]
        if not folder.exists():
            if source.needs:
                shutil.copytree(self.trained(family, source.needs), folder)
            else:
                folder.mkdir(parents=True)
            with chdir(folder):
                source.make()
        return folder

    def trained(self, family: str, what: str) -> Path:
        """Return a folder with the family's run and its data, or only with its bundle."""
        folder = self.scratch / family / f"its {what}"
        if folder.exists():
            return folder
        if what == "run":
            shutil.copytree(self.good(family, RUNS[family]), folder)
            source = SOURCES[family][RUNS[family]]
            with chdir(folder):
                code, said = call(source.command, source.arguments)
            assert code == 0, said
        else:
            folder.mkdir(parents=True)
            with chdir(self.trained(family, "run")), captured():
                write_bundle(folder / "bundle")
        return folder

    def outcome(self, family: str, name: str, breaker: Callable[[], list[str] | None]) -> Outcome:
        """Run a source's command in a broken copy of its folder and return the outcome."""
        source = SOURCES[family][name]
        with tempfile.TemporaryDirectory(dir=self.scratch) as place:
            folder = Path(place, "work")
            shutil.copytree(self.good(family, name), folder)
            with chdir(folder):
                more = breaker() or []
                before = contents(folder)
                code, said = call(source.command, [*source.arguments, *more])
            after = contents(folder)
        changed = [path for path in sorted(before.keys() | after.keys()) if before.get(path, 0) != after.get(path, 0)]
        return Outcome(code, said, changed)


def write_bundle(folder: Path) -> None:
    """Write the bundle of the run in the current folder, without verification and measurement, which take minutes."""
    task, data = load_run(Path("run"), [])
    data.setup("validate")
    data.setup("test")
    task.take_facts(data)
    served = task.deployable(next(iter(data.val_dataloader())))
    folder.mkdir()
    for name, graph in served.graphs.items():
        write_onnx(graph, folder / f"{name}.onnx", TARGETS["cpu"])
    write_manifest(folder, served, TARGETS["cpu"], "float32", folder)


CHECKS = ("exit 2", "one line", "named", "nothing left")


def faults(case: Case, outcome: Outcome) -> dict[str, str]:
    """Return the CHECKS that a case fails, each with a description of the failure."""
    lines = outcome.said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    last = lines[-1] if lines else ""
    found = {}
    if outcome.code != 2:
        found["exit 2"] = f"exit code {outcome.code!r}"
    if len(errors) != 1 or last != errors[0] or "Traceback" in outcome.said:
        found["one line"] = f"{len(errors)} lines of error, the last line is {last[:300]!r}"
    if missing := [word for word in case.words if word not in last]:
        found["named"] = f"no {', '.join(map(repr, missing))} in {last[:300]!r}"
    if outcome.changed:
        found["nothing left"] = f"changed or left: {', '.join(outcome.changed)[:300]}"
    return found


def valid(larder: Larder, family: str, name: str) -> str:
    """Return the error of a command on valid input. It must be empty, else a case would not test what it breaks."""
    outcome = larder.outcome(family, name, nothing)
    return "" if outcome.code == 0 else outcome.said


def main() -> int:
    """Run the corpus, print a table of the families and the failures; return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.bad_input", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this text")
    asked = parser.parse_args()
    cases = [case for case in every_case() if asked.only in str(case)]
    used = dict.fromkeys((case.family, case.source) for case in cases)
    watched = {"console": screen(), "transient": True}
    torch.set_num_threads(1)
    start, failed, refused = time.monotonic(), {}, {}
    with tempfile.TemporaryDirectory(prefix="bad_input.") as scratch:
        larder = Larder(Path(scratch))
        for family, name in track(used, "Valid inputs", **watched):
            # A valid export would verify and measure for a minute; the family's bundle shows that its run is valid.
            if SOURCES[family][name].command is not export and (said := valid(larder, family, name)):
                refused[f"{family}: {name}"] = said
        for case in track(cases, "Cases", **watched):
            failed[case] = faults(case, larder.outcome(case.family, case.source, case.breaker))
    print(f"{len(used)} valid sources, {len(cases)} cases in {time.monotonic() - start:.0f} s")
    tally(cases, failed)
    for name, said in refused.items():
        print(f"REFUSED though valid: {name}: {said[-500:]}")
    for case, found in failed.items():
        for check, what in found.items():
            print(f"FAILED {case}: {check}: {what}")
    return 1 if refused or any(failed.values()) else 0


def tally(cases: list[Case], failed: dict[Case, dict[str, str]]) -> None:
    """Print how many cases of each family pass each of CHECKS."""
    table = Table("family", "cases", *CHECKS, box=SIMPLE_HEAD)
    for family in [*CASES, "all"]:
        own = [case for case in cases if family in (case.family, "all")]
        held = [sum(check not in failed[case] for case in own) for check in CHECKS]
        table.add_row(family, *map(str, [len(own), *held]))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
