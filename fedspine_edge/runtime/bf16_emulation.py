"""Emulates bfloat16 ONNX graphs in float32, because ONNX Runtime's CPU provider has no bfloat16 kernels.

Every bfloat16 tensor is computed in float32 and rounded to bfloat16 and back; weights keep their rounded values. This
matches the bfloat16 units of GPUs, which multiply rounded numbers and accumulate in float32.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.errors import DeployError, MissingDependency


@contextlib.contextmanager
def emulated_copy(model: Path) -> Iterator[Path]:
    """Yield a temporary file that emulates the bfloat16 file `model`. Raises `MissingDependency` without onnx."""
    try:
        import onnx
    except ImportError as error:
        purpose = "Running a bfloat16 model on a CPU"
        raise MissingDependency.of("onnx", extra="export", purpose=purpose) from error
    with tempfile.TemporaryDirectory(prefix="fedspine-bf16-") as folder:
        path = Path(folder) / model.name
        onnx.save(emulate_bfloat16(onnx.load(model)), path, save_as_external_data=True, size_threshold=1 << 16)
        yield path


def emulate_bfloat16(model: Any) -> Any:
    """Convert an `onnx.ModelProto` in place and return it. Its inputs and outputs are unchanged."""
    import onnx

    kinds, graph = onnx.TensorProto, model.graph
    bfloat16 = {name for name, kind in tensor_types(model).items() if kind == kinds.BFLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == kinds.BFLOAT16:
            bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
            tensor.raw_data, tensor.data_type = bits.tobytes(), kinds.FLOAT
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for position, name in enumerate(node.output):
            if name not in bfloat16:
                continue
            if node.op_type == "Cast":  # it already rounds to bfloat16
                node.output[position] = f"{name}.rounded"
            else:
                node.output[position] = f"{name}.unrounded"
                nodes.append(
                    onnx.helper.make_node("Cast", [f"{name}.unrounded"], [f"{name}.rounded"], to=kinds.BFLOAT16)
                )
            nodes.append(onnx.helper.make_node("Cast", [f"{name}.rounded"], [name], to=kinds.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def tensor_types(model: Any) -> dict[str, int]:
    """Return the ONNX element type of every tensor, found by shape inference on a copy without the weights.

    Raises `DeployError`, which names the tensor, if a type cannot be inferred.
    """
    import onnx

    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    graph = skeleton.graph
    graph.name = "skeleton"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64:
            graph.initializer.append(tensor)  # shapes, which are small and needed for the inference
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    inferred = onnx.shape_inference.infer_shapes(skeleton).graph
    every = (*inferred.input, *inferred.output, *inferred.value_info, *graph.initializer)
    types = {
        info.name: info.data_type if isinstance(info, onnx.TensorProto) else info.type.tensor_type.elem_type
        for info in every
    }
    unknown = [name for node in model.graph.node for name in node.output if name and not types.get(name)]
    if unknown:
        raise DeployError(
            f"The type of the tensor {unknown[0]!r} cannot be inferred, but 16-bit precisions need it.",
            remedy="Export in fp32, and report the model.",
        )
    return types
