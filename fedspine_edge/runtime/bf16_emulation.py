"""A bfloat16 graph as ONNX Runtime's CPU provider, which has no bfloat16 kernels, can run it.

Every tensor that was bfloat16 is computed in float32 and rounded to bfloat16 and back, weights keep their rounded
values: that is what a GPU's bfloat16 units do, which multiply rounded numbers and add in float32.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.errors import MissingDependency
from fedspine_edge.export.mixed_precision import tensor_types


@contextlib.contextmanager
def widened_copy(model: Path) -> Iterator[Path]:
    """A temporary file that computes what the bfloat16 file `model` does.

    Raises `MissingDependency` without the onnx package.
    """
    try:
        import onnx
    except ImportError as error:
        purpose = "Running a bfloat16 model on a CPU"
        raise MissingDependency.of("onnx", extra="export", purpose=purpose) from error
    with tempfile.TemporaryDirectory(prefix="fedspine-widen-") as folder:
        path = Path(folder) / model.name
        onnx.save(widened(onnx.load(model)), path, save_as_external_data=True, size_threshold=1 << 16)
        yield path


def widened(model: Any) -> Any:
    """Converts an `onnx.ModelProto` in place and returns it; its inputs and outputs stay as they were."""
    import onnx

    kinds, graph = onnx.TensorProto, model.graph
    narrow = {name for name, kind in tensor_types(model).items() if kind == kinds.BFLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == kinds.BFLOAT16:
            bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
            tensor.raw_data, tensor.data_type = bits.tobytes(), kinds.FLOAT
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for position, name in enumerate(node.output):
            if name not in narrow:
                continue
            if node.op_type == "Cast":  # its target type stays: the cast is the rounding
                node.output[position] = f"{name}.narrow"
            else:
                node.output[position] = f"{name}.wide"
                nodes.append(onnx.helper.make_node("Cast", [f"{name}.wide"], [f"{name}.narrow"], to=kinds.BFLOAT16))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}.narrow"], [name], to=kinds.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model
