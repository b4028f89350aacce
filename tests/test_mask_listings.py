"""Readers of masks, given good, broken and arbitrary sets."""

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from refusals import answer_or_none, error_of
from torch._utils import ExceptionWrapper

from dlref.data.images import UnreadableImage, read_image
from dlref.data.mask_listings import MAX_PIXELS, VOID, read_mask, read_mask_folders, read_mask_list, read_voc_masks

pytestmark = pytest.mark.filterwarnings("ignore:The image (de|en)coding")
# tmp_path is one folder for all examples of a test: each example overwrites the same files.
shared_folder = [HealthCheck.function_scoped_fixture]
quick = settings(max_examples=60, deadline=None, suppress_health_check=shared_folder, database=None)

# One set that all three readers can read: the pictures a.jpg and b.jpg, 8 x 6 pixels, and their masks.


def array(*rows: str) -> np.ndarray:
    """Return the mask of these rows: a digit is a value, a dot is void."""
    return np.array([[255 if value == "." else int(value) for value in row] for row in rows], np.uint8)


A = array("00000000", "00111100", "00111100", "0.1111.0", "00......", "22000000")
B = array("22222222", "22222222", "2222....", "00000000", "00000000", "00000000")
PIXELS = [26 + 24, 12, 2 + 20]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values))


def palette_png(values: np.ndarray, **options) -> bytes:
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette([(37 * i + 90) % 256 for i in range(768)])  # no colour's level equals its index
    return encode(image, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes, interlace: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlace))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *more, pixels, chunk(b"IEND", b"")])


PICTURE = encode(Image.new("RGB", (8, 6), "red"), "JPEG")
SET = {
    "ImageSets/Segmentation/train.txt": b"a\r\n\n b \n",
    "train.txt": b"JPEGImages/a.jpg SegmentationClass/a.png\r\n \nJPEGImages/b.jpg\tSegmentationClass/b.png",
    "JPEGImages/a.jpg": PICTURE,
    "JPEGImages/b.jpg": PICTURE,
    "SegmentationClass/a.png": png(A),
    "SegmentationClass/b.png": palette_png(B),
}
READERS = {
    "folders": lambda root, **options: read_mask_folders(root / "JPEGImages", root / "SegmentationClass", **options),
    "list": lambda root, **options: read_mask_list(root / "train.txt", **options),
    "voc": lambda root, **options: read_voc_masks(root / "ImageSets/Segmentation/train.txt", **options),
}
IMAGES, MASKS = "JPEGImages/", "SegmentationClass/"


def write(root: Path, **files: bytes) -> Path:
    for name, content in (SET | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def with_map(root: Path, content, **options):
    (root / "map.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return READERS["folders"](root, label_map=root / "map.json", **options)


def well_formed_or_none(function, *arguments, **options):
    """Check and return the result of a call, or return None if the call refuses its input."""
    listing = answer_or_none(function, *arguments, **options)
    if listing is None:
        return None
    count = len(listing.classes)
    read = [read_mask(mask, listing.table) for mask in listing.masks]
    assert listing.sizes == [values.shape for values in read]
    assert (listing.table.shape, listing.table.dtype, listing.pixels.dtype) == ((256,), np.uint8, np.int64)
    assert set(listing.table) <= {*range(count), VOID}
    assert listing.pixels.sum(axis=0).tolist() == [sum((values == i).sum() for values in read) for i in range(count)]
    assert 2 <= count <= 254
    return listing


# Good sets


@pytest.mark.parametrize("kind", READERS)
def test_a_good_set_is_read_by_every_reader(tmp_path, kind):
    listing = well_formed_or_none(READERS[kind], write(tmp_path))
    assert listing.images == [f"{tmp_path}/{IMAGES}{name}.jpg" for name in "ab"]
    assert listing.masks == [f"{tmp_path}/{MASKS}{name}.png" for name in "ab"]
    assert listing.sizes == [(6, 8), (6, 8)]
    names = ["background", "aeroplane", "bicycle", "bird"] if kind == "voc" else ["0", "1", "2"]
    assert listing.classes[:4] == names
    assert listing.pixels.sum(axis=0).tolist() == PIXELS + [0] * (18 if kind == "voc" else 0)
    for path, drawn in zip(listing.masks, (A, B), strict=True):
        ids = read_mask(path, listing.table)
        assert ids.dtype == np.uint8
        assert np.array_equal(ids, drawn)


@pytest.mark.parametrize("kind", READERS)
def test_given_classes_name_the_values_and_limit_them(tmp_path, kind):
    listing = READERS[kind](write(tmp_path), classes=["sky", "road", "car", "kite"])
    assert listing.classes == ["sky", "road", "car", "kite"]
    assert listing.pixels.sum(axis=0).tolist() == [*PIXELS, 0]  # a class without pixels is not an error here
    assert listing.table[:5].tolist() == [0, 1, 2, 3, VOID]
    message = error_of(READERS[kind], tmp_path, classes=["sky", "road"])
    assert f"{tmp_path}/{MASKS}a.png: value 2 in 2 pixels; expected 0 to 1, or 255 for void" in message


def test_paths_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path))
    assert read_mask_list("train.txt").masks[0] == f"./{MASKS}a.png"
    assert read_voc_masks("ImageSets/Segmentation/train.txt").images[0] == f"{IMAGES}a.jpg"
    monkeypatch.chdir("ImageSets/Segmentation")
    assert read_voc_masks("train.txt").images[0] == f"../../{IMAGES}a.jpg"


def test_folders_pair_many_kinds_of_pictures_with_their_masks(tmp_path):
    mask = SET[f"{MASKS}a.png"]
    files = {f"i/{name}": PICTURE for name in ("c.JPG", "b.jpeg", "a.b.jpg", ".hidden", "ü.jpg")}
    files |= {f"m/{name}.png": mask for name in ("a.b", "b", "c")} | {"m/ü.PNG": mask, "m/.hidden": b""}
    files["i/d.png"], files["m/d.png"] = encode(Image.new("L", (8, 6))), mask
    listing = read_mask_folders(write(tmp_path, **files) / "i", tmp_path / "m")
    assert [os.path.relpath(path, tmp_path) for path in listing.images] == [
        f"i/{name}" for name in ("a.b.jpg", "b.jpeg", "c.JPG", "d.png", "ü.jpg")
    ]
    assert [Path(path).stem for path in listing.masks] == ["a.b", "b", "c", "d", "ü"]


DEPTHS = {  # depth, colour type, a row of eight values as stored, and the values
    "bilevel": (1, 0, b"\x00\xa5", [1, 0, 1, 0, 0, 1, 0, 1]),
    "2-bit grey": (2, 0, b"\x00\x1b\xe4", [0, 1, 2, 3, 3, 2, 1, 0]),
    "4-bit grey": (4, 0, b"\x00\x01\x23\xba\x98", [0, 1, 2, 3, 11, 10, 9, 8]),
    "1-bit palette": (1, 3, b"\x00\xa5", [1, 0, 1, 0, 0, 1, 0, 1]),
    "4-bit palette": (4, 3, b"\x00\x01\x23\xba\x98", [0, 1, 2, 3, 11, 10, 9, 8]),
}


@pytest.mark.parametrize(("depth", "colour", "row", "values"), DEPTHS.values(), ids=DEPTHS)
def test_masks_of_few_bits_keep_the_stored_values(tmp_path, depth, colour, row, values):
    palette = [chunk(b"PLTE", bytes(range(200, 152, -1)))] if colour == 3 else []
    mask = raw_png(8, 6, depth, colour, row * 6, *palette)
    root = write(tmp_path, **{f"{MASKS}a.png": mask, f"{MASKS}b.png": mask})
    assert read_mask(f"{root}/{MASKS}a.png", np.arange(256, dtype=np.uint8)).tolist() == [values] * 6
    assert READERS["list"](root).pixels.sum(axis=0).tolist() == [12 * values.count(i) for i in range(max(values) + 1)]


def test_bilevel_transparent_and_animated_masks_are_read(tmp_path):
    bilevel = encode(Image.fromarray(A == 1))
    animated = raw_png(
        8, 6, 8, 0, b"".join(b"\0" + row.tobytes() for row in B), chunk(b"acTL", bytes(8))
    )  # or claims to be
    for other in (palette_png(B, transparency=0), animated):
        root = write(tmp_path, **{f"{MASKS}a.png": bilevel, f"{MASKS}b.png": other})
        assert well_formed_or_none(READERS["list"], root).pixels.sum(axis=0).tolist() == [36 + 24, 12, 20]


def test_the_given_void_value_is_void_in_addition_to_255(tmp_path):
    listing = well_formed_or_none(READERS["list"], write(tmp_path), void=2)
    assert listing.classes == ["0", "1"]
    assert listing.pixels.sum(axis=0).tolist() == PIXELS[:2]
    assert listing.table[[0, 1, 2, 255]].tolist() == [0, 1, VOID, VOID]
    assert READERS["folders"](tmp_path, void=0, classes=["x", "y", "z"]).pixels.sum(axis=0).tolist() == [0, *PIXELS[1:]]
    message = error_of(READERS["list"], tmp_path, classes=["x", "y"], void=7)
    assert "a.png: value 2 in 2 pixels; expected 0 to 1, or 7 or 255 for void" in message


def test_a_label_map_with_scale_divides_the_values(tmp_path):
    root = write(tmp_path)
    listing = with_map(root, {"scale": "2"})
    assert listing.pixels.sum(axis=0).tolist() == [PIXELS[0] + PIXELS[1], PIXELS[2]]
    assert listing.table[:4].tolist() == [0, 0, 1, 1]
    assert listing.table[255] == VOID
    assert with_map(root, {"scale": 1}).pixels.sum(axis=0).tolist() == PIXELS
    listing = with_map(root, {"scale": 127}, classes=["x", "y", "z"])  # 255 // 127 is one of these classes
    assert listing.pixels.sum(axis=0).tolist() == [sum(PIXELS), 0, 96 - sum(PIXELS)]
    listing = with_map(root, {"scale": 127}, classes=["x", "y"], void=0)
    assert listing.pixels.sum(axis=0).tolist() == [sum(PIXELS[1:]), 0]
    write(tmp_path, **{f"{MASKS}b.png": png(B * 0 + np.uint8(90))})
    message = error_of(with_map, root, {"scale": 3}, classes=["x", "y"])
    assert f"{MASKS}b.png: value 90 in 48 pixels, class 30 by the label map; expected 0 to 1, or 255 for" in message


def test_a_scaled_255_is_a_class_only_if_it_follows_the_highest_class_present(tmp_path):
    quarters = np.repeat(np.array([0, 85, 170, 255], np.uint8), 12).reshape(6, 8)
    root = write(tmp_path, **{f"{MASKS}a.png": png(quarters), f"{MASKS}b.png": png(quarters)})
    assert with_map(root, {"scale": 85}).pixels.sum(axis=0).tolist() == [24, 24, 24, 24]
    write(tmp_path, **{f"{MASKS}{name}.png": png(np.where(quarters == 170, 85, quarters)) for name in "ab"})
    listing = with_map(root, {"scale": 85})
    assert (listing.classes, listing.table[255]) == (["0", "1"], VOID)
    write(tmp_path, **{f"{MASKS}{name}.png": png(np.where(quarters > 90, np.uint8(255), 0)) for name in "ab"})
    assert with_map(root, {"scale": 255}).pixels.sum(axis=0).tolist() == [48, 48]


@pytest.mark.parametrize("classes", [None, list("abcd")])
def test_a_scaled_255_is_void_in_every_split_if_another_value_has_its_class(tmp_path, classes):
    quarters = np.repeat(np.array([0, 64, 192, 255], np.uint8), 12).reshape(6, 8)
    root = write(tmp_path, **{f"{MASKS}a.png": png(quarters), f"{MASKS}b.png": png(quarters)})
    assert with_map(root, {"scale": 64}, classes=classes).pixels.sum(axis=0).tolist() == [24, 24, 0, 24]
    write(tmp_path, **{f"{MASKS}{name}.png": png(np.where(quarters == 192, 128, quarters)) for name in "ab"})
    assert with_map(root, {"scale": 64}, classes=classes).pixels.sum(axis=0).tolist() == [24, 24, 24, 24]


def test_a_label_map_with_map_assigns_values_to_classes(tmp_path):
    root = write(tmp_path)
    listing = well_formed_or_none(with_map, root, {"map": {"1": 0, "0": "2", "2": 1}})
    assert listing.pixels.sum(axis=0).tolist() == [PIXELS[2], PIXELS[0], PIXELS[1]]
    assert np.array_equal(read_mask(listing.masks[1], listing.table), np.array([1, 9, 0, *[9] * 252, 255])[B])
    listing = with_map(root, {"map": {"0": 255, "1": 0, "2": 1, "3": 2}})
    assert listing.pixels.sum(axis=0).tolist() == [96 - sum(PIXELS), *PIXELS]
    assert with_map(root, {"map": {"0": 0, "1": 1}}, void=2).pixels.sum(axis=0).tolist() == PIXELS[:2]
    assert with_map(root, {"map": {str(i): i for i in range(254)}}).classes == ["0", "1", "2"]
    message = error_of(with_map, root, {"map": {"0": 255, "1": 2, "2": 0}})
    assert message.endswith("a.png: value 1 in 12 pixels, not in the label map; expected one of [0, 2, 255]")
    message = error_of(with_map, root, {"map": {"0": 1, "1": 2, "2": 0}}, classes=["x", "y"])
    assert message.endswith("value 0 in 26 pixels, class 2 by the label map; expected 0 to 1, or 255 for void")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_mask_of_a_turned_picture_must_be_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    size = (8, 6) if orientation < 5 else (6, 8)
    root = write(tmp_path, **{f"{IMAGES}b.jpg": encode(Image.new("RGB", size), "JPEG", exif=exif)})
    assert read_image(f"{root}/{IMAGES}b.jpg").shape == (3, 6, 8)
    assert READERS["voc"](root).sizes == [(6, 8), (6, 8)]
    (root / f"{MASKS}b.png").write_bytes(png(B.T))
    message = error_of(READERS["folders"], root)
    assert message == (f"{root}/{MASKS}b.png: 6 x 8 pixels; expected 8 x 6, as {root}/{IMAGES}b.jpg has when shown")


@pytest.mark.parametrize("terminal", ["1", "0"])
def test_progress_is_shown_only_on_stderr_and_only_on_a_terminal(tmp_path, terminal, monkeypatch, capsys):
    monkeypatch.setattr("dlref.data.images.SHOW_PROGRESS_ABOVE", 0)
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)  # read by rich
    monkeypatch.setenv("TERM", "xterm")
    assert len(READERS["list"](write(tmp_path)).images) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Reading masks" in shown.err if terminal == "1" else shown.err == ""


def test_the_first_broken_mask_is_named_and_warning_filters_stay_unchanged(tmp_path):
    files = {f"i/{i:02}.jpg": PICTURE for i in range(30)} | {f"m/{i:02}.png": png(A) for i in range(30)}
    root = write(tmp_path, **files | {"m/07.png": png(A * 50), "m/08.png": b"", "i/09.jpg": b""})
    filters = list(warnings.filters)
    for _ in range(5):
        message = error_of(read_mask_folders, root / "i", root / "m", classes=["x", "y", "z"])
        assert message.startswith(f"{root}/m/07.png: value 50 in 12 pixels; ")
        assert warnings.filters == filters


def test_an_error_from_a_data_loader_worker_keeps_its_one_line_message(tmp_path):
    path = tmp_path / "a.png"
    try:
        read_mask(str(path), np.arange(256, dtype=np.uint8))
    except UnreadableImage:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")  # as in a DataLoader
    assert error_of(wrapper.reraise) == f"{path}: no such file; expected a mask as PNG"
    path.write_bytes(encode(Image.new("RGB", (8, 6))))
    with pytest.raises(UnreadableImage, match=r"/a.png: RGB colours; expected class ids in one channel"):
        read_mask(str(path), np.arange(256, dtype=np.uint8))


# Broken sets: reader, broken file, its content (None: the file is missing), and the complaint

TRAIN, VOC, MASK = "train.txt", "ImageSets/Segmentation/train.txt", f"{MASKS}a.png"
WHOLE = SET[MASK]
FLIPPED = WHOLE[:-20] + bytes([WHOLE[-20] ^ 1]) + WHOLE[-19:]  # one bit of the pixels is flipped
BOMB = raw_png(10_000, 9_000, 1, 0, bytes(9_000 * 1_251))
UNREADABLE = "cannot be decoded; expected a mask as PNG"
CHANNEL = '; expected class ids in one channel (mode L or P); docs/semantic-segmentation.md, "Coloured masks", shows'
PICTURES = "JPEG, PNG, GIF or WebP"
BROKEN = [
    ("folders", f"{IMAGES}c.jpg", PICTURE, f": no mask of the same name in {{root}}/{MASKS[:-1]}; expected one"),
    ("folders", f"{MASKS}c.png", WHOLE, f": no picture of the same name in {{root}}/{IMAGES[:-1]}; expected one"),
    ("folders", MASK, None, "JPEGImages/a.jpg: no mask of the same name in"),
    ("folders", f"{IMAGES}a.png", WHOLE, f": same name as {{root}}/{IMAGES}a.jpg; expected a unique name for"),
    ("folders", f"{MASKS}a.PNG", WHOLE, "; expected a unique name for each file"),
    ("folders", f"{MASKS}a.jpg", PICTURE, ": not a PNG file; expected nothing else in this folder"),
    ("folders", f"{MASKS}c.png/d.png", WHOLE, f"{MASKS}c.png: not a PNG file; expected nothing else"),
    ("folders", f"{IMAGES}Thumbs.db", b"", f": not a {PICTURES} file; expected nothing else in this folder"),
    ("folders", f"{IMAGES}c.jpg/d.jpg", PICTURE, f"{IMAGES}c.jpg: not a {PICTURES} file; expected nothing else"),
    ("folders", f"{IMAGES}c\nd.jpg", PICTURE, "JPEGImages: file 'c\\nd.jpg'; expected a name of one line"),
    ("folders", f"{IMAGES}b.jpg", b"", f": cannot be decoded; expected a {PICTURES} image"),
    ("list", f"{IMAGES}b.jpg", PICTURE[:100], f": cannot be decoded; expected a {PICTURES} image"),
    ("list", f"{IMAGES}b.jpg", None, f"train.txt:3: {{root}}/{IMAGES}b.jpg: no such file; expected a {PICTURES} image"),
    ("list", MASK, None, f"train.txt:1: {{root}}/{MASK}: no such file; expected a mask as PNG"),
    ("voc", MASK, None, f"train.txt:1: {{root}}/{MASK}: no such file; expected a mask as PNG"),
    ("list", TRAIN, None, ": No such file or directory; expected a list of images"),
    ("list", TRAIN, b"", ": no lines; expected a picture on each"),
    ("list", TRAIN, b"\r\n \n", ": no lines; expected a picture on each"),
    ("list", TRAIN, b"\xff\xfe", ":1: byte 0 is 0xff, not UTF-8; expected a list of images in UTF-8"),
    ("list", TRAIN, b"\na.jpg", ":2: 1 fields; expected 2: a picture and its mask"),
    ("list", TRAIN, b"my cat.jpg my cat.png", ":1: 4 fields; expected 2: a picture and its mask"),
    ("list", TRAIN, b"a\0.jpg a.png", ":1: image 'a\\x00.jpg'; expected a path"),
    ("list", TRAIN, b"/SegNet/x.png /SegNet/y.png", ":1: /SegNet/x.png: no such file; expected a JPEG"),
    ("list", TRAIN, f"{IMAGES}a.jpg /SegNet/y.png".encode(), ":1: /SegNet/y.png: no such file; expected a mask as PNG"),
    ("list", TRAIN, SET[TRAIN] + f"\n{IMAGES}./a.jpg {MASK}".encode(), f":4: {{root}}/{IMAGES}a.jpg again; expected"),
    ("voc", VOC, None, ": No such file or directory; expected a list of images"),
    ("voc", VOC, b"\n", ": no lines; expected a picture on each"),
    ("voc", VOC, b"a\nb 1\n", ":2: 2 fields; expected 1: the name of a picture"),
    ("voc", VOC, b"a\nb\na\n", f":3: {{root}}/{IMAGES}a.jpg again; expected it once, as in {{root}}/{VOC}:1"),
    ("voc", VOC, b"c", f":1: {{root}}/{IMAGES}c.jpg: no such file; expected a {PICTURES} image"),
    ("voc", MASK, png(A + 19), "a.png: value 21 in 2 pixels; expected 0 to 20, or 255 for void"),
    ("folders", MASK, encode(Image.new("RGB", (8, 6))), f": RGB colours{CHANNEL}"),
    ("list", MASK, encode(Image.new("RGBA", (8, 6))), f": RGBA colours{CHANNEL}"),
    ("voc", MASK, encode(Image.new("LA", (8, 6))), f": LA colours{CHANNEL}"),
    ("list", MASK, encode(Image.new("I;16", (8, 6))), ": 16 bits per pixel; expected 8 bits or fewer"),
    ("list", MASK, raw_png(8, 6, 16, 2, bytes(6 * 49)), f": RGB colours{CHANNEL}"),
    ("list", MASK, PICTURE, UNREADABLE),
    ("list", MASK, encode(Image.new("L", (8, 6)), "BMP"), UNREADABLE),
    ("list", MASK, b"", UNREADABLE),
    ("list", MASK, WHOLE[: len(WHOLE) // 2], UNREADABLE),
    ("list", MASK, WHOLE[:-12], UNREADABLE),  # without its end
    ("list", MASK, FLIPPED, UNREADABLE),
    ("list", MASK, raw_png(8, 6, 3, 0, bytes(6 * 4)), UNREADABLE),  # no such depth
    ("list", MASK, raw_png(8, 6, 8, 0, bytes(54), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))), UNREADABLE),
    ("list", MASK, BOMB, f": 10000 x 9000 pixels; expected at most {MAX_PIXELS}"),
    ("list", MASK, raw_png(2**30, 2**30, 8, 0, b""), f": {2**30} x {2**30} pixels; expected at most {MAX_PIXELS}"),
    ("list", MASK, png(A[:5]), f": 8 x 5 pixels; expected 8 x 6, as {{root}}/{IMAGES}a.jpg has when shown"),
    ("folders", MASK, png(A.T), f": 6 x 8 pixels; expected 8 x 6, as {{root}}/{IMAGES}a.jpg has when shown"),
    ("list", MASK, png(np.where(A == 1, 254, A).astype(np.uint8)), ": value 254 in 12 pixels; expected 0 to 253, or"),
]


@pytest.mark.parametrize(("kind", "file", "content", "complaint"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_set_is_refused_and_the_message_names_the_file(tmp_path, kind, file, content, complaint):
    root = write(tmp_path, **{} if content is None else {file: content})
    if content is None:
        (root / file).unlink()
    message = error_of(READERS[kind], root)
    assert complaint.replace("{root}", str(root)) in message
    assert Path(file).stem.split("\n")[0] in message


def test_folders_that_are_empty_missing_or_mismatched_are_refused(tmp_path):
    root = write(tmp_path)
    (root / "empty").mkdir()
    (root / "empty/.hidden").touch()
    images, masks, empty, none = (root / name for name in ("JPEGImages", "SegmentationClass", "empty", "none"))
    assert error_of(read_mask_folders, empty, masks) == f"{empty}: no files; expected at least one {PICTURES} file"
    assert error_of(read_mask_folders, images, empty) == f"{empty}: no files; expected at least one PNG file"
    for pair in ((none, masks), (images, none)):
        assert error_of(read_mask_folders, *pair) == f"{none}: No such file or directory; expected a folder"
    for name in "cdf":
        (images / f"{name}.jpg").write_bytes(PICTURE)
    message = error_of(read_mask_folders, images, masks)
    assert message == f"{images}/c.jpg: no mask of the same name in {masks}, nor for 2 more; expected one for each file"


def test_masks_of_fewer_than_two_classes_are_refused_except_with_vocs_classes(tmp_path):
    for value, count in ((0, 1), (255, 0)):
        root = write(tmp_path, **{f"{MASKS}{name}.png": png(A * 0 + np.uint8(value)) for name in "ab"})
        assert error_of(READERS["list"], root) == f"{root}/train.txt: {count} classes; expected 2 to 254"
        message = error_of(READERS["folders"], root)
        assert message.startswith(f"{root}/SegmentationClass: {count} classes; expected 2 to 254")
        assert ("unless a label_map" in message) == (value == 255)
        assert READERS["voc"](root).pixels.sum() == 96 * count


SCALES = ["0", '"256"', "-1", "2.0", "true", "null", "NaN", '"٣"', '"3\\n"', '""', "9" * 4000, "[3]"]
BROKEN_MAPS = [
    *((f'{{"scale": {value}}}', ": scale ") for value in SCALES),
    ("", ":1: Expecting value at column 1; expected one JSON object"),
    ("[" * 100_000, ": nested too deeply; expected one JSON object"),
    ("[3]", ": [3]; expected one JSON object"),
    ("{}", ": keys []; expected one of scale and map"),
    ('{"scale": 2, "map": {"0": 0}}', ": keys ['scale', 'map']; expected one of scale and map"),
    ('{"map": [5, 0, 2]}', ": map [5, 0, 2]; expected an object with the value of each class id"),
    ('{"map": {}}', ": map {}; expected an object with the value of each class id"),
    ('{"map": {"0": 1, "1": 2, "2": 1}}', ": value 1 for the classes 0 and 2; expected one class"),
    ('{"map": {"0": 1, "2": 2}}', ": no class 1 in the map; expected all class ids from 0 to the highest"),
    ('{"map": {"1": 1}}', ": no class 0 in the map; expected all class ids from 0"),
    ('{"map": {"0": 0, "00": 1}}', ": class id '00'; expected a whole number from 0 to 253"),
    ('{"map": {"254": 1}}', ": class id '254'; expected a whole number from 0 to 253"),
    ('{"map": {"sky": 1}}', ": class id 'sky'; expected a whole number from 0 to 253"),
    ('{"map": {"0": 256}}', ": class 0: value 256; expected a whole number from 0 to 255"),
    ('{"map": {"0": -1}}', ": class 0: value -1; expected a whole number from 0 to 255"),
    ('{"map": {"0": false}}', ": class 0: value False; expected a whole number from 0 to 255"),
    ('{"map": {"0": 0, "1": 11}}', ": value 11 for class 1 and for void; expected one of them"),
]


@pytest.mark.parametrize(("content", "complaint"), BROKEN_MAPS, ids=range(len(BROKEN_MAPS)))
def test_a_broken_label_map_is_refused(tmp_path, content, complaint):
    message = error_of(with_map, write(tmp_path), content, void=11)
    assert message.startswith(f"{tmp_path}/map.json{complaint}")
    assert complaint != ": scale " or message.endswith("; expected a whole number from 1 to 255")


def test_invalid_options_are_refused(tmp_path):
    root = write(tmp_path)
    for void in (-1, 256, True, 1.0):
        assert error_of(READERS["list"], root, void=void) == f"void: {void}; expected 0 to 255"
    for count in (0, 1, 255):
        names = [str(i) for i in range(count)]
        assert error_of(READERS["voc"], root, classes=names) == f"classes: {count} classes; expected 2 to 254"
    message = error_of(READERS["voc"], root, classes=["sky", "car", "sky"])
    assert message == "classes[2]: sky again; expected it once, as in classes[0]"
    assert error_of(READERS["voc"], root, classes=["sky", "\n"]) == "classes[1]: name '\\n'; expected a class name"
    message = error_of(READERS["folders"], root, label_map=root / "no.json")
    assert message == f"{root}/no.json: No such file or directory; expected JSON"


# Arbitrary contents

arbitrary = st.binary() | st.text(st.sampled_from('{}[]":,0123é\n\\ab./ ')).map(str.encode)


@pytest.mark.parametrize(("kind", "file"), [("list", TRAIN), ("voc", VOC), ("list", MASK), ("list", f"{IMAGES}a.jpg")])
@quick
@given(content=arbitrary)
def test_arbitrary_bytes_are_read_or_refused(tmp_path, kind, file, content):
    well_formed_or_none(READERS[kind], write(tmp_path, **{file: content}))


keys = st.sampled_from(["scale", "map", "0", "1", "2"])
values = st.none() | st.booleans() | st.integers(-1, 256) | st.integers(0, 2).map(str) | st.floats() | st.text()


@quick
@given(
    content=arbitrary.map(lambda text: text.decode(errors="replace"))
    | st.dictionaries(keys, values | st.dictionaries(keys, values, max_size=4), max_size=2),
    void=st.integers(-1, 256),
    classes=st.none() | st.integers(0, 4).map(lambda count: list("abcd")[:count]),
)
def test_an_arbitrary_label_map_is_read_or_refused(tmp_path, content, void, classes):
    well_formed_or_none(with_map, write(tmp_path), content, void=void, classes=classes)


@pytest.mark.parametrize("file", [TRAIN, MASK, f"{MASKS}b.png"])
@quick
@given(at=st.integers(0, 10_000), new=st.binary(max_size=2), cut=st.integers(0, 9))
def test_mutated_bytes_are_read_or_refused(tmp_path, file, at, new, cut):
    at %= len(SET[file])
    content = SET[file][:at] + new + SET[file][at + cut :]
    well_formed_or_none(READERS["list"], write(tmp_path, **{file: content}))


names = [b"acTL", b"fcTL", b"fdAT", b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"IHDR", b"IDAT", b"IEND"]


@quick
@given(
    header=st.tuples(*map(st.sampled_from, ([8, 8, 6], [6, 6, 2**31], [1, 2, 4, 8, 16], [0, 3, 2, 4, 6]))),
    rows=st.binary(max_size=60).map(lambda start: start.ljust(60, b"\0")),
    more=st.lists(st.builds(chunk, st.sampled_from(names), st.binary(max_size=30)), max_size=3),
    interlace=st.integers(0, 2),
)
def test_an_arbitrary_png_with_valid_checksums_is_read_or_refused(tmp_path, header, rows, more, interlace):
    mask = raw_png(*header, rows, *more, interlace=interlace)
    well_formed_or_none(READERS["list"], write(tmp_path, **{MASK: mask}))


# Real data

REAL = os.environ.get("DLREF_DATA")


@pytest.mark.skipif(not REAL, reason="needs DLREF_DATA, the folder of the real data sets")
def test_the_real_camvid_set_is_read():
    for name, count in (("train", 367), ("val", 101), ("test", 233)):
        listing = read_mask_list(Path(REAL) / f"camvid/{name}.txt", [str(i) for i in range(11)], void=11)
        assert listing.sizes == [(360, 480)] * count
        assert (listing.pixels.sum(axis=0) > 0).all()
    assert "value 11 in " in error_of(read_mask_list, Path(REAL) / "camvid/val.txt", [str(i) for i in range(11)])
