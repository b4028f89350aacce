"""Devices to export for. A target is data: adding a device adds one entry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What an exported graph has to be to run well on a device.

    Args:
        name: as given to `export.py --target`.
        description: for people, one line.
        provider: onnxruntime's execution provider.
        precision: of the weights and the arithmetic.
        opset: version of ONNX's operator set.
        ir_version: version of ONNX's file format; onnx writes newer ones than onnxruntime reads.
    """

    name: str
    description: str
    provider: str
    precision: str = "float32"
    opset: int = 20
    ir_version: int = 10


TARGETS = {
    target.name: target
    for target in [
        Target("cpu", "float32 on any CPU", "CPUExecutionProvider"),
    ]
}
