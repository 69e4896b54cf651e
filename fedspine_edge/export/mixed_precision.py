"""Converts a float32 ONNX graph to mixed precision: 16-bit weights and products, float32 norms and softmax.

Strongly typed TensorRT networks take the precision from the graph, so it is chosen here for every node:

- Nodes that do not depend on an embedding (masks, rotary angles) stay in float32.
- LayerNormalization, decomposed RMSNorm, and softmax with the preceding mask addition stay in float32. In float16 they
  overflow (squares at 256, and a mask of -3e38 becomes -inf), and bfloat16 has only 8 bits for a sum.
- All other nodes that compute floats, including the scales of QuantizeLinear and DequantizeLinear, become float16 or
  bfloat16.
- The KV cache of a decoder is an input and output in float16. With bfloat16, which numpy does not support, it stays in
  float32. All other outputs are cast back to float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from fedspine_edge.errors import DeployError
from fedspine_edge.runtime.bf16_emulation import tensor_types

Kind = Literal["fp16", "bf16"]
LARGEST: dict[Kind, float] = {"fp16": 65504.0, "bf16": 3.3895e38}
"""Constants are clipped to these values, because the float32 minimum in a mask would round to infinity."""
_FP32_OPS = frozenset({"LayerNormalization", "Softmax", "ReduceMean", "Pow", "Sqrt", "Reciprocal", "Cos", "Sin"})
_SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})
_NORM_TAIL = frozenset({"Add", "Sqrt", "Div", "Reciprocal", "Mul"})


def convert_to_16bit(model: Any, kind: Kind = "fp16") -> None:
    """Convert an `onnx.ModelProto` in place. Raises `DeployError` if a node contains a nested graph."""
    _Converter(model, kind).convert()


def bfloat16_bits(value: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return the upper 16 bits of float32 numbers, rounded to nearest even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded: np.ndarray[Any, np.dtype[np.uint16]] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


class _Converter:
    def __init__(self, model: Any, kind: Kind) -> None:
        import onnx

        self.kind = kind
        self.half_type = onnx.TensorProto.FLOAT16 if kind == "fp16" else onnx.TensorProto.BFLOAT16
        self.onnx = onnx
        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producer = {name: index for index, node in enumerate(self.nodes) for name in node.output}
        self.consumers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise DeployError(
                    f"Node {node.name!r} ({node.op_type}) contains a nested graph, which {kind} does not support.",
                    remedy="Export in fp32.",
                )
            for name in node.input:
                self.consumers[name].append(index)
        self.floats = {name for name, found in tensor_types(model).items() if found == onnx.TensorProto.FLOAT}
        self.half_tensors: set[str] = set()
        self.kept_outputs = {output.name for output in self.graph.output}
        if kind == "fp16":
            self.half_tensors |= {t.name for t in self.graph.input if t.name.startswith("past_key_values.")}
            self.kept_outputs = {name for name in self.kept_outputs if not name.startswith("present.")}
        self.casts: dict[tuple[str, bool], str] = {}
        self.result: list[Any] = []

    def convert(self) -> None:
        half = self._descendants_of_embeddings() - self._kept_in_fp32()
        for index, node in enumerate(self.nodes):
            is_half = index in half and node.op_type not in ("Cast", "Constant")
            self._convert_inputs(node, index, is_half)
            self.result.append(node)
            for position, name in enumerate(node.output):
                if is_half and name in self.floats:
                    if name in self.kept_outputs:
                        node.output[position] = self.casts[name, True] = f"{name}.{self.kind}"
                        self.result.append(self._cast(node.output[position], name, to_half=False))
                    else:
                        self.half_tensors.add(name)
        self._tidy_initializers()
        del self.graph.node[:]
        self.graph.node.extend(self.result)
        del self.graph.value_info[:]  # holds the float32 types
        for info in (*self.graph.input, *self.graph.output):
            if info.name in self.half_tensors:
                info.type.tensor_type.elem_type = self.half_type

    def _convert_inputs(self, node: Any, index: int, is_half: bool) -> None:
        if node.op_type in ("Cast", "Shape"):
            return  # take any type
        for position, name in enumerate(node.input):
            if name in self.floats and (name in self.half_tensors) != is_half:
                node.input[position] = self._in_precision(name, is_half)

    def _in_precision(self, name: str, half: bool) -> str:
        """Return the name of the tensor `name` in the other precision; it is created once."""
        key = (name, half)
        if key in self.casts:
            return self.casts[key]
        other = self.casts[key] = f"{name}.{self.kind}" if half else f"{name}.fp32"
        value = self._constant(name)
        if value is None:
            self.result.append(self._cast(name, other, to_half=half))
        else:
            self.graph.initializer.append(self._rounded(value, other))
        return other

    def _rounded(self, value: Any, name: str) -> Any:
        clipped = np.clip(value, -LARGEST[self.kind], LARGEST[self.kind])
        raw = clipped.astype(np.float16) if self.kind == "fp16" else bfloat16_bits(clipped)
        return self.onnx.TensorProto(name=name, data_type=self.half_type, dims=value.shape, raw_data=raw.tobytes())

    def _constant(self, name: str) -> Any:
        """Return the value of an initializer or of a Constant node, or None for any other tensor."""
        if name in self.initializers:
            return self.onnx.numpy_helper.to_array(self.initializers[name])
        index = self.producer.get(name)
        if index is None or self.nodes[index].op_type != "Constant":
            return None
        attribute = self.nodes[index].attribute[0]
        return self.onnx.numpy_helper.to_array(attribute.t) if attribute.name == "value" else None

    def _cast(self, source: str, target: str, *, to_half: bool) -> Any:
        kind = self.half_type if to_half else self.onnx.TensorProto.FLOAT
        return self.onnx.helper.make_node("Cast", [source], [target], name=f"Cast.{target}", to=kind)

    def _descendants_of_embeddings(self) -> set[int]:
        """Return the nodes that compute floats from the rows of an embedding table."""
        roots = [
            index
            for index, node in enumerate(self.nodes)
            if node.op_type == "Gather" and node.input[0] in self.initializers and node.input[0] in self.floats
        ]
        found: set[int] = set()
        pending = roots
        while pending:
            index = pending.pop()
            if index not in found:
                found.add(index)
                node = self.nodes[index]
                follow = [name for name in node.output if name in self.floats or node.op_type == "QuantizeLinear"]
                pending.extend(consumer for name in follow for consumer in self.consumers[name])
        # Nodes without float outputs, such as comparisons, keep float32 inputs. Dequantized weights do not depend on an
        # embedding, but they are multiplied with tensors that do.
        quantized = {index for index, node in enumerate(self.nodes) if node.op_type in _SCALED}
        return quantized | {i for i in found if any(name in self.floats for name in self.nodes[i].output)}

    def _kept_in_fp32(self) -> set[int]:
        kept = {index for index, node in enumerate(self.nodes) if node.op_type in _FP32_OPS}
        for index, node in enumerate(self.nodes):
            if node.op_type == "Softmax":
                kept.update(self._producers(node.input[:1], {"Add", "Where"}))
            elif node.op_type == "ReduceMean":
                kept.update(self._norm_tail(index))
        return kept

    def _producers(self, names: Iterable[str], ops: set[str]) -> set[int]:
        indices = (self.producer[name] for name in names if name in self.producer)
        return {index for index in indices if self.nodes[index].op_type in ops}

    def _norm_tail(self, mean: int) -> set[int]:
        """Return the nodes of a decomposed RMSNorm after its mean: + eps, square root, 1/x, up to x · (1/rms)."""
        tail: set[int] = set()
        index = mean
        while True:
            following = [i for name in self.nodes[index].output for i in self.consumers[name]]
            if len(following) != 1 or self.nodes[following[0]].op_type not in _NORM_TAIL:
                return tail
            index = following[0]
            tail.add(index)
            if self.nodes[index].op_type == "Mul":
                return tail

    def _tidy_initializers(self) -> None:
        """Remove unused initializers and constants. A weight that is used only in 16 bits keeps its original name."""
        used = {name for node in self.result for name in node.input}
        self.result = [node for node in self.result if node.op_type != "Constant" or node.output[0] in used]
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        rename = {}
        for tensor in kept:
            original = tensor.name.removesuffix(f".{self.kind}")
            if original in self.initializers and original not in used:
                rename[tensor.name] = tensor.name = original
        for node in self.result:
            for position, name in enumerate(node.input):
                node.input[position] = rename.get(name, name)
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
