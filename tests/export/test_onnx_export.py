"""ONNX export and verification: ONNX Runtime agrees with torch at any widths."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx
import pytest
import torch
import transformers
from tiny_deploy import tiny_model

from fedspine_edge.errors import CheckpointError, ConfigError, DeployError, ExportMismatch
from fedspine_edge.export import onnx_export
from fedspine_edge.export.onnx_export import export_onnx, load_folder, merged_module
from fedspine_edge.export.tracing import task_graph
from fedspine_edge.export.verification import verify_onnx
from fedspine_edge.model.families import max_tokens_of
from fedspine_edge.runtime import comparison
from fedspine_edge.runtime.comparison import compare, random_inputs
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner

FAMILIES = [
    ("bert", "classification"),
    ("roberta", "classification"),
    ("llama", "classification"),
    ("llama", "causal_lm"),
]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_export_of_unequal_widths_agrees_with_torch(family, task, precision, tmp_path):
    model = tiny_model(family, task)
    counts = model.layout.counts
    assert counts[0] != counts[1]
    exported = export_onnx(model, tmp_path / "model.onnx", precision=precision)
    shapes = [(1, 1), (1, 2), (4, 5), (2, 64)]
    result = verify_onnx(exported, merged_module(model), shapes=shapes)
    assert result.shapes == tuple(shapes)
    assert result.max_abs_diff < (2e-6 if precision == "fp32" else 5e-3)
    assert result.argmax_agreement == 1.0
    assert exported.task == task


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_export_uses_operators_of_tensorrt_10_3(opset, tmp_path):
    export_onnx(tiny_model("llama"), tmp_path / "model.onnx", opset=opset)
    proto = onnx.load(tmp_path / "model.onnx")
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert not {node.op_type for node in proto.graph.node} & {"Attention", "RotaryEmbedding", "RMSNormalization"}
    assert [[axis.dim_param for axis in info.type.tensor_type.shape.dim] for info in proto.graph.input] == [
        ["batch", "sequence"]
    ] * 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_initializers_are_named_as_in_state_dict(precision, tmp_path):
    model = tiny_model("bert")
    export_onnx(model, tmp_path / "model.onnx", precision=precision)
    proto = onnx.load(tmp_path / "model.onnx")
    names = {tensor.name for tensor in proto.graph.initializer}
    expected = set()
    for name, parameter in merged_module(model).named_parameters():
        linear = parameter.ndim == 2 and "encoder" in name
        expected.add(f"{name}.T" if linear else name)
    assert expected <= names
    assert not [name for name in names if name.startswith("onnx::")]


def test_fp16_keeps_norms_and_softmax_in_fp32(tmp_path):
    model = tiny_model("llama")
    export_onnx(model, tmp_path / "model.onnx", precision="fp16")
    proto = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"), strict_mode=True)
    kinds = {info.name: info.type.tensor_type.elem_type for info in [*proto.graph.value_info, *proto.graph.output]}
    by_op: dict[str, set[int]] = {}
    for node in proto.graph.node:
        by_op.setdefault(node.op_type, set()).update(kinds[name] for name in node.output if name in kinds)
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert by_op["Softmax"] == by_op["ReduceMean"] == by_op["Pow"] == by_op["Sqrt"] == by_op["Cos"] == {single}
    projections = [node for node in proto.graph.node if node.op_type == "MatMul" and "proj" in node.name]
    assert len(projections) == 14
    assert {kinds[node.output[0]] for node in projections} == {half}
    assert kinds["logits"] == single
    weights = {tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    assert weights == {half}


def test_fp16_keeps_layer_norm_in_fp32(tmp_path):
    export_onnx(tiny_model("bert"), tmp_path / "model.onnx", precision="fp16")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    assert {kinds[node.input[1]] for node in norms} == {onnx.TensorProto.FLOAT}


def test_export_does_not_change_model(tmp_path):
    model = tiny_model("llama")
    config = copy.deepcopy(model.module.config.to_dict())
    attention = model.module.config._attn_implementation
    model.module.train()
    export_onnx(model, tmp_path / "model.onnx")
    assert model.module.training
    assert model.module.config.to_dict() == config
    assert model.module.config._attn_implementation == attention
    assert model.r == 2


def test_export_converts_bfloat16_module_to_float32(tmp_path):
    module = merged_module(tiny_model("bert")).to(torch.bfloat16)
    exported = export_onnx(module, tmp_path / "model.onnx")
    assert next(module.parameters()).dtype == torch.bfloat16
    assert verify_onnx(exported, copy.deepcopy(module).float()).max_abs_diff < 2e-6


def test_large_weights_are_stored_externally(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_INLINE_BYTES", 1000)
    model = tiny_model("bert")
    for _ in range(2):  # the second export must replace the data file, not append to it
        exported = export_onnx(model, tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    weights = 4 * sum(parameter.numel() for parameter in merged_module(model).parameters())
    assert 0.9 * weights <= data.stat().st_size < 1.2 * weights
    assert verify_onnx(exported, merged_module(model)).max_abs_diff < 2e-6


def test_verify_onnx_names_output_of_changed_weight(tmp_path):
    model = tiny_model("bert")
    exported = export_onnx(model, tmp_path / "model.onnx")
    other = merged_module(model)
    with torch.no_grad():
        other.classifier.bias[1] += 0.5
    with pytest.raises(ExportMismatch, match=r"logits at \(batch, tokens\) = .* differs by 0\.5 \(tolerance"):
        verify_onnx(exported, other)


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_verify_onnx_tolerates_rounding_error_of_model(family, task, precision, tmp_path, monkeypatch):
    model = tiny_model(family, task)
    module = merged_module(model)
    exported = export_onnx(model, tmp_path / "model.onnx", precision=precision)
    monkeypatch.setitem(comparison.TOLERANCE, precision, 1e-9)
    monkeypatch.setitem(comparison.MIN_AGREEMENT, precision, 0.0)
    result = verify_onnx(exported, module)
    assert 0 < result.noise < {"fp32": 1e-5, "bf16": 0.2}[precision]
    assert "own rounding error" in result.summary
    if precision == "fp32":
        proto = onnx.load(exported.path)
        name = {"bert": "layer.1.output.dense.weight", "llama": "layers.1.mlp.down_proj.weight"}[family]
        tensor = next(t for t in proto.graph.initializer if name in t.name)
        changed = onnx.numpy_helper.to_array(tensor) * np.float32(1.05)
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
        onnx.save(proto, exported.path)
        with pytest.raises(ExportMismatch, match="disagrees with torch"):
            verify_onnx(exported, module)


def test_compare_rejects_non_finite_outputs(tmp_path):
    model = tiny_model("bert")
    exported = export_onnx(model, tmp_path / "model.onnx")

    class Broken(OnnxRuntimeRunner):
        def run(self, inputs):
            return {"logits": np.full((len(inputs["input_ids"]), 3), np.nan, np.float32)}

    reference = OnnxRuntimeRunner(exported.path)
    with pytest.raises(ExportMismatch, match="non-finite"):
        compare(
            Broken(exported.path),
            reference.run,
            random_inputs(exported.inputs, [(1, 4)], exported.max_tokens),
            exported.outputs,
            precision="fp32",
            subject="a",
            reference="b",
        )


def test_verify_onnx_accepts_own_inputs(tmp_path):
    model = tiny_model("bert")
    exported = export_onnx(model, tmp_path / "model.onnx")
    own = random_inputs(exported.inputs, [(2, 9)], exported.max_tokens, seed=3)
    assert verify_onnx(exported, merged_module(model), inputs=own).shapes == ((2, 9),)


def test_random_inputs_are_limited_to_max_tokens():
    model = tiny_model("roberta")
    limit = max_tokens_of(model.module.config)
    inputs = task_graph(merged_module(model), None).inputs
    assert limit == 66 - 2
    assert [batch["input_ids"].shape for batch in random_inputs(inputs, [(1, 500), (1, 64)], limit)] == [(1, 64)]


@pytest.mark.parametrize(("setting", "value"), [("opset", 16), ("opset", 23), ("precision", "int8")])
def test_export_invalid_settings_raise(setting, value, tmp_path):
    with pytest.raises(ConfigError, match=str(value)):
        export_onnx(tiny_model("bert"), tmp_path / "model.onnx", **{setting: value})
    assert not (tmp_path / "model.onnx").exists()


def test_export_of_untraceable_model_raises(tmp_path):
    module = merged_module(tiny_model("llama"))
    module.config.pad_token_id = None  # transformers cannot find the last token of padded rows then
    with pytest.raises(DeployError, match="could not be exported"):
        export_onnx(module, tmp_path / "model.onnx")


def test_export_of_transformers_folder_agrees(tmp_path):
    module = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=50,
            num_labels=4,
        )
    )
    module.save_pretrained(tmp_path / "plain")
    exported = export_onnx(tmp_path / "plain", tmp_path / "model.onnx")
    assert exported.outputs[0].shape == ("batch", 4)
    assert verify_onnx(exported, module.eval()).max_abs_diff < 2e-6


def test_export_of_unsupported_family_works_unpruned(tmp_path):
    sizes = {"embedding_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ElectraConfig(**sizes, intermediate_size=16, vocab_size=50)
    module = transformers.ElectraForSequenceClassification(config).eval()
    assert verify_onnx(export_onnx(module, tmp_path / "model.onnx"), module).max_abs_diff < 2e-6


def test_load_folder_rejects_backbone_without_head(tmp_path):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "plain")
    with pytest.raises(DeployError, match="no trained task head"):
        load_folder(tmp_path / "plain")


def test_export_names_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        export_onnx(tmp_path / "nowhere", tmp_path / "model.onnx")


def test_convert_to_16bit_rejects_nested_graphs():
    from fedspine_edge.export.mixed_precision import convert_to_16bit

    branch = onnx.helper.make_graph([], "branch", [], [])
    node = onnx.helper.make_node("If", ["condition"], ["out"], name="choice", then_branch=branch, else_branch=branch)
    graph = onnx.helper.make_graph([node], "graph", [], [])
    with pytest.raises(DeployError, match="choice"):
        convert_to_16bit(onnx.helper.make_model(graph))


def test_exported_model_is_immutable(tmp_path):
    exported = export_onnx(tiny_model("bert"), tmp_path / "model.onnx")
    with pytest.raises(dataclasses.FrozenInstanceError):
        exported.opset = 20
