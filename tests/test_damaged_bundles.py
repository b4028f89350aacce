"""Bundles damaged in transfer or built to do harm: each ends in one line, exit status 2, no prediction."""

import json
import os

import numpy as np
import onnx
import pytest
from handmade import LABELS, METADATA, SIGNATURE, make_bundle, write_manifest
from onnx import TensorProto, helper
from PIL import Image

from dlref.runtime import UserError, load
from dlref.runtime.__main__ import main
from dlref.runtime.bundle import sha256

GRAPH = "classify.onnx"


def manifest(**changes):
    """Change entries of the manifest."""
    return lambda folder: write_manifest(folder, **changes)


def text(content):
    """Replace the manifest's text."""
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def graph(change, hashed=True):
    """Change the bytes of the graph's file and, if `hashed`, its hash in the manifest."""

    def damage(folder):
        path = folder / GRAPH
        path.write_bytes(change(path.read_bytes()))
        if hashed:
            write_manifest(folder)

    return damage


def model(change):
    """Change the graph and its hash in the manifest."""

    def damage(folder):
        loaded = onnx.load(folder / GRAPH, load_external_data=False)
        change(loaded)
        (folder / GRAPH).write_bytes(loaded.SerializeToString())
        write_manifest(folder)

    return damage


def flip(content):
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def external(location):
    """Store the bytes of a weight at an external location."""

    def change(loaded):
        weight = next(tensor for tensor in loaded.graph.initializer if tensor.name == "white")
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)

    return change


def huge_weight(loaded):
    weight = next(tensor for tensor in loaded.graph.initializer if tensor.name == "white")
    weight.dims.extend([1 << 40])


def huge_input(loaded):
    for axis, size in enumerate((1, 1 << 20, 1 << 20, 1)):
        loaded.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size


def huge_constant(loaded):
    loaded.graph.initializer.append(helper.make_tensor("endless", TensorProto.INT64, [2], [1 << 24, 1 << 24]))
    loaded.graph.node.insert(0, helper.make_node("ConstantOfShape", ["endless"], ["zeros"]))
    loaded.graph.node.append(helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0))
    loaded.graph.node[-2].output[0] = "part"
    loaded.graph.node.append(helper.make_node("Add", ["part", "zero"], ["probability"]))


def last_node(*nodes):
    """Let `nodes` compute the output probability from its earlier value."""

    def change(loaded):
        loaded.graph.node[-1].output[0] = "before"
        loaded.graph.initializer.append(helper.make_tensor("zero", TensorProto.INT64, [1], [0]))
        loaded.graph.initializer.append(helper.make_tensor("nan", TensorProto.FLOAT, [], [float("nan")]))
        partly = [float("nan"), *[1.0] * (len(LABELS) - 1)]
        loaded.graph.initializer.append(helper.make_tensor("partly", TensorProto.FLOAT, [len(LABELS)], partly))
        for operator, inputs, attributes in nodes:
            loaded.graph.node.append(helper.make_node(operator, inputs, ["probability"], **attributes))
        del loaded.graph.output[0].type.tensor_type.shape.dim[:]
        loaded.graph.output[0].type.tensor_type.ClearField("shape")

    return change


answer_of_one_row = last_node(("Concat", ["before", "before"], {"axis": 0}))
answer_without_rows = last_node(("ReduceMax", ["before"], {"keepdims": 0}))
answer_of_nan = last_node(("Mul", ["before", "nan"], {}))
answer_partly_of_nan = last_node(("Mul", ["before", "partly"], {}))


def empty_input(loaded):
    loaded.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 0


def other_input(folder):
    """Rename the input in graph and manifest: they agree, but do not describe image classification."""
    model(rename("image", "picture"))(folder)
    inputs = [{**SIGNATURE["inputs"][0], "name": "picture"}]
    write_manifest(folder, graphs={"classify": {**SIGNATURE, "inputs": inputs}})


def rename(old, new):
    def change(loaded):
        for values in (loaded.graph.input, loaded.graph.output):
            for value in values:
                value.name = new if value.name == old else value.name
        for node in loaded.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = new if name == old else name

    return change


def foreign_operator(loaded):
    loaded.opset_import.append(helper.make_opsetid("evil", 1))
    loaded.graph.node[0].domain = "evil"


def no_graph(folder):
    (folder / GRAPH).unlink()


def renamed_graph(folder):
    (folder / GRAPH).rename(folder / "other.onnx")


def folder_for_a_graph(folder):
    (folder / GRAPH).unlink()
    (folder / GRAPH).mkdir()


def linked_graph(folder):
    (folder / GRAPH).rename(folder.parent / "outside.onnx")
    (folder / GRAPH).symlink_to(folder.parent / "outside.onnx")


def broken_link(folder):
    (folder / GRAPH).unlink()
    (folder / GRAPH).symlink_to("/nowhere")


def linked_manifest(folder):
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to(folder.parent / "manifest.json")


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def endless_manifest(folder):
    os.truncate(folder / "manifest.json", 1 << 40)  # sparse: takes no disk space


def endless_graph(folder):
    os.truncate(folder / GRAPH, 1 << 40)


def one_more_file(folder):
    (folder / "weights.bin").write_bytes(bytes(4))


def weight_in_an_unlisted_file(folder):
    one_more_file(folder)
    model(external("weights.bin"))(folder)


def junk_as_ort(folder):
    (folder / GRAPH).rename(folder / "classify.ort")
    (folder / "classify.ort").write_bytes(b"\x20\x00\x00\x00ORTM" + bytes(range(256)))
    digest = sha256(folder / "classify.ort")
    described = {"classify": {**SIGNATURE, "file": "classify.ort"}}
    (folder / GRAPH).touch()
    write_manifest(folder, files={"classify.ort": digest}, graphs=described)
    (folder / GRAPH).unlink()


def without(key):
    return {name: value for name, value in METADATA.items() if name != key}


DAMAGE = {
    # damaged in transfer
    "truncated graph": (graph(lambda b: b[:-10], hashed=False), "SHA-256 differs"),
    "empty graph": (graph(lambda b: b"", hashed=False), "SHA-256 differs"),
    "one bit of the graph": (graph(flip, hashed=False), "SHA-256 differs"),
    "no graph": (no_graph, "missing"),
    "renamed graph": (renamed_graph, "missing"),
    "folder for a graph": (folder_for_a_graph, "missing"),
    "no manifest": (no_manifest, "expected the folder of a bundle"),
    "empty manifest": (text(b""), "expected JSON"),
    "truncated manifest": (text(b'{"format": 1, "kind": "image-cl'), "expected JSON"),
    "manifest that is a list": (text(b"[]"), "not a manifest"),
    "manifest that is empty braces": (text(b"{}"), "not a manifest"),
    "manifest that is no text": (text(b"\xff\xfe\x00"), "expected JSON"),
    # of another version or kind, or malformed
    "a later format": (manifest(format=2), "format 2"),
    "a format that is text": (manifest(format="1"), "not a manifest"),
    "an unknown kind": (manifest(kind="object-location"), "unknown"),
    "a kind that is a module": (manifest(kind="os.path"), "unknown"),
    "a kind that is a path": (manifest(kind="../image-classification"), "unknown"),
    "a kind that is a number": (manifest(kind=3), "not a manifest"),
    "a target that is text": (manifest(target="cpu"), "not a manifest"),
    "no provider": (manifest(target={}), "provider None"),
    "threads below 0": (manifest(target={"provider": "CPUExecutionProvider", "threads": -1}), "threads -1"),
    "an unknown provider": (manifest(target={"provider": "../libevil.so"}), "expected one of CPUExecutionProvider"),
    "a provider that is a list": (manifest(target={"provider": ["CPUExecutionProvider", {}]}), "expected one of"),
    "files that are a list": (manifest(files=[]), "not a manifest"),
    "a graph without a hash": (manifest(files={}), "not in the manifest"),
    "a graph without a file": (manifest(graphs={"classify": {}}), "no hash"),
    "a graph whose file is a list": (manifest(graphs={"classify": {"file": [GRAPH]}}), "no hash"),
    "a graph that is text": (manifest(graphs={"classify": GRAPH}), "no hash"),
    "no graphs": (manifest(graphs={}), "expected a graph classify"),
    "a graph without a signature": (manifest(graphs={"classify": {"file": GRAPH}}), "names none"),
    "a signature that is a number": (manifest(graphs={"classify": {**SIGNATURE, "inputs": 3}}), "names none"),
    "no channels": (manifest(metadata={"labels": ["a"]}), "expected a graph classify and metadata channels, labels"),
    "seven channels": (manifest(metadata={**METADATA, "channels": 7}), "expected a graph classify"),
    "channels that are a list": (manifest(metadata={**METADATA, "channels": [1]}), "expected a graph classify"),
    "labels that are numbers": (manifest(metadata={**METADATA, "labels": [1, 2]}), "expected a graph classify"),
    "labels that are text": (manifest(metadata={**METADATA, "labels": "ab"}), "expected a graph classify"),
    "no multi_label": (manifest(metadata=without("multi_label")), "expected metadata crop, multi_label"),
    "no crop": (manifest(metadata=without("crop")), "expected metadata crop, multi_label"),
    "a crop that is text": (manifest(metadata={**METADATA, "crop": "0.8"}), "expected metadata crop, multi_label"),
    "a crop that is true": (manifest(metadata={**METADATA, "crop": True}), "expected metadata crop, multi_label"),
    "channels that are true": (manifest(metadata={**METADATA, "channels": True}), "expected a graph classify"),
    "no labels": (manifest(metadata={**METADATA, "labels": []}), "expected a graph classify"),
    "a format that is true": (manifest(format=True), "not a manifest"),
    "a kind with an underscore": (manifest(kind="image_classification"), "unknown"),
    "a kind that is no runner": (manifest(kind="--init--"), "unknown"),
    "a kind of 300 letters": (manifest(kind="a" * 300), "unknown"),
    "threads that are text": (
        manifest(target={"provider": "CPUExecutionProvider", "threads": "2"}),
        "expected a number",
    ),
    "a file name of 300 letters": (manifest(files={"a" * 300: "0"}), "; expected the file"),
    "a file name with a line feed": (manifest(files={"a\nb": "0"}), r"'a\nb' is missing"),
    "a file name with an escape": (manifest(files={"a\x1bb": "0"}), r"'a\x1bb' is missing"),
    "a crop beyond the image": (manifest(metadata={**METADATA, "crop": 1e9}), "expected metadata crop, multi_label"),
    "one label for two classes": (manifest(metadata={**METADATA, "labels": ["one"]}), "expected 1 classes"),
    # built to do harm
    "a file above the bundle": (manifest(files={"../secret": "0"}), "plain name"),
    "a file of the system": (manifest(files={"/etc/passwd": "0"}), "plain name"),
    "a file by backslashes": (manifest(files={"..\\secret": "0"}), "plain name"),
    "the folder itself": (manifest(files={".": "0"}), "plain name"),
    "a hash that is null": (manifest(files={GRAPH: None}), "SHA-256 differs"),
    "a graph that is a link": (linked_graph, "symbolic link"),
    "a link to nowhere": (broken_link, "symbolic link"),
    "a manifest that is a link": (linked_manifest, "symbolic link"),
    "a terabyte of manifest": (endless_manifest, "expected at most"),
    "a terabyte of graph": (endless_graph, "expected less than 2 GB"),
    "deep nesting": (text(b"[" * 200_000), "expected JSON"),
    "a file that nobody listed": (one_more_file, "not in the manifest"),
    "truncated graph, hashed": (graph(lambda b: b[:-10]), "onnxruntime refuses it"),
    "empty graph, hashed": (graph(lambda b: b""), "onnxruntime refuses it"),
    "junk, hashed": (graph(lambda b: b"junk"), "onnxruntime refuses it"),
    "junk as .ort": (junk_as_ort, "onnxruntime refuses it"),
    "weights above the bundle": (model(external("../secret.bin")), "onnxruntime refuses it"),
    "weights of the system": (model(external("/etc/passwd")), "onnxruntime refuses it"),
    "weights in a file that nobody listed": (weight_in_an_unlisted_file, "not in the manifest"),
    "a weight of a trillion numbers": (model(huge_weight), "onnxruntime refuses it"),
    "an input of a trillion numbers": (model(huge_input), "expected at most"),
    "a constant of a petabyte": (model(huge_constant), "onnxruntime refuses"),
    "an operator from elsewhere": (model(foreign_operator), "onnxruntime refuses it"),
    "one answer for all": (model(answer_of_one_row), "returns no probability for each"),
    "an answer without rows": (model(answer_without_rows), "returns no probability for each"),
    "answers that are no numbers": (model(answer_of_nan), "expected finite float32"),
    "an answer of which one is no number": (model(answer_partly_of_nan), "expected finite float32"),
    "an input of no height": (model(empty_input), "axes that are not empty"),
    "another input everywhere": (other_input, "expected one input, image, with four axes"),
    "another input": (model(rename("image", "picture")), "has inputs and outputs picture, probability; expected"),
    "another output": (model(rename("probability", "logits")), "has inputs and outputs image, logits; expected"),
}


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "black.png")
    return tmp_path / "black.png"


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused_in_one_line(name, bundle, picture, capsys):
    damage, message = DAMAGE[name]
    (bundle.parent / "secret").write_text("secret")
    (bundle.parent / "secret.bin").write_bytes(bytes(4))
    damage(bundle)
    assert main([str(bundle), str(picture)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 1000
    assert '"label"' not in printed.out


def test_the_undamaged_bundle_is_accepted(bundle, picture, capsys):
    assert main([str(bundle), str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "dark"


def test_an_input_with_too_many_elements_is_refused(tmp_path, monkeypatch):
    runner = load(make_bundle(tmp_path / "bundle"))
    monkeypatch.setattr("dlref.runtime.bundle.LARGEST_INPUT", 10)
    assert runner(np.zeros((2, 5), np.uint8))["label"] == "dark"
    with pytest.raises(UserError, match=r"input image of \(1, 3, 4, 1\); expected at most 10 elements"):
        runner(np.zeros((3, 4), np.uint8))


def test_the_hash_is_checked_before_a_graph_is_opened(tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path / "bundle")
    graph(flip, hashed=False)(bundle)
    monkeypatch.setattr("dlref.runtime.bundle.OnnxGraph", None)
    with pytest.raises(Exception, match="SHA-256 differs"):
        load(bundle)
