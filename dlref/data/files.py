"""What the readers of folders and lists share: names, class ids, lines, JSON, sizes of pictures, what is held out."""

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

SPLIT_SEED = 0  # of what is held out, which must be the same whatever the run's own seed
PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
EXIF_OF_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG has it, XMP too


def held_out_indices(count: int, share: float) -> set[int]:
    """Indices of the held-out share of `count` pictures; always the same ones. Raises UserError."""
    chosen = round(count * share) if math.isfinite(share) else 0
    if not 0 < chosen < count:
        raise UserError(f"--data.init_args.held_out: {share} of {count} pictures; expected at least one in each part")
    return set(np.random.RandomState(SPLIT_SEED).permutation(count)[:chosen].tolist())


def read_splits(
    lists: Mapping[str, Any], read: Callable[[Any, list[str] | None], Any], classes: list[str] | None, share: float
) -> dict[str, Any]:
    """Read the pictures of "train", "val" and "test", the latter two with the classes of the training pictures.

    Args:
        lists: what `read` takes for each split; None for val holds out a `share` of the training pictures, and None
            for test uses the validation pictures for testing too.
        read: returns a listing with `images`, `classes` and `take`.
        classes: the class names; None: those of the training pictures.
        share: of the training pictures, held out.
    """
    train = read(lists["train"], classes)
    splits = {name: read(lists[name], train.classes) for name in ("val", "test") if lists[name] is not None}
    if "val" not in splits:
        places, out = range(len(train.images)), held_out_indices(len(train.images), share)
        splits["val"] = train.take([i for i in places if i in out])
        train = train.take([i for i in places if i not in out])
    if "test" not in splits:
        rank_zero_info("No test pictures are given: the validation pictures serve for testing too.")
        splits["test"] = splits["val"]
    splits = {"train": train, **splits}
    warn_of_shared({name: listing.images for name, listing in splits.items()}, "pictures")
    return splits


def warn_of_shared(splits: Mapping[str, Iterable[str]], what: str) -> None:
    """Warn of paths of validation and test that are trained on, too: their scores flatter the network."""
    train = set(map(os.path.normpath, splits["train"]))
    for name in ("val", "test"):
        paths = [os.path.normpath(path) for path in splits[name]]
        if shared := sum(path in train for path in paths):
            rank_zero_warn(f"{name}: {shared} of {len(paths)} {what} are among those of train")


def visible_entries(folder: str | Path) -> list[os.DirEntry]:
    """What a folder holds, by name, hidden entries left out. Raises UserError."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; expected a folder") from None


def first_of(names: Sequence[str]) -> str:
    """Names for a message, no more than five."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def is_line(text: str) -> bool:
    """Whether a text is one line that says something, as a name has to."""
    return text.splitlines() == [text] and text.strip() != "" and "\0" not in text


def check_name(name: Any, where: str) -> str:
    """The name of a class. Raises UserError at `where` for what is none."""
    if not isinstance(name, str) or not is_line(name) or not is_unicode(name):
        raise UserError(f"{where}: name {shorten(name)}; expected that of a class")
    return name


def check_class_ids(where: str | Path, labels: np.ndarray, classes: int) -> None:
    """Raise UserError for the first of the labels (N,) that is not the id of a class."""
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(f"{where}: label {labels[at]} of image {at}; expected 0 to {classes - 1}")


def image_path(root: str | Path, name: Any, where: str) -> str:
    """The path of an image of a folder. Raises UserError at `where` for what is no name."""
    if not isinstance(name, str) or not is_line(name):
        raise UserError(f"{where}: image {shorten(name)}; expected a path")
    return os.path.join(root, name)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a list, numbered from 1, without blank ones. Raises UserError."""
    return ((number, line) for number, line in numbered(path, "a list of images") if line.strip())


def read_fields(path: str | Path, count: int, what: str) -> Iterator[tuple[str, list[str]]]:
    """The place of each line of a list, for an error to name, and the `count` words on it. Raises UserError."""
    for number, line in read_lines(path):
        fields = line.split()
        if len(fields) != count:
            raise UserError(f"{path}:{number}: {len(fields)} fields; expected {count}: {what}")
        yield f"{path}:{number}", fields


def read_json(path: str | Path, object_hook: Callable[[dict], Any] | None = None) -> dict[str, Any]:
    """One JSON object; `object_hook` is json.loads's. Raises UserError."""
    text, where = read_text(path, "JSON", largest=None), str(path)
    try:
        content = json.loads(text, object_hook=object_hook)
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} at column {error.colno}"
        raise UserError(f"{path}:{error.lineno}: {wrong}; expected one JSON object") from None
    except ValueError:  # a number of more digits than Python reads
        raise UserError(f"{where}: a number too long to read; expected one JSON object") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; expected one JSON object") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: {shorten(content)}; expected one JSON object")
    return content


def picture_size(path: str) -> tuple[int, int]:
    """Width and height from a picture's header, turned as `read_image` turns it. Raises UserError."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=PILLOW_FORMATS) as image:
            width, height = image.size
            # To find the orientation of a PNG Pillow decodes all of it, and most have none.
            content = Path(path).read_bytes() if image.format == "PNG" else b""
            told = image.format != "PNG" or any(mark in content for mark in EXIF_OF_PNG)
            turned = told and orientation(image) in SIDEWAYS
    except Exception:  # what Pillow's readers raise at a broken header is open-ended
        wrong = "cannot be decoded" if os.path.isfile(path) else "no such file"
        raise UserError(f"{path}: {wrong}; expected a {FORMATS} image") from None
    return (height, width) if turned else (width, height)
