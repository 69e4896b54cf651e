"""Finds the first layer of an exported file whose output differs from torch's.

Forward hooks record the outputs of torch's modules in execution order. The corresponding tensor in the file is the last
one inside the module's scope, which the exporter writes into the names of nodes
(/model/bert/encoder/layer.0/attention/self/query/Add). One run of each yields all of them, so that no bisection of the
graph is needed; see docs/decisions/0062-one-pass-names-the-failing-layer.md.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.runtime.bf16_emulation import emulate_bfloat16, tensor_types
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

ROOT = "/model/"
"""Scope that tracing adds around the model (`tracing._TracedModule.model`)."""


@dataclass(frozen=True)
class LayerDifference:
    """A module whose output differs: its canonical name ("layers.3.q"), its path in torch, and the difference."""

    name: str
    path: str
    max_abs_diff: float
    largest: float
    """Largest absolute value of torch's output."""

    def __str__(self) -> str:
        where = self.name if self.name == self.path else f"{self.name} ({self.path})"
        return f"{where}: it differs by {self.max_abs_diff:.3g}, and its largest value is {self.largest:.3g}"


def first_divergent_layer(
    model: Path, module: nn.Module, inputs: dict[str, Array], run: Callable[[], object], *, tolerance: float
) -> LayerDifference | None:
    """Return the first module whose output in the file differs from torch's by more than the tolerance.

    Args:
        model: The exported file.
        module: The module that was exported.
        inputs: One batch for the file.
        run: Function that runs `module` once on the same batch.
        tolerance: Accepted difference relative to the module's largest output.

    Returns None if all modules agree; the difference is then in how the outputs are assembled.
    """
    actual = _intermediate_tensors(model, [path for path, _ in module.named_modules() if path], inputs)
    mask = inputs["attention_mask"] > 0
    names = canonical_names(module)
    for path, reference in _module_outputs(module, run):
        tensor = actual.get(path)
        if tensor is None or tensor.shape != reference.shape:
            continue
        if reference.shape[:2] == mask.shape:  # ignore values at padded positions
            tensor, reference = tensor[mask], reference[mask]
        difference = float(np.abs(tensor.astype(np.float32) - reference).max(initial=0.0))
        largest = float(np.abs(reference).max(initial=0.0))
        if not difference <= tolerance * largest:  # also true for NaN
            return LayerDifference(names.get(path, path), path, difference, largest)
    return None


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Return this package's name for every path in torch: "layers.3", "layers.3.q", or "layers.3.q+k+v" if fused."""
    from fedspine_edge.model.families import architecture_of

    architecture = architecture_of(module.config)
    modules = dict(module.named_modules())
    layers = len(modules[f"{architecture.backbone}.{architecture.layers}"])
    names = {}
    for layer in range(layers):
        names[architecture.layer_path(layer)] = f"layers.{layer}"
        for part in architecture.linears:
            path = architecture.path(f"layers.{layer}.{part}")
            names[path] = f"layers.{layer}.{part}"
        for path, parts in architecture.fused.items():
            names[f"{architecture.layer_path(layer)}.{path}"] = f"layers.{layer}.{'+'.join(parts)}"
    return names


def _module_outputs(module: nn.Module, run: Callable[[], object]) -> Iterator[tuple[str, Array]]:
    """Yield the path and the output of every module that returns a single float tensor, in execution order."""
    import torch

    outputs: list[tuple[str, Array]] = []

    def record(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            tensors = [one for one in values if isinstance(one, torch.Tensor) and one.is_floating_point()]
            if len(tensors) == 1:  # with several, as from a rotary embedding, none is the last in the file
                outputs.append((path, tensors[0].detach().float().cpu().numpy()))

        return hook

    handles = [child.register_forward_hook(record(path)) for path, child in module.named_modules() if path]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    calls: dict[str, int] = {}
    for path, _ in outputs:
        calls[path] = calls.get(path, 0) + 1
    # A module that runs twice (DeBERTa also projects its positions) has no single output to compare.
    return (entry for entry in outputs if calls[entry[0]] == 1)


def _intermediate_tensors(model: Path, paths: list[str], inputs: dict[str, Array]) -> dict[str, Array]:
    """Return the output that the file computes for every module, by module path."""
    import onnx

    proto = onnx.load(model)
    if any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in proto.graph.initializer):
        emulate_bfloat16(proto)
    types = tensor_types(proto)
    floats = {name for name, kind in types.items() if kind in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)}
    scopes = {ROOT + re.sub(r"\.(?=\D)", "/", path) + "/": path for path in paths}
    last: dict[str, str] = {}
    for node in proto.graph.node:
        outputs = [name for name in node.output if name in floats]
        if not outputs:
            continue
        position = node.name.find("/", len(ROOT))
        while position > 0:
            path = scopes.get(node.name[: position + 1])
            if path is not None and node.name.startswith(ROOT):
                last[path] = outputs[0]
            position = node.name.find("/", position + 1)
    known = {output.name for output in proto.graph.output}
    for name in dict.fromkeys(last.values()):
        if name not in known:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, types[name], None))
    with tempfile.TemporaryDirectory(prefix="fedspine-divergence-") as folder:
        copy = Path(folder) / "model.onnx"
        onnx.save(proto, copy, save_as_external_data=True, size_threshold=1 << 16)
        runner = OnnxRuntimeRunner(copy, threads=1)
        try:
            tensors = runner.run(inputs)
        finally:
            runner.close()
    return {path: tensors[name] for path, name in last.items()}
