"""Export of every family, task and kind of width: comparison with torch, and builds with TensorRT-RTX.

One case per family runs by default; the full matrix (families × tasks × widths × precisions, each with the real
builder) is marked slow.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, KINDS, prunable, random_layout, task_of

from fedspine_edge.bundle.bundle import OptimizationProfile, load_bundle
from fedspine_edge.engine import tensorrt_api
from fedspine_edge.engine.tensorrt_builder import EngineOptions, OnnxModel, build_plan
from fedspine_edge.errors import MissingDependency
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.export.divergence import _intermediate_tensors
from fedspine_edge.export.onnx_export import export_onnx, merged_module
from fedspine_edge.export.tracing import with_runtime_lora
from fedspine_edge.export.verification import verify_adapters, verify_cache, verify_onnx
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.model.layout import Layout, Order
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.runtime.adapters import bundled_adapter, read_adapter
from fedspine_edge.runtime.comparison import random_inputs

WIDTHS = ("unpruned", "layer-pruned", "unequal")
LARGEST = {"fp32": 5e-5, "fp16": 0.1, "bf16": 0.6}
"""Largest difference for outputs up to 7. Tiny models with large weights are hard for 16 bits."""


def model_of(kind: str, widths: str) -> PrunableModel:
    model = prunable(kind)
    if widths == "unequal":
        model.compact(random_layout(model, seed=3))
        assert len(set(model.layout.counts)) > 1
    elif widths == "layer-pruned":
        spec = model.spec
        order = Order(
            (np.arange(spec.num_kv_heads),) * spec.num_layers, (np.arange(spec.intermediate_size),) * spec.num_layers
        )
        half = (spec.num_kv_heads // 2, spec.intermediate_size // 2)
        model.compact(Layout.prefix(spec, order, [half] * spec.num_layers))
    return model


def verified(model: PrunableModel, path, precision: str):
    """Export a model and compare full passes; decoders are also compared token by token."""
    module = merged_module(model)
    exported = export_onnx(model, path, precision=precision)
    assert verify_onnx(exported, module).max_abs_diff < LARGEST[precision]
    if exported.task == "causal_lm":
        assert verify_cache(exported, module).max_abs_diff < LARGEST[precision]
    return exported


def rtx_plan(exported, sm: str = "86") -> bytes:
    """Return a plan of the real builder, or skip the test."""
    try:
        backend = tensorrt_api.find_backend("tensorrt_rtx")
    except MissingDependency as error:
        pytest.skip(error.message)
    options = EngineOptions(profiles=(OptimizationProfile(tokens=(1, 8, 16)),), compute_capabilities=(sm,))
    return build_plan(backend, OnnxModel(path=exported.path, inputs=exported.inputs), options, device=None).plan


@pytest.mark.parametrize("kind", FAMILIES)
def test_export_agrees_with_torch_in_every_family(kind, tmp_path):
    model = model_of(kind, "unequal")
    exported = verified(model, tmp_path / "model.onnx", "fp32")
    assert exported.task == task_of(kind)[1]
    if exported.task == "causal_lm":
        heads = [tensor.shape[1] for tensor in exported.inputs if tensor.kind == "past"]
        assert heads[::2] == heads[1::2] == [heads for heads, _ in model.layout.counts]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if task_of(kind)[1] == "classification"])
def test_export_computes_only_pooled_token_in_last_layer(kind, tmp_path):
    model = model_of(kind, "unequal")
    exported = verified(model, tmp_path / "model.onnx", "fp32")
    inputs = random_inputs(exported.inputs, [(3, 7)], exported.max_tokens, seed=0, pad=exported.pad_token_id)
    left = [{name: np.ascontiguousarray(value[:, ::-1]) for name, value in inputs[0].items()}]
    assert verify_onnx(exported, merged_module(model), inputs=left).max_abs_diff < LARGEST["fp32"]
    paths = [model.architecture.path(f"layers.{layer}.{part}") for layer in (0, 1) for part in ("o", "down")]
    computed = _intermediate_tensors(exported.path, paths, inputs[0])
    hidden = model.spec.hidden_size
    assert [computed[path].shape for path in paths] == [(3, 7, hidden)] * 2 + [(3, 1, hidden)] * 2


@pytest.mark.parametrize("kind", ["bert_tokens", "mistral_tokens"])
def test_token_classifier_exports_row_per_token(kind, tmp_path):
    exported = verified(model_of(kind, "layer-pruned"), tmp_path / "model.onnx", "fp32")
    assert exported.task == "token_classification"
    assert exported.outputs[0].shape == ("batch", "sequence", 3)


@pytest.mark.parametrize(("kind", "precision"), [("gpt2_lm", "fp16"), ("mistral_lm", "bf16")])
def test_16bit_exports_build_with_tensorrt_rtx(kind, precision, tmp_path):
    assert len(rtx_plan(verified(model_of(kind, "unequal"), tmp_path / "model.onnx", precision))) > 100_000


def test_sliding_window_applies_to_prompt_and_steps(tmp_path):
    """Mistral's window is 4 here, so tokens outside of it do not change the output."""
    model = model_of("mistral_lm", "unpruned")
    module = merged_module(model)
    ids = torch.randint(1, 60, (1, 12))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 60 + 1
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids).logits[0, -1], module(input_ids=changed).logits[0, -1])
    assert verify_cache(verified(model, tmp_path / "model.onnx", "fp32"), module, prompt=6, steps=8).tolerance > 0


def test_export_of_mixed_attention_windows_agrees(tmp_path):
    model = prunable("qwen2_lm", layers=2)
    config = model.module.config
    config.layer_types, config.sliding_window, config.use_sliding_window = (
        ["full_attention", "sliding_attention"],
        4,
        True,
    )
    model.module.model.has_sliding_layers = True
    model.module.model.layers[1].self_attn.sliding_window = 4
    verified(model, tmp_path / "model.onnx", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_full_export_matrix(kind, widths, tmp_path):
    model = model_of(kind, widths)
    for precision in ("fp32", "fp16", "bf16") if widths == "unequal" else ("fp16",):
        assert len(rtx_plan(verified(model, tmp_path / f"{precision}.onnx", precision))) > 100_000


@pytest.mark.parametrize("kind", ["gpt2", "modernbert"])
def test_read_adapter_splits_fused_matrix(kind, tmp_path):
    """PEFT has one adapter for c_attn or Wqkv; the bundle has one input per linear."""
    model = model_of(kind, "unequal")
    save_model(model, tmp_path / "model")
    out = compile_engine(tmp_path / "model", tmp_path / "out", lora="inputs", backend="onnxruntime")
    manifest = load_bundle(out).manifest
    own = bundled_adapter(out, manifest)
    read = read_adapter(tmp_path / "model", manifest, own)
    assert read.keys() == own.keys()
    for entry in manifest.adapter.modules:
        a, b = (read[f"lora.{entry.path}.{side}"] for side in "AB")
        expected = own[f"lora.{entry.path}.A"] @ own[f"lora.{entry.path}.B"]
        np.testing.assert_allclose(a @ b, expected, atol=1e-6)
        assert a.shape[1] <= 3 * model.r


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_inputs_agree_with_torch_in_every_family(kind, tmp_path):
    model = model_of(kind, "unequal")
    runtime, spec, factors = with_runtime_lora(model)
    exported = export_onnx(runtime, tmp_path / "model.onnx", adapter=spec, layout=model.layout)
    values = {name: tensor.numpy() for name, tensor in factors.items()}
    assert verify_onnx(exported, merged_module(model), adapter=values).max_abs_diff < LARGEST["fp32"]
    assert verify_adapters(exported, runtime, spec).max_abs_diff < LARGEST["fp32"]
