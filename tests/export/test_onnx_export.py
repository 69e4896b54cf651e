"""Export and verification: what ONNX Runtime computes is what torch computes, whatever the widths."""

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
from fedspine_edge.export.verification import compare, random_inputs, verify_onnx
from fedspine_edge.model.families import max_tokens_of
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner

FAMILIES = [
    ("bert", "classification"),
    ("roberta", "classification"),
    ("llama", "classification"),
    ("llama", "causal_lm"),
]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_unequal_widths_agree_with_torch_at_every_shape(family, task, precision, tmp_path):
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
def test_graph_uses_only_operators_that_tensorrt_10_3_parses(opset, tmp_path):
    export_onnx(tiny_model("llama"), tmp_path / "model.onnx", opset=opset)
    proto = onnx.load(tmp_path / "model.onnx")
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert not {node.op_type for node in proto.graph.node} & {"Attention", "RotaryEmbedding", "RMSNormalization"}
    assert [[axis.dim_param for axis in info.type.tensor_type.shape.dim] for info in proto.graph.input] == [
        ["batch", "sequence"]
    ] * 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_initialisers_have_the_names_of_the_state_dict(precision, tmp_path):
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


def test_fp16_halves_weights_and_keeps_norms_and_softmax_in_fp32(tmp_path):
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


def test_fp16_of_bert_keeps_layer_norm_in_fp32(tmp_path):
    export_onnx(tiny_model("bert"), tmp_path / "model.onnx", precision="fp16")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    assert {kinds[node.input[1]] for node in norms} == {onnx.TensorProto.FLOAT}


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = tiny_model("llama")
    config = copy.deepcopy(model.module.config.to_dict())
    attention = model.module.config._attn_implementation
    model.module.train()
    export_onnx(model, tmp_path / "model.onnx")
    assert model.module.training
    assert model.module.config.to_dict() == config
    assert model.module.config._attn_implementation == attention
    assert model.r == 2


def test_bfloat16_modules_are_exported_as_float32(tmp_path):
    module = merged_module(tiny_model("bert")).to(torch.bfloat16)
    exported = export_onnx(module, tmp_path / "model.onnx")
    assert next(module.parameters()).dtype == torch.bfloat16
    assert verify_onnx(exported, copy.deepcopy(module).float()).max_abs_diff < 2e-6


def test_weights_beyond_protobuf_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_INLINE_BYTES", 1000)
    model = tiny_model("bert")
    for _ in range(2):  # the second export must replace the data file, not append to it
        exported = export_onnx(model, tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    weights = 4 * sum(parameter.numel() for parameter in merged_module(model).parameters())
    assert 0.9 * weights <= data.stat().st_size < 1.2 * weights
    assert verify_onnx(exported, merged_module(model)).max_abs_diff < 2e-6


def test_a_changed_weight_is_a_mismatch_that_names_the_output(tmp_path):
    model = tiny_model("bert")
    exported = export_onnx(model, tmp_path / "model.onnx")
    other = merged_module(model)
    with torch.no_grad():
        other.classifier.bias[1] += 0.5
    with pytest.raises(ExportMismatch, match=r"logits at \(batch, tokens\) = .* differs by 0\.5 \(tolerance"):
        verify_onnx(exported, other)


def test_non_finite_outputs_are_a_mismatch(tmp_path):
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


def test_the_users_own_inputs_can_be_compared(tmp_path):
    model = tiny_model("bert")
    exported = export_onnx(model, tmp_path / "model.onnx")
    own = random_inputs(exported.inputs, [(2, 9)], exported.max_tokens, seed=3)
    assert verify_onnx(exported, merged_module(model), inputs=own).shapes == ((2, 9),)


def test_shapes_longer_than_the_model_are_cut():
    model = tiny_model("roberta")
    limit = max_tokens_of(model.module.config)
    inputs = task_graph(merged_module(model), max_tokens=limit).inputs
    assert limit == 66 - 2
    assert [batch["input_ids"].shape for batch in random_inputs(inputs, [(1, 500), (1, 64)], limit)] == [(1, 64)]


@pytest.mark.parametrize(("setting", "value"), [("opset", 16), ("opset", 23), ("precision", "int8")])
def test_settings_out_of_range(setting, value, tmp_path):
    with pytest.raises(ConfigError, match=str(value)):
        export_onnx(tiny_model("bert"), tmp_path / "model.onnx", **{setting: value})
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_that_cannot_be_traced_says_so(tmp_path):
    module = merged_module(tiny_model("llama"))
    module.config.pad_token_id = None  # transformers cannot find the last token of padded rows then
    with pytest.raises(DeployError, match="could not be exported"):
        export_onnx(module, tmp_path / "model.onnx")


def test_plain_folders_with_a_trained_head_export(tmp_path):
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


def test_a_classifier_of_a_family_that_is_not_pruned_here_exports_as_it_is(tmp_path):
    sizes = {"embedding_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ElectraConfig(**sizes, intermediate_size=16, vocab_size=50)
    module = transformers.ElectraForSequenceClassification(config).eval()
    assert verify_onnx(export_onnx(module, tmp_path / "model.onnx"), module).max_abs_diff < 2e-6


def test_a_backbone_without_a_task_head_is_refused(tmp_path):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "plain")
    with pytest.raises(DeployError, match="no trained task head"):
        load_folder(tmp_path / "plain")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        export_onnx(tmp_path / "nowhere", tmp_path / "model.onnx")


def test_nested_graphs_are_refused_in_fp16():
    from fedspine_edge.export.mixed_precision import convert_to_16bit

    branch = onnx.helper.make_graph([], "branch", [], [])
    node = onnx.helper.make_node("If", ["condition"], ["out"], name="choice", then_branch=branch, else_branch=branch)
    graph = onnx.helper.make_graph([node], "graph", [], [])
    with pytest.raises(DeployError, match="choice"):
        convert_to_16bit(onnx.helper.make_model(graph))


def test_exported_records_are_immutable(tmp_path):
    exported = export_onnx(tiny_model("bert"), tmp_path / "model.onnx")
    with pytest.raises(dataclasses.FrozenInstanceError):
        exported.opset = 20
