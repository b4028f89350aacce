"""Pictures with an orientation: training, a device and the readers of boxes and masks turn them the same way."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dlref.data.files import picture_size
from dlref.data.images import read_image
from dlref.runtime.images import read_image as on_a_device

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF>'
    "</x:xmpmeta>"
)


def exif_of(orientation, order=">", kind="H"):
    """Return EXIF data with only an orientation, in either byte order, stored as a short or a long."""
    value = struct.pack(f"{order}{kind}", orientation).ljust(4, b"\0")
    entry = struct.pack(f"{order}HHI", 0x112, {"H": 3, "I": 4}[kind], 1) + value
    return {">": b"MM", "<": b"II"}[order] + struct.pack(f"{order}HIH", 42, 8, 1) + entry + bytes(4)


def app1(*contents):
    """Return the JPEG segments for EXIF and XMP."""
    return b"".join(b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content for content in contents)


def chunk(kind, content):
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def packets(name, plain):
    """Return the content of a file that stores its orientation in the way that `name` stands for."""
    exif, xmp = b"Exif\0\0" + exif_of(6), b"http://ns.adobe.com/xap/1.0/\0" + XMP.format(1).encode()
    raw = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    xmp_of_png = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format(6).encode()
    return {
        "xmp_alone.jpg": lambda: plain[:2] + app1(xmp.replace(b'"1"', b'"6"')) + plain[2:],
        "xmp_first.jpg": lambda: plain[:2] + app1(xmp, exif) + plain[2:],
        "long.jpg": lambda: plain[:2] + app1(b"Exif\0\0" + exif_of(6, ">", "I")) + plain[2:],
        "little.jpg": lambda: plain[:2] + app1(b"Exif\0\0" + exif_of(6, "<", "I")) + plain[2:],
        "raw.png": lambda: plain[:33] + chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)) + plain[33:],
        "late.png": lambda: plain[:-12] + chunk(b"eXIf", exif_of(6)) + plain[-12:],
        "xmp.png": lambda: plain[:33] + chunk(b"iTXt", xmp_of_png) + plain[33:],
    }[name]()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "webp.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_and_the_device_turn_a_photograph_the_same_way(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners = np.zeros((16, 24, 3), np.uint8)
    corners[:8, :8], corners[:8, -8:], corners[-8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = tmp_path / name
    Image.fromarray(corners).save(path, "WEBP" if "webp" in name else None, exif=exif, quality=95)
    device = on_a_device(path, 3)
    training = read_image(str(path)).permute(1, 2, 0).numpy()
    assert training.shape == device.shape
    assert np.abs(training.astype(int) - device).mean() < 4
    with Image.open(path) as image:  # turned by Pillow, as viewers and labelling tools show it
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(device, expected)
    assert picture_size(str(path)) == expected.shape[1::-1]


@pytest.mark.parametrize(
    "name", ["xmp_alone.jpg", "xmp_first.jpg", "long.jpg", "little.jpg", "raw.png", "late.png", "xmp.png", "xmp.webp"]
)
def test_a_picture_is_turned_wherever_its_file_stores_the_orientation(tmp_path, name):
    """In training, on a device, and when boxes and masks are compared with its size."""
    path = tmp_path / name
    picture = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    if name == "xmp.webp":
        picture.save(path, xmp=XMP.format(6).encode(), lossless=True)
    else:
        picture.save(path)
        path.write_bytes(packets(name, path.read_bytes()))
    device = on_a_device(path, 3)
    assert device.shape == (24, 16, 3)
    np.testing.assert_array_equal(read_image(str(path)).permute(1, 2, 0).numpy(), device)
    assert picture_size(str(path)) == (16, 24)


def test_broken_exif_does_not_turn_a_picture(tmp_path):
    Image.new("RGB", (24, 16)).save(tmp_path / "a.jpg")
    plain = (tmp_path / "a.jpg").read_bytes()
    for exif in (b"nonsense", exif_of(6)[:12], exif_of(9)):
        (tmp_path / "a.jpg").write_bytes(plain[:2] + app1(b"Exif\0\0" + exif) + plain[2:])
        with warnings.catch_warnings(action="ignore"):  # Pillow warns on a device; training is silent
            assert on_a_device(tmp_path / "a.jpg", 3).shape == (16, 24, 3)
            assert read_image(str(tmp_path / "a.jpg")).shape == (3, 16, 24)
            assert picture_size(str(tmp_path / "a.jpg")) == (24, 16)


def test_a_file_name_need_not_be_utf_8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9.jpg")
    Image.new("RGB", (24, 16)).save(path)
    assert read_image(path).shape == (3, 16, 24)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_a_single_line_of_pixels_is_turned_as_well(tmp_path, name, size):
    """NumPy considers a view with a negative stride contiguous if that axis has length 1; torch refuses it."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        ramp = np.linspace(40, 200, max(size)).astype(np.uint8).reshape(size[::-1])
        Image.fromarray(ramp).convert("RGB").save(tmp_path / name, exif=exif, quality=95)
        with Image.open(tmp_path / name) as image:
            expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
        np.testing.assert_allclose(read_image(str(tmp_path / name)).permute(1, 2, 0).int(), expected, atol=3)
