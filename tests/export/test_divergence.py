"""`ExportMismatch` names the layer when one weight of the exported file is altered."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from tiny_models import prunable, random_layout

from fedspine_edge.errors import ExportMismatch
from fedspine_edge.export.divergence import canonical_names
from fedspine_edge.export.onnx_export import export_onnx, merged_module
from fedspine_edge.export.verification import verify_onnx


def corrupt(path, weight: str) -> None:
    """Change one column of the initializer of a torch parameter."""
    proto = onnx.load(path)
    found = [tensor for tensor in proto.graph.initializer if tensor.name.removesuffix(".T") == weight]
    assert len(found) == 1, [tensor.name for tensor in proto.graph.initializer]
    tensor = found[0]
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        bits = np.frombuffer(tensor.raw_data, np.uint16).copy()
        bits[: bits.size // 2] ^= 0x8000  # the sign
        tensor.raw_data = bits.tobytes()
    else:
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[..., 0] += 2.0
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, path)


@pytest.mark.parametrize(
    ("kind", "weight", "name", "precision"),
    [
        ("bert", "bert.encoder.layer.1.attention.self.query.weight", "layers.1.q", "fp32"),
        ("bert", "bert.encoder.layer.0.output.dense.weight", "layers.0.down", "fp16"),
        ("bert", "bert.encoder.layer.1.attention.output.LayerNorm.weight", "LayerNorm", "fp32"),
        ("llama_lm", "model.layers.1.mlp.gate_proj.weight", "layers.1.gate", "bf16"),
        ("gpt2_lm", "transformer.h.1.attn.c_attn.weight", "layers.1.q+k+v", "fp32"),
        pytest.param("modernbert", "model.layers.1.mlp.Wo.weight", "layers.1.down", "fp32", marks=pytest.mark.slow),
        pytest.param(
            "deberta-v2",
            "deberta.encoder.layer.1.attention.self.value_proj.weight",
            "layers.1.v",
            "fp32",
            marks=pytest.mark.slow,
        ),
        ("roberta", "classifier.out_proj.weight", "classifier.out_proj", "fp32"),
    ],
)
def test_divergence_names_layer_of_altered_weight(kind, weight, name, precision, tmp_path):
    model = prunable(kind)
    model.compact(random_layout(model, seed=3))
    exported = export_onnx(model, tmp_path / "model.onnx", precision=precision)
    corrupt(exported.path, weight)
    with pytest.raises(ExportMismatch, match="first layer that differs") as caught:
        verify_onnx(exported, merged_module(model))
    layer = caught.value.message.partition("first layer that differs is ")[2]
    assert name in layer.split(":")[0]


def test_divergence_only_in_outputs_is_reported(tmp_path):
    """The logits are negated after the last module, so no module has a different output."""
    model = prunable("bert")
    exported = export_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(exported.path)
    next(node for node in proto.graph.node if "logits" in node.output).output[0] = "straight"
    proto.graph.node.append(onnx.helper.make_node("Neg", ["straight"], ["logits"], name="after"))
    onnx.save(proto, exported.path)
    with pytest.raises(ExportMismatch, match="Every layer matches on its own"):
        verify_onnx(exported, merged_module(model))


def test_canonical_names_cover_every_linear():
    model = prunable("llama_lm")
    names = canonical_names(model.module)
    assert {name for name in names.values() if name.startswith("layers.1")} == {
        "layers.1",
        *(f"layers.1.{part}" for part in ("q", "k", "v", "o", "up", "gate", "down")),
    }
    linears = {path for path, child in model.merge().named_modules() if isinstance(child, torch.nn.Linear)}
    assert linears - set(names) == {"lm_head"}
