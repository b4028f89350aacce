"""Boxes in SageMaker's formats: a JSON file for each image, or an augmented manifest with a line for each."""

import os
from collections import Counter
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from dlref.data.box_listings import (
    BoxListing,
    Found,
    OnBadBox,
    Record,
    corners,
    declared_size,
    is_number,
    objects_in,
    to_listing,
    whole,
)
from dlref.data.files import first_of, image_path, read_json, read_lines, visible_entries
from dlref.data.images import SUFFIXES, show_progress
from dlref.data.listings import MAX_CLASSES, add_name, only_attribute, parse_source
from dlref.runtime.errors import UserError
from dlref.runtime.lines import parse_object


def read_sagemaker(
    images: str | Path, annotations: str | Path, classes: list[str] | None = None, on_bad_box: OnBadBox = "error"
) -> BoxListing:
    """Read the training data of SageMaker's built-in object detection: a JSON file for each image.

    Args:
        images: the folder that `file` is relative to.
        annotations: the folder of the JSON files, which are read in the order of their names.
        classes: the class names of the training pictures, by class id; None: the names in `categories`, or the ids
            if no file has names. If any class has a name, a box of a class without one is an error.
        on_bad_box: how to treat a box that has no area or is not within its picture.
    """
    names = dict(enumerate(classes or []))
    limit = MAX_CLASSES if classes is None else len(classes)
    records = []
    files = [file for file in visible_entries(annotations) if file.name.lower().endswith(".json")]
    for file in show_progress(files, "Reading annotations"):
        entry = read_json(file.path)
        for where, category in objects_in(entry, "categories", file.path) if "categories" in entry else []:
            class_id = _class_id(category, where, limit)
            add_name(names, class_id, category.get("name"), f"{where}: class {class_id}")
        path = image_path(images, entry.get("file"), file.path)
        records.append(Record(file.path, path, _image_size(entry, file.path), _parse_boxes(entry, file.path, limit)))
    if not records:
        raise UserError(f"{annotations}: no .json files; expected one for each image")
    listing = _by_class_id(annotations, records, names, classes, on_bad_box)
    named = {os.path.normpath(record.path) for record in records}
    folders = {Path(os.path.normpath(images)), *(Path(path).parent for path in named)}
    entries = [entry for folder in sorted(folders) for entry in visible_entries(folder)]
    pictures = [entry.path for entry in entries if entry.name.lower().endswith(SUFFIXES)]
    if without := [os.path.relpath(path, images) for path in pictures if os.path.normpath(path) not in named]:
        rank_zero_warn(f"{images}: {len(without)} pictures without a .json, left out: {first_of(without)}")
    return listing


def read_box_manifest(
    path: str | Path,
    label_attribute: str | None = None,
    classes: list[str] | None = None,
    on_bad_box: OnBadBox = "error",
) -> BoxListing:
    """Read an augmented manifest of Ground Truth: one JSON object per line, with `source-ref` and the boxes.

    Args:
        path: the manifest; `source-ref` is relative to its folder.
        label_attribute: the key of the boxes; None: the only key besides `source-ref` and `*-metadata`.
        classes: the class names of the training pictures, by class id; None: the names in the metadata's `class-map`,
            or the ids if no line has names. If any class has a name, a box of a class without one is an error.
        on_bad_box: how to treat a box that has no area or is not within its picture.
    """
    names = dict(enumerate(classes or []))
    limit = MAX_CLASSES if classes is None else len(classes)
    records = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        entry = parse_object(line, where)
        label_attribute = label_attribute or only_attribute(entry, where)
        boxes = entry.get(label_attribute)
        if not isinstance(boxes, dict):
            raise UserError(
                f"{where}: {shorten(label_attribute)} {shorten(boxes)}; expected an object with annotations"
            )
        _add_class_map(names, entry.get(f"{label_attribute}-metadata", {}), where, limit)
        image = image_path(Path(path).parent, parse_source(entry, where), where)
        records.append(Record(where, image, _image_size(boxes, where), _parse_boxes(boxes, where, limit)))
    if not records:
        raise UserError(f"{path}: no lines; expected a picture on each")
    return _by_class_id(path, records, names, classes, on_bad_box)


def _add_class_map(names: dict[int, str], metadata: Any, where: str, limit: int) -> None:
    class_map = metadata.get("class-map", {}) if isinstance(metadata, dict) else None
    if not isinstance(class_map, dict):
        raise UserError(f"{where}: metadata {shorten(metadata)}; expected an object with a class-map")
    for key, name in class_map.items():
        # isascii: isdecimal alone accepts the digits of every script.
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < limit):
            raise UserError(f"{where}: class {shorten(key)}; expected a class id from 0 to {limit - 1}")
        add_name(names, int(key), name, f"{where}: class {key}")


def _class_id(entry: dict[str, Any], where: str, limit: int) -> int:
    key = whole(entry, "class_id", where)
    if not 0 <= key < limit:
        raise UserError(f"{where}: class_id {shorten(key)}; expected 0 to {limit - 1}")
    return key


def _image_size(entry: dict[str, Any], where: str) -> tuple[float | None, float | None]:
    if "image_size" not in entry:
        return None, None
    sizes = objects_in(entry, "image_size", where)
    if len(sizes) != 1:
        raise UserError(f"{where}: {len(sizes)} objects in image_size; expected one, with width and height")
    return declared_size(sizes[0][1], where)


def _parse_boxes(entry: dict[str, Any], where: str, limit: int) -> list[Found]:
    found = []
    for at, box in objects_in(entry, "annotations", where):
        sides = [box.get(name) for name in ("left", "top", "width", "height")]
        if not all(map(is_number, sides)):
            raise UserError(f"{at}: left, top, width and height {shorten(sides)}; expected four numbers")
        found.append(Found(at, _class_id(box, at, limit), corners(*sides)))
    return found


def _by_class_id(
    source: str | Path,
    records: list[Record],
    names: dict[int, str],
    classes: list[str] | None,
    on_bad_box: OnBadBox,
) -> BoxListing:
    """List records whose labels are class ids, with a name for each id up to the highest."""
    known = set(names) or {found.label for record in records for found in record.objects}
    if classes is None:
        classes = [names.get(i, str(i)) for i in range(1 + max(known, default=-1))]
        name, times = Counter(classes).most_common(1)[0] if classes else ("", 0)
        if times > 1:
            raise UserError(f"{source}: {times} classes called {shorten(name)}; expected a unique name for each")
    if not classes:
        raise UserError(f"{source}: no classes; expected at least one box or name")
    return to_listing(source, records, {i: i for i in known}, classes, on_bad_box)
