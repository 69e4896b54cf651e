"""A float32 ONNX file gets 8- or 4-bit linears: QuantizeLinear and DequantizeLinear around the layers' weights.

- int8, fp8: weights per output channel, activations per tensor, symmetric, scaled by calibration on the user's
  data. Placed by nvidia-modelopt where it is installed, else by ONNX Runtime's quantizer.
- int4: weights alone, one scale per block of input channels; needs no data.

Only the linears inside the layers are quantised: embeddings and heads cost little and lose most. What is left is
float16 afterwards (`half.to_half`), as TensorRT's strongly typed networks want it. Measured numbers and why:
docs/decisions/0063-int8-and-int4.md.
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
"""Of int4, largest that divides a linear's inputs; a narrower one costs a 16-bit scale per fewer weights."""
_LARGEST_FP8, _LARGEST_INT8, _LARGEST_INT4 = 448.0, 127.0, 7.0
_CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of a block's largest weight at which its scale may end: cutting one outlier can serve the other weights."""


def quantize(
    source: Path, target: Path, precision: Precision, scope: str, calibration: Sequence[Inputs] = ()
) -> Quantization:
    """Writes `source` with quantised linears to `target`; all else stays float32.

    Args:
        source: A float32 file of opset 19 or 20.
        target: Where the result goes.
        precision: One of `QUANTIZED`.
        scope: Names of nodes inside the layers begin with it, "/model/bert/encoder/layer.".
        calibration: Inputs to take the ranges of activations from (int8, fp8).

    Raises `DeployError` where nothing can be quantised.
    """
    import onnx

    proto = onnx.load(source)
    linears = _linears(proto.graph, scope)
    if not linears:
        raise DeployError(f"{source.name} has no linear inside {scope!r} to quantise.")
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
    """Nodes inside the layers that multiply with a weight matrix of the file."""
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
        raise MissingDependency.of("onnxruntime", extra="export", purpose="Quantising a model") from error
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
                # TensorRT takes symmetric scales, and quantised inputs of products but not their outputs.
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
            dq_only=True,  # weights in 8 bits in the file
            output_path=str(target),
        )
    return f"nvidia-modelopt {metadata.version('nvidia-modelopt')}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both tools report every tensor to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _int8_to_fp8(path: Path, weights: dict[str, Array]) -> None:
    """Turns symmetric int8 into float8 (e4m3): the same ranges, other steps; weights are rounded from the originals."""
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
        quantised = tensors.get(node.input[0])
        if quantised is not None and quantised.data_type == onnx.TensorProto.INT8:
            original = weights[quantised.name.removesuffix("_quantized")]
            steps = _along(onnx.numpy_helper.to_array(scale), node, original.ndim)
            values = np.clip(original / steps, -_LARGEST_FP8, _LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
            raw = onnx.TensorProto(name=quantised.name, data_type=fp8, dims=original.shape, raw_data=values.tobytes())
            quantised.CopyFrom(raw)
    onnx.save(proto, path)


def _size(tensor: Any) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _along(scale: Array, node: Any, dimensions: int) -> Array:
    """A scale per channel, shaped to divide a weight."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [1] * dimensions
    if scale.size > 1:
        shape[axis] = scale.size
    return scale.reshape(shape)


def _weights_in_int4(proto: Any, linears: Sequence[Any], target: Path) -> Quantization:
    """DequantizeLinear in blocks along the inputs of every linear, which opset 21 brought."""
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
            f"No linear's inputs are a multiple of {BLOCK_SIZES[-1]}, so int4 has no blocks.",
            remedy="Prune with `round_to` 16 or wider, or use `precision` int8.",
        )
    ordered = [*nodes.values(), *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(ordered)
    # Opset 21 only adds types to the operators used here, so the version can be raised without converting them.
    proto.opset_import[0].version = max(21, proto.opset_import[0].version)
    proto.ir_version = max(10, proto.ir_version)
    onnx.save(proto, target)
    return Quantization(tool="blocks", linears=len(used), left_out=len(linears) - len(used), block_size=min(used))


def int4_blocks(weight: Array, axis: int, block: int) -> tuple[Array, Array]:
    """(codes −8..7 of the weight's shape, float32 scales with `axis` divided by `block`).

    Per block the scale with the smallest squared error among a few that cut the largest weight.
    """
    moved = np.moveaxis(weight, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, block).astype(np.float32)
    largest = np.abs(blocks).max(axis=-1)
    best = np.full(largest.shape, np.inf, np.float32)
    scale = np.ones_like(largest)
    for share in _CLIPPED:
        # Rounded to float16 first: that is what the finished file divides by.
        candidate = np.maximum(largest * np.float32(share / _LARGEST_INT4), 1e-6).astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint(blocks / candidate[..., None]), -8, 7)
        error = ((codes * candidate[..., None] - blocks) ** 2).sum(axis=-1)
        scale, best = np.where(error < best, candidate, scale), np.minimum(error, best)
    codes = np.clip(np.rint(blocks / scale[..., None]), -8, 7).astype(np.int8).reshape(moved.shape)
    return np.moveaxis(codes, -1, axis), np.ascontiguousarray(np.moveaxis(scale, -1, axis), np.float32)
