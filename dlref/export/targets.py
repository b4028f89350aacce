"""Devices to export for. A target is data: adding a device adds one entry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantisation:
    """What `onnxruntime.quantization` is asked for.

    Args:
        activation: a QuantType of onnxruntime, for what flows between nodes.
        weight: a QuantType, for constants.
        per_channel: a scale for each output channel of a weight.
        reduce_range: 7 bits a weight, whose products fit the 16 bits that x86-64 without VNNI adds pairs of them in.
        qnn: let onnxruntime's own configuration for Qualcomm's HTP add to this.
    """

    activation: str
    weight: str = "QInt8"
    per_channel: bool = True
    reduce_range: bool = False
    qnn: bool = False


@dataclass(frozen=True)
class Target:
    """What an exported graph has to be to run well on a device.

    Args:
        name: as given to `export.py --target`.
        description: for people, one line.
        provider: onnxruntime's execution provider.
        machines: what `platform.machine()` says on the device; none: any. Elsewhere nothing is timed.
        precision: of the weights and the arithmetic; where it fails the gate, the bundle is float32.
        quantisation: how int8 or int16 comes about.
        static: every axis is fixed to its first declared size, for compilers that cannot do otherwise.
        file_format: onnx, or ort: onnxruntime's own for its small builds.
        threads: that the device gives to the model; 0 is all it has.
        gate: points of the task's metric that a lower precision may lose on the validation split.
        opset: version of ONNX's operator set.
        ir_version: version of ONNX's file format; onnx writes newer ones than onnxruntime reads.
    """

    name: str
    description: str
    provider: str = "CPUExecutionProvider"
    machines: tuple[str, ...] = ()
    precision: str = "float32"
    quantisation: Quantisation | None = None
    static: bool = False
    file_format: str = "onnx"
    threads: int = 0
    gate: float = 0.5
    opset: int = 20
    ir_version: int = 10


X86 = ("x86_64", "AMD64")
ARM = ("aarch64", "arm64", "ARM64")

TARGETS = {
    target.name: target
    for target in [
        Target("cpu", "any CPU"),
        Target(
            "x86-64",
            "x86-64, at its fastest with VNNI: Intel since Ice Lake, AMD since Zen 4",
            machines=X86,
            precision="int8",
            quantisation=Quantisation("QUInt8"),
        ),
        Target(
            "x86-64-avx2",
            "x86-64 without VNNI: Intel before Ice Lake, AMD before Zen 4",
            machines=X86,
            precision="int8",
            quantisation=Quantisation("QUInt8", reduce_range=True),
        ),
        Target(
            "arm64",
            "64-bit Arm: Raspberry Pi 3 to 5, Graviton, Apple",
            machines=ARM,
            precision="int8",
            quantisation=Quantisation("QInt8"),
        ),
        Target("cuda", "Nvidia GPU by CUDA", provider="CUDAExecutionProvider", precision="float16"),
        Target(
            "tensorrt",
            "Nvidia GPU by TensorRT, Jetson: fixed shapes, one input at a time",
            provider="TensorrtExecutionProvider",
            precision="float16",
            static=True,  # it would compile anew for each size that it has not met
        ),
        Target(
            "qualcomm",
            "Qualcomm NPU by QNN: 16-bit activations, 8-bit weights, fixed shapes",
            provider="QNNExecutionProvider",
            machines=ARM,
            precision="int16",
            quantisation=Quantisation("QUInt16", weight="QUInt8", per_channel=False, qnn=True),
            static=True,
            opset=21,  # the first whose QuantizeLinear knows 16 bits
        ),
        Target(
            "mobile",
            "phones: onnxruntime's own format, and the operators a small build needs",
            machines=ARM,
            precision="int8",
            quantisation=Quantisation("QInt8", reduce_range=True),  # .ort is fixed before sums can be made exact
            file_format="ort",
            threads=2,  # the large cores
        ),
        Target("web", "browsers and Node: onnxruntime-web by WebAssembly", machines=("wasm",), threads=1),
    ]
}
