"""Which picture has which objects where: VOC, COCO, SageMaker's JSON for each image and its augmented manifest.

Each reader returns a `BoxListing` and opens no picture except to read its size. Boxes are x1 y1 x2 y2 in pixels of
the picture as `read_image` returns it, turned as its EXIF orientation says. Given `classes`, a reader checks the
labels against them: the class names of the training pictures are what validation and test pictures are read with.

A box has to have an area and lie within its picture; up to the border is within. One that has not or does not is an
error, unless `on_bad_box` says otherwise:

    "error"  refuse it
    "clip"   cut it to the picture, and leave it out if it then has no area
    "skip"   leave it out

Every other mistake is an error whatever `on_bad_box` is.

N boxes in a picture, K classes.
"""

import math
import os
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Literal, NamedTuple, get_args
from xml.etree import ElementTree
from xml.parsers.expat import ErrorString

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dlref.data.files import (
    check_name,
    first_of,
    image_path,
    picture_size,
    read_fields,
    read_json,
    read_lines,
    visible_entries,
)
from dlref.data.images import SUFFIXES, show_progress
from dlref.data.listings import MAX_CLASSES, add_name, only_attribute, parse_source
from dlref.runtime.errors import UserError
from dlref.runtime.lines import parse_object, read_text

MAX_XML = 16 * 2**20  # bytes; a VOC annotation has a few thousand


class Picture(NamedTuple):
    """An image file and its objects.

    Attributes:
        path: the image file.
        boxes: x1 y1 x2 y2 in pixels, float32 (N, 4); N may be 0.
        labels: class ids, int64 (N,).
        ignored: neither right nor wrong in evaluation, bool (N,): COCO's crowds and VOC's difficult objects.
    """

    path: str
    boxes: Tensor
    labels: Tensor
    ignored: Tensor


class BoxListing(NamedTuple):
    """Pictures in the order of their source.

    Attributes:
        pictures: pictures, those without objects too.
        classes: K class names.
    """

    pictures: list[Picture]
    classes: list[str]

    @property
    def images(self) -> list[str]:
        """The paths of the pictures."""
        return [picture.path for picture in self.pictures]

    def take(self, places: list[int]) -> "BoxListing":
        """The pictures at these places."""
        return self._replace(pictures=[self.pictures[i] for i in places])


OnBadBox = Literal["error", "clip", "skip"]
Box = tuple[float, float, float, float]


class Found(NamedTuple):
    """An object as its source has it: where that is, its class by name or id, its box, whether it is ignored."""

    where: str
    label: Hashable
    box: Box
    ignored: bool = False


class Record(NamedTuple):
    """A picture as its source has it: where that is, the path, width and height if declared, and its objects."""

    where: str
    path: str
    size: tuple[float | None, float | None]
    objects: list[Found]


# Pascal VOC


def read_voc(
    root: str | Path, names: str | Path, classes: list[str] | None = None, on_bad_box: OnBadBox = "error"
) -> BoxListing:
    """Read `root/Annotations/STEM.xml` and `root/JPEGImages/<its filename, or STEM.jpg>` for each stem in a list.

    Coordinates are taken as they are. VOC's own count pixels from 1, those of other tools from 0, and no file says
    which: nothing is subtracted.

    Args:
        root: the folder that has `Annotations` and `JPEGImages`.
        names: the list, such as `root/ImageSets/Main/train.txt`: one stem a line.
        classes: the class names of the training pictures; None is those found, sorted.
        on_bad_box: what becomes of a box without area or not within its picture.
    """
    records, seen = [], {}
    for where, (stem,) in show_progress(list(read_fields(names, 1, "the name of a picture")), "Reading annotations"):
        if stem in seen:
            raise UserError(f"{where}: {shorten(stem)} again; expected it once, as in {seen[stem]}")
        seen[stem] = where
        records.append(_parse_voc(Path(root), stem, where))
    if not records:
        raise UserError(f"{names}: no lines; expected the name of a picture on each")
    if classes is None:
        classes = sorted({found.label for record in records for found in record.objects})
    if not classes:
        raise UserError(f"{names}: no objects; expected at least one, to know the classes")
    return _to_listing(names, records, {name: i for i, name in enumerate(classes)}, classes, on_bad_box)


def _parse_voc(root: Path, stem: str, listed: str) -> Record:
    path = root / "Annotations" / f"{stem}.xml"
    tree = _read_xml(path, listed)
    if tree.tag != "annotation":
        raise UserError(f"{path}: {shorten(tree.tag)}; expected an annotation")
    image = _text(tree, "filename") or f"{stem}.jpg"
    size = [_xml_number(tree, name, str(path)) if _text(tree, name) else None for name in ("size/width", "size/height")]
    objects = []
    for number, entry in enumerate(tree.findall("object"), start=1):
        where = f"{path}: object {number}"
        name = check_name(_text(entry, "name"), where)
        difficult = _text(entry, "difficult") or "0"
        if difficult not in ("0", "1"):
            raise UserError(f"{where}: difficult {shorten(difficult)}; expected 0 or 1")
        box = tuple(_xml_number(entry, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax"))
        objects.append(Found(where, name, box, difficult == "1"))
    return Record(str(path), image_path(root / "JPEGImages", image, str(path)), tuple(size), objects)


def _read_xml(path: Path, listed: str) -> ElementTree.Element:
    try:
        # Text, not bytes: bytes may declare another encoding, in which the next check would find nothing.
        text = read_text(path, "an annotation", MAX_XML)
    except UserError as error:
        raise UserError(f"{listed}: {error}") from None
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities of entities fill the memory from a few lines
        raise UserError(f"{path}: a document type or entity; expected an annotation without")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        what = ErrorString(error.code)
        raise UserError(f"{path}:{error.position[0]}: {what}; expected well-formed XML") from None


def _text(entry: ElementTree.Element, name: str) -> str:
    return (entry.findtext(name) or "").strip()


def _xml_number(entry: ElementTree.Element, name: str, where: str) -> float:
    text = _text(entry, name)
    try:
        return float("" if "_" in text else text)  # 1_0 is Python's 10
    except ValueError:
        raise UserError(f"{where}: {name} {shorten(text)}; expected a number") from None


# COCO


def read_coco(
    annotations: str | Path, root: str | Path, classes: list[str] | None = None, on_bad_box: OnBadBox = "error"
) -> BoxListing:
    """Read an instances file of COCO. Crowds are ignored objects.

    Args:
        annotations: the JSON file: images, annotations and categories.
        root: the folder that `file_name` is relative to.
        classes: the class names of the training pictures; None is the categories, in the order of their ids.
        on_bad_box: what becomes of a box without area or not within its picture.
    """
    content = read_json(annotations, _without_outlines)
    names = _parse_categories(content, str(annotations), classes)
    if classes is None:
        classes = [names[i] for i in sorted(names)]
    objects: dict[int, list[Found]] = {}
    records = []
    for where, entry in _objects(content, "images", str(annotations)):
        key = _whole(entry, "id", where)
        if key in objects:
            raise UserError(f"{where}: id {key} again; expected another for each image")
        objects[key] = []
        path = image_path(root, entry.get("file_name"), where)
        records.append(Record(where, path, _declared_size(entry, where), objects[key]))
    if not records:
        raise UserError(f"{annotations}: no images; expected at least one")
    seen = set()
    for where, entry in _objects(content, "annotations", str(annotations)):
        if "id" in entry:
            key = _whole(entry, "id", where)
            if key in seen:
                raise UserError(f"{where}: id {key} again; expected another for each annotation")
            seen.add(key)
        found = _parse_coco(entry, where)
        image = _whole(entry, "image_id", where)
        if image not in objects:
            raise UserError(f"{where}: image_id {image}; expected the id of one of the images")
        objects[image].append(found)
    index = {name: i for i, name in enumerate(classes)}
    return _to_listing(annotations, records, {key: index[name] for key, name in names.items()}, classes, on_bad_box)


def _without_outlines(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)  # most of the file: dropped while it is read, it never fills the memory
    return entry


def _parse_categories(content: dict[str, Any], path: str, classes: list[str] | None) -> dict[int, str]:
    names, taken = {}, set()
    for where, entry in _objects(content, "categories", path):
        key, name = _whole(entry, "id", where), check_name(entry.get("name"), where)
        if key in names:
            raise UserError(f"{where}: id {key} again; expected another for each category")
        if name in taken:
            raise UserError(f"{where}: name {shorten(name)} again; expected another for each category")
        if classes is not None and name not in classes:
            raise UserError(f"{where}: name {shorten(name)}; expected one of {shorten(classes)}")
        names[key] = name
        taken.add(name)
    if not names:
        raise UserError(f"{path}: no categories; expected at least one")
    return names


def _parse_coco(entry: dict[str, Any], where: str) -> Found:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise UserError(f"{where}: bbox {shorten(box)}; expected [x, y, width, height]")
    crowd = entry.get("iscrowd", 0)
    if type(crowd) is not int or crowd not in (0, 1):
        raise UserError(f"{where}: iscrowd {shorten(crowd)}; expected 0 or 1")
    return Found(where, _whole(entry, "category_id", where), _corners(*box), crowd == 1)


# SageMaker


def read_sagemaker(
    images: str | Path, annotations: str | Path, classes: list[str] | None = None, on_bad_box: OnBadBox = "error"
) -> BoxListing:
    """Read what SageMaker's built-in object detection is trained with: a JSON file for each image.

    Args:
        images: the folder that `file` is relative to.
        annotations: the folder with the JSON files; they are read in the order of their names.
        classes: the class names of the training pictures, by class id; None is what `categories` call them, and
            where no file names one it is called by its id.
        on_bad_box: what becomes of a box without area or not within its picture.
    """
    names = dict(enumerate(classes or []))
    limit = MAX_CLASSES if classes is None else len(classes)
    records = []
    files = [file for file in visible_entries(annotations) if file.name.lower().endswith(".json")]
    for file in show_progress(files, "Reading annotations"):
        entry = read_json(file.path)
        for where, category in _objects(entry, "categories", file.path) if "categories" in entry else []:
            class_id = _class_id(category, where, limit)
            add_name(names, class_id, category.get("name"), f"{where}: class {class_id}")
        path = image_path(images, entry.get("file"), file.path)
        records.append(Record(file.path, path, _image_size(entry, file.path), _parse_boxes(entry, file.path, limit)))
    if not records:
        raise UserError(f"{annotations}: no .json files; expected one for each image")
    listing = _by_class_id(annotations, records, names, classes, on_bad_box)
    named = {os.path.normpath(record.path) for record in records}
    pictures = [entry.path for entry in visible_entries(images) if entry.name.lower().endswith(SUFFIXES)]
    if without := [os.path.basename(path) for path in pictures if os.path.normpath(path) not in named]:
        rank_zero_warn(f"{images}: {len(without)} pictures without a .json, left out: {first_of(without)}")
    return listing


def read_box_manifest(
    path: str | Path,
    root: str | Path | None = None,
    label_attribute: str | None = None,
    classes: list[str] | None = None,
    on_bad_box: OnBadBox = "error",
) -> BoxListing:
    """Read an augmented manifest of Ground Truth: a JSON object a line, `source-ref` and an attribute with the boxes.

    Args:
        path: the manifest.
        root: the folder that `source-ref` is relative to; None is the manifest's own.
        label_attribute: the key of the boxes; None is the only one besides `source-ref` and `*-metadata`.
        classes: the class names of the training pictures, by class id; None is what the metadata's `class-map` calls
            them, and where no line names one it is called by its id.
        on_bad_box: what becomes of a box without area or not within its picture.
    """
    root = Path(path).parent if root is None else root
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
        image = image_path(root, parse_source(entry, where), where)
        records.append(Record(where, image, _image_size(boxes, where), _parse_boxes(boxes, where, limit)))
    if not records:
        raise UserError(f"{path}: no lines; expected a picture on each")
    return _by_class_id(path, records, names, classes, on_bad_box)


def _add_class_map(names: dict[int, str], metadata: Any, where: str, limit: int) -> None:
    class_map = metadata.get("class-map", {}) if isinstance(metadata, dict) else None
    if not isinstance(class_map, dict):
        raise UserError(f"{where}: metadata {shorten(metadata)}; expected an object with a class-map")
    for key, name in class_map.items():
        # isascii: isdecimal alone takes the digits of every script.
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < limit):
            raise UserError(f"{where}: class {shorten(key)}; expected a class id from 0 to {limit - 1}")
        add_name(names, int(key), name, f"{where}: class {key}")


def _class_id(entry: dict[str, Any], where: str, limit: int) -> int:
    key = _whole(entry, "class_id", where)
    if not 0 <= key < limit:
        raise UserError(f"{where}: class_id {shorten(key)}; expected 0 to {limit - 1}")
    return key


def _image_size(entry: dict[str, Any], where: str) -> tuple[float | None, float | None]:
    if "image_size" not in entry:
        return None, None
    sizes = _objects(entry, "image_size", where)
    if len(sizes) != 1:
        raise UserError(f"{where}: {len(sizes)} objects in image_size; expected one, with width and height")
    return _declared_size(sizes[0][1], where)


def _parse_boxes(entry: dict[str, Any], where: str, limit: int) -> list[Found]:
    found = []
    for at, box in _objects(entry, "annotations", where):
        sides = [box.get(name) for name in ("left", "top", "width", "height")]
        if not all(map(_is_number, sides)):
            raise UserError(f"{at}: left, top, width and height {shorten(sides)}; expected four numbers")
        found.append(Found(at, _class_id(box, at, limit), _corners(*sides)))
    return found


def _by_class_id(
    source: str | Path,
    records: list[Record],
    names: dict[int, str],
    classes: list[str] | None,
    on_bad_box: OnBadBox,
) -> BoxListing:
    """List records whose labels are class ids, with a name for each id up to the highest."""
    if classes is None:
        used = {found.label for record in records for found in record.objects}
        classes = [names.get(i, str(i)) for i in range(1 + max(used | set(names), default=-1))]
        name, times = Counter(classes).most_common(1)[0] if classes else ("", 0)
        if times > 1:
            raise UserError(f"{source}: {times} classes called {shorten(name)}; expected another name for each")
    if not classes:
        raise UserError(f"{source}: no classes; expected at least one box or name")
    return _to_listing(source, records, {i: i for i in range(len(classes))}, classes, on_bad_box)


# JSON


def _objects(holder: dict[str, Any], name: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a list, each with its place for an error to name."""
    values = holder.get(name)
    if not isinstance(values, list):
        raise UserError(f"{where}: {name} {shorten(values)}; expected a list")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name}[{i}]: {shorten(value)}; expected an object")
    return [(f"{where}: {name}[{i}]", value) for i, value in enumerate(values)]


def _whole(entry: dict[str, Any], name: str, where: str) -> int:
    value = entry.get(name)
    if type(value) is not int:  # not isinstance: True is an int too
        raise UserError(f"{where}: {name} {shorten(value)}; expected a whole number")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _declared_size(entry: dict[str, Any], where: str) -> tuple[float | None, float | None]:
    for name in ("width", "height"):
        if name in entry and not _is_number(entry[name]):
            raise UserError(f"{where}: {name} {shorten(entry[name])}; expected a number of pixels")
    return entry.get("width"), entry.get("height")


def _corners(x: float, y: float, width: float, height: float) -> Box:
    try:
        x, y, width, height = float(x), float(y), float(width), float(height)
    except OverflowError:  # a whole number beyond every float
        x = y = width = height = math.inf
    return x, y, x + width, y + height


# Common to all


def _to_listing(
    source: str | Path, records: list[Record], ids: dict[Hashable, int], classes: list[str], on_bad_box: OnBadBox
) -> BoxListing:
    """Check each record against its picture and the classes, and warn of boxes that were clipped or skipped.

    `ids` has the class id of each label.
    """
    if on_bad_box not in get_args(OnBadBox):
        raise UserError(f"on_bad_box: {shorten(on_bad_box)}; expected one of {', '.join(get_args(OnBadBox))}")
    pictures, mended, seen = [], Counter(), {}
    for record in show_progress(records, "Checking boxes"):
        path = os.path.normpath(record.path)
        if path in seen:
            raise UserError(
                f"{record.where}: {record.path} again; expected each picture once, this one in {seen[path]}"
            )
        seen[path] = record.where
        pictures.append(_check_picture(record, ids, on_bad_box, mended))
    if mended:
        what = ", ".join(f"{count} {how}" for how, count in mended.items())
        rank_zero_warn(f"{source}: boxes that stick out of their picture or have no area: {what}")
    return BoxListing(pictures, classes)


def _check_picture(record: Record, ids: dict[Hashable, int], on_bad_box: OnBadBox, mended: Counter) -> Picture:
    try:
        size = picture_size(record.path)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
    if any(told is not None and told != true for told, true in zip(record.size, size, strict=True)):
        told = " x ".join(shorten(told).removesuffix(".0") for told in record.size)  # VOC's are read as decimals
        true = f"{size[0]} x {size[1]}, as {record.path} has when shown"
        raise UserError(f"{record.where}: size {told}; expected {true}")
    # Checked as they are handed on: in float32 a sliver has no area, and nothing sticks out by float64's rounding.
    rounded = torch.tensor([found.box for found in record.objects], dtype=torch.float32).tolist()
    boxes, labels, ignored = [], [], []
    for found, box in zip(record.objects, rounded, strict=True):
        if found.label not in ids:
            raise UserError(f"{found.where}: class {shorten(found.label)}; expected one of {shorten(list(ids))}")
        fitted = _fit(box, size, found, on_bad_box, mended)
        if fitted is not None:
            boxes.append(fitted)
            labels.append(ids[found.label])
            ignored.append(found.ignored)
    return Picture(
        record.path,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(ignored, dtype=torch.bool),
    )


def _fit(box: Box, size: tuple[int, int], found: Found, on_bad_box: OnBadBox, mended: Counter) -> Box | None:
    """Return a good box as it is; a bad one cut to the picture, or None to leave it out."""
    x1, y1, x2, y2 = box
    width, height = size
    if 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:
        return box
    finite, has_area = all(map(math.isfinite, box)), x1 < x2 and y1 < y2
    if on_bad_box == "error":
        what = f"{found.where}: box {', '.join(f'{value:.10g}' for value in found.box)}"
        if not finite:
            raise UserError(f"{what}: not finite; expected four numbers")
        if not has_area:
            raise UserError(f"{what}: no area; expected its second corner below and to the right of its first")
        raise UserError(f"{what}: outside the picture; expected it within 0, 0, {width}, {height}")
    if on_bad_box == "clip" and finite and has_area:
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if x1 < x2 and y1 < y2:
            mended["clipped"] += 1
            return x1, y1, x2, y2
    mended["skipped"] += 1
    return None
