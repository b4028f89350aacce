"""Read images: files and arrays of any size -> uint8 (H, W, C)."""

from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from textwrap import shorten

import numpy as np
from PIL import ExifTags, Image

from dlref.runtime.errors import UserError
from dlref.runtime.runner import Runner

BYTES = (bytes, bytearray, memoryview)
Source = str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
WHITE_IS_ZERO = 0  # a TIFF's photometric interpretation, which pillow applies to 8 bits only
# Without PostScript, for which pillow starts another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def read_image(source: Source, channels: int) -> np.ndarray:
    """Return one image as uint8 (H, W, C), with C = `channels` (1 grey, 3 RGB).

    `source` is a file that pillow can open, the bytes of such a file, a Pillow image, or a uint8 array (H, W),
    (H, W, C) or (C, H, W). All except arrays are turned upright by their EXIF orientation, and alpha is dropped. Raises
    UserError for anything else.
    """
    if isinstance(source, np.ndarray):
        return _as_hwc(source, channels)
    name = f"{len(source)} bytes" if isinstance(source, BYTES) else source
    try:
        with _opened(source) as image:
            image.load()  # also turns a TIFF upright, and reads metadata at the end of a PNG
            side_up = orientation(image)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # the high byte
                image = Image.fromarray(high_byte(image))
            if image.mode[0] in "IF":
                raise UserError(f"{name}: {image.mode} pixels; expected 8 or 16 bits a channel")
            if 0 in image.size:
                raise UserError(f"{name}: {image.width}×{image.height} pixels; expected at least one")
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            return np.ascontiguousarray(upright(pixels[:, :, None] if channels == 1 else pixels, side_up))
    except FileNotFoundError:
        raise UserError(f"{name}: not found; expected an image file") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # for a damaged file, pillow may raise any exception
        reason = "" if isinstance(source, BYTES) else f" ({error})"  # which would name an object that holds the bytes
        raise UserError(f"{name}: cannot be decoded{reason}; expected an image file") from None


def high_byte(image: Image.Image) -> np.ndarray:
    """Return the high byte of each grey value of 12 or 16 bits, (H, W)."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]  # 12 in some
    high = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return ~high if tags.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO else high


def orientation(image: Image.Image) -> int:
    """Return the orientation of EXIF (or XMP), 1 to 8; 1, upright, if the metadata are broken."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # for damaged EXIF, pillow may raise any exception
        return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, ...) upright by an EXIF orientation. Returns a view."""
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _opened(source) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)  # the caller's image, which stays open
    return Image.open(BytesIO(source) if isinstance(source, BYTES) else source, formats=FORMATS)


def _as_hwc(array: np.ndarray, channels: int) -> np.ndarray:
    """Convert (H, W), (H, W, C) or (C, H, W) to (H, W, C). A last axis of size 1, 3 or 4 holds the channels."""
    if array.dtype != np.uint8 or array.size == 0:
        raise UserError(f"array {array.dtype} {array.shape}: expected a non-empty uint8 image")
    array = np.array(array)  # a camera may overwrite its buffer before the batch is complete
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1 and channels == 3:
        array = array.repeat(3, axis=2)
    if array.ndim == 3 and array.shape[2] == 3 and channels == 1:
        array = np.asarray(Image.fromarray(array).convert("L"))[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels:
        raise UserError(
            f"array of shape {array.shape}: expected (H, W), (H, W, C) or (C, H, W) with {channels} channel(s)"
        )
    return array


def centre(image: np.ndarray, crop: float | None) -> np.ndarray:
    """Return the central square of (H, W, C) whose side is `crop` of the shorter side, or the whole image for None."""
    if crop is None:
        return image
    height, width = image.shape[:2]
    side = max(1, round(crop * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


class ImageRunner(Runner):
    """Base class of runners for images. `metadata` holds at least `labels` (K names) and `channels` (1 or 3).

    Raises UserError if metadata lack these, or if the graph takes anything but images.
    """

    def __init__(self, graphs: dict, metadata: dict, graph: str, kind: str):
        labels, channels = metadata.get("labels"), metadata.get("channels")
        named = isinstance(labels, list) and bool(labels) and all(isinstance(label, str) for label in labels)
        if graph not in graphs or not named or type(channels) is not int or channels not in (1, 3):
            raise UserError(f"not {kind}; expected a graph {graph} and metadata channels, labels")
        inputs = graphs[graph].shape
        image = inputs.get("image", [])
        if len(inputs) != 1 or len(image) != 4 or any(isinstance(size, int) and size < 1 for size in image):
            raise UserError(f"graph takes {inputs}; expected one input, image, with four axes that are not empty")
        self.metadata = metadata

    @staticmethod
    def takes(metadata: dict) -> str:
        """Describe the input: pictures."""
        colours = "grey" if metadata["channels"] == 1 else "RGB"
        return (
            f"Pictures of any size, converted to {colours}: files ({', '.join(FORMATS)}); in Python also a file's "
            f"bytes, Pillow images and uint8 arrays (H, W, {metadata['channels']}). {len(metadata['labels'])} labels: "
            f"{shorten(', '.join(metadata['labels']), 400, placeholder='...')}."
        )

    def read(self, source: Source) -> np.ndarray:
        """Read any source that `read_image` accepts -> uint8 (H, W, C)."""
        return read_image(source, self.metadata["channels"])

    def together(self, first: np.ndarray, second: np.ndarray) -> bool:
        """Return whether two images have the same size."""
        return first.shape == second.shape

    def size(self, item: np.ndarray) -> int:
        """Return the number of pixels times channels."""
        return item.size


def as_picture(image: np.ndarray) -> Image.Image:
    """Convert uint8 (H, W, C) to a picture in colour, to draw on."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")


def fixed_size(graph) -> tuple[int, int] | None:
    """Return the height and width to which `ask` resizes images for `graph`; None if it takes any size."""
    height, width = graph.shape["image"][1:3]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def ask(graph, image: np.ndarray, *outputs: str) -> list[np.ndarray]:
    """Run `graph` on `image` uint8 (B, H, W, C), resized if the graph's size is fixed, and return its `outputs`.

    A graph with a fixed batch runs on one image at a time. Raises UserError unless there is an output for each image.
    """
    if size := fixed_size(graph):
        image = resize(image, *size)
    rows = [row[None] for row in image] if isinstance(graph.shape["image"][0], int) else [image]
    answers = [graph(image=row) for row in rows]
    return [
        np.concatenate([answered(a, output, len(r)) for a, r in zip(answers, rows, strict=True)]) for output in outputs
    ]


def answered(answer: dict[str, np.ndarray], output: str, count: int) -> np.ndarray:
    """Return an output that has a row for each of `count` images. Raises UserError if it does not."""
    array = answer.get(output)
    if not (isinstance(array, np.ndarray) and array.ndim and len(array) == count):
        raise UserError(f"graph returns no {output} for each of {count} images; expected one row for each")
    return array


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (B, H, W, C) -> (B, height, width, C), bilinear and antialiased, as graphs with free sizes do."""
    if image.shape[1:3] == (height, width):
        return image
    planes = image.transpose(0, 3, 1, 2).reshape(-1, *image.shape[1:3])
    resized = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)) for plane in planes
    ]
    return np.stack(resized).reshape(len(image), -1, height, width).transpose(0, 2, 3, 1)
