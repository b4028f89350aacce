"""Bundles at the edge: images in every form, answers, and what is refused."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from dlref.runtime import UserError, load
from dlref.runtime.__main__ import main
from dlref.runtime.images import BATCH, batches, centre, read_image
from dlref.runtime.runners.image_classification import answers

LABELS = ["dark", "bright"]
METADATA = {"labels": LABELS, "channels": 1, "multi_label": False, "crop": None}


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose answer can be read off: P(bright) is the mean of the pixels over 255."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "white"], ["bright"]),
        helper.make_node("Sub", ["one", "bright"], ["dark"]),
        helper.make_node("Unsqueeze", ["dark", "last"], ["dark_column"]),
        helper.make_node("Unsqueeze", ["bright", "last"], ["bright_column"]),
        helper.make_node("Concat", ["dark_column", "bright_column"], ["probability"], axis=1),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
        helper.make_tensor("last", TensorProto.INT64, [1], [1]),
        helper.make_tensor("white", TensorProto.FLOAT, [], [255.0]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
    ]
    graph = helper.make_graph(
        nodes,
        "classify",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 1])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", 2])],
        constants,
    )
    folder = tmp_path / "bundle"
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "classify.onnx")
    write_manifest(folder)
    return folder


def write_manifest(folder, **changes):
    manifest = {
        "format": 1,
        "kind": "image-classification",
        "target": {"provider": "CPUExecutionProvider"},
        "graphs": {"classify": {"file": "classify.onnx"}},
        "metadata": METADATA,
        "files": {"classify.onnx": hashlib.sha256((folder / "classify.onnx").read_bytes()).hexdigest()},
        "verification": {},
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def grey(value, height=4, width=6):
    return np.full((height, width), value, np.uint8)


def test_a_file_an_array_and_a_list_get_the_same_answer(bundle, tmp_path):
    Image.fromarray(grey(204)).save(tmp_path / "grey.png")
    runner = load(bundle)
    answer = runner(tmp_path / "grey.png")
    assert answer["label"] == "bright"
    assert answer["probability"] == pytest.approx(0.8)
    assert [row["label"] for row in answer["top"]] == ["bright", "dark"]
    assert runner(grey(204)) == answer
    assert runner([grey(204), str(tmp_path / "grey.png")]) == [answer, answer]
    assert json.loads(json.dumps(answer)) == answer  # plain Python values


def test_answers_keep_the_order_of_images_of_many_sizes(bundle):
    values = list(range(0, 250, 2))
    images = [grey(value, height=3 + value % 3) for value in values]
    probabilities = [row["top"] for row in load(bundle)(images)]
    bright = [next(t["probability"] for t in top if t["label"] == "bright") for top in probabilities]
    np.testing.assert_allclose(bright, np.array(values) / 255, atol=1e-6)


def test_batches_are_bounded_and_of_one_size():
    sizes = [batch.shape for batch in batches([grey(0)] * (BATCH + 3) + [grey(0, 9)])]
    assert sizes == [(BATCH, 4, 6), (3, 4, 6), (1, 9, 6)]


def test_a_crop_keeps_the_centre(bundle):
    framed = grey(0, 10, 20)
    framed[1:9, 6:14] = 255  # what a crop of 0.8 leaves
    assert load(bundle)(framed)["label"] == "dark"
    write_manifest(bundle, metadata={**METADATA, "crop": 0.8})
    assert load(bundle)(framed)["top"][0] == {"label": "bright", "probability": 1.0}
    assert centre(grey(7, 1, 1), 0.1).shape == (1, 1)


def test_arrays_are_taken_in_the_orders_people_have_them():
    rgb = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    np.testing.assert_array_equal(read_image(rgb, 3), rgb)
    np.testing.assert_array_equal(read_image(rgb.transpose(2, 0, 1), 3), rgb)
    assert read_image(grey(7), 1).shape == (4, 6, 1)
    assert read_image(grey(7), 3).shape == (4, 6, 3)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 6), np.float32), np.zeros((0, 6), np.uint8), np.zeros((2, 4, 6, 3), np.uint8)]
)
def test_other_arrays_are_refused(array):
    with pytest.raises(UserError, match="expected"):
        read_image(array, 3)


def test_files_are_turned_upright_and_converted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    Image.fromarray(grey(90, 4, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", 1).shape == (6, 4, 1)
    Image.new("RGBA", (5, 3), (10, 20, 30, 0)).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png", 3)[0, 0], [10, 20, 30])
    Image.new("P", (5, 3)).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png", 1).shape == (3, 5, 1)


def test_16_bits_are_read_by_their_high_byte(tmp_path):
    Image.fromarray(np.full((3, 5), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", 1), 0x80)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", 3), 0x80)


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((3, 5), np.float32)).save(tmp_path / "float.tiff")
    for name in ("text.png", "float.tiff", "absent.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name, 1)


def test_several_labels_are_those_of_at_least_one_half():
    metadata = {"labels": ["a", "b", "c"], "multi_label": True}
    (row,) = answers(np.array([[0.9, 0.2, 0.5]], np.float32), metadata)
    assert row["labels"] == ["a", "c"]


def test_json_lines(bundle, tmp_path, capsys):
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    assert main([str(bundle), str(tmp_path / "white.png"), str(tmp_path / "white.png")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines] == ["bright", "bright"]
    assert lines[0]["input"] == str(tmp_path / "white.png")


def test_a_wrong_input_is_one_line_and_2_after_the_answers_before_it(bundle, tmp_path, capsys):
    Image.fromarray(grey(255)).save(tmp_path / "white.png")
    assert main([str(bundle), str(tmp_path / "white.png"), "absent.png"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["label"] == "bright"
    assert printed.err == "error: absent.png: not found; expected an image file\n"
    assert main([str(bundle), "absent.png", "--threads", "0"]) == 2


def test_a_tampered_file_is_refused(bundle):
    path = bundle / "classify.onnx"
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"classify\.onnx: SHA-256 differs"):
        load(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"kind": "os.path"}, "unknown"),
        ({"kind": "bundle"}, "unknown"),
        ({"kind": "../image-classification"}, "unknown"),
        ({"files": {"../secret": "0"}}, "plain name"),
        ({"files": {"gone.onnx": "0"}}, "missing"),
        ({"files": {}}, "no hash"),
        ({"files": []}, "not a manifest"),
        ({"kind": 3}, "not a manifest"),
        ({"target": "cpu"}, "not a manifest"),
        ({"target": {}}, "needs None"),
        ({"graphs": {"classify": {}}}, "no hash"),
        ({"graphs": {"classify": "classify.onnx"}}, "no hash"),
        ({"graphs": {}}, "expected a graph classify"),
        ({"metadata": {"labels": LABELS}}, "expected a graph classify and channels"),
        ({"metadata": {**METADATA, "channels": 7}}, "expected a graph classify"),
        ({"target": {"provider": "NoSuchProvider"}}, "NoSuchProvider"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(bundle, changes, message):
    write_manifest(bundle, **changes)
    with pytest.raises(UserError, match=message):
        load(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path):
    (bundle / "classify.onnx").rename(tmp_path / "outside.onnx")
    (bundle / "classify.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(UserError, match="symbolic link"):
        load(bundle)


def test_what_onnxruntime_refuses_is_one_line(bundle):
    write_manifest(bundle, metadata={**METADATA, "channels": 3})
    with pytest.raises(UserError, match="onnxruntime refuses the input") as error:
        load(bundle)(grey(7))
    assert "\n" not in str(error.value)
    write_manifest(bundle, metadata={**METADATA, "labels": ["one"]})
    with pytest.raises(UserError, match="2 classes; expected 1"):
        load(bundle)(grey(7))
    (bundle / "classify.onnx").write_bytes(b"junk")
    write_manifest(bundle)
    with pytest.raises(UserError, match="onnxruntime refuses it"):
        load(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_folder_without_a_readable_manifest_is_refused(bundle, text):
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest"):
        load(bundle)
    (bundle / "manifest.json").unlink()
    with pytest.raises(UserError, match="expected the folder of a bundle"):
        load(bundle)
