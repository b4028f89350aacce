"""A bundle made without training or exporting."""

import hashlib
import json

import onnx
from onnx import TensorProto, helper

LABELS = ["dark", "bright"]
METADATA = {"labels": LABELS, "channels": 1, "multi_label": False, "crop": None}


def make_bundle(folder):
    """Write a bundle whose prediction is known: P(bright) is the mean of the pixels divided by 255."""
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
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "classify.onnx")
    write_manifest(folder)
    return folder


SIGNATURE = {
    "file": "classify.onnx",
    "inputs": [{"name": "image", "type": "uint8", "shape": ["batch", "height", "width", 1]}],
    "outputs": [{"name": "probability", "type": "float32", "shape": ["batch", 2]}],
    "dynamic_axes": {"image": {"0": "batch", "1": "height", "2": "width"}},
    "calls": 1,
    "selected": [],
}


def write_manifest(folder, **changes):
    """Write a manifest that matches the current files, except for `changes`."""
    manifest = {
        "format": 1,
        "kind": "image-classification",
        "target": {"provider": "CPUExecutionProvider"},
        "graphs": {"classify": SIGNATURE},
        "metadata": METADATA,
        "files": {"classify.onnx": hashlib.sha256((folder / "classify.onnx").read_bytes()).hexdigest()},
        "verification": {},
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
