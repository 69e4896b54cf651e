"""Quantization to 8 and 4 bits: file content, outputs, and accuracy on the user's examples."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from tiny_deploy import tiny_model, write_byte_tokenizer
from tiny_models import prunable
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from fedspine_edge.bundle.bundle import OptimizationProfile, TensorInfo, load_bundle
from fedspine_edge.data.examples import Example
from fedspine_edge.engine import tensorrt_api
from fedspine_edge.engine.tensorrt_builder import EngineOptions, OnnxModel, build_plan
from fedspine_edge.errors import ConfigError, DataError, DeployError, EngineBuildError, MissingDependency
from fedspine_edge.export.calibration import profile_for_lengths, read_user_data
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.export.onnx_export import export_onnx, merged_module, quantize_export
from fedspine_edge.export.quantization import int4_blocks
from fedspine_edge.export.verification import run_torch, verify_bundle
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.runtime.comparison import random_inputs
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner
from fedspine_edge.runtime.session import Session
from fedspine_edge.training.batching import encode

WORDS = ["good", "bad", "film", "board", "very", "not", "a", "the"]


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    rng = np.random.default_rng(seed)
    return [(" ".join(rng.choice(WORDS, int(rng.integers(2, 12)))), int(rng.integers(0, 3))) for _ in range(count)]


def wide_model(kind: str = "bert"):
    """Return a model that is wide enough for blocks of 16 and for quantization noise to average out."""
    return prunable(kind, heads=4, head_dim=16, channels=96)


def finished(model, precision, path):
    """Return (float32 export, quantized export, quantization record, module)."""
    module = merged_module(model)
    exported = export_onnx(module, path / "float.onnx", opset=19)
    calibration = random_inputs(exported.inputs, [(8, 24)], exported.max_tokens, seed=1)
    return (exported, *quantize_export(exported, path / "model.onnx", precision, module, calibration), module)


@pytest.mark.parametrize(("precision", "kind"), [("int8", "INT8"), ("fp8", "FLOAT8E4M3FN"), ("int4", "INT4")])
def test_quantized_file_stores_only_linears_narrow(precision, kind, tmp_path):
    _, exported, info, _ = finished(wide_model(), precision, tmp_path)
    proto = onnx.load(exported.path)
    onnx.checker.check_model(proto, full_check=True)
    stored = {t.name: t.data_type for t in proto.graph.initializer if len(t.dims) == 2 and t.dims[0] > 8}
    kinds = onnx.TensorProto
    narrow = [name for name, found in stored.items() if found == getattr(kinds, kind)]
    assert len(narrow) == info.linears == 12
    assert all(".layer." in name for name in narrow)
    assert {found for name, found in stored.items() if name not in narrow} == {kinds.FLOAT16}
    assert exported.opset == tensorrt_api.opset_for(precision) == proto.opset_import[0].version
    quantise = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert bool(quantise) == (precision != "int4")
    assert exported.path.stat().st_size < (tmp_path / "float.onnx").stat().st_size / 1.5


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("kind", ["bert", pytest.param("gpt2_lm", marks=pytest.mark.slow)])
def test_quantized_outputs_are_close_to_torch(kind, precision, tmp_path):
    if precision == "fp8" and sys.version_info < (3, 11):
        pytest.skip("the last ONNX Runtime for Python 3.10 transposes float8 where the opset does not allow it")
    original, exported, _, module = finished(wide_model(kind), precision, tmp_path)
    batch = random_inputs(original.inputs, [(16, 24)], original.max_tokens, seed=2)[0]
    expected = run_torch(module, batch, original.inputs)["logits"]
    half = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in batch.items()}
    actual = OnnxRuntimeRunner(exported.path, threads=1).run(half)["logits"]
    kept = batch["attention_mask"] > 0 if expected.ndim == 3 else np.ones(len(expected), bool)
    a, b = actual[kept].ravel(), expected[kept].ravel()
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    # Large random weights, and no training that would have made the model robust.
    assert cosine > {"int8": 0.98, "fp8": 0.9, "int4": 0.85}[precision]
    assert cosine < 0.99999


def test_int4_blocks_error_is_within_step_size():
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    codes, scale = int4_blocks(weight, 0, 16)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert scale.shape == (4, 8)
    error = np.abs(codes * np.repeat(scale, 16, axis=0) - weight)
    largest = np.repeat(np.abs(weight).reshape(4, 16, 8).max(axis=1), 16, axis=0)
    assert (error <= np.maximum(largest / 7 / 2 * 1.001, largest * 0.251)).all()
    naive = np.clip(np.rint(weight * 7 / largest), -8, 7) * largest / 7
    assert (error**2).sum() <= ((naive - weight) ** 2).sum() * 1.001
    np.testing.assert_array_equal(int4_blocks(weight.T, 1, 16)[0], codes.T)


def test_int4_counts_linears_without_blocks(tmp_path):
    model = prunable("bert", heads=4, head_dim=8, channels=24)  # 24 is no multiple of 16
    info = finished(model, "int4", tmp_path)[2]
    assert (info.linears, info.left_out, info.block_size) == (10, 2, 32)
    with pytest.raises(DeployError, match="no blocks"):
        finished(prunable("bert", heads=3, head_dim=8, channels=24), "int4", tmp_path)


def build(backend, exported, sm):
    model = OnnxModel(path=exported.path, inputs=exported.inputs, opset=exported.opset)
    options = EngineOptions(profiles=(OptimizationProfile(tokens=(1, 8, 16)),), compute_capabilities=(sm,))
    return build_plan(backend, model, options, device=None)


def rtx() -> tensorrt_api.Backend:
    try:
        return tensorrt_api.find_backend("tensorrt_rtx")
    except MissingDependency as error:
        pytest.skip(error.message)


@pytest.mark.parametrize(
    ("precision", "sm"),
    [
        ("int8", "86"),
        pytest.param("fp8", "120", marks=pytest.mark.slow),
        pytest.param("int4", "86", marks=pytest.mark.slow),
    ],
)
def test_rtx_builds_quantized_models(precision, sm, tmp_path):
    backend = rtx()
    exported = finished(wide_model(), precision, tmp_path)[1]
    assert len(build(backend, exported, sm).plan) > 100_000


def test_compile_int8_records_accuracy_and_profile(model_folder, tmp_path):
    lines: list[str] = []
    out = compile_engine(
        model_folder,
        tmp_path / "out",
        precision="int8",
        backend="onnxruntime",
        calibrate=sentences(80),
        progress=lines.append,
    )
    manifest = load_bundle(out).manifest
    assert (manifest.precision, manifest.opset, manifest.quantization.calibration_examples) == ("int8", 19, 40)
    accuracy = manifest.accuracy
    assert (accuracy.metric, accuracy.num_answers, accuracy.held_out) == ("accuracy", 40, True)
    assert accuracy.agreement > 0.9
    assert abs(accuracy.before - accuracy.after) <= 1 - accuracy.agreement + 1e-9
    assert manifest.default_profile.tokens == (1, 9, 24)
    assert any("accuracy" in line and "in torch" in line for line in lines)
    with Session.load(out) as session:
        assert session.classify("good film").label in manifest.labels
    assert verify_bundle(load_bundle(out), model_folder)[0].argmax_agreement >= 0.9


def test_int4_decoder_records_next_token_accuracy(tmp_path):
    save_model(tiny_model("llama", "causal_lm"), tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    texts = ["the quick brown fox", "jumps over", "the lazy dog and runs"] * 8
    out = compile_engine(tmp_path / "model", tmp_path / "out", precision="int4", backend="onnxruntime", calibrate=texts)
    manifest = load_bundle(out).manifest
    assert manifest.accuracy.metric == "next_token_accuracy"
    assert manifest.accuracy.loss_before == pytest.approx(manifest.accuracy.loss_after, abs=0.2)
    with Session.load(out) as session:
        assert session.generate("the", max_new_tokens=3).tokens


def test_compile_reports_bad_examples_before_export(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fedspine_edge.export.export_bundle.export_onnx", lambda *_, **__: pytest.fail("the model was exported first")
    )
    with pytest.raises(DataError, match="label 7 is out of range"):
        compile_engine(model_folder, tmp_path / "out", precision="int8", calibrate=[("good", 7)] * 4)
    with pytest.raises(DataError, match="nowhere"):
        compile_engine(model_folder, tmp_path / "out", precision="int8", calibrate=tmp_path / "nowhere.csv")
    assert list(tmp_path.iterdir()) == []


def test_user_data_is_split_and_batched_by_length(model_folder):
    data = read_user_data(
        sentences(200), model_folder, description("classification", load_inputs(model_folder), max_tokens=66)
    )
    assert sum(len(batch.labels) for batch in data.calibration) == 100
    assert sum(len(batch.labels) for batch in data.measured) == 100
    assert data.held_out
    for batch in data.measured:
        assert batch.tokens["input_ids"].size <= 1024
        assert (batch.tokens["input_ids"][batch.tokens["attention_mask"] == 0] == 0).all()
    assert "good" not in repr(data)


def test_user_data_truncates_prompts_as_in_training(tmp_path):
    """Prompt and answer together never exceed the model's limit."""
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="= $A =", special_tokens=[("=", ord("="))])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    inputs = [TensorInfo(name="input_ids", dtype="int64", shape=("batch", "sequence"))]
    limit = 8
    data = read_user_data(
        [("a long prompt", "not"), ("b", "and no")] * 8, tmp_path, description("causal_lm", inputs, max_tokens=limit)
    )
    rows = {bytes(r[r > 0].tolist()) for batch in data.measured for r in batch.tokens["input_ids"]}
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    examples = [Example("a long prompt", 0, "not"), Example("b", 0, "and no")]
    trained = {bytes(one.input_ids) for one in encode(examples, fast, limit, causal=True)}
    assert rows == trained == {b"ompt=not", b"b=and no"}


def load_inputs(folder):
    from fedspine_edge.export.onnx_export import load_folder
    from fedspine_edge.export.tracing import task_graph

    return task_graph(merged_module(load_folder(folder)), None).inputs


def description(task, inputs, *, max_tokens):
    return SimpleNamespace(task=task, inputs=tuple(inputs), max_tokens=max_tokens, pad_token_id=0, num_labels=3)


@pytest.mark.parametrize(
    ("lengths", "limit", "tokens"),
    [([4, 9, 30], 512, (1, 9, 40)), ([4, 60, 500], 512, (1, 60, 512)), ([1], 1, (1, 1, 1))],
)
def test_profile_for_lengths(lengths, limit, tokens):
    assert profile_for_lengths(lengths, limit).tokens == tokens


def test_fp8_build_for_old_gpu_explains_number_format(tmp_path):
    exported = finished(wide_model(), "fp8", tmp_path)[1]
    with pytest.raises(EngineBuildError, match="number format that this GPU does not support") as caught:
        build(rtx(), exported, "86")
    assert "int8" in caught.value.remedy


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="needs nvidia-modelopt[onnx]")
def test_quantization_uses_modelopt_if_installed(tmp_path):
    """With nvidia-modelopt installed, every test above uses its files."""
    assert finished(wide_model(), "int8", tmp_path)[2].tool.startswith("nvidia-modelopt")


def test_compile_int8_without_examples_raises(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="int8 needs examples") as caught:
        compile_engine(model_folder, tmp_path / "out", precision="int8")
    assert "`calibrate`" in caught.value.remedy


def test_bf16_bundle_runs_without_bf16_kernels(model_folder, tmp_path):
    out = compile_engine(model_folder, tmp_path / "out", precision="bf16", backend="onnxruntime")
    weights = {t.data_type for t in onnx.load(out / "model.onnx").graph.initializer if len(t.dims) == 2}
    assert onnx.TensorProto.BFLOAT16 in weights
    reference = compile_engine(model_folder, tmp_path / "reference", backend="onnxruntime")
    with Session.load(out) as session, Session.load(reference) as exact:
        text = "good film"
        assert session.classify(text).probability == pytest.approx(exact.classify(text).probability, abs=0.02)
        assert session.classify(text).probability != exact.classify(text).probability
