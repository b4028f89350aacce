"""Readers given corrupted and arbitrary bytes: `python -m tests.faults.fuzz --examples 2000`.

Hypothesis breaks one file of a valid set: it flips bits, removes, inserts, overwrites or repeats parts, truncates the
file, or replaces it by arbitrary bytes or text. A reader may return a value or raise a UserError of one line that names
one of its files or folders. Anything else is a finding, shown with the smallest file that Hypothesis finds; it ends the
search for this reader.
"""

import argparse
import gzip
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dlref.data import cifar, idx, listings, mask_listings, pairs, tokens, vocabulary
from dlref.data import series_files as series
from dlref.data.coco_boxes import read_coco
from dlref.data.images import read_image
from dlref.data.sagemaker_boxes import read_box_manifest, read_sagemaker
from dlref.data.voc_boxes import read_voc
from dlref.runtime import UserError, bundle, images, lines
from dlref.runtime.calendar import Frequency
from dlref.runtime.text import make_tokenizer
from dlref.training.weights import read_checkpoint, read_state_dict

from . import bad_input as corpus
from .bad_input import COCO, DAY, IMAGES, LABELS, VOC_LIST, VOC_MASKS, captured, screen

H = Frequency(1, "H")
TOKENIZER = make_tokenizer({"kind": "byte", "exact": True})
BOXES, MASK, PICTURE = "Annotations/two.xml", "SegmentationClass/a.png", "JPEGImages/a.jpg"


class Reader(NamedTuple):
    """A function that writes a valid set, the file to break, and a function that reads the set."""

    name: str
    make: Callable[[], object]
    file: str
    read: Callable[[str], object]


def packed(make: Callable[[], object], file: str) -> Callable[[], None]:
    """Make a set with one of its files gzipped."""

    def packed_too() -> None:
        make()
        Path(f"{file}.gz").write_bytes(gzip.compress(Path(file).read_bytes(), mtime=0))

    return packed_too


def checkpoint() -> None:
    """Write a checkpoint of a tiny network without a seal, which would detect every change before the reader."""
    state = {"state_dict": {"network.weight": torch.zeros(2)}, "facts": {"labels": ["a"]}, "global_step": 1}
    state |= {"optimizer": {}, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    state["pytorch-lightning_version"] = "2.6.5"
    torch.save(state, "a.ckpt")


def digits() -> None:
    """Write MNIST's files."""
    corpus.write_idx(Path(), train=4, test=2, zipped=False)


def cifar_batch() -> None:
    """Write CIFAR-10's files with one picture each."""
    corpus.write_cifar(Path(), records=1)


READERS = {
    "image classification": [
        Reader("read_idx", digits, IMAGES, lambda file: idx.read_idx(file, 3)),
        Reader("read_idx, gzipped", packed(digits, IMAGES), f"{IMAGES}.gz", lambda file: idx.read_idx(file, 3)),
        Reader("read_idx_pair", digits, LABELS, lambda file: idx.read_idx_pair(IMAGES, file, 10)),
        Reader("read_cifar_batch", cifar_batch, "test_batch.bin", cifar.read_cifar_batch),
        Reader("read_class_names", cifar_batch, "batches.meta.txt", cifar.read_class_names),
        Reader("read_lst", corpus.image_lists, "train.lst", lambda file: listings.read_lst(file, ".")),
        Reader("read_image_manifest", corpus.image_manifests, "train.manifest", listings.read_image_manifest),
        Reader("read_image", corpus.masked, PICTURE, read_image),
        Reader("read_image of a device", corpus.masked, PICTURE, lambda file: images.read_image(file, 3)),
        Reader("read_checkpoint", checkpoint, "a.ckpt", lambda file: read_checkpoint(Path(file))),
        Reader("read_state_dict", checkpoint, "a.ckpt", lambda file: read_state_dict(Path(file))),
        Reader(
            "read_manifest of a bundle",
            corpus.handmade,
            "bundle/manifest.json",
            lambda file: bundle.read_manifest(Path(file).parent),
        ),
    ],
    "object detection": [
        Reader("read_voc, the list", corpus.voc_boxes, VOC_LIST, lambda file: read_voc(".", file)),
        Reader("read_voc, an annotation", corpus.voc_boxes, BOXES, lambda _: read_voc(".", VOC_LIST)),
        Reader("read_coco", corpus.coco_boxes, COCO, lambda file: read_coco(file, "train")),
        Reader(
            "read_sagemaker",
            corpus.sagemaker_boxes,
            "train_annotation/0.json",
            lambda file: read_sagemaker("train", Path(file).parent),
        ),
        Reader("read_box_manifest", corpus.box_manifest, "JPEGImages/train.manifest", read_box_manifest),
    ],
    "semantic segmentation": [
        Reader(
            "read_mask_folders, a mask",
            corpus.masked,
            MASK,
            lambda file: mask_listings.read_mask_folders("JPEGImages", Path(file).parent),
        ),
        Reader(
            "read_mask_folders, a picture",
            corpus.masked,
            PICTURE,
            lambda file: mask_listings.read_mask_folders(Path(file).parent, "SegmentationClass"),
        ),
        Reader(
            "read_mask_folders, a label map",
            corpus.masked,
            "map.json",
            lambda file: mask_listings.read_mask_folders("JPEGImages", "SegmentationClass", label_map=file),
        ),
        Reader("read_mask_list", corpus.masked, "train.txt", mask_listings.read_mask_list),
        Reader("read_voc_masks", corpus.masked, VOC_MASKS, mask_listings.read_voc_masks),
    ],
    "forecasting": [
        Reader("read_json_lines", corpus.json_series, "train.jsonl", lambda file: series.read_json_lines(file, H)),
        Reader(
            "read_json_lines, gzipped",
            packed(corpus.json_series, "train.jsonl"),
            "train.jsonl.gz",
            lambda file: series.read_json_lines(file, H),
        ),
        Reader(
            "read_json_lines, Parquet",
            corpus.parquet_series,
            "train.parquet",
            lambda file: series.read_json_lines(file, H),
        ),
        Reader("read_wide", corpus.wide_series, "wide.txt", lambda file: series.read_wide(file, DAY, H)),
        Reader("read_dated", corpus.dated_series, "dated.csv", lambda file: series.read_dated(file, H)),
        Reader("read_rows", corpus.row_series, "train.csv", lambda file: series.read_rows(file, DAY, H)),
        Reader("read_long", corpus.long_series, "long.csv", lambda file: series.read_long(file, H)),
    ],
    "translation": [
        Reader(
            "read_parallel", corpus.parallel, "train.de", lambda file: pairs.read_parallel(Path(file), Path("train.en"))
        ),
        Reader("read_table, tabs", corpus.tabs, "train.tsv", lambda file: pairs.read_table(Path(file))),
        Reader(
            "read_table, gzipped",
            packed(corpus.tabs, "train.tsv"),
            "train.tsv.gz",
            lambda file: pairs.read_table(Path(file)),
        ),
        Reader("read_table, objects", corpus.objects, "train.jsonl", lambda file: pairs.read_table(Path(file))),
        Reader("read_records", corpus.records, "train.rec", lambda file: pairs.read_records(Path(file))),
        Reader(
            "read_vocabulary", corpus.records, "vocab.src.json", lambda file: vocabulary.read_vocabulary(Path(file))
        ),
    ],
    "language modelling": [
        Reader("texts_of", corpus.text, "input.txt", lambda file: list(tokens.texts_of(file))),
        Reader(
            "texts_of, gzipped",
            packed(corpus.text, "input.txt"),
            "input.txt.gz",
            lambda file: list(tokens.texts_of(file)),
        ),
        Reader("texts_of, lines", corpus.stories, "train.jsonl", lambda file: list(tokens.texts_of(file))),
        Reader("read_exact", corpus.tokenised, "tokenizer.json", lambda file: vocabulary.read_exact(Path(file))),
        Reader("open_tokens", corpus.tokenised, "train.bin", lambda file: tokens.open_tokens(Path(file), TOKENIZER)),
        Reader("read_text of a device", corpus.text, "input.txt", lambda file: lines.read_text(file, "text")),
    ],
}


def flipped(content: bytes, place: int, new: bytes) -> bytes:
    """Flip the bits that are set in `new`."""
    part = content[place : place + len(new)]
    return content[:place] + bytes(a ^ b for a, b in zip(part, new, strict=False)) + content[place + len(part) :]


CHANGES = {
    "flip": flipped,
    "cut off": lambda content, place, new: content[:place],
    "leave out": lambda content, place, new: content[:place] + content[place + 1 + len(new) :],
    "put in": lambda content, place, new: content[:place] + new + content[place:],
    "put over": lambda content, place, new: content[:place] + new + content[place + len(new) :],
    "repeat": lambda content, place, new: content[:place] + content[max(0, place - 9 * (1 + len(new))) :],
}
TELLING = [b"\n", b"\t", b"\0", b"\xff", *b'" { } [ ] , - < &a; 1e999 NaN null true'.split()]
CHANGE = st.tuples(
    st.sampled_from(sorted(CHANGES)),
    st.integers(0, 1 << 20),
    st.binary(min_size=1, max_size=4) | st.sampled_from(TELLING),
)


def broken(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for files with one or more changes, arbitrary bytes or arbitrary text."""

    def changed(changes: list[tuple[str, int, bytes]]) -> bytes:
        result = content
        for kind, place, new in changes:
            result = CHANGES[kind](result, place % (1 + len(result)), new)
        return result

    one, several = (st.lists(CHANGE, min_size=1, max_size=most).map(changed) for most in (1, 4))
    anything = st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
    return one | one | several | anything


def outcome(reader: Reader, names: set[str]) -> str:
    """Return "valid", "refused", or a description of what is wrong with the reader's behaviour."""
    try:
        with warnings.catch_warnings(action="ignore"):
            reader.read(reader.file)
    except UserError as error:
        message = str(error)
        if len(message.splitlines()) != 1:
            return f"a message of several lines: {message!r}"
        if not any(name in message for name in names):
            return f"a message that names no file: {message!r}"
        return "refused"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is not an Exception
        place = error.__traceback__
        while place.tb_next:
            place = place.tb_next
        code = place.tb_frame.f_code
        return f"{type(error).__name__}: {error} ({Path(code.co_filename).name}:{place.tb_lineno})"
    return "valid"


def fuzz(reader: Reader, examples: int, number: int = 0) -> tuple[Counter, str]:
    """Return how often a reader returned or refused, and a finding, or "" if there is none."""
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz.") as folder, chdir(folder):
        reader.make()
        names = {path.name for path in Path().rglob("*")}
        assert outcome(reader, names) == "valid", f"{reader.name} refuses what is valid"

        @seed(number)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(broken(Path(reader.file).read_bytes()))
        def run(content: bytes) -> None:
            Path(reader.file).write_bytes(content)
            end = outcome(reader, names)
            ends[end if end in ("valid", "refused") else "finding"] += 1
            assert end in ("valid", "refused"), f"{end}; the file: {content[:300]!r}"

        try:
            with captured():  # image libraries print their complaints
                run()
        except AssertionError as error:
            return ends, str(error)
    return ends, ""


def main() -> int:
    """Fuzz every reader, print a table and the findings; return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="files for each reader (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--only", default="", metavar="TEXT", help="readers whose family or name has this text")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    readers = [
        (family, one) for family, known in READERS.items() for one in known if asked.only in f"{family}: {one.name}"
    ]
    table = Table("family", "reader", "files", "read", "refused", "findings", box=SIMPLE_HEAD)
    start, findings, total = time.monotonic(), [], Counter()
    for family, reader in track(readers, "Readers", console=screen(), transient=True):
        ends, finding = fuzz(reader, asked.examples, asked.seed)
        total += ends
        table.add_row(family, reader.name, *map(str, [ends.total(), ends["valid"], ends["refused"], bool(finding) + 0]))
        if finding:
            findings.append(f"{family}: {reader.name}: {finding}")
    table.add_row(
        "all", f"{len(readers)} readers", *map(str, [total.total(), total["valid"], total["refused"], len(findings)])
    )
    Console(width=100).print(table)
    print(f"{total.total()} files in {time.monotonic() - start:.0f} s")
    for finding in findings:
        print(f"FINDING {finding}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
