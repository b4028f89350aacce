"""Boxes in Pascal VOC's format: an XML file for each picture, and lists of picture names."""

from pathlib import Path
from reprlib import repr as shorten
from xml.etree import ElementTree
from xml.parsers.expat import ErrorString

from dlref.data.box_listings import BoxListing, Found, OnBadBox, Record, to_listing
from dlref.data.files import check_name, image_path, read_fields
from dlref.data.images import show_progress
from dlref.runtime.errors import UserError
from dlref.runtime.lines import read_text

MAX_XML = 16 * 2**20  # bytes; an annotation has a few thousand


def read_voc(
    root: str | Path, names: str | Path, classes: list[str] | None = None, on_bad_box: OnBadBox = "error"
) -> BoxListing:
    """Read `root/Annotations/STEM.xml` and `root/JPEGImages/<its filename, or STEM.jpg>` for each stem in a list.

    Coordinates are used unchanged. VOC's own files count pixels from 1, other tools from 0, and no file specifies
    which, so nothing is subtracted.

    Args:
        root: the folder that has `Annotations` and `JPEGImages`.
        names: the list, such as `root/ImageSets/Main/train.txt`: one stem per line.
        classes: the class names of the training pictures; None: those found, sorted.
        on_bad_box: how to treat a box that has no area or is not within its picture.
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
    return to_listing(names, records, {name: i for i, name in enumerate(classes)}, classes, on_bad_box)


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
        # Parse text, not bytes: bytes may declare another encoding, which would hide entities from the check below.
        text = read_text(path, "an annotation", MAX_XML)
    except UserError as error:
        raise UserError(f"{listed}: {error}") from None
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # a few lines of nested entities can fill the memory
        raise UserError(f"{path}: a document type or entity; expected an annotation without them")
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
        return float("" if "_" in text else text)  # Python would read 1_0 as 10
    except ValueError:
        raise UserError(f"{where}: {name} {shorten(text)}; expected a number") from None
