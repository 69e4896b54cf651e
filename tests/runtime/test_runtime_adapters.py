"""Adapters as inputs: adapters of any rank can be set at run time, and the outputs match torch."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file
from tiny_deploy import tiny_model, write_tokenizer

from fedspine_edge.bundle.bundle import load_bundle
from fedspine_edge.engine import tensorrt_api
from fedspine_edge.errors import CheckpointError, ConfigError, DeployError, MissingDependency
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import load_model, save_model
from fedspine_edge.runtime.session import Session


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "model"
    save_model(tiny_model("bert"), folder)
    write_tokenizer(folder)
    compile_engine(folder, backend="onnxruntime", lora="inputs")
    return folder


@pytest.fixture
def session(folder):
    with Session.load(folder.with_name("model.bundle"), threads=1) as session:
        yield session


def other_adapter(folder, out, rank, seed=7, scaling=0.5):
    """Save the same pruned model with another adapter and head."""
    model = load_model(folder)
    model.attach_lora(rank, scaling, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return save_model(model, out)


INPUTS = {"input_ids": np.arange(2, 16).reshape(2, 7), "attention_mask": np.array([[1] * 7, [1] * 4 + [0] * 3])}


def torch_logits(folder):
    with torch.no_grad():
        return load_model(folder).merge()(**{k: torch.from_numpy(v) for k, v in INPUTS.items()}).logits.numpy()


def test_bundle_starts_with_own_adapter(session, folder):
    np.testing.assert_allclose(session.run(**INPUTS), torch_logits(folder), atol=2e-6)


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_set_adapter_of_any_rank_agrees_with_torch(session, folder, tmp_path, rank):
    other = other_adapter(folder, tmp_path / "other", rank)
    before = session.run(**INPUTS)
    session.set_adapter(other)
    np.testing.assert_allclose(session.run(**INPUTS), torch_logits(other), atol=1e-5)
    assert np.abs(session.run(**INPUTS) - before).max() > 0.01
    session.set_adapter(None)
    np.testing.assert_array_equal(session.run(**INPUTS), before)


def test_concurrent_runs_use_one_adapter_each(session, folder, tmp_path):
    other = other_adapter(folder, tmp_path / "other", 5)
    first = session.run(**INPUTS)
    session.set_adapter(other)
    second = session.run(**INPUTS)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(session.run, **INPUTS) for _ in range(60)]
        for number in range(20):
            session.set_adapter(None if number % 2 else other)
        for result in results:
            errors = [float(np.abs(result.result() - expected).max()) for expected in (first, second)]
            assert min(errors) < 1e-6


def test_model_without_adapter_accepts_one_at_run_time(folder, tmp_path):
    save_model(load_model(folder), tmp_path / "bare", merged=True)
    bundle = compile_engine(tmp_path / "bare", backend="onnxruntime", lora="inputs")
    other = other_adapter(tmp_path / "bare", tmp_path / "other", 4)
    with Session.load(bundle) as session:
        np.testing.assert_allclose(session.run(**INPUTS), torch_logits(tmp_path / "bare"), atol=2e-6)
        session.set_adapter(other)
        np.testing.assert_allclose(session.run(**INPUTS), torch_logits(other), atol=1e-5)


def test_generate_uses_current_adapter(tmp_path):
    save_model(tiny_model("llama", "causal_lm"), tmp_path / "model")
    from tiny_deploy import write_byte_tokenizer

    write_byte_tokenizer(tmp_path / "model")
    bundle = compile_engine(tmp_path / "model", backend="onnxruntime", lora="inputs", precision="fp16")
    other = other_adapter(tmp_path / "model", tmp_path / "other", 8, scaling=2.0)
    with Session.load(bundle) as session:
        own = session.generate("hello", max_new_tokens=10).tokens
        session.set_adapter(other)
        assert session.generate("hello", max_new_tokens=10).tokens != own
        session.set_adapter(tmp_path / "model")
        assert session.generate("hello", max_new_tokens=10).tokens == own


def test_adapter_of_bundle_is_restored_after_bundle_is_gone(folder, tmp_path):
    bundle = Path(shutil.copytree(folder.with_name("model.bundle"), tmp_path / "copy"))
    with Session.load(bundle, threads=1) as session:
        before = session.run(**INPUTS)
        session.set_adapter(other_adapter(folder, tmp_path / "other", 3))
        shutil.rmtree(bundle)
        session.set_adapter(None)
        np.testing.assert_array_equal(session.run(**INPUTS), before)


def damaged(folder, out, change):
    shutil.copytree(folder, out)
    change(out)
    return out


def edit_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_tensors(function):
    def change(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        function(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def edit_layout(function):
    def change(folder):
        values = json.loads((folder / "layout.json").read_text())
        function(values)
        (folder / "layout.json").write_text(json.dumps(values))

    return change


def poison(tensors):
    tensors[sorted(tensors)[0]].flat[0] = np.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config"),
        (edit_config(peft_type="IA3"), "only plain LoRA"),
        (edit_config(use_dora=True), "only plain LoRA"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "cannot be read"),
        (edit_tensors(poison), "not finite"),
        (edit_tensors(lambda t: t.update(extra=np.zeros(3, np.float32))), "has no input"),
        (edit_tensors(lambda t: t.pop(next(n for n in t if "lora_B" in n))), "only one of"),
        (edit_config(init_lora_weights="lora_ga"), "changed the base weights"),
        (edit_config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is set"),
        (edit_config(future_feature=True), "future_feature is set"),
        (edit_config(r=8), "has rank 2; adapter_config.json states 8"),
        (edit_config(rank_pattern={"query": 4}), "has rank 2; adapter_config.json states 4"),
        (edit_config(alpha_pattern={"query(": 4}), "is damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "does not exist"),
        (edit_layout(lambda v: v["spec"].update(base_sha256="1" * 64)), "another base model"),
        (edit_layout(lambda v: v["channels"][0].reverse()), "other heads and channels"),
    ],
)
def test_set_adapter_invalid_keeps_current_adapter(session, folder, tmp_path, change, words):
    before = session.run(**INPUTS)
    with pytest.raises(CheckpointError, match=words):
        session.set_adapter(damaged(folder, tmp_path / "bad", change))
    np.testing.assert_array_equal(session.run(**INPUTS), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_set_adapter_accepts_tensors_of_any_float_type(session, folder, tmp_path, dtype, monkeypatch):
    converted = other_adapter(folder, tmp_path / "converted", 3)
    weights = converted / "adapter_model.safetensors"
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(tensors, weights)
    rounded = Path(shutil.copytree(converted, tmp_path / "rounded"))
    exact = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    safetensors.torch.save_file(exact, rounded / "adapter_model.safetensors")
    session.set_adapter(rounded)
    expected = session.run(**INPUTS)
    assert np.abs(expected - torch_logits(folder)).max() > 0.01
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # as on a board
    session.set_adapter(converted)
    np.testing.assert_allclose(session.run(**INPUTS), expected, atol=1e-6)


def test_set_adapter_rejects_rank_above_limit(session, folder, tmp_path):
    with pytest.raises(CheckpointError, match="rank 65"):
        session.set_adapter(other_adapter(folder, tmp_path / "big", 65))


def test_set_adapter_on_merged_bundle_raises(shared_bundle, folder):
    with Session.load(shared_bundle) as session, pytest.raises(DeployError, match=r"adapter merged") as caught:
        session.set_adapter(folder)
    assert "--lora inputs" in caught.value.remedy


def test_compile_invalid_lora_raises(folder, shared_bundle):
    with pytest.raises(ConfigError, match="`lora` is 'both'"):
        compile_engine(folder, lora="both")
    with pytest.raises(ConfigError, match="is a bundle"):
        compile_engine(shared_bundle, lora="inputs")


@pytest.mark.parametrize(
    ("family", "task", "precision"), [("bert", "classification", "fp16"), ("llama", "causal_lm", "fp32")]
)
def test_rtx_builds_adapters_and_caches_as_inputs(family, task, precision, tmp_path):
    try:
        tensorrt_api.find_backend("tensorrt_rtx")
    except MissingDependency as error:
        pytest.skip(error.message)
    save_model(tiny_model(family, task), tmp_path / "model")
    out = compile_engine(
        tmp_path / "model",
        lora="inputs",
        precision=precision,
        backend="tensorrt_rtx",
        compute_capabilities=("86",),
    )
    manifest = load_bundle(out).manifest
    assert manifest.engine.profiles[0].rank == (0, 8, 64)
    assert [profile.past for profile in manifest.engine.profiles] == [(0, 0, 0), (1, 65, 65)][
        : 1 + (task != "classification")
    ]
