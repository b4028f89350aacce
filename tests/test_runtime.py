"""Bundles at the edge: image inputs in every form, predictions, and refused requests."""

import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from handmade import METADATA, write_manifest
from PIL import Image

from dlref.data.images import read_image as to_train_with
from dlref.runtime import UserError, kinds, load, runner_of, sessions
from dlref.runtime import bundle as bundles
from dlref.runtime.__main__ import line, main, places_of, progress, save
from dlref.runtime.images import ask, centre, read_image, resize
from dlref.runtime.lines import text_in
from dlref.runtime.machine import cores
from dlref.runtime.runner import BATCH
from dlref.runtime.runners.image_classification import answers
from dlref.tasks.image_classification import metrics


def grey(value, height=4, width=6):
    return np.full((height, width), value, np.uint8)


def test_a_file_an_array_and_a_list_give_the_same_prediction(bundle, tmp_path):
    Image.fromarray(grey(204)).save(tmp_path / "grey.png")
    runner = load(bundle)
    answer = runner(tmp_path / "grey.png")
    assert answer["label"] == "bright"
    assert answer["probability"] == pytest.approx(0.8)
    assert [row["label"] for row in answer["top"]] == ["bright", "dark"]
    assert runner(grey(204)) == answer
    assert runner([grey(204), str(tmp_path / "grey.png")]) == [answer, answer]
    assert json.loads(json.dumps(answer)) == answer  # plain Python values


def test_stream_predicts_correctly_if_the_caller_reuses_one_frame_buffer(bundle):
    runner, camera = load(bundle), grey(0)

    def frames():
        for value in (10, 200, 90):
            camera[:] = value
            yield camera

    assert list(runner.stream(frames())) == runner([grey(10), grey(200), grey(90)])


def test_stream_with_batch_size_1_predicts_each_frame_before_taking_the_next(bundle):
    taken = []
    for count, _ in enumerate(load(bundle).stream((taken.append(v) or grey(v) for v in (1, 2, 3)), batch_size=1)):
        assert len(taken) == count + 1


def test_the_error_message_for_a_very_long_input_is_shortened(bundle):
    with pytest.raises(UserError) as caught:
        load(bundle)("A" * 1_000_000)  # a picture as text
    assert len(str(caught.value)) < 3000
    assert str(caught.value).endswith("expected an image file")


def test_an_image_without_pixels_is_refused(bundle):
    with pytest.raises(UserError, match=r"0×5 pixels; expected at least one$"):
        load(bundle)(Image.new("L", (0, 5)))


def test_a_bundle_loads_from_a_folder_whose_name_is_not_valid_utf8(bundle, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff")
    shutil.copytree(bundle, folder)
    assert load(folder)(grey(204)) == load(bundle)(grey(204))


def test_an_empty_provider_name_is_refused_instead_of_using_the_default(bundle):
    with pytest.raises(UserError, match="provider ''; expected one of"):
        load(bundle, provider="")


def test_predictions_keep_the_order_of_images_of_different_sizes(bundle):
    values = list(range(0, 250, 2))
    images = [grey(value, height=3 + value % 3) for value in values]
    probabilities = [row["top"] for row in load(bundle)(images)]
    bright = [next(t["probability"] for t in top if t["label"] == "bright") for top in probabilities]
    np.testing.assert_allclose(bright, np.array(values) / 255, atol=1e-6)


def test_batches_are_bounded_and_hold_images_of_one_size(bundle):
    runner, sizes = load(bundle), []
    answer = runner.probability
    runner.probability = lambda image: sizes.append(image.shape[:3]) or answer(image)
    list(runner.stream([grey(0)] * (BATCH + 3) + [grey(0, 9)]))
    list(runner.stream([grey(0)] * 5, batch_size=2))
    assert sizes == [(BATCH, 4, 6), (3, 4, 6), (1, 9, 6), (2, 4, 6), (2, 4, 6), (1, 4, 6)]


def test_stream_yields_an_error_in_place_of_each_bad_input(bundle, tmp_path):
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    sources = [tmp_path / "white.png", tmp_path / "absent.png", grey(0), np.zeros(3), grey(255)]
    answers = list(load(bundle).stream(sources))
    assert [isinstance(answer, UserError) for answer in answers] == [False, True, False, True, False]
    assert [answers[i]["label"] for i in (0, 2, 4)] == ["bright", "dark", "bright"]
    with pytest.raises(UserError, match=r"absent\.png"):
        load(bundle)(sources)


def test_images_of_a_refused_batch_are_retried_one_at_a_time(bundle):
    runner = load(bundle)
    answer = runner.probability

    def refuses_black(image):
        if not image.any(axis=(1, 2, 3)).all():
            raise UserError("black")
        return answer(image)

    runner.probability = refuses_black
    answers = list(runner.stream([grey(255), grey(0), grey(204)]))
    assert [str(a) if isinstance(a, UserError) else a["label"] for a in answers] == ["bright", "black", "bright"]


def test_a_graph_with_fixed_shapes_gets_one_resized_image_at_a_time():
    class Fixed:
        shape: ClassVar = {"image": [1, 8, 8, 3]}
        seen: ClassVar = []

        def __call__(self, image):
            self.seen.append(image.shape)
            return {"mean": image.mean(axis=(1, 2, 3))}

    image = np.repeat(np.arange(4, dtype=np.uint8)[:, None, None, None] * 60, 48, axis=1).repeat(32, axis=2)
    np.testing.assert_allclose(ask(Fixed(), image.repeat(3, axis=3), "mean")[0], np.arange(4) * 60)
    assert Fixed.seen == [(1, 8, 8, 3)] * 4


def test_resize_matches_pytorchs_antialiased_bilinear_interpolation():
    image = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float()
    for size in ((16, 24), (64, 80)):
        expected = F.interpolate(pixels, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()
        assert (
            np.abs(resize(image, *size) - expected).max() <= 1
        )  # on a scale of 255: Pillow rounds intermediate values


def test_crop_keeps_the_centre_of_the_image(bundle):
    framed = grey(0, 10, 20)
    framed[1:9, 6:14] = 255  # the region that a crop of 0.8 keeps
    assert load(bundle)(framed)["label"] == "dark"
    write_manifest(bundle, metadata={**METADATA, "crop": 0.8})
    assert load(bundle)(framed)["top"][0] == {"label": "bright", "probability": 1.0}
    assert centre(grey(7, 1, 1), 0.1).shape == (1, 1)


def test_read_image_accepts_arrays_with_channels_last_first_or_absent():
    rgb = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    np.testing.assert_array_equal(read_image(rgb, 3), rgb)
    np.testing.assert_array_equal(read_image(rgb.transpose(2, 0, 1), 3), rgb)
    assert read_image(grey(7), 1).shape == (4, 6, 1)
    assert read_image(grey(7), 3).shape == (4, 6, 3)
    for array in (rgb, rgb.transpose(2, 0, 1)):
        np.testing.assert_array_equal(read_image(array, 1)[..., 0], np.asarray(Image.fromarray(rgb).convert("L")))
    for height, width, channels in ((3, 5, 1), (1, 5, 3)):  # one side could be mistaken for the channels
        for wanted in (1, 3):
            assert read_image(np.zeros((height, width, channels), np.uint8), wanted).shape == (height, width, wanted)


def test_bytes_and_pil_images_are_read_like_the_file_they_come_from(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3)).save(tmp_path / "a.jpg", exif=exif)
    expected = read_image(tmp_path / "a.jpg", 3)
    np.testing.assert_array_equal(read_image((tmp_path / "a.jpg").read_bytes(), 3), expected)
    with Image.open(tmp_path / "a.jpg") as picture:
        for _ in range(2):  # it stays open
            np.testing.assert_array_equal(read_image(picture, 3), expected)
    for damaged in (b"\xff\xd8\xff\xe0", bytearray(4)):
        with pytest.raises(UserError, match=r"^4 bytes: cannot be decoded; expected an image file$"):
            read_image(damaged, 3)
    Image.new("F", (2, 2)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"^\d+ bytes: F pixels; expected 8 or 16 bits a channel$"):
        read_image((tmp_path / "a.tif").read_bytes(), 3)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 6), np.float32), np.zeros((0, 6), np.uint8), np.zeros((2, 4, 6, 3), np.uint8)]
)
def test_arrays_of_other_types_or_shapes_are_refused(array):
    with pytest.raises(UserError, match="expected"):
        read_image(array, 3)


def test_image_files_are_rotated_upright_and_converted_to_the_requested_channels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated: rows and columns are swapped
    Image.fromarray(grey(90, 4, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", 1).shape == (6, 4, 1)
    Image.new("RGBA", (5, 3), (10, 20, 30, 0)).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png", 3)[0, 0], [10, 20, 30])
    Image.new("P", (5, 3)).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png", 1).shape == (3, 5, 1)


def test_16_bit_png_images_are_reduced_to_their_high_byte(tmp_path):
    Image.fromarray(np.full((3, 5), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", 1), 0x80)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", 3), 0x80)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated: rows and columns are swapped
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) << 8).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", 1)
    np.testing.assert_array_equal(turned[..., 0], np.rot90(np.arange(24).reshape(4, 6), -1))
    np.testing.assert_array_equal(turned[..., 0], to_train_with(tmp_path / "turned.png")[0])


def test_the_error_for_an_unreadable_image_names_the_file(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((3, 5), np.float32)).save(tmp_path / "float.tiff")
    for name in ("text.png", "float.tiff", "absent.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name, 1)


def test_a_multi_label_prediction_returns_the_labels_that_the_metrics_count():
    metadata = {"labels": ["a", "b", "c"], "multi_label": True}
    probability = np.array([[0.51, 0.2, 0.5]], np.float32)
    (row,) = answers(probability, metadata)
    assert row["labels"] == ["a"]
    accuracy = metrics(3, multi_label=True)["accuracy"]
    assert accuracy(torch.from_numpy(probability), torch.tensor([[1, 0, 0]])) == 1


def test_the_five_likeliest_classes_are_listed_and_equal_ones_in_order():
    probability = np.full((1, 1000), 0.5, np.float32)
    probability[0, 7] = 1
    (row,) = answers(probability, {"labels": list(map(str, range(1000))), "multi_label": False})
    assert [one["label"] for one in row["top"]] == ["7", "0", "1", "2", "3"]


def test_a_folder_as_input_is_expanded_to_its_files(bundle, tmp_path, capsys):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name in ("b.png", "more/a.png", "a.png"):
        Image.fromarray(grey(255)).save(folder / name)
    (folder / ".hidden").touch()
    (folder / "notes.txt").write_text("no image")
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(grey(0)).save(tmp_path / "elsewhere/c.png")
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "again").symlink_to("more")
    (folder / "more/round").symlink_to("..")
    (folder / "lost.png").symlink_to("nowhere.png")
    assert main([str(bundle), str(folder), "--batch-size", "2"]) == 2  # notes.txt and lost.png have no prediction
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [Path(line["input"]).relative_to(folder).as_posix() for line in lines] == [
        "a.png",
        "b.png",
        "linked/c.png",
        "lost.png",
        "more/a.png",
        "notes.txt",
    ]
    assert ["label" in line for line in lines] == [True, True, True, False, True, False]
    assert "lost.png: not found" in lines[3]["error"]
    assert "notes.txt: cannot be decoded" in lines[5]["error"]
    assert printed.err.count("\n") == 1
    assert "(2 of 6 inputs have no answer)" in printed.err
    (tmp_path / "empty").mkdir()
    assert main([str(bundle), str(tmp_path / "empty")]) == 2
    assert "no files in this folder" in capsys.readouterr().err


def test_standard_output_holds_only_predictions_if_standard_error_is_closed(bundle, tmp_path, capsys, monkeypatch):
    Image.fromarray(grey(255)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "stderr", None)
    assert main([str(bundle), str(tmp_path / "a.png"), str(tmp_path / "none.png")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert ["label" in json.loads(line) for line in lines] == [True, False]
    assert main([str(bundle / "none"), "a.png"]) == 2
    sys.stderr.close()
    assert capsys.readouterr().out == ""


def test_an_image_with_truncated_exif_is_classified_without_a_warning(bundle, tmp_path):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x010E] = "a description" * 20
    Image.fromarray(grey(255)).save(file, "JPEG", exif=exif)
    content = file.getvalue()
    begin = content.index(b"Exif")
    size = int.from_bytes(content[begin - 2 : begin], "big")
    cut = content[: begin - 2] + (42).to_bytes(2, "big") + content[begin : begin + 40] + content[begin - 2 + size :]
    (tmp_path / "cut.jpg").write_bytes(cut)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main([str(bundle), str(tmp_path / "cut.jpg")]) == 0
    assert not caught


def test_the_size_of_each_image_is_read_at_most_twice(bundle, monkeypatch):
    runner, asked = load(bundle), []
    monkeypatch.setattr(type(runner), "size", lambda self, item: asked.append(item) or item.size)
    assert len(list(runner.stream([grey(255)] * 50, batch_size=50))) == 50
    assert len(asked) <= 100


def test_bundle_kinds_are_found_if_dlref_is_imported_from_a_zip(tmp_path):
    """Frozen and single-file programs import the package this way."""
    with zipfile.ZipFile(tmp_path / "dlref.zip", "w") as archive:
        for path in sorted((ROOT / "dlref/runtime").rglob("*.py")):
            archive.write(path, path.relative_to(ROOT))
        archive.write(ROOT / "dlref/__init__.py", "dlref/__init__.py")
    code = "from dlref import runtime; print(runtime.__file__, *runtime.kinds())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "dlref.zip")}
    command = [sys.executable, "-c", code]
    place, *found = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert place.startswith(str(tmp_path / "dlref.zip"))
    assert found == kinds()


def test_text_in_reads_a_pipe_and_returns_none_for_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=("3 March 2026\n",)).start()
    assert text_in(str(tmp_path / "pipe")) == "3 March 2026\n"
    assert text_in(str(tmp_path)) is None


def test_a_dangling_symlink_is_not_read_as_text(tmp_path):
    (tmp_path / "lost").symlink_to("nowhere")
    assert text_in(str(tmp_path / "lost")) == tmp_path / "lost"


def test_numbered_output_names_do_not_collide_with_names_of_input_files(tmp_path):
    (tmp_path / "1.jpg").touch()
    names = ["lost.jpg", str(tmp_path / "1.jpg"), "a text"]
    found = [path.name for path in places_of(names, tmp_path / "out", "--output")]
    assert found == ["input-1.png", "1.png", "3.png"]


@pytest.mark.parametrize(("system", "collide"), [("linux", False), ("darwin", True)])
def test_output_names_that_differ_only_in_case_collide_on_a_mac(system, collide, tmp_path, monkeypatch):
    names = [tmp_path / "x/A.jpg", tmp_path / "y/a.jpg"]
    for name in names:
        name.parent.mkdir()
        name.touch()
    monkeypatch.setattr("sys.platform", system)
    refused = pytest.raises(UserError, match=r"two inputs would be written to a\.png; expected names that differ")
    with refused if collide else nullcontext():
        places_of(list(map(str, names)), tmp_path / "out", "--output")


def test_save_uses_a_different_temporary_file_for_each_image(tmp_path):
    """Two machines may write to the same folder at once, from processes with equal ids."""
    parts = []

    class Watched:
        def save(self, part, format):
            parts.append(part)
            part.touch()

    for name in ("a.png", "b.png"):
        save(Watched(), tmp_path / name)
    assert len(set(parts)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_save_accepts_a_file_name_of_the_maximum_length(tmp_path):
    save(Image.new("L", (2, 2)), tmp_path / f"{'a' * 251}.png")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_a_16_bit_pgm_image_is_reduced_to_its_high_byte(tmp_path):
    values = np.array([[0, 255, 256, 65535]], dtype=">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + values.tobytes())
    assert read_image(tmp_path / "a.pgm", 1)[..., 0].tolist() == [[0, 0, 1, 255]]


def grey_tiff(pixels, width, bits, white_is_zero=False):
    """Return a TIFF file of one row."""
    black, size = int(not white_is_zero), len(pixels)
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: black, 273: 8, 277: 1, 278: 1, 279: size}  # pixels from byte 8
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head, padding = struct.pack("<2sHI", b"II", 42, 8 + size + size % 2), bytes(size % 2)
    return head + pixels + padding + struct.pack("<H", len(tags)) + directory + bytes(4)


def test_a_12_bit_tiff_image_is_reduced_to_its_high_eight_bits(tmp_path):
    values = [0, 15, 16, 0x7FF, 0x800, 0xFFF]  # two pixels in three bytes
    pixels = bytes.fromhex("".join(f"{value:03x}" for value in values))
    (tmp_path / "a.tif").write_bytes(grey_tiff(pixels, len(values), bits=12))
    assert read_image(tmp_path / "a.tif", 1)[..., 0].tolist() == [[value >> 4 for value in values]]


@pytest.mark.parametrize(("bits", "pixels"), [(8, b"\x00\x01\xff"), (16, b"\xff\x00\x00\x01\xff\xff")])
def test_a_tiff_image_whose_zeros_are_white_is_not_read_as_its_negative(bits, pixels):
    """As X-ray machines write it."""
    assert read_image(grey_tiff(pixels, 3, bits, white_is_zero=True), 1)[..., 0].tolist() == [[255, 254, 0]]
    assert read_image(grey_tiff(pixels, 3, bits), 1)[..., 0].tolist() == [[0, 1, 255]]


def test_progress_is_shown_only_on_a_terminal(capsys, monkeypatch):
    assert list(progress([1, 2], 2)) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress([1, 2], 2)) == [1, 2]
    assert f"[{'#' * 30}] 2/2" in capsys.readouterr().err


def test_large_images_are_processed_in_smaller_batches(bundle, monkeypatch):
    monkeypatch.setattr("dlref.runtime.runner.ROOM", 3 * 4 * 6)
    runner, sizes = load(bundle), []
    answer = runner.probability
    runner.probability = lambda image: sizes.append(len(image)) or answer(image)
    list(runner.stream([grey(0)] * 7 + [grey(0, 40)] * 2))
    assert sizes == [3, 3, 1, 1, 1]  # at least one image, however large


def test_an_unexpected_exception_in_an_image_reader_fails_only_that_input(bundle, tmp_path, monkeypatch, capsys):
    """Pillow's plugins raise arbitrary exceptions for damaged files."""
    Image.fromarray(grey(255)).save(tmp_path / "white.png")

    def broken():
        raise AttributeError("'NoneType' object has no attribute 'seek'")

    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **_: broken() if "bad" in str(path) else real(path))
    assert main([str(bundle), "bad.spi", str(tmp_path / "white.png")]) == 2
    bad, good = map(json.loads, capsys.readouterr().out.splitlines())
    assert "bad.spi: cannot be decoded" in bad["error"]
    assert good["label"] == "bright"


def test_running_out_of_memory_for_one_input_does_not_affect_the_others(bundle, tmp_path, monkeypatch, capsys):
    paths = [str(tmp_path / name) for name in ("white.png", "huge.png", "black.png")]
    for path, value in zip(paths, (255, 254, 0), strict=True):
        Image.fromarray(grey(value)).save(path)
    convert, runner = Image.Image.convert, load(bundle)

    def too_large(picture, *arguments):
        if picture.getpixel((0, 0)) == 254:
            raise MemoryError
        return convert(picture, *arguments)

    monkeypatch.setattr(Image.Image, "convert", too_large)
    assert main([str(bundle), *paths]) == 2
    first, refused, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert refused["error"] == "not enough memory; expected a smaller input, or more memory"
    assert (first["label"], last["label"]) == ("bright", "dark")
    answer = runner.answer
    runner.answer = lambda items: answer(items) if len(items) == 1 else too_large(Image.new("L", (1, 1), 254))
    assert [row["label"] for row in runner.stream([grey(255), grey(0)])] == ["bright", "dark"]


def test_loading_a_bundle_writes_no_telemetry_to_the_home_folder(bundle, tmp_path):
    """By default onnxruntime keeps unsent telemetry in the home folder."""
    code = "import sys, dlref.runtime; dlref.runtime.load(sys.argv[1])"
    home = os.environ | {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "", "PYTHONPATH": str(ROOT)}
    (tmp_path / "home").mkdir()
    home.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code, bundle], env=home, check=True)
    assert list((tmp_path / "home").rglob("*")) == []


def test_a_file_whose_name_is_not_valid_utf8_is_classified_and_printed_in_ascii(bundle, tmp_path, capsys):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(path, "wb") as file:
        Image.fromarray(grey(255)).save(file, "png")
    assert main([str(bundle), os.fsdecode(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed)["label"] == "bright"


@pytest.mark.parametrize(("encoding", "ascii_"), [("cp1252", True), ("latin-1", True), ("utf-8", False)])
def test_output_lines_are_utf8_or_escaped_to_ascii_for_other_encodings(encoding, ascii_, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    text = line({"label": "é"})
    assert text.isascii() == ascii_
    assert json.loads(text) == {"label": "é"}


def test_a_file_that_can_be_listed_but_not_accessed_fails_only_that_input(bundle, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(grey(255)).save(tmp_path / "in" / name)

    def hiding(function):
        return lambda path: not str(path).endswith("a.png") and function(path)

    for name in ("isfile", "exists", "isdir"):  # as in a folder that may not be entered
        monkeypatch.setattr(os.path, name, hiding(getattr(os.path, name)))
    (tmp_path / "in/a.png").write_bytes(b"")
    assert main([str(bundle), str(tmp_path / "in")]) == 2
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert "a.png" in first["error"]
    assert second["label"] == "bright"


def test_threads_default_to_those_of_the_bundles_target(bundle, monkeypatch):
    seen = []
    real = bundles.OnnxGraph
    monkeypatch.setattr(bundles, "OnnxGraph", lambda *arguments: seen.append(arguments[2]) or real(*arguments))
    load(bundle)
    write_manifest(bundle, target={"provider": "CPUExecutionProvider", "threads": 2})
    load(bundle)
    load(bundle, threads=1)
    assert seen == [None, min(2, cores()), 1]
    load(bundle, threads=np.int64(1 << 40))  # more threads than cores would wait for each other
    assert seen[-1] == cores()


def test_the_onnxruntime_session_uses_the_given_number_of_threads(bundle):
    graph = bundles.OnnxGraph(bundle / "classify.onnx", "CPUExecutionProvider", 3)
    assert graph.session.get_session_options().intra_op_num_threads == 3


@pytest.mark.parametrize(
    ("mine", "asked", "threads"), [(8, None, None), (8, 9, 8), (8, 3, 3), (2, None, 2), (2, 5, 2), (2, 1, 1)]
)
def test_threads_are_limited_to_the_cores_that_this_process_may_use(mine, asked, threads, monkeypatch):
    """By default onnxruntime binds one thread to each core of the machine, which has eight here."""
    monkeypatch.setattr("dlref.runtime.cores", lambda: mine)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert sessions("image-classification", asked, "CPUExecutionProvider") == (threads, 1)


@pytest.mark.parametrize("threads", [0, -1, True, "2", 1.5])
def test_threads_other_than_positive_integers_are_refused(bundle, threads):
    with pytest.raises(UserError, match=r"threads .*; expected a whole number from 1"):
        load(bundle, threads=threads)


def test_a_full_disk_or_closed_standard_output_ends_in_a_one_line_error(bundle, tmp_path):
    """The full disk is tested only on Linux, which has a device that is always full."""
    outputs = [(">&-", "output is closed")]
    if Path("/dev/full").exists():
        outputs.append((">/dev/full", "standard output: No space left"))
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    command = [sys.executable, "-m", "dlref.runtime", bundle, tmp_path / "white.png"]
    for redirection, message in outputs:
        shell = f"{shlex.join(map(str, command))} {redirection}"
        result = subprocess.run(shell, shell=True, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--output", "--overlay"])
def test_output_and_overlay_are_refused_before_any_prediction_of_a_classifier(option, bundle, tmp_path, capsys):
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    assert main([str(bundle), str(tmp_path / "white.png"), option, str(tmp_path / "out.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r"^error: this bundle's answers (are not pictures|cannot be drawn); expected", printed.err)


def test_predictions_are_printed_as_json_lines(bundle, tmp_path, capsys):
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    assert main([str(bundle), str(tmp_path / "white.png"), str(tmp_path / "white.png")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines] == ["bright", "bright"]
    assert lines[0]["input"] == str(tmp_path / "white.png")


def test_bad_inputs_and_options_give_a_one_line_error_and_status_2_and_other_inputs_a_result(bundle, tmp_path, capsys):
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    assert main([str(bundle), "absent.png", str(tmp_path / "white.png")]) == 2
    printed = capsys.readouterr()
    bad, good = map(json.loads, printed.out.splitlines())
    assert bad == {"input": "absent.png", "error": "absent.png: not found; expected an image file"}
    assert good["label"] == "bright"
    assert printed.err == "error: absent.png: not found; expected an image file (1 of 2 inputs have no answer)\n"
    assert main([str(bundle), "absent.png"]) == 2
    assert capsys.readouterr().err == "error: absent.png: not found; expected an image file\n"
    for wrong in (["--threads", "0"], ["--batch-size", "-1"]):
        assert main([str(bundle), "absent.png", *wrong]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: argument {wrong[0]}: {wrong[1]}; expected 1 or more")
        assert len(printed.splitlines()) == 1
    assert main([str(bundle), "absent.png", "--beam", "2"]) == 2
    assert capsys.readouterr().err == "error: --beam: unknown to this bundle; expected a bundle of another kind\n"


def test_runner_options_are_unique_across_bundle_kinds():
    names = [name for kind in kinds() for name in runner_of(kind).options]
    assert len(names) == len(set(names)) > 2


def test_options_may_appear_anywhere_on_the_command_line(bundle, tmp_path, capsys):
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    paths = [str(bundle), str(tmp_path / "white.png")]
    for arguments in (
        [*paths, "--threads", "1"],
        ["--threads", "1", *paths],
        [paths[0], "--threads", "1", paths[1]],
        [paths[0], "--threads", "1", "--", paths[1]],
        [paths[0], paths[1], "--threads", "1", paths[1]],
    ):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["label"] for line in lines] == ["bright"] * arguments.count(paths[1])


def test_an_input_that_starts_with_a_dash_must_follow_a_double_dash(bundle, capsys):
    assert main([str(bundle), "-heute"]) == 2
    assert "unrecognized arguments: -heute; " in capsys.readouterr().err
    assert main([str(bundle), "--", "-heute"]) == 2
    assert "error: -heute: not found; " in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["-h"])
    assert ended.value.code == 0


@pytest.mark.parametrize("option", [["--form", "sagemaker"], ["--output", "a.png"], ["--overlay", "a.png"]])
def test_prompt_is_refused_with_output_options_and_for_bundles_that_do_not_generate_text(
    bundle, tmp_path, monkeypatch, capsys, option
):
    monkeypatch.chdir(tmp_path)
    assert main([str(bundle), "--prompt", "a", *option]) == 2
    assert "--form, --output and --overlay cannot be used with it" in capsys.readouterr().err
    assert main([str(bundle), "--prompt", "a"]) == 2
    assert "does not generate text piece by piece; expected a bundle of a language model" in capsys.readouterr().err


def test_the_provider_option_overrides_the_provider_of_the_bundles_target(bundle, capsys, tmp_path):
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    write_manifest(bundle, target={"provider": "CUDAExecutionProvider"})
    arguments = [str(bundle), str(tmp_path / "white.png")]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert main(arguments) == 2
        assert "needs CUDAExecutionProvider, which this onnxruntime lacks" in capsys.readouterr().err
    assert main([*arguments, "--provider", "CPUExecutionProvider"]) == 0


def test_a_provider_with_missing_libraries_is_refused_instead_of_using_the_cpu(bundle, monkeypatch):
    known = [*onnxruntime.get_available_providers(), "QNNExecutionProvider"]  # as if this build included it
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    with pytest.warns(UserWarning, match="not in available"), pytest.raises(UserError, match="does not start"):
        load(bundle, provider="QNNExecutionProvider")


def test_a_provider_package_that_onnxruntime_cannot_load_is_refused(bundle, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime_qnn.py").write_text(f"def get_library_path(): return {str(tmp_path / 'none.so')!r}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="onnxruntime_qnn: onnxruntime refuses it"):
        load(bundle, provider="QNNExecutionProvider")
    sys.modules.pop("onnxruntime_qnn")


def test_a_provider_already_registered_by_the_program_is_not_registered_again(tmp_path, monkeypatch):
    kinds = onnxruntime.OrtHardwareDeviceType
    (tmp_path / "onnxruntime_qnn.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    there = [
        SimpleNamespace(ep_name="QNNExecutionProvider", device=SimpleNamespace(type=kind))
        for kind in (kinds.GPU, kinds.NPU)
    ]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: there)
    assert bundles.plugin_devices("QNNExecutionProvider") == there[1:]
    assert bundles.plugin_devices("CPUExecutionProvider") == []


def test_errors_of_onnxruntime_are_reported_on_one_line(bundle):
    write_manifest(bundle, metadata={**METADATA, "channels": 3})
    with pytest.raises(UserError, match="onnxruntime refuses the input") as error:
        load(bundle)(grey(7))
    assert "\n" not in str(error.value)
    write_manifest(bundle, metadata={**METADATA, "labels": ["one"]})
    with pytest.raises(UserError, match=r"returns \[1, 2\]; expected 1 classes"):
        load(bundle)(grey(7))
    (bundle / "classify.onnx").write_bytes(b"junk")
    write_manifest(bundle)
    with pytest.raises(UserError, match="onnxruntime refuses it") as error:
        load(bundle)
    assert "\n" not in str(error.value)
