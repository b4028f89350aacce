"""Devices to export for. A target is data: adding a device adds one entry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantisation:
    """Options for `onnxruntime.quantization`.

    Args:
        activation: onnxruntime's QuantType of activations, the values that flow between nodes.
        weight: the QuantType of constants.
        per_channel: use a separate scale for each output channel of a weight.
        reduce_range: use 7-bit weights. x86-64 without VNNI adds products in pairs in 16 bits, which then suffice.
        qnn: use onnxruntime's own configuration for Qualcomm's HTP, which extends these options.
    """

    activation: str
    weight: str = "QInt8"
    per_channel: bool = True
    reduce_range: bool = False
    qnn: bool = False


@dataclass(frozen=True)
class Target:
    """The requirements for an exported graph to run well on a device.

    Args:
        name: as given to `export.py --target`.
        description: one line for people.
        provider: onnxruntime's execution provider.
        machines: values of `platform.machine()` on the device; empty for any. On other machines nothing is timed.
        precision: of the weights and the arithmetic; if every attempt at it is refused, the bundle is float32.
        quantisation: options of int8 or int16; None for float32 and float16.
        static: fix every axis to its first declared size, for compilers that need fixed shapes.
        file_format: onnx, or ort, the format of onnxruntime's small builds.
        threads: number of threads that the device gives to the model; 0 for all its cores.
        gate: points of the task's metric that a lower precision may lose on the validation split.
        opset: version of ONNX's operator set.
        ir_version: version of ONNX's file format; the onnx package writes newer versions than onnxruntime reads.
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
        Target("cuda", "Nvidia GPU with CUDA", provider="CUDAExecutionProvider", precision="float16"),
        Target(
            "tensorrt",
            "Nvidia GPU with TensorRT, Jetson: fixed shapes, one input at a time",
            provider="TensorrtExecutionProvider",
            precision="float16",
            static=True,  # TensorRT would recompile for each new size
        ),
        Target(
            "qualcomm",
            "Qualcomm NPU with QNN: 16-bit activations, 8-bit weights, fixed shapes",
            provider="QNNExecutionProvider",
            machines=ARM,
            precision="int16",
            quantisation=Quantisation("QUInt16", weight="QUInt8", per_channel=False, qnn=True),
            static=True,
            opset=21,  # the first whose QuantizeLinear supports 16 bits
        ),
        Target(
            "mobile",
            "phones: onnxruntime's own format, with a list of the operators that a small build needs",
            machines=ARM,
            precision="int8",
            # An .ort file is fixed at export, too early for the option that makes sums exact.
            quantisation=Quantisation("QInt8", reduce_range=True),
            file_format="ort",
            threads=2,  # the large cores
        ),
        Target(
            "web",
            "browsers and Node: onnxruntime-web with WebAssembly",
            machines=("wasm",),
            precision="int8",
            quantisation=Quantisation("QUInt8"),
            threads=1,
        ),
    ]
}
