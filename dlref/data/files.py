"""Common parts of the readers of folders and lists: names, class ids, lines, JSON, picture sizes, held-out pictures."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image

from dlref.data.images import FORMATS
from dlref.runtime.errors import UserError
from dlref.runtime.images import SIDEWAYS, orientation
from dlref.runtime.lines import numbered, read_text
from dlref.runtime.text import is_unicode

SPLIT_SEED = 0  # for held-out samples, which must not depend on the run's own seed
PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
EXIF_OF_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # mark EXIF or XMP data in a PNG


def held_out_indices(count: int, share: float) -> set[int]:
    """Return the indices of the held-out share of `count` pictures, always the same ones. Raises UserError."""
    chosen = round(count * share) if math.isfinite(share) else 0
    if not 0 < chosen < count:
        raise UserError(f"--data.init_args.held_out: {share} of {count} pictures; expected at least one in each part")
    return set(np.random.RandomState(SPLIT_SEED).permutation(count)[:chosen].tolist())


def read_splits(
    lists: Mapping[str, Any],
    read: Callable[[Any, list[str] | None], Any],
    classes: list[str] | None = None,
    share: float = 0.0,
    what: str = "pictures",
) -> dict[str, Any]:
    """Read the pictures of "train", "val" and "test"; "val" and "test" use the classes of the training pictures.

    Args:
        lists: the argument of `read` for each split. None for val holds out a `share` of the training pictures, and
            None for test uses the validation pictures for testing, too.
        read: returns a listing with `images`, `classes` and `take`.
        classes: the class names; None: those of the training pictures.
        share: share of the training pictures to hold out.
        what: what messages call the pictures.
    """
    train = listing_of(read, lists["train"], classes, what)
    splits = {
        name: listing_of(read, lists[name], train.classes, what) for name in ("val", "test") if lists[name] is not None
    }
    if "val" not in splits:
        places, out = range(len(train.images)), held_out_indices(len(train.images), share)
        splits["val"] = train.take([i for i in places if i in out])
        train = train.take([i for i in places if i not in out])
    if "test" not in splits:
        rank_zero_info(f"No test {what} are given: the validation {what} are also used for testing.")
        splits["test"] = splits["val"]
    splits = {"train": train, **splits}
    warn_of_shared({name: listing.images for name, listing in splits.items()}, what)
    return splits


def listing_of(read: Callable[[Any, list[str] | None], Any], source: Any, classes: list[str] | None, what: str) -> Any:
    """Return the listing that a `read` returns, perhaps one of one's own.

    Raises UserError for something else, such as a plain tuple, and for other classes than those it was given: ids would
    have another meaning in each split.
    """
    listing = read(source, classes)
    if not hasattr(listing, "classes"):
        raise UserError(f"{what} read as {type(listing).__name__}; expected a listing like those of dlref's readers")
    if classes is not None and list(listing.classes) != list(classes):
        found = shorten(list(listing.classes))
        raise UserError(f"{source}: {what} read with the classes {found}; expected those given, {shorten(classes)}")
    return listing


def warn_of_shared(splits: Mapping[str, Iterable[str]], what: str) -> None:
    """Warn about validation and test paths that are also trained on, which makes the scores too good."""
    train = set(map(os.path.normpath, splits["train"]))
    for name in ("val", "test"):
        paths = [os.path.normpath(path) for path in splits.get(name, ())]
        if shared := sum(path in train for path in paths):
            rank_zero_warn(f"{name}: {shared} of {len(paths)} {what} are among those of train")


def visible_entries(folder: str | Path) -> list[os.DirEntry]:
    """Return the entries of a folder sorted by name, without hidden ones. Raises UserError."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; expected a folder") from None


def first_of(names: Sequence[str]) -> str:
    """Return at most five of the names as text for a message."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def is_line(text: str) -> bool:
    """Return whether a text is a single non-blank line without null characters, as a name must be."""
    return text.splitlines() == [text] and text.strip() != "" and "\0" not in text


def check_name(name: Any, where: str) -> str:
    """Return the name of a class. Raises UserError at `where` if it is not a valid name."""
    if not isinstance(name, str) or not is_line(name) or not is_unicode(name):
        raise UserError(f"{where}: name {shorten(name)}; expected a class name")
    return name


def check_class_ids(where: str | Path, labels: np.ndarray, classes: int) -> None:
    """Raise UserError for the first of the labels (N,) that is not a class id."""
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(f"{where}: label {labels[at]} of image {at}; expected 0 to {classes - 1}")


def image_path(root: str | Path, name: Any, where: str) -> str:
    """Return the path of an image, relative to `root` unless absolute. Raises UserError at `where` if not a path."""
    if not isinstance(name, str) or not is_line(name):
        raise UserError(f"{where}: image {shorten(name)}; expected a path")
    return os.path.join(root, name)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Return the non-blank lines of a list with their numbers, which start at 1. Raises UserError."""
    return ((number, line) for number, line in numbered(path, "a list of images") if line.strip())


def read_fields(path: str | Path, count: int, what: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the place of each line of a list, for error messages, and its `count` words. Raises UserError."""
    for number, line in read_lines(path):
        fields = line.split()
        if len(fields) != count:
            raise UserError(f"{path}:{number}: {len(fields)} fields; expected {count}: {what}")
        yield f"{path}:{number}", fields


def read_json(path: str | Path, object_hook: Callable[[dict], Any] | None = None) -> dict[str, Any]:
    """Read one JSON object; `object_hook` is passed to json.loads. Raises UserError."""
    text = read_text(path, "JSON", largest=None)
    try:
        content = json.loads(text, object_hook=object_hook)
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} at column {error.colno}"
        raise UserError(f"{path}:{error.lineno}: {wrong}; expected one JSON object") from None
    except ValueError:  # a number with more digits than Python reads
        raise UserError(f"{path}: a number too long to read; expected one JSON object") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected one JSON object") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {shorten(content)}; expected one JSON object")
    return content


def picture_size(path: str) -> tuple[int, int]:
    """Return width and height from a picture's header, oriented as `read_image` orients it. Raises UserError."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=PILLOW_FORMATS) as image:
            width, height = image.size
            # Pillow decodes a whole PNG to find its orientation; most have none, so look for the marks first.
            content = Path(path).read_bytes() if image.format == "PNG" else b""
            marked = image.format != "PNG" or any(mark in content for mark in EXIF_OF_PNG)
            turned = marked and orientation(image) in SIDEWAYS
    except Exception:  # Pillow's readers raise many kinds of exceptions for a broken header
        wrong = "cannot be decoded" if os.path.isfile(path) else "no such file"
        raise UserError(f"{path}: {wrong}; expected a {FORMATS} image") from None
    return (height, width) if turned else (width, height)
