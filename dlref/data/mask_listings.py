"""Read which picture has which mask: two folders, CamVid's lists and Pascal VOC.

A mask is a PNG with the class of each pixel in one channel. The value stored in the file counts: with a palette the
index, not the colour; with fewer than 8 bits the number itself, not the grey it represents. A mask is used as stored
and must fit its picture as `read_image` returns it, with the picture's EXIF orientation applied.

The readers decode every mask once, and any mistake in a mask is an error. If `classes` is given, they check the pixels
against them: validation and test masks are read with the class names of the training masks.

N pictures, H high and W wide; K classes.
"""

import os
import re
import warnings
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

import numpy as np
from PIL.PngImagePlugin import PngImageFile

from dlref.data.files import (
    check_name,
    image_path,
    is_line,
    picture_size,
    read_fields,
    read_json,
    visible_entries,
)
from dlref.data.images import FORMATS, SUFFIXES, UnreadableImage, show_progress
from dlref.runtime.errors import UserError

VOID = 255  # class id of pixels to ignore
NO_CLASS = -1  # for values missing from the map of a label map
VALUES = 256
MIN_CLASSES, MAX_CLASSES = 2, 254  # ids up to 253
# Ends an error if the masks may be black and white.
OF_255 = '; 255 is void, unless a label_map such as {"map": {"0": 0, "1": 255}} makes it a class'
MAX_PIXELS = 89_478_485  # in a mask; above this, Pillow warns of a decompression bomb
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow spreads values of 2 and 4 bits over 0 to 255
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)


class MaskListing(NamedTuple):
    """Pictures and their masks, in the order of their source.

    Attributes:
        images: N paths.
        masks: N paths of PNG files.
        sizes: N heights and widths in pixels, of the picture as `read_image` returns it.
        table: uint8 (256,), the class id of each value that a mask's pixels can have; VOID for void.
        classes: K class names.
        pixels: int64 (N, K), the number of pixels of each class in each mask.
    """

    images: list[str]
    masks: list[str]
    sizes: list[tuple[int, int]]
    table: np.ndarray
    classes: list[str]
    pixels: np.ndarray

    def take(self, places: list[int]) -> "MaskListing":
        """Return a listing of the pictures at these places."""
        chosen = {name: [getattr(self, name)[i] for i in places] for name in ("images", "masks", "sizes")}
        return self._replace(**chosen, pixels=self.pixels[places])


class Pair(NamedTuple):
    """A picture, its mask and the line of the list that names them ("" if they come from folders)."""

    where: str
    image: str
    mask: str


def read_mask(path: str, table: np.ndarray) -> np.ndarray:
    """Read the class ids of a mask, uint8 (H, W); `table`, uint8 (256,), maps values to class ids.

    Raises UnreadableImage if the file is missing, damaged or not a mask.
    """
    return table[_decode(path)]


def read_mask_folders(
    images: str | Path,
    masks: str | Path,
    classes: list[str] | None = None,
    label_map: str | Path | None = None,
    void: int = VOID,
) -> MaskListing:
    """Pair `images/NAME.jpg` with `masks/NAME.png`, sorted by name. Hidden files are left out.

    Args:
        images: the folder of the pictures, and of nothing else.
        masks: the folder of the masks, and of nothing else.
        classes: the class names of the training masks; None: "0", "1" and so on up to the highest id found.
        label_map: SageMaker's JSON file: {"scale": 3}: a pixel's class id is its value divided by 3, rounded down;
            or {"map": {"0": 5, "1": 0}}: class 0 has the value 5 and class 1 the value 0. None: values are ids.
        void: another void value besides 255; 255 is void unless the label map makes it a class.
    """
    pictures, found = _by_stem(images, SUFFIXES, FORMATS), _by_stem(masks, (".png",), "PNG")
    _refuse_orphans(pictures, found, f"mask of the same name in {masks}")
    _refuse_orphans(found, pictures, f"picture of the same name in {images}")
    pairs = [Pair("", path, found[stem]) for stem, path in pictures.items()]
    return _to_listing(masks, pairs, classes, label_map, void, OF_255)


def read_mask_list(path: str | Path, classes: list[str] | None = None, void: int = VOID) -> MaskListing:
    """Read a list like CamVid's: each line names a picture and its mask, relative to the list's folder.

    Args:
        path: the list.
        classes: the class names of the training masks; None: "0", "1" and so on up to the highest id found.
        void: another void value besides 255.
    """
    root = Path(path).parent
    pairs = []
    for where, (image, mask) in read_fields(path, 2, "a picture and its mask"):
        pairs.append(Pair(where, image_path(root, image, where), image_path(root, mask, where)))
    return _to_listing(path, pairs, classes, None, void)


def read_voc_masks(path: str | Path, classes: list[str] | None = None) -> MaskListing:
    """Read a VOC list: `F/JPEGImages/STEM.jpg` and `F/SegmentationClass/STEM.png` for each stem in it.

    Args:
        path: the list, such as `F/ImageSets/Segmentation/train.txt`.
        classes: the class names; None: VOC's own 21.
    """
    root = Path(os.path.normpath(Path(path).parent / ".." / ".."))
    pairs = []
    for where, (stem,) in read_fields(path, 1, "the name of a picture"):
        image = image_path(root / "JPEGImages", f"{stem}.jpg", where)
        pairs.append(Pair(where, image, image_path(root / "SegmentationClass", f"{stem}.png", where)))
    return _to_listing(path, pairs, VOC_CLASSES.split() if classes is None else classes, None, VOID)


# Folders and lists


def _by_stem(folder: str | Path, suffixes: Collection[str], formats: str) -> dict[str, str]:
    found = {}
    for entry in visible_entries(folder):
        if not is_line(entry.name):
            raise UserError(f"{folder}: file {shorten(entry.name)}; expected a name of one line")
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() not in suffixes or not entry.is_file():
            raise UserError(f"{entry.path}: not a {formats} file; expected nothing else in this folder")
        if stem in found:
            raise UserError(f"{entry.path}: same name as {found[stem]}; expected a unique name for each file")
        found[stem] = entry.path
    if not found:
        raise UserError(f"{folder}: no files; expected at least one {formats} file")
    return found


def _refuse_orphans(files: dict[str, str], others: dict[str, str], what: str) -> None:
    orphans = [path for stem, path in files.items() if stem not in others]
    if orphans:
        more = f", nor for {len(orphans) - 1} more" if len(orphans) > 1 else ""
        raise UserError(f"{orphans[0]}: no {what}{more}; expected one for each file")


# Meaning of the values


def _class_ids(label_map: str | Path | None, classes: list[str] | None, void: int) -> np.ndarray:
    """Return the class id of each value, int64 (256,): from 0, or VOID or NO_CLASS."""
    if type(void) is not int or not 0 <= void < VALUES:
        raise UserError(f"void: {shorten(void)}; expected 0 to {VALUES - 1}")
    ids = np.arange(VALUES)  # 255 is VOID
    if label_map is not None:
        content = read_json(label_map)
        if len(content.keys() & {"scale", "map"}) != 1:
            raise UserError(f"{label_map}: keys {shorten(list(content))}; expected one of scale and map")
        if "map" in content:
            ids = _from_map(content["map"], str(label_map), void)
        else:
            ids //= _whole(content["scale"], 1, VALUES - 1, f"{label_map}: scale")
            if ids[VOID] >= (MAX_CLASSES if classes is None else len(classes)):
                ids[VOID] = VOID
    if void != VOID:
        ids[void] = VOID
    return ids


def _from_map(content: Any, where: str, void: int) -> np.ndarray:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where}: map {shorten(content)}; expected an object with the value of each class id")
    ids = np.full(VALUES, NO_CLASS)
    ids[VOID] = VOID
    taken = {}
    for key, value in content.items():
        class_id = _whole(key, 0, MAX_CLASSES - 1, f"{where}: class id")
        value = _whole(value, 0, VALUES - 1, f"{where}: class {class_id}: value")
        if value in taken:
            raise UserError(f"{where}: value {value} for the classes {taken[value]} and {class_id}; expected one class")
        if value == void != VOID:
            raise UserError(f"{where}: value {value} for class {class_id} and for void; expected one of them")
        taken[value] = ids[value] = class_id
    if gaps := set(range(len(taken))) - set(taken.values()):
        raise UserError(f"{where}: no class {min(gaps)} in the map; expected all class ids from 0 to the highest")
    return ids


def _whole(value: Any, low: int, high: int, where: str) -> int:
    # SageMaker's own examples use both "3" and 3. No other JSON value is written in digits alone.
    if re.fullmatch("0|[1-9][0-9]{0,2}", str(value)) and low <= int(value) <= high:
        return int(value)
    raise UserError(f"{where} {shorten(value)}; expected a whole number from {low} to {high}")


# Common to all


def _to_listing(
    source: str | Path,
    pairs: list[Pair],
    classes: list[str] | None,
    label_map: str | Path | None,
    void: int,
    hint: str = "",
) -> MaskListing:
    if not pairs:
        raise UserError(f"{source}: no lines; expected a picture on each")
    _refuse_repeats([(pair.where, os.path.normpath(pair.image)) for pair in pairs])
    if classes is not None:
        _check_count(len(classes), "classes")
        _refuse_repeats([(f"classes[{i}]", check_name(name, f"classes[{i}]")) for i, name in enumerate(classes)])
    ids = _class_ids(label_map, classes, void)
    sizes, counts = _inspect_all(pairs, ids, MAX_CLASSES if classes is None else len(classes))
    found = counts.any(axis=0)
    if (found[:VOID] & (ids[:VOID] == ids[VOID])).any():
        ids[VOID] = VOID  # with {"scale": 64}, class 3 is 192
    if classes is None:
        highest = ids[:VOID][found[:VOID] & (ids[:VOID] != VOID)].max(initial=-1)
        if label_map is not None and "scale" in read_json(label_map) and ids[VOID] != highest + 1:
            ids[VOID] = VOID  # with a scale, 255 is a class only if its id follows the highest id found
        count = ids[found & (ids != VOID)].max(initial=-1) + 1
        _check_count(count, str(source), hint if found[VOID] else "")
        classes = [str(i) for i in range(count)]
    table = np.where((ids >= 0) & (ids < len(classes)), ids, VOID).astype(np.uint8)
    pixels = np.stack([counts[:, ids == i].sum(axis=1) for i in range(len(classes))], axis=1)
    return MaskListing([pair.image for pair in pairs], [pair.mask for pair in pairs], sizes, table, classes, pixels)


def _refuse_repeats(names: list[tuple[str, str]]) -> None:
    seen = {}
    for where, name in names:
        if name in seen:
            raise UserError(f"{where}: {name} again; expected it once, as in {seen[name]}")
        seen[name] = where


def _check_count(count: int, where: str, hint: str = "") -> None:
    if not MIN_CLASSES <= count <= MAX_CLASSES:
        raise UserError(f"{where}: {count} classes; expected {MIN_CLASSES} to {MAX_CLASSES}{hint}")


def _inspect_all(pairs: list[Pair], ids: np.ndarray, limit: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Return the heights and widths, and the number of pixels of each value in each mask, int64 (N, 256)."""
    sizes, counts = [], np.zeros((len(pairs), VALUES), np.int64)
    # All threads share the warning filters: filters that _inspect sets in one thread may remain after another thread
    # has restored its own. The filters set here are the first to be set and the last to be restored.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        results = pool.map(partial(_inspect, ids=ids, limit=limit), pairs)
        for _, row, (size, found) in zip(show_progress(pairs, "Reading masks"), counts, results, strict=True):
            sizes.append(size)
            row[:] = found
    return sizes, counts


def _inspect(pair: Pair, ids: np.ndarray, limit: int) -> tuple[tuple[int, int], np.ndarray]:
    """Check a mask; return height and width, and the number of pixels of each value."""
    try:
        width, height = picture_size(pair.image)
        values = _decode(pair.mask)
        if values.shape != (height, width):
            size = f"{values.shape[1]} x {values.shape[0]} pixels"
            raise UserError(f"{pair.mask}: {size}; expected {width} x {height}, as {pair.image} has when shown")
        counts = np.bincount(values.ravel(), minlength=VALUES)
        _check_values(pair.mask, counts, ids, limit)
    except UserError as error:
        raise UserError(f"{pair.where}: {error}" if pair.where else str(error)) from None
    return (height, width), counts


def _check_values(path: str, counts: np.ndarray, ids: np.ndarray, limit: int) -> None:
    good = (ids == VOID) | (ids >= 0) & (ids < limit)
    if not counts[~good].any():
        return
    value = np.flatnonzero(~good & (counts > 0))[0]
    found = f"{path}: value {value} in {counts[value]} pixels"
    void = f", or {' or '.join(map(str, np.flatnonzero(ids == VOID)))} for void" if VOID in ids else ""
    if ids[value] == NO_CLASS:
        known = shorten(np.flatnonzero((ids != VOID) & (ids != NO_CLASS)).tolist())
        raise UserError(f"{found}, not in the label map; expected one of {known}{void}")
    mapped = f", class {ids[value]} by the label map" if ids[value] != value else ""
    raise UserError(f"{found}{mapped}; expected 0 to {limit - 1}{void}")


def _decode(path: str) -> np.ndarray:
    """Read the values of a mask's pixels, uint8 (H, W)."""
    try:
        content = Path(path).read_bytes()
        with warnings.catch_warnings(action="ignore"):
            PngImageFile(BytesIO(content)).verify()  # checks checksums: a damaged file may decode to other values
            image = PngImageFile(BytesIO(content))  # not Image.open, which only warns of too many pixels
            wrong = _wrong_kind(image)
            if wrong is None:
                step = GREY_STEPS.get(image.tile[0][3], 1)  # reading the pixels empties `tile`
                return np.asarray(image, np.uint8) // step
    except Exception:  # Pillow raises many kinds of exceptions for a damaged file
        wrong = "cannot be decoded" if os.path.isfile(path) else "no such file"
        wrong += "; expected a mask as PNG"
    raise UnreadableImage(f"{path}: {wrong}")


def _wrong_kind(image: PngImageFile) -> str | None:
    if image.width * image.height > MAX_PIXELS:
        return f"{image.width} x {image.height} pixels; expected at most {MAX_PIXELS}"
    if image.mode.startswith("I"):
        return "16 bits per pixel; expected 8 bits or fewer"
    if image.mode not in ("L", "P", "1"):
        how = 'docs/semantic-segmentation.md, "Coloured masks", shows how to convert'
        return f"{image.mode} colours; expected class ids in one channel (mode L or P); {how}"
    return None
