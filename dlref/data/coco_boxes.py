"""Boxes in COCO's format: one JSON file of images, annotations and categories."""

from collections.abc import Container
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

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
from dlref.data.files import check_name, image_path, read_json
from dlref.runtime.errors import UserError


def read_coco(
    annotations: str | Path, root: str | Path, classes: list[str] | None = None, on_bad_box: OnBadBox = "error"
) -> BoxListing:
    """Read a COCO instances file. Crowds become ignored objects.

    Args:
        annotations: the JSON file: images, annotations and categories.
        root: the folder that `file_name` is relative to.
        classes: the class names of the training pictures; None: the categories, in the order of their ids.
        on_bad_box: how to treat a box that has no area or is not within its picture.
    """
    content = read_json(annotations, _without_outlines)
    names = _parse_categories(content, str(annotations), classes)
    if classes is None:
        classes = [names[i] for i in sorted(names)]
    records: dict[int, Record] = {}
    for where, entry in objects_in(content, "images", str(annotations)):
        key = _new_id(entry, records, where, "image")
        records[key] = Record(where, image_path(root, entry.get("file_name"), where), declared_size(entry, where), [])
    if not records:
        raise UserError(f"{annotations}: no images; expected at least one")
    seen: set[int] = set()
    for where, entry in objects_in(content, "annotations", str(annotations)):
        if "id" in entry:
            seen.add(_new_id(entry, seen, where, "annotation"))
        found = _parse_coco(entry, where)
        image = whole(entry, "image_id", where)
        if image not in records:
            raise UserError(f"{where}: image_id {image}; expected the id of one of the images")
        records[image].objects.append(found)
    ids = {key: classes.index(name) for key, name in names.items()}
    return to_listing(annotations, list(records.values()), ids, classes, on_bad_box)


def _new_id(entry: dict[str, Any], taken: Container[int], where: str, kind: str) -> int:
    key = whole(entry, "id", where)
    if key in taken:
        raise UserError(f"{where}: id {key} again; expected a unique id for each {kind}")
    return key


def _without_outlines(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)  # most of the file; dropped during parsing, so that it never fills the memory
    return entry


def _parse_categories(content: dict[str, Any], path: str, classes: list[str] | None) -> dict[int, str]:
    names, taken = {}, set()
    for where, entry in objects_in(content, "categories", path):
        key, name = _new_id(entry, names, where, "category"), check_name(entry.get("name"), where)
        if name in taken:
            raise UserError(f"{where}: name {shorten(name)} again; expected a unique name for each category")
        if classes is not None and name not in classes:
            raise UserError(f"{where}: name {shorten(name)}; expected one of {shorten(classes)}")
        names[key] = name
        taken.add(name)
    if not names:
        raise UserError(f"{path}: no categories; expected at least one")
    return names


def _parse_coco(entry: dict[str, Any], where: str) -> Found:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise UserError(f"{where}: bbox {shorten(box)}; expected [x, y, width, height]")
    crowd = entry.get("iscrowd", 0)
    if type(crowd) is not int or crowd not in (0, 1):
        raise UserError(f"{where}: iscrowd {shorten(crowd)}; expected 0 or 1")
    return Found(where, whole(entry, "category_id", where), corners(*box), crowd == 1)
