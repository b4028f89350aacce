"""Readers of boxes, given good, broken and arbitrary annotations."""

import io
import json
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from refusals import answer_or_none, error_of

from dlref.data import box_listings
from dlref.data.coco_boxes import read_coco
from dlref.data.files import read_splits
from dlref.data.images import read_image
from dlref.data.listings import MAX_CLASSES
from dlref.data.sagemaker_boxes import read_box_manifest, read_sagemaker
from dlref.data.voc_boxes import MAX_XML, read_voc

pytestmark = pytest.mark.filterwarnings("ignore:The image (de|en)coding")
# tmp_path is one folder for all examples of a test: each example overwrites the same files.
quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)

# One set in four formats. `two.png` has a cat and a dog, `none.jpg` nothing and `one.png` a cat that fills the picture.

SIZES = {"two.png": (40, 30), "none.jpg": (30, 40), "one.png": (20, 10)}


def voc(picture: str, *objects: str) -> str:
    width, height = SIZES[picture]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>\n<filename>{picture}</filename>\n{size}\n{''.join(objects)}</annotation>"


def voc_object(name: str, box: str, difficult: int) -> str:
    sides = "".join(
        f"<{side}>{at}</{side}>" for side, at in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True)
    )
    # A part, such as the head of a person in VOC, is not an object of its own.
    part = "<part><name>head</name><bndbox><xmin>0</xmin></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox>{part}</object>\n"


def sized(picture: str) -> dict:
    return dict(zip(("width", "height"), SIZES[picture], strict=True))


def sides(class_id: int, left: float, top: float, width: float, height: float) -> dict:
    return {"class_id": class_id, "left": left, "top": top, "width": width, "height": height}


def sagemaker(picture: str, *boxes: dict) -> str:
    names = [{"class_id": 0, "name": "cat"}, {"class_id": 1, "name": "dog"}]
    size = [sized(picture) | {"depth": 3}]
    return json.dumps({"file": picture, "image_size": size, "annotations": boxes, "categories": names})


def manifest(picture: str, *boxes: dict) -> str:
    value = {"image_size": [sized(picture) | {"depth": 3}], "annotations": boxes}
    return json.dumps({"source-ref": picture, "pets": value, "pets-metadata": {"class-map": {"0": "cat", "1": "dog"}}})


MANIFEST = "JPEGImages/a.manifest"
BOXES = {
    "two.png": (sides(1, 1, 2, 10, 20), sides(0, 5.5, 0, 34.5, 30)),
    "none.jpg": (),
    "one.png": (sides(0, 0, 0, 20, 10),),
}
COCO = {
    "images": [{"id": 7 - i, "file_name": name, **sized(name)} for i, name in enumerate(SIZES)],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [1, 2, 10, 20], "segmentation": [[1, 2, 3, 4, 5, 6]]},
        {"id": 2, "image_id": 5, "category_id": 17, "bbox": [0, 0, 20, 10], "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 17, "bbox": [5.5, 0, 34.5, 30], "iscrowd": 1},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
}
GOOD = {
    "voc": {
        "train.txt": "two\nnone\r\n\none \n",
        "Annotations/two.xml": voc(
            "two.png", voc_object("dog", "1 2 11 22", 0), voc_object("cat", " 5.5 0 40 30.0", 1)
        ),
        "Annotations/none.xml": voc("none.jpg"),
        "Annotations/one.xml": voc("one.png", voc_object("cat", "0 0 20 10", 0)),
    },
    "coco": {"coco.json": json.dumps(COCO)},
    "sagemaker": {f"json/{i}.json": sagemaker(name, *boxes) for i, (name, boxes) in enumerate(BOXES.items())},
    "manifest": {MANIFEST: "\n".join(manifest(name, *boxes) for name, boxes in BOXES.items())},
}
READERS = {
    "voc": lambda root, **options: read_voc(root, root / "train.txt", **options),
    "coco": lambda root, **options: read_coco(root / "coco.json", root / "JPEGImages", **options),
    "sagemaker": lambda root, **options: read_sagemaker(root / "JPEGImages", root / "json", **options),
    "manifest": lambda root, **options: read_box_manifest(root / MANIFEST, **options),
}
FORMATS = list(READERS)


def encode(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", SIZES[name]).save(file, Image.registered_extensions()[Path(name).suffix])
    return file.getvalue()


PICTURES = {name: encode(name) for name in SIZES}


def write(root: Path, kind: str) -> Path:
    for name, text in GOOD[kind].items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, newline="")
    (root / "JPEGImages").mkdir(exist_ok=True)
    for name, content in PICTURES.items():
        (root / "JPEGImages" / name).write_bytes(content)
    return root


def mutate(root: Path, file: str, old: str | None, new: str | bytes | None) -> None:
    """Replace the first `old`, or if it is None the whole content, of a file; if `new` is None, delete the file."""
    path = root / file
    if new is None:
        path.unlink()
    elif old is None:
        path.write_bytes(new.encode() if isinstance(new, str) else new)
    else:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))


def well_formed_or_none(function, *arguments, **options):
    """Check and return the result of a call, or return None if the call refuses its input."""
    listing = answer_or_none(function, *arguments, **options)
    if listing is None:
        return None
    for picture in listing.pictures:
        count = len(picture.boxes)
        width, height = SIZES[Path(picture.path).name]
        assert picture.boxes.shape == (count, 4)
        assert picture.labels.shape == picture.ignored.shape == (count,)
        assert all(0 <= label < len(listing.classes) for label in picture.labels.tolist())
        assert all(0 <= a < c <= width and 0 <= b < d <= height for a, b, c, d in picture.boxes.tolist())
    return listing


# Good sets


@pytest.mark.parametrize("kind", FORMATS)
def test_a_good_set_is_read_in_every_format(tmp_path, kind):
    listing = READERS[kind](write(tmp_path, kind))
    assert [picture.path for picture in listing.pictures] == [str(tmp_path / "JPEGImages" / name) for name in SIZES]
    two, none, one = listing.pictures
    assert two.boxes.tolist() == [[1, 2, 11, 22], [5.5, 0, 40, 30]]
    assert one.boxes.tolist() == [[0, 0, 20, 10]]
    assert listing.classes == ["cat", "dog"]
    assert two.labels.tolist() == [1, 0]
    assert one.labels.tolist() == [0]
    assert two.ignored.tolist() == [False, kind in ("voc", "coco")]
    assert one.ignored.tolist() == [False]
    assert none.boxes.shape == (0, 4)
    assert none.labels.shape == none.ignored.shape == (0,)
    for picture in listing.pictures:
        assert [t.dtype for t in picture[1:]] == [torch.float32, torch.int64, torch.bool]


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_given_classes_set_the_order_of_names(tmp_path, kind):
    listing = READERS[kind](write(tmp_path, kind), classes=["dog", "bird", "cat"])
    assert listing.classes == ["dog", "bird", "cat"]
    assert listing.pictures[0].labels.tolist() == [0, 2]


@pytest.mark.parametrize("kind", ["sagemaker", "manifest"])
def test_class_ids_index_the_given_classes(tmp_path, kind):
    root = write(tmp_path, kind)
    listing = READERS[kind](root, classes=["cat", "dog", "bird"])
    assert listing.classes == ["cat", "dog", "bird"]
    assert listing.pictures[0].labels.tolist() == [1, 0]
    assert "class 0: 'cat'; expected 'dog', as before" in error_of(READERS[kind], root, classes=["dog", "cat"])
    message = error_of(READERS[kind], root, classes=["cat"])
    assert ("class_id 1; expected 0 to 0" if kind == "sagemaker" else "class '1'; expected a class id") in message


@pytest.mark.parametrize("kind", ["sagemaker", "manifest"])
def test_class_ids_without_any_names_are_their_own_names(tmp_path, kind):
    root = write(tmp_path, kind)
    for file, text in GOOD[kind].items():
        content = re.sub(r'"categories": \[.*?\]', '"categories": []', text)
        content = re.sub(r'"class-map": {.*?}', '"class-map": {}', content)
        (root / file).write_text(content.replace('"class_id": 0, "left": 0', '"class_id": 3, "left": 0'))
    listing = READERS[kind](root)
    assert listing.classes == ["0", "1", "2", "3"]
    assert listing.pictures[2].labels.tolist() == [3]


@pytest.mark.parametrize("kind", ["sagemaker", "manifest"])
def test_a_class_id_that_no_name_belongs_to_is_refused(tmp_path, kind):
    root = write(tmp_path, kind)
    for file, text in GOOD[kind].items():
        (root / file).write_text(text.replace('"class_id": 0, "left": 0', '"class_id": 3, "left": 0'))
    message = error_of(READERS[kind], root)
    assert "annotations[0]: class 3; expected one of [0, 1]" in message


def test_voc_is_read_without_its_optional_fields(tmp_path):
    root = write(tmp_path, "voc")
    mutate(root, "Annotations/one.xml", "<filename>one.png</filename>\n", "")
    mutate(root, "Annotations/one.xml", "<size><width>20</width><height>10</height><depth>3</depth></size>", "")
    mutate(root, "Annotations/one.xml", "<difficult>0</difficult>", "")
    Image.new("RGB", (20, 10)).save(root / "JPEGImages/one.jpg")
    picture = READERS["voc"](root).pictures[2]
    assert picture.path == str(root / "JPEGImages/one.jpg")
    assert picture.boxes.tolist() == [[0, 0, 20, 10]]
    assert picture.ignored.tolist() == [False]


def test_coco_is_read_without_its_optional_fields(tmp_path):
    content = json.loads(json.dumps(COCO))
    for entry in content["images"] + content["annotations"]:
        for name in ("width", "height", "iscrowd"):
            entry.pop(name, None)
    for entry in content["annotations"]:
        del entry["id"]
    root = write(tmp_path, "coco")
    mutate(root, "coco.json", None, "\ufeff" + json.dumps(content))  # a byte order mark, as Windows writes it
    assert [len(picture.boxes) for picture in READERS["coco"](root).pictures] == [2, 0, 1]


def test_a_manifest_next_to_its_pictures_and_with_two_attributes_is_read(tmp_path):
    root = write(tmp_path, "manifest")
    text = GOOD["manifest"][MANIFEST].replace('"pets":', '"other": 1, "pets":')
    (root / "JPEGImages/b.manifest").write_text(text)
    assert "attributes ['other', 'pets']" in error_of(read_box_manifest, root / "JPEGImages/b.manifest")
    listing = read_box_manifest(root / "JPEGImages/b.manifest", label_attribute="pets")
    assert [len(picture.boxes) for picture in listing.pictures] == [2, 0, 1]
    assert listing.pictures[0].path == str(root / "JPEGImages/two.png")


def test_boxes_are_checked_as_float32(tmp_path):
    root = write(tmp_path, "coco")
    mutate(root, "coco.json", "[0, 0, 20, 10]", "[0, 0, 20.000000000000004, 10]")
    assert READERS["coco"](root).pictures[2].boxes.tolist() == [[0, 0, 20, 10]]
    mutate(root, "coco.json", "20.000000000000004", "20.00001")
    assert "outside the picture" in error_of(READERS["coco"], root)
    mutate(root, "coco.json", "[0, 0, 20.00001, 10]", "[4, 4, 1e-9, 10]")
    assert "no area" in error_of(READERS["coco"], root)


@pytest.mark.parametrize("terminal", ["1", "0"])
@pytest.mark.parametrize("kind", FORMATS)
def test_progress_is_shown_only_on_stderr_and_only_on_a_terminal(tmp_path, kind, terminal, monkeypatch, capsys):
    root = write(tmp_path, kind)
    monkeypatch.setattr("dlref.data.images.SHOW_PROGRESS_ABOVE", 0)
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)  # read by rich
    monkeypatch.setenv("TERM", "xterm")
    assert len(READERS[kind](root).pictures) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Checking boxes" in shown.err if terminal == "1" else shown.err == ""


@pytest.mark.parametrize("suffix", ["jpg", "mpo", "png", "webp", "gif"])
def test_the_expected_size_is_that_of_the_upright_picture(tmp_path, suffix):
    root = write(tmp_path, "manifest")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path = root / f"JPEGImages/x.{suffix}"
        frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]} if suffix == "mpo" else {}
        Image.new("RGB", (40, 30)).save(path, exif=exif, **frames)
        _, height, width = read_image(str(path)).shape
        value = {"image_size": [{"width": width, "height": height}], "annotations": [sides(0, 0, 0, width, height)]}
        mutate(root, MANIFEST, None, json.dumps({"source-ref": path.name, "c": value}))
        assert READERS["manifest"](root).pictures[0].boxes.tolist() == [[0, 0, width, height]]
        value["image_size"] = [{"width": height, "height": width}]
        mutate(root, MANIFEST, None, json.dumps({"source-ref": path.name, "c": value}))
        assert f"size {height} x {width}; expected {width} x {height}" in error_of(READERS["manifest"], root)


def test_broken_exif_does_not_turn_a_picture(tmp_path):
    root = write(tmp_path, "coco")
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0", b"nonsense"):
        Image.new("RGB", (40, 30)).save(root / "JPEGImages/two.png", exif=exif)
        assert len(READERS["coco"](root).pictures) == 3


# Boxes that can be repaired

BAD_BOXES = [  # x1 y1 x2 y2 in one.png (20 × 10), the clipped box, the complaint
    ((-1, -2, 21, 12), [0, 0, 20, 10], "outside the picture; expected it within 0, 0, 20, 10"),
    ((19, 0, 20.5, 10), [19, 0, 20, 10], "outside the picture"),
    ((20, 0, 22, 10), None, "outside the picture"),
    ((0, 10, 20, 12), None, "outside the picture"),
    ((-5, -5, -1, -1), None, "outside the picture"),
    ((4, 4, 4, 4), None, "no area; expected its second corner below and to the right of its first"),
    ((8, 0, 4, 10), None, "no area"),
    ((0, 5, 4, 4.5), None, "no area"),
    ((0, 5, 4, 5), None, "no area"),
    ((4, 0, 4, 5), None, "no area"),
    (("nan", 0, 4, 4), None, "not finite; expected four numbers"),
    ((0, 0, "inf", 4), None, "not finite"),
]


def mended(kind: str, root: Path, on_bad_box: str, counted: str):
    """Read the set; check that a single warning counts the bad boxes."""
    source = {"voc": "train.txt", "coco": "coco.json", "sagemaker": "json", "manifest": MANIFEST}[kind]
    message = f"{root}/{source}: boxes that stick out of their picture or have no area: {counted}"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as told:
        listing = READERS[kind](root, on_bad_box=on_bad_box)
    assert len(told) == 1
    return listing


def test_pictures_without_a_json_file_are_counted_in_a_warning(tmp_path):
    root = write(tmp_path, "sagemaker")
    first, *_ = sorted((root / "json").iterdir())
    entry = json.loads(first.read_text())
    (root / "JPEGImages/deep").mkdir()
    (root / "JPEGImages" / entry["file"]).rename(root / "JPEGImages/deep" / entry["file"])
    first.write_text(json.dumps(entry | {"file": f"deep/{entry['file']}"}))
    for name in ("z.png", "deep/z.png"):
        (root / "JPEGImages" / name).write_bytes(next(iter(PICTURES.values())))
    message = f"{root}/JPEGImages: 2 pictures without a .json, left out: z.png, deep/z.png"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        listing = READERS["sagemaker"](root)
    assert len(listing.pictures) == len(BOXES)


def read_aloud(read, *args, **kwargs):
    """Return the listing and the count at the end of the only warning, or "" if there is no warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        listing = read(*args, **kwargs)
    assert len(told) <= 1
    return listing, "".join(str(one.message).rpartition(": ")[2] for one in told)


def put_box(root: Path, kind: str, corners) -> None:
    """Replace the box of one.png."""
    x1, y1, x2, y2 = (float(value) for value in corners)
    x, y, width, height = (json.dumps(value) for value in (x1, y1, x2 - x1, y2 - y1))
    if kind == "voc":
        old, new = voc_object("cat", "0 0 20 10", 0), voc_object("cat", f"{x1} {y1} {x2} {y2}", 0)
    elif kind == "coco":
        old, new = "[0, 0, 20, 10]", f"[{x}, {y}, {width}, {height}]"
    else:
        old = json.dumps(sides(0, 0, 0, 20, 10))
        new = f'{{"class_id": 0, "left": {x}, "top": {y}, "width": {width}, "height": {height}}}'
    mutate(root, list(GOOD[kind])[-1], old, new)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("corners", "clipped", "complaint"), BAD_BOXES)
def test_a_bad_box_is_refused_skipped_or_clipped(tmp_path, kind, corners, clipped, complaint):
    root = write(tmp_path, kind)
    put_box(root, kind, corners)
    place = {
        "voc": "Annotations/one.xml: object 1: box ",
        "coco": "coco.json: annotations[1]: box ",
        "sagemaker": "json/2.json: annotations[0]: box ",
        "manifest": f"{MANIFEST}:3: annotations[0]: box ",
    }
    message = error_of(READERS[kind], root)
    assert f"{root}/{place[kind]}" in message
    assert complaint in message
    skipped = mended(kind, root, "skip", "1 skipped")
    assert skipped.pictures[2].boxes.shape == (0, 4)
    assert skipped.pictures[2].labels.shape == skipped.pictures[2].ignored.shape == (0,)
    cut = mended(kind, root, "clip", "1 clipped" if clipped else "1 skipped")
    assert cut.pictures[2].boxes.tolist() == ([clipped] if clipped else [])
    for listing in (skipped, cut):
        assert listing.pictures[0].boxes.tolist() == [[1, 2, 11, 22], [5.5, 0, 40, 30]]
        assert listing.pictures[0].labels.tolist() == [1, 0]


def test_a_coordinate_too_large_for_a_float_is_refused_or_skipped(tmp_path):
    root = write(tmp_path, "coco")
    mutate(root, "coco.json", "[0, 0, 20, 10]", f"[0, 0, {10**400}, 10]")
    assert "annotations[1]: box inf, inf, inf, inf: not finite; expected" in error_of(READERS["coco"], root)
    mended("coco", root, "clip", "1 skipped")


def test_labels_stay_with_their_boxes_when_some_boxes_are_left_out(tmp_path):
    boxes = ["1 1 1 5", "2 2 50 9", "3 3 4 4", "-9 0 -2 9", "5 -5 6 6"]
    objects = [voc_object(name, box, i % 2) for i, (name, box) in enumerate(zip("abcde", boxes, strict=True))]
    root = write(tmp_path, "voc")
    mutate(root, "Annotations/two.xml", None, voc("two.png", *objects))
    mutate(root, "train.txt", None, "two")
    clip = mended("voc", root, "clip", "2 skipped, 2 clipped")
    assert clip.classes == list("abcde")  # includes the classes of boxes that were left out
    assert clip.pictures[0].boxes.tolist() == [[2, 2, 40, 9], [3, 3, 4, 4], [5, 0, 6, 6]]
    assert clip.pictures[0].labels.tolist() == [1, 2, 4]
    assert clip.pictures[0].ignored.tolist() == [True, False, False]
    skip = mended("voc", root, "skip", "4 skipped")
    assert skip.pictures[0].labels.tolist() == [2]
    assert "on_bad_box: 'mend'; expected one of error, clip, skip" in error_of(READERS["voc"], root, on_bad_box="mend")


# Broken sets: format, file, old text, new text, and the complaint

TWO, ONE = "Annotations/two.xml", "Annotations/one.xml"
BROKEN = [
    ("voc", "train.txt", None, None, "train.txt: No such file or directory"),
    ("voc", "train.txt", None, "\n \n", "train.txt: no lines; expected the name of a picture on each"),
    ("voc", "train.txt", None, b"two\n\xff\n", "train.txt:2: byte 0 is 0xff, not UTF-8"),
    ("voc", "train.txt", "none", "none -1", "train.txt:2: 2 fields; expected 1: the name of a picture"),
    ("voc", "train.txt", "\none ", "\ntwo ", "train.txt:4: 'two' again; expected it once, as in {root}/train.txt:1"),
    ("voc", "train.txt", "none", "three", "train.txt:2: {root}/Annotations/three.xml: No such file"),
    ("voc", "train.txt", "none", "no\0ne", "train.txt:2: {root}/Annotations/no\\x00ne.xml: unreadable (embedded null"),
    ("voc", "train.txt", "none", "/etc", "train.txt:2: /etc.xml: No such file or directory; expected an annotation"),
    ("voc", TWO, None, b"<annotation>\xff", "two.xml: byte 12 is 0xff, not UTF-8; expected an annotation"),
    ("voc", TWO, None, voc("two.png").encode("utf-16"), "two.xml: byte 0 is 0xff, not UTF-8"),
    ("voc", TWO, None, b"", "two.xml:1: no element found; expected well-formed XML"),
    ("voc", TWO, "</object>", "</objekt>", "two.xml:4: mismatched tag; expected well-formed XML"),
    ("voc", TWO, "<name>dog", "<name>&dog;", "two.xml:4: undefined entity; expected well-formed XML"),
    ("voc", TWO, "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "two.xml: a document type or entity"),
    ("voc", TWO, None, b" " * MAX_XML + b"<a/>", f"two.xml: more than {MAX_XML} bytes; expected a smaller file"),
    ("voc", TWO, None, "<annotations/>", "two.xml: 'annotations'; expected an annotation"),
    ("voc", TWO, "two.png", "three.png", "two.xml: {root}/JPEGImages/three.png: no such file; expected a JPEG, PNG"),
    ("voc", TWO, "two.png", "/no/a.png", "two.xml: /no/a.png: no such file"),
    ("voc", TWO, "two.png", "t\nwo.png", "two.xml: image 't\\nwo.png'; expected a path"),
    ("voc", TWO, "two.png", "one.png", "two.xml: size 40 x 30; expected 20 x 10, as {root}/JPEGImages/one.png has"),
    (
        "voc",
        ONE,
        "one.png",
        "two.png",
        "one.xml: {root}/JPEGImages/two.png again, after",
    ),
    ("voc", TWO, "<width>40", "<width>30", "two.xml: size 30 x 30; expected 40 x 30"),
    ("voc", TWO, "<width>40", "<width>wide", "two.xml: size/width 'wide'; expected a number"),
    ("voc", TWO, "<name>cat</name>", "", "two.xml: object 2: name ''; expected a class name"),
    ("voc", TWO, "<difficult>1", "<difficult>2", "two.xml: object 2: difficult '2'; expected 0 or 1"),
    ("voc", TWO, "<xmax>40</xmax>", "", "two.xml: object 2: bndbox/xmax ''; expected a number"),
    ("voc", TWO, "<xmax>40", "<xmax>4_0", "two.xml: object 2: bndbox/xmax '4_0'; expected a number"),
    ("voc", "JPEGImages/two.png", None, None, "two.xml: {root}/JPEGImages/two.png: no such file"),
    ("voc", "JPEGImages/two.png", None, b"GIF89a", "two.xml: {root}/JPEGImages/two.png: cannot be decoded"),
    ("coco", "coco.json", None, None, "coco.json: No such file or directory; expected JSON"),
    ("coco", "coco.json", None, b'{"images": "\xff"}', "coco.json: byte 12 is 0xff, not UTF-8"),
    ("coco", "coco.json", None, b'{\n"images": [}', "coco.json:2: Expecting value at column 12; expected one JSON"),
    ("coco", "coco.json", None, b"[" * 100_000, "coco.json: nested too deeply; expected one JSON object"),
    ("coco", "coco.json", None, b"1" * 5000, "coco.json: a number too long to read"),
    ("coco", "coco.json", None, b"[1]", "coco.json: [1]; expected one JSON object"),
    ("coco", "coco.json", '"images"', '"image"', "coco.json: images None; expected a list"),
    ("coco", "coco.json", '"annotations"', '"notes"', "coco.json: annotations None; expected a list"),
    ("coco", "coco.json", '"categories"', '"classes"', "coco.json: categories None; expected a list"),
    ("coco", "coco.json", None, '{"images": [], "annotations": [], "categories": []}', "coco.json: no categories"),
    (
        "coco",
        "coco.json",
        None,
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}',
        "coco.json: no images; expected at least one",
    ),
    ("coco", "coco.json", '"images": [', '"images": [3, ', "coco.json: images[0]: 3; expected an object"),
    ("coco", "coco.json", '"id": 6', '"id": 7', "coco.json: images[1]: id 7 again; expected a unique id for each"),
    ("coco", "coco.json", '"id": 6', '"id": true', "coco.json: images[1]: id True; expected a whole number"),
    ("coco", "coco.json", '"two.png"', "5", "coco.json: images[0]: image 5; expected a path"),
    ("coco", "coco.json", '"two.png"', '"a\\u0000"', "coco.json: images[0]: image 'a\\x00'; expected a path"),
    ("coco", "coco.json", '"two.png"', '"a\\ud800"', r"JPEGImages/a\ud800: no such file"),
    ("coco", "coco.json", '"two.png"', '"../../a.png"', "images[0]: {root}/JPEGImages/../../a.png: no such file"),
    ("coco", "coco.json", '"one.png"', '"./two.png"', "images[2]: {root}/JPEGImages/./two.png again, after"),
    ("coco", "coco.json", '"width": 40', '"width": 41', "coco.json: images[0]: size 41 x 30; expected 40 x 30"),
    ("coco", "coco.json", '"width": 40', '"width": "40"', "coco.json: images[0]: width '40'; expected a number"),
    ("coco", "coco.json", '"id": 3', '"id": 1', "coco.json: annotations[2]: id 1 again; expected a unique id for"),
    ("coco", "coco.json", '"id": 3', '"id": "3"', "coco.json: annotations[2]: id '3'; expected a whole number"),
    (
        "coco",
        "coco.json",
        '"image_id": 5',
        '"image_id": 9',
        "coco.json: annotations[1]: image_id 9; expected the id of",
    ),
    ("coco", "coco.json", '"image_id": 5, ', "", "coco.json: annotations[1]: image_id None; expected a whole number"),
    ("coco", "coco.json", '"category_id": 17', '"category_id": 3', "annotations[1]: class 3; expected one of [18, 17]"),
    (
        "coco",
        "coco.json",
        '"category_id": 17',
        '"category_id": 1.5',
        "annotations[1]: category_id 1.5; expected a whole",
    ),
    ("coco", "coco.json", "[1, 2, 10, 20]", "[1, 2, 10]", "annotations[0]: bbox [1, 2, 10]; expected [x, y, width, he"),
    ("coco", "coco.json", "[1, 2, 10, 20]", "[1, 2, true, 20]", "annotations[0]: bbox [1, 2, True, 20]; expected [x"),
    ("coco", "coco.json", '"iscrowd": 1', '"iscrowd": true', "annotations[2]: iscrowd True; expected 0 or 1"),
    ("coco", "coco.json", '{"id": 17', '{"id": 18', "categories[1]: id 18 again; expected a unique id for each"),
    ("coco", "coco.json", '"name": "cat"', '"name": "dog"', "categories[1]: name 'dog' again; expected a unique name"),
    ("coco", "coco.json", '"name": "cat"', '"name": ""', "categories[1]: name ''; expected a class name"),
    ("sagemaker", "json/1.json", None, b"\xff", "json/1.json: byte 0 is 0xff, not UTF-8"),
    ("sagemaker", "json/1.json", None, b"{", "json/1.json:1: Expecting property name enclosed in double quotes"),
    ("sagemaker", "json/1.json", '"none.jpg"', '"a.jpg\\n"', "json/1.json: image 'a.jpg\\n'; expected a path"),
    (
        "coco",
        "coco.json",
        '"name": "cat"',
        '"name": "cat\\u2028"',
        "categories[1]: name 'cat\\u2028'; expected a class name",
    ),
    ("sagemaker", "json/1.json", '"none.jpg"', "null", "json/1.json: image None; expected a path"),
    (
        "sagemaker",
        "json/1.json",
        '"none.jpg"',
        '"two.png"',
        "json/1.json: {root}/JPEGImages/two.png again, after {root}/json/0.json; expected each picture once",
    ),
    ("sagemaker", "json/1.json", '"none.jpg"', '"no.jpg"', "json/1.json: {root}/JPEGImages/no.jpg: no such file"),
    ("sagemaker", "json/1.json", '"width": 30', '"width": 31', "json/1.json: size 31 x 40; expected 30 x 40"),
    ("sagemaker", "json/1.json", '"width": 30', '"width": NaN', "json/1.json: size nan x 40; expected 30 x 40"),
    (
        "sagemaker",
        "json/1.json",
        '"depth": 3}',
        '"depth": 3}, {}',
        "json/1.json: 2 objects in image_size; expected one",
    ),
    (
        "sagemaker",
        "json/1.json",
        '"annotations": []',
        '"annotations": {}',
        "json/1.json: annotations {}; expected a list",
    ),
    ("sagemaker", "json/0.json", '"class_id": 1', '"class_id": -1', "annotations[0]: class_id -1; expected 0 to 99999"),
    ("sagemaker", "json/0.json", '"class_id": 1', '"class_id": "1"', "annotations[0]: class_id '1'; expected a whole"),
    (
        "sagemaker",
        "json/0.json",
        '"class_id": 1',
        f'"class_id": {MAX_CLASSES}',
        f"json/0.json: annotations[0]: class_id {MAX_CLASSES}; expected 0 to {MAX_CLASSES - 1}",
    ),
    (
        "sagemaker",
        "json/0.json",
        '"left": 1, ',
        "",
        "annotations[0]: left, top, width and height [None, 2, 10, 20]; exp",
    ),
    ("sagemaker", "json/0.json", '"left": 1', '"left": false', "left, top, width and height [False, 2, 10, 20]; exp"),
    (
        "sagemaker",
        "json/1.json",
        '"cat"',
        '"bird"',
        "json/1.json: categories[0]: class 0: 'bird'; expected 'cat', as before",
    ),
    ("sagemaker", "json/1.json", '"cat"', "[]", "1.json: categories[0]: class 0: name []; expected a class name"),
    (
        "sagemaker",
        "json/1.json",
        '"class_id": 1',
        '"class_id": 0',
        "categories[1]: class 0: 'dog'; expected 'cat', as before",
    ),
    ("manifest", MANIFEST, None, b"", "a.manifest: no lines; expected a picture on each"),
    ("manifest", MANIFEST, None, b"\xff", "a.manifest:1: byte 0 is 0xff, not UTF-8"),
    ("manifest", MANIFEST, None, b"[" * 100_000, "a.manifest:1: '[[[[["),
    (
        "manifest",
        MANIFEST,
        '"none.jpg"',
        '"s3://a/none.jpg"',
        "a.manifest:2: source-ref 's3://a/none.jpg'; expected a",
    ),
    ("manifest", MANIFEST, '"none.jpg"', '"a\\nb"', "a.manifest:2: image 'a\\nb'; expected a path"),
    ("manifest", MANIFEST, '"none.jpg"', '"no.jpg"', "a.manifest:2: {root}/JPEGImages/no.jpg: no such file"),
    (
        "manifest",
        MANIFEST,
        '"one.png"',
        '"two.png"',
        "a.manifest:3: {root}/JPEGImages/two.png again, after",
    ),
    ("manifest", MANIFEST, '"height": 10,', '"height": 20,', "a.manifest:3: size 20 x 20; expected 20 x 10"),
    ("manifest", MANIFEST, '"annotations": []', '"boxes": []', "a.manifest:2: annotations None; expected a list"),
    (
        "manifest",
        MANIFEST,
        '"pets": {',
        '"pet": {',
        "a.manifest:2: 'pet' None; expected an object with annotations",
    ),
    (
        "manifest",
        MANIFEST,
        '{"0": "cat", "1": "dog"}',
        "[]",
        "a.manifest:1: metadata {'class-map': []}; expected an",
    ),
    (
        "manifest",
        MANIFEST,
        '"1": "dog"',
        '"x": "dog"',
        "a.manifest:1: class 'x'; expected a class id from 0 to 99999",
    ),
    (
        "manifest",
        MANIFEST,
        '"1": "dog"',
        '"²": "dog"',
        "a.manifest:1: class '²'; expected a class id from 0 to 99999",
    ),
    ("manifest", MANIFEST, '"1": "dog"', '"1": "cat"', "a.manifest:2: class 1: 'dog'; expected 'cat', as before"),
    (
        "manifest",
        MANIFEST,
        '"class_id": 0',
        '"class_id": 0.0',
        "a.manifest:1: annotations[1]: class_id 0.0; expected",
    ),
    (
        "manifest",
        MANIFEST,
        '"top": 0',
        '"top": "0"',
        "a.manifest:1: annotations[1]: left, top, width and height [5.5",
    ),
]


@pytest.mark.parametrize(("kind", "file", "old", "new", "complaint"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_set_is_refused_and_the_message_says_where(tmp_path, kind, file, old, new, complaint):
    root = write(tmp_path, kind)
    mutate(root, file, old, new)
    for on_bad_box in ("error", "clip", "skip"):  # no mode repairs anything but coordinates
        assert complaint.replace("{root}", str(root)) in error_of(READERS[kind], root, on_bad_box=on_bad_box)


def test_names_outside_the_given_classes_are_refused(tmp_path):
    root = write(tmp_path, "voc")
    message = error_of(READERS["voc"], root, classes=["dog"])
    assert f"{root}/Annotations/two.xml: object 2: class 'cat'; expected one of ['dog']" in message
    root = write(tmp_path, "coco")
    message = error_of(READERS["coco"], root, classes=["dog"])
    assert f"{root}/coco.json: categories[1]: name 'cat'; expected one of ['dog']" in message


def test_sets_without_classes_or_records_are_refused(tmp_path):
    root = write(tmp_path, "voc")
    mutate(root, "train.txt", None, "none")
    assert "train.txt: no objects; expected at least one, to know the classes" in error_of(READERS["voc"], root)
    assert len(READERS["voc"](root, classes=["cat"]).pictures) == 1
    bare = {"source-ref": "two.png", "c": {"annotations": []}}
    mutate(write(tmp_path, "manifest"), MANIFEST, None, json.dumps(bare))
    assert "a.manifest: no classes; expected at least one box or name" in error_of(READERS["manifest"], root)
    bare["c-metadata"] = {"class-map": {"0": "cat", "2": "cat"}}
    mutate(root, MANIFEST, None, json.dumps(bare))
    assert "a.manifest: 2 classes called 'cat'; expected a unique name" in error_of(READERS["manifest"], root)
    (root / "json").mkdir()
    (root / "json/readme.txt").touch()
    assert f"{root}/json: no .json files; expected one for each image" in error_of(READERS["sagemaker"], root)
    assert "none: No such file" in error_of(read_sagemaker, root, root / "none")


def test_xml_that_is_deeply_nested_or_declares_a_bogus_encoding_is_read(tmp_path):
    root = write(tmp_path, "voc")
    deep = "<a>" * 200_000 + "</a>" * 200_000
    mutate(root, TWO, "<size>", f"{deep}<size>")
    assert len(READERS["voc"](root).pictures[0].boxes) == 2
    mutate(root, TWO, deep, "")
    mutate(root, TWO, "<annotation>", '<?xml version="1.0" encoding="bogus"?><annotation>')  # UTF-8 regardless
    assert len(READERS["voc"](root).pictures[0].boxes) == 2


def test_a_picture_whose_header_claims_a_huge_size_is_refused(tmp_path):
    root = write(tmp_path, "coco")
    chunk = b"IHDR" + struct.pack(">2I5B", 2**30, 2**30, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    mutate(root, "JPEGImages/two.png", None, content + b"\0\0\0\0IDAT" + bytes(4))
    assert f"images[0]: {root}/JPEGImages/two.png: cannot be decoded" in error_of(READERS["coco"], root)


# Arbitrary contents

modes = st.sampled_from(["error", "clip", "skip"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore:.* boxes that stick out of their picture")
@pytest.mark.filterwarnings("ignore:.* pictures without a .json")
@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind in FORMATS for file in list(GOOD[kind])[:2]])
@quick
@given(
    content=st.binary()
    | st.text().map(str.encode)
    | st.text(st.sampled_from("<>/&;![]?=\"'{}:,0aé\n\\")).map(str.encode),
    mode=modes,
)
def test_arbitrary_bytes_are_read_or_refused(tmp_path, kind, file, content, mode):
    root = write(tmp_path, kind)
    mutate(root, file, None, content)
    well_formed_or_none(READERS[kind], root, on_bad_box=mode)


@pytest.mark.filterwarnings("ignore:.* boxes that stick out of their picture")
@pytest.mark.filterwarnings("ignore:.* pictures without a .json")
@pytest.mark.parametrize("kind", FORMATS)
@quick
@given(at=st.integers(0, 10_000), new=st.binary(max_size=2), cut=st.integers(0, 9), which=st.integers(0, 3), mode=modes)
def test_mutated_bytes_are_read_or_refused(tmp_path, kind, at, new, cut, which, mode):
    root = write(tmp_path, kind)
    path = root / list(GOOD[kind])[which % len(GOOD[kind])]
    content = path.read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + new + content[at + cut :])
    well_formed_or_none(READERS[kind], root, on_bad_box=mode)


def nodes_of(value) -> list[tuple]:
    """Return the container and key of every nested value."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    return [node for key, inner in items for node in [(value, key), *nodes_of(inner)]]


@pytest.mark.filterwarnings("ignore:.* boxes that stick out of their picture")
@pytest.mark.filterwarnings("ignore:.* pictures without a .json")
@pytest.mark.parametrize("kind", ["coco", "sagemaker", "manifest"])
@quick
@given(at=st.integers(0, 10_000), new=json_values, mode=modes)
def test_an_arbitrary_json_value_anywhere_is_read_or_refused(tmp_path, kind, at, new, mode):
    root = write(tmp_path, kind)
    file, text = next(iter(GOOD[kind].items()))
    first, *rest = text.splitlines()
    content = json.loads(first)
    nodes = nodes_of(content)
    holder, key = nodes[at % len(nodes)]
    holder[key] = new
    mutate(root, file, None, "\n".join([json.dumps(content), *rest]))
    well_formed_or_none(READERS[kind], root, on_bad_box=mode)


numbers = st.integers(-5, 25) | st.integers() | st.floats() | st.floats(-1, 21, width=32)


@pytest.mark.parametrize("kind", ["voc", "coco"])
@quick
@given(corners=st.tuples(numbers, numbers, numbers, numbers))
def test_any_box_is_read_or_else_refused_skipped_or_clipped(tmp_path, kind, corners):
    root = write(tmp_path, kind)
    put_box(root, kind, corners)
    good = well_formed_or_none(READERS[kind], root)
    clip, clipped = read_aloud(READERS[kind], root, on_bad_box="clip")
    skip, skipped = read_aloud(READERS[kind], root, on_bad_box="skip")
    assert (good is None) == bool(skipped) == bool(clipped)
    assert len(clip.pictures[2].boxes) == (clipped in ("", "1 clipped"))
    assert len(skip.pictures[2].boxes) == (skipped == "")
    assert good is None or torch.equal(good.pictures[2].boxes, clip.pictures[2].boxes)


# Split


def listing_of(count: int) -> box_listings.BoxListing:
    pictures = [
        box_listings.Picture(
            f"{i}.jpg", torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=bool)
        )
        for i in range(count)
    ]
    return box_listings.BoxListing(pictures, ["cat"])


def paths_of(listing) -> list[str]:
    return [picture.path for picture in listing.pictures]


def hold_out(listing, share: float):
    splits = read_splits({"train": "all", "val": None, "test": None}, lambda *_: listing, None, share)
    assert splits["test"] is splits["val"]
    return splits["train"], splits["val"]


def test_hold_out_is_reproducible_and_keeps_the_order():
    listing = listing_of(50)
    kept, held_out = hold_out(listing, 0.2)
    assert (len(kept.pictures), len(held_out.pictures)) == (40, 10)
    assert sorted(paths_of(kept) + paths_of(held_out)) == sorted(paths_of(listing))
    for part in (kept, held_out):
        assert part.classes == ["cat"]
        assert paths_of(part) == sorted(paths_of(part), key=lambda path: int(path.split(".")[0]))
    assert paths_of(hold_out(listing, 0.2)[1]) == paths_of(held_out)
    # Hard-coded, because every release of NumPy must hold out the same pictures.
    assert paths_of(hold_out(listing_of(8), 0.4)[1]) == ["1.jpg", "2.jpg", "6.jpg"]


def test_held_out_shares_that_leave_a_part_empty_are_refused():
    for share in (0, 0.04, 1, 0.96, -1, 2, float("nan"), float("inf")):
        message = f"--data.init_args.held_out: {share} of 10 pictures; expected at least one in each part"
        assert error_of(hold_out, listing_of(10), share) == message
    assert "held_out: 0.5 of 1 pictures" in error_of(hold_out, listing_of(1), 0.5)


# Real data

REAL = os.environ.get("DLREF_DATA")


@pytest.mark.skipif(not REAL, reason="needs DLREF_DATA, the folder of the real data sets")
def test_the_real_bccd_set_is_read():
    root = Path(REAL) / "bccd"
    pictures, boxes = [], 0
    for name, bad in (
        ("train", "BloodImage_00343.xml: object 4"),
        ("val", "BloodImage_00338.xml: object 13"),
        ("test", ""),
    ):
        names = root / f"ImageSets/Main/{name}.txt"
        listing, skipped = read_aloud(read_voc, root, names, on_bad_box="skip")
        assert listing.classes == ["Platelets", "RBC", "WBC"]
        pictures.append(len(listing.pictures))
        boxes += sum(len(picture.boxes) for picture in listing.pictures)
        assert skipped == ("1 skipped" if bad else "")
        if bad:
            assert f"{root}/Annotations/{bad}: box " in error_of(read_voc, root, names)
        else:
            assert len(read_voc(root, names).pictures) == 72
    assert pictures == [205, 87, 72]
    assert boxes == 4886
