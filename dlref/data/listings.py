"""Read which image has which label: class folders, MXNet's .lst and SageMaker's augmented manifest.

Each reader returns a `Listing` and opens no image. If `classes` is given, it checks the labels against them:
validation and test images are read with the class names of the training images.

N images, K classes.
"""

import os
import re
from collections import Counter
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dlref.data.files import check_name, first_of, image_path, read_lines, visible_entries
from dlref.data.images import FORMATS, SUFFIXES
from dlref.runtime.errors import UserError
from dlref.runtime.lines import parse_object

MAX_CLASSES = 100_000  # a mistyped label must not allocate a name for each class below it


class Listing(NamedTuple):
    """Image files and their labels, in the order of their source.

    Attributes:
        images: N paths.
        targets: class ids, int64 (N,); or, if an image may have several labels, multi-hot float32 (N, K).
        classes: K class names.
    """

    images: list[str]
    targets: Tensor
    classes: list[str]

    @property
    def multi_label(self) -> bool:
        """Whether the targets are multi-hot."""
        return self.targets.ndim == 2


Label = int | list[int] | set[int]  # a class id, a multi-hot list, or the ids of several classes


class Record(NamedTuple):
    """One line: its number, the image's path, and its label."""

    line: int
    path: str
    label: Label


# Class folders


def read_folder(folder: str | Path, classes: list[str] | None = None) -> Listing:
    """List `folder/<class>/<image>`, classes and images sorted by name; warn about entries that are not images.

    Hidden files are left out without a warning.
    """
    entries = visible_entries(folder)
    others = [entry.path for entry in entries if not entry.is_dir()]
    found = [check_name(entry.name, str(folder)) for entry in entries if entry.is_dir()]
    if not found:
        raise UserError(f"{folder}: no folders; expected one for each class, with its images")
    classes = classes or found
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(f"{folder}/{unknown[0]}: not a class of train; expected one of {shorten(classes)}")
    paths, targets = [], []
    for name in found:
        files = visible_entries(os.path.join(folder, name))
        images = [file.path for file in files if file.name.lower().endswith(SUFFIXES) and file.is_file()]
        if not images:
            raise UserError(f"{folder}/{name}: no images; expected at least one {FORMATS} file")
        others += sorted({file.path for file in files} - set(images))
        paths += images
        targets += [classes.index(name)] * len(images)
    if others:
        kinds = Counter(Path(other).suffix.lower() or "without an extension" for other in others).most_common()
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds)
        rank_zero_warn(f"{folder}: left out files that are not {FORMATS}: {counted}: {first_of(others)}")
    return Listing(paths, torch.tensor(targets), classes)


# MXNet's .lst


def read_lst(path: str | Path, root: str | Path, classes: list[str] | None = None) -> Listing:
    """Read an MXNet image list: index, label(s) and the path relative to `root`, separated by tabs.

    One label is a class id; several are multi-hot columns, one for each class. Without `classes`, the names
    are the class ids.
    """
    records = [_parse_lst(path, number, line) for number, line in read_lines(path)]
    return _to_listing(path, root, records, classes, names={})


def _parse_lst(source: str | Path, number: int, line: str) -> Record:
    where = f"{source}:{number}"
    fields = line.split("\t")
    if len(fields) < 3:
        raise UserError(f"{where}: {len(fields)} tab-separated fields; expected index, label(s) and path")
    index, *labels, image = fields
    if not re.fullmatch("[0-9]+", index):
        raise UserError(f"{where}: index {shorten(index)}; expected a whole number")
    for column, label in enumerate(labels, start=1):
        if not re.fullmatch(r"[0-9]{1,9}(\.0+)?", label):
            raise UserError(f"{where}: label {column} is {shorten(label)}; expected a class id, or 0 or 1")
    ids = [int(label.split(".")[0]) for label in labels]
    return Record(number, image, ids[0] if len(ids) == 1 else ids)


# SageMaker's augmented manifest


def read_image_manifest(
    path: str | Path,
    root: str | Path | None = None,
    label_attribute: str | None = None,
    classes: list[str] | None = None,
) -> Listing:
    """Read an augmented manifest: one JSON object per line, with `source-ref` and an attribute for the label.

    The label is a class id or, for several labels, a multi-hot list; if the metadata's type shows that Ground Truth
    wrote it, the list contains class ids instead. The metadata (`class-name`, `class-map`) names the classes; a
    class without a name is named after its id.

    Args:
        path: the manifest.
        root: the folder that `source-ref` is relative to; None: the manifest's own folder.
        label_attribute: the key of the label; None: the only key besides `source-ref` and `*-metadata`.
        classes: the class names of the training images.
    """
    names = dict(enumerate(classes or []))
    records = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        entry = parse_object(line, where)
        label_attribute = label_attribute or only_attribute(entry, where)
        metadata = entry.get(f"{label_attribute}-metadata", {})
        if not isinstance(metadata, dict):
            raise UserError(f"{where}: metadata {shorten(metadata)}; expected an object")
        label = _parse_label(entry, label_attribute, metadata, where)
        _add_names(names, label, metadata, where)
        records.append(Record(number, parse_source(entry, where), label))
    return _to_listing(path, Path(path).parent if root is None else root, records, classes, names)


def only_attribute(entry: dict[str, Any], where: str) -> str:
    """Return the key that holds the label in a line of a manifest. Raises UserError unless there is exactly one."""
    names = [name for name in entry if name != "source-ref" and not name.endswith("-metadata")]
    if len(names) != 1:
        raise UserError(f"{where}: attributes {shorten(names)}; expected one, or label_attribute to choose")
    return names[0]


def parse_source(entry: dict[str, Any], where: str) -> str:
    """Return the image path in a line of a manifest. Raises UserError."""
    source = entry.get("source-ref")
    if not isinstance(source, str):
        raise UserError(f"{where}: source-ref {shorten(source)}; expected the path of an image")
    if "://" in source:
        raise UserError(f"{where}: source-ref {shorten(source)}; expected a path: download the images first")
    return source


def _parse_label(entry: dict[str, Any], name: str, metadata: dict[str, Any], where: str) -> Label:
    label = entry.get(name)
    if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label):  # as in SageMaker's own examples
        return int(label)
    if type(label) is int and label >= 0:  # not isinstance: True is an int too
        return label
    if isinstance(label, list) and all(type(value) is int and value >= 0 for value in label):
        # Ground Truth's [1, 0] means the classes 1 and 0; written by hand, it means class 0 but not class 1.
        if str(metadata.get("type")).endswith("-multilabel"):
            return set(label)
        if label:
            return label
    raise UserError(f"{where}: {shorten(name)} {shorten(label)}; expected a class id or a list of 0 and 1")


def _add_names(names: dict[int, str], label: Label, metadata: dict[str, Any], where: str) -> None:
    """Add the class names given by this line, and check them against those of earlier lines."""
    given = {label: metadata["class-name"]} if isinstance(label, int) and "class-name" in metadata else {}
    if not isinstance(label, int) and "class-map" in metadata:
        given = metadata["class-map"]
    if not isinstance(given, dict):
        raise UserError(f"{where}: class-map {shorten(given)}; expected an object from class ids to names")
    for key, name in given.items():
        if not re.fullmatch("[0-9]{1,9}", str(key)):
            raise UserError(f"{where}: class {shorten(key)}: {shorten(name)}; expected an id and a name")
        add_name(names, int(key), name, f"{where}: class {key}")


def add_name(names: dict[int, str], class_id: int, name: Any, where: str) -> None:
    """Add the name of a class. Raises UserError at `where` if it is not valid or differs from an earlier name."""
    if names.setdefault(class_id, check_name(name, where)) != name:
        raise UserError(f"{where}: {shorten(name)}; expected {shorten(names[class_id])}, as before")


# Common to .lst and manifest


def _to_listing(
    source: str | Path,
    root: str | Path,
    records: list[Record],
    classes: list[str] | None,
    names: dict[int, str],
) -> Listing:
    """Check the labels against `classes`; if it is None, name the classes that the labels need."""
    if not records:
        raise UserError(f"{source}: no lines; expected an image on each")
    given = classes or list(names.values())
    if len(set(given)) < len(given):
        raise UserError(f"{source}: classes {shorten(given)}; expected names that differ")
    classes = classes or [names.get(i) or _number(i, given) for i in range(_count_classes(source, records))]
    kind, first, paths = type(records[0].label), {}, []
    for line, path, label in records:
        where = f"{source}:{line}"
        if type(label) is not kind:
            raise UserError(f"{where}: label {shorten(label)}; expected one like {shorten(records[0].label)}")
        if kind is list and (len(label) != len(classes) or max(label) > 1):
            raise UserError(f"{where}: label {shorten(label)}; expected {len(classes)} values, 0 or 1 each")
        if kind is not list and _classes_needed(label) > len(classes):
            raise UserError(f"{where}: label {shorten(label)}; expected ids from 0 to {len(classes) - 1}")
        paths.append(image_path(root, path, where))
        before, other = first.setdefault(os.path.normpath(path), (line, label))
        if other != label:
            raise UserError(f"{where}: {path}: label {shorten(label)}; expected {shorten(other)}, as in line {before}")
    if kind is list and (without := [i for i in names if i >= len(classes)]):
        raise UserError(
            f"{source}: class {without[0]}, {shorten(names[without[0]])}: labels have {len(classes)} values; "
            "expected one for each class, or lists of class ids whose metadata have a type ending in -multilabel"
        )
    labels = [record.label for record in records]
    targets = _multi_hot(labels, len(classes)) if kind is set else torch.tensor(labels)
    return Listing(paths, targets.float() if targets.ndim == 2 else targets, classes)


def _number(class_id: int, given: list[str]) -> str:
    """Return a name, used by no other class, for a class without one."""
    return f"class {class_id}" if str(class_id) in given else str(class_id)


def _count_classes(source: str | Path, records: list[Record]) -> int:
    if isinstance(records[0].label, list):
        return len(records[0].label)
    most = max(records, key=lambda record: _classes_needed(record.label))
    count = _classes_needed(most.label)
    if not 0 < count <= MAX_CLASSES:
        raise UserError(f"{source}:{most.line}: label needs {count} classes; expected 1 to {MAX_CLASSES}")
    return count


def _classes_needed(label: Label) -> int:
    if isinstance(label, int):
        return label + 1
    return len(label) if isinstance(label, list) else max(label, default=-1) + 1


def _multi_hot(labels: list[set[int]], classes: int) -> Tensor:
    targets = torch.zeros(len(labels), classes)
    for row, label in zip(targets, labels, strict=True):
        row[list(label)] = 1
    return targets
