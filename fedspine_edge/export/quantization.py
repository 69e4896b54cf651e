"""Quantizes the linears of a float32 ONNX file to 8 or 4 bits with QuantizeLinear and DequantizeLinear nodes.

- int8, fp8: symmetric, with one scale per output channel for weights and one per tensor for activations, which are
  calibrated on the user's data. nvidia-modelopt places the nodes if it is installed, or else ONNX Runtime's quantizer.
- int4: weights only, with one scale per block of input channels. It needs no data.

Only the linears inside the layers are quantized, because embeddings and heads are cheap and lose the most accuracy. The
rest of the graph is converted to float16 afterwards (`mixed_precision.convert_to_16bit`), as strongly typed TensorRT
networks require. docs/decisions/0063-int8-and-int4.md has measurements and reasons.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import Precision
from fedspine_edge.bundle.metrics import Quantization
from fedspine_edge.errors import DeployError, MissingDependency

Inputs = dict[str, Array]

QUANTIZED: tuple[Precision, ...] = ("int8", "fp8", "int4")
BLOCK_SIZES = (128, 64, 32, 16)
"""Block sizes of int4. The largest that divides a linear's inputs is used, because each block has a 16-bit scale."""
_LARGEST_FP8, _LARGEST_INT8, _LARGEST_INT4 = 448.0, 127.0, 7.0
_CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Candidate ranges as shares of a block's largest weight, because clipping an outlier can improve the other weights."""


def quantize(
    source: Path, target: Path, precision: Precision, scope: str, calibration: Sequence[Inputs] = ()
) -> Quantization:
    """Write `source` with quantized linears to `target`; everything else stays in float32.

    Args:
        source: A float32 file of opset 19 or 20.
        target: File to write.
        precision: One of `QUANTIZED`.
        scope: Prefix of the names of nodes inside the layers, such as "/model/bert/encoder/layer.".
        calibration: Inputs that determine the ranges of activations (int8, fp8).

    Raises `DeployError` if no linear can be quantized.
    """
    import onnx

    proto = onnx.load(source)
    linears = _linears(proto.graph, scope)
    if not linears:
        raise DeployError(
            f"{source.name} has no linear inside {scope!r} to quantize.", remedy="Set `precision` to fp16."
        )
    if precision == "int4":
        return _weights_in_int4(proto, linears, target)
    names = [node.name for node in linears]
    if importlib.util.find_spec("modelopt") is not None:
        tool = _with_modelopt(source, target, names, calibration)
    else:
        tool = _with_onnxruntime(source, target, names, calibration)
    if precision == "fp8":
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        _int8_to_fp8(target, weights)
    examples = sum(len(inputs["input_ids"]) for inputs in calibration)
    return Quantization(tool=tool, linears=len(linears), calibration_examples=examples)


def _linears(graph: Any, scope: str) -> list[Any]:
    """Return the nodes inside the layers that multiply with a weight matrix."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [
        node
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm") and node.name.startswith(scope) and node.input[1] in matrices
    ]


def _reader(calibration: Sequence[Inputs]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> Inputs | None:
            return next(self.left, None)

        def rewind(self) -> None:
            self.left = iter(calibration)

        def get_first(self) -> Inputs:
            return calibration[0]

    return Reader()


def _with_onnxruntime(source: Path, target: Path, names: list[str], calibration: Sequence[Inputs]) -> str:
    try:
        import onnxruntime
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, quantize_static
    except ImportError as error:
        raise MissingDependency.of("onnxruntime", extra="export", purpose="Quantizing a model") from error
    with _quiet():
        quantize_static(
            source,
            target,
            _reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=names,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                # TensorRT supports symmetric scales, and quantized inputs of products but not outputs.
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "QuantizeBias": False,
            },
        )
    return f"onnxruntime {onnxruntime.__version__}"


def _with_modelopt(source: Path, target: Path, names: list[str], calibration: Sequence[Inputs]) -> str:
    from modelopt.onnx.quantization import quantize as modelopt_quantize

    with _quiet():
        modelopt_quantize(
            str(source),
            quantize_mode="int8",
            calibration_method="max",
            calibration_data_reader=_reader(calibration),
            calibration_eps=["cpu"],
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=names,
            high_precision_dtype="fp32",
            dq_only=True,  # stores the weights in 8 bits
            output_path=str(target),
        )
    return f"nvidia-modelopt {metadata.version('nvidia-modelopt')}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress logging, because both tools report every tensor to the root logger."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _int8_to_fp8(path: Path, weights: dict[str, Array]) -> None:
    """Convert symmetric int8 to float8 (e4m3) with the same ranges. Weights are rounded from the original values."""
    import ml_dtypes
    import onnx

    proto = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    fp8 = onnx.TensorProto.FLOAT8E4M3FN
    scaled = set()
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = tensors[node.input[1]], tensors[node.input[2]]
        if scale.name not in scaled:
            scaled.add(scale.name)
            values = onnx.numpy_helper.to_array(scale) * np.float32(_LARGEST_INT8 / _LARGEST_FP8)
            scale.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), scale.name))
        if zero.data_type != fp8:
            zero.CopyFrom(onnx.TensorProto(name=zero.name, data_type=fp8, dims=zero.dims, raw_data=b"\0" * _size(zero)))
        quantized = tensors.get(node.input[0])
        if quantized is not None and quantized.data_type == onnx.TensorProto.INT8:
            original = weights[quantized.name.removesuffix("_quantized")]
            steps = _broadcastable(onnx.numpy_helper.to_array(scale), node, original.ndim)
            values = np.clip(original / steps, -_LARGEST_FP8, _LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
            raw = onnx.TensorProto(name=quantized.name, data_type=fp8, dims=original.shape, raw_data=values.tobytes())
            quantized.CopyFrom(raw)
    onnx.save(proto, path)


def _size(tensor: Any) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _broadcastable(scale: Array, node: Any, dimensions: int) -> Array:
    """Return a scale per channel, reshaped to divide a weight."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [1] * dimensions
    if scale.size > 1:
        shape[axis] = scale.size
    return scale.reshape(shape)


def _weights_in_int4(proto: Any, linears: Sequence[Any], target: Path) -> Quantization:
    """Insert blocked DequantizeLinear nodes along the inputs of every linear, which requires opset 21."""
    import onnx

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    used: list[int] = []
    nodes: dict[str, Any] = {}
    for node in linears:
        name = node.input[1]
        if name in nodes:
            node.input[1] = nodes[name].output[0]
            continue
        weight = onnx.numpy_helper.to_array(tensors[name])
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        axis = 1 if transposed else 0
        block = next((size for size in BLOCK_SIZES if weight.shape[axis] % size == 0), 0)
        if not block:
            continue
        used.append(block)
        codes, scale = int4_blocks(weight, axis, block)
        flat = codes.reshape(-1).astype(np.uint8) & 0xF
        packed = flat[0::2] | (np.append(flat[1::2], np.uint8(0))[: len(flat[0::2])] << 4)
        tensors[name].CopyFrom(
            onnx.TensorProto(
                name=name,
                data_type=onnx.TensorProto.INT4,
                dims=weight.shape,
                raw_data=packed.astype(np.uint8).tobytes(),
            )
        )
        proto.graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}.scale"))
        nodes[name] = onnx.helper.make_node(
            "DequantizeLinear",
            [name, f"{name}.scale"],
            [f"{name}.dequantized"],
            name=f"{node.name}.weight",
            axis=axis,
            block_size=block,
        )
        node.input[1] = nodes[name].output[0]
    if not used:
        raise DeployError(
            f"No linear has a number of inputs that is a multiple of {BLOCK_SIZES[-1]}, so int4 has no blocks.",
            remedy="Prune with `round_to` 16 or a multiple of it, or set `precision` to int8.",
        )
    ordered = [*nodes.values(), *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(ordered)
    # Opset 21 only adds types to the operators that are used here, so raising the version needs no conversion.
    proto.opset_import[0].version = max(21, proto.opset_import[0].version)
    proto.ir_version = max(10, proto.ir_version)
    onnx.save(proto, target)
    return Quantization(tool="blocks", linears=len(used), left_out=len(linears) - len(used), block_size=min(used))


def int4_blocks(weight: Array, axis: int, block: int) -> tuple[Array, Array]:
    """Return codes −8..7 of the weight's shape, and float32 scales whose size along `axis` is divided by `block`.

    Each block gets the scale with the smallest squared error among a few candidates that clip its largest weight.
    """
    moved = np.moveaxis(weight, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, block).astype(np.float32)
    largest = np.abs(blocks).max(axis=-1)
    best = np.full(largest.shape, np.inf, np.float32)
    scale = np.ones_like(largest)
    for share in _CLIPPED:
        # Round to float16 first, because the final file contains float16 scales.
        candidate = np.maximum(largest * np.float32(share / _LARGEST_INT4), 1e-6).astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint(blocks / candidate[..., None]), -8, 7)
        error = ((codes * candidate[..., None] - blocks) ** 2).sum(axis=-1)
        scale, best = np.where(error < best, candidate, scale), np.minimum(error, best)
    codes = np.clip(np.rint(blocks / scale[..., None]), -8, 7).astype(np.int8).reshape(moved.shape)
    return np.moveaxis(codes, -1, axis), np.ascontiguousarray(np.moveaxis(scale, -1, axis), np.float32)
