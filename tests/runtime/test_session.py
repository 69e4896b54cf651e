"""Sessions: choice of the backend, input validation, text, timing, and imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tiny_deploy import tiny_model, write_tokenizer

from fedspine_edge.bundle.archive import pack
from fedspine_edge.bundle.bundle import EngineInfo, OptimizationProfile, load_bundle
from fedspine_edge.bundle.publish import seal
from fedspine_edge.engine import cuda_driver, tensorrt_api
from fedspine_edge.engine.cuda_driver import DeviceInfo
from fedspine_edge.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeployError,
    EngineIncompatible,
    MissingDependency,
)
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import load_model, save_model
from fedspine_edge.runtime.session import Session, compare_latency

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def session(shared_bundle):
    with Session.load(shared_bundle, threads=1) as session:
        yield session


def ids(*shape):
    return np.random.default_rng(0).integers(1, 100, shape)


def test_run_agrees_with_torch(session, model_folder):
    inputs = {"input_ids": ids(2, 9), "attention_mask": np.array([[1] * 9, [1] * 6 + [0] * 3])}
    logits = session.run(**inputs)
    with torch.no_grad():
        expected = load_model(model_folder).merge()(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-6)


def test_token_type_ids_default_to_zero(session):
    inputs = {"input_ids": ids(1, 5), "attention_mask": np.ones((1, 5), np.int64)}
    zero = session.run(**inputs, token_type_ids=np.zeros((1, 5), np.int64))
    one = session.run(**inputs, token_type_ids=np.ones((1, 5), np.int64))
    np.testing.assert_array_equal(session.run(**inputs), zero)
    assert np.abs(zero - one).max() > 1e-4


def test_run_accepts_any_integer_type_and_memory_order(session):
    mask = np.ones((2, 6), np.int64)
    expected = session.run(input_ids=ids(2, 6), attention_mask=mask)
    actual = session.run(input_ids=np.asfortranarray(ids(2, 6).astype(np.uint16)), attention_mask=mask.astype(np.int8))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": None}, "input 'input_ids' is missing"),
        ({"attention_mask": None}, "input 'attention_mask' is missing"),
        ({"pixels": ids(2, 6)}, "no input 'pixels'"),
        ({"input_ids": [[1, 2]]}, "input_ids is a list"),
        ({"input_ids": np.ones((2, 6), np.float32)}, "input_ids has dtype float32"),
        ({"attention_mask": np.ones((2, 6), bool)}, "attention_mask has dtype bool"),
        ({"input_ids": ids(6)}, r"input_ids has shape \(6,\)"),
        ({"input_ids": ids(2, 6, 1)}, r"input_ids has shape \(2, 6, 1\)"),
        ({"input_ids": ids(0, 6)}, r"input_ids has shape \(0, 6\)"),
        ({"attention_mask": np.ones((2, 7), np.int64)}, r"shape \(2, 7\), but another input has shape \(2, 6\)"),
        ({"input_ids": np.full((2, 6), 120)}, r"input_ids contains 120; it must be within 0\.\.119"),
        ({"input_ids": np.full((2, 6), -1)}, "input_ids contains -1"),
        ({"attention_mask": np.full((2, 6), 2)}, "attention_mask contains 2"),
        ({"input_ids": ids(2, 67)}, "67 tokens; the model allows 66"),
    ],
)
def test_run_invalid_inputs_raise(session, change, words):
    inputs = {"input_ids": ids(2, 6), "attention_mask": np.ones((2, 6), np.int64)} | change
    with pytest.raises(DataError, match=words):
        session.run(**{name: value for name, value in inputs.items() if value is not None})


def test_classify_agrees_with_run(session):
    inputs = session.tokenize(["a very good film"])
    assert inputs["input_ids"].tolist() == [[2, 10, 8, 4, 6, 3]]
    logits = session.run(**inputs)[0]
    prediction = session.classify("a very good film")
    assert prediction.index == int(logits.argmax())
    assert prediction.label == ("bad", "mixed", "good")[prediction.index]
    assert prediction.probability == pytest.approx(float(np.exp(logits).max() / np.exp(logits).sum()), rel=1e-5)
    assert prediction.to_dict() == {
        "label": prediction.label,
        "probability": prediction.probability,
        "index": prediction.index,
    }


def test_classify_list_keeps_order_for_any_batch_size(session):
    texts = ["good", "a very very very bad film", "not good", "the the the board", "bad"] * 3
    alone = [session.classify(text) for text in texts]
    for batch_size in (1, 4, 100):
        together = session.classify(texts, batch_size=batch_size)
        assert [p.index for p in together] == [p.index for p in alone]
        np.testing.assert_allclose([p.probability for p in together], [p.probability for p in alone], atol=1e-5)


def test_tokenize_pairs_sets_token_types(session):
    inputs = session.tokenize([("good film", "bad"), ("a", "the")])
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert inputs["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert len(session.classify([("good film", "bad"), "a"])) == 2
    assert session.classify(("good film", "bad")).label in ("bad", "mixed", "good")


def test_tokenize_truncates_long_texts(session):
    assert session.tokenize(["good " * 500])["input_ids"].shape == (1, 66)


@pytest.mark.parametrize("texts", [[], [3], [("a", "b", "c")], [None]])
def test_classify_invalid_input_raises(session, texts):
    with pytest.raises(DataError):
        session.classify(texts)


@pytest.mark.parametrize("packed", [False, True])
def test_session_does_not_depend_on_files_after_load(bundle, tmp_path, monkeypatch, packed):
    """The bundle may be replaced, renamed or deleted, and a relative path may become invalid."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    with Session.load(bundle, threads=1) as session:
        expected = session.classify("a very good film")
    source = pack(bundle, tmp_path / "model.zip") if packed else bundle
    with Session.load(source.relative_to(tmp_path), threads=1) as session:
        assert list((tmp_path / "scratch").iterdir()) == []
        shutil.rmtree(bundle)
        (tmp_path / "model.zip").unlink(missing_ok=True)
        monkeypatch.chdir("/")
        assert session.classify("a very good film") == expected


@pytest.mark.parametrize(
    "texts", [["good", "half \ud83d"], [("good", "caf\udce9")], ["\udcff"]], ids=["emoji", "pair", "byte"]
)
def test_classify_invalid_unicode_names_text(session, texts):
    with pytest.raises(DataError, match=rf"Text {len(texts)} is not valid Unicode: character \d+") as caught:
        session.classify(texts)
    assert '"replace"' in caught.value.remedy


def test_session_invalid_argument_types_raise(session, shared_bundle):
    for texts in (None, 3):
        with pytest.raises(DataError, match=f"type {type(texts).__name__}"):
            session.classify(texts)
    for value in ("4", None, 1.5, True):
        with pytest.raises(ConfigError, match=f"`batch_size` is {value!r}"):
            session.classify("good", batch_size=value)
    with pytest.raises(ConfigError, match="`threads` is '2'"):
        Session.load(shared_bundle, threads="2")


def test_session_is_thread_safe(session):
    inputs = [{"input_ids": ids(1, n), "attention_mask": np.ones((1, n), np.int64)} for n in range(1, 40)]
    expected = [session.run(**each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda each: session.run(**each), inputs))
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_spin_wait_false_leaves_cpu_idle(shared_bundle):
    with Session.load(shared_bundle, "onnxruntime", threads=2, spin_wait=False) as session:
        inputs = session.random_inputs(8, 32)
        used = []
        for _ in range(5):
            session.run(**inputs)
            before = time.process_time()
            time.sleep(0.03)
            used.append(time.process_time() - before)
    assert np.median(used) < 0.005  # spinning threads would use all of the time that other programs leave


def test_closed_session_raises(shared_bundle):
    with Session.load(shared_bundle) as session:
        pass
    session.close()
    with pytest.raises(DeployError, match="closed"):
        session.run(input_ids=ids(1, 2), attention_mask=np.ones((1, 2), np.int64))


def test_bench_reports_requested_shape_and_repeats(session):
    latency = session.bench(batch=2, tokens=8, repeats=7, warmup=1)
    assert (latency.batch, latency.tokens, latency.repeats, latency.backend) == (2, 8, 7, "onnxruntime")
    assert 0 < latency.min_ms <= latency.p50_ms <= latency.p90_ms <= latency.p99_ms
    with pytest.raises(ConfigError):
        session.bench(repeats=0)
    with pytest.raises(DataError):
        session.bench(tokens=67)


def test_compare_latency_interleaves_runs(shared_bundle, monkeypatch):
    order = []
    with Session.load(shared_bundle, threads=1) as first, Session.load(shared_bundle, threads=1) as second:
        for name, session in (("first", first), ("second", second)):
            runner = session.model.runner
            run = runner.run
            monkeypatch.setattr(runner, "run", lambda x, n=name, r=run: order.append(n) or r(x))
        result = compare_latency(first, second, tokens=4, repeats=5)
    assert order == ["first", "second"] * 15
    assert result.first.repeats == result.second.repeats == 5
    assert result.ratio == result.second_ms / result.first_ms
    assert result.to_dict()["ratio"] == result.ratio


def test_load_auto_without_engine_uses_onnxruntime(session):
    assert session.backend == "onnxruntime"
    assert "has no engine" in session.why


def test_load_invalid_requests_raise(shared_bundle):
    for backend in ("tensorrt", "tensorrt_rtx"):
        with pytest.raises(EngineIncompatible, match="has no engine") as caught:
            Session.load(shared_bundle, backend=backend)
        assert "fedspine-edge compile" in caught.value.remedy
    with pytest.raises(ConfigError, match="cuda"):
        Session.load(shared_bundle, backend="cuda")
    with pytest.raises(ConfigError, match="`threads` is 0"):
        Session.load(shared_bundle, threads=0)
    with pytest.raises(CheckpointError, match="nowhere"):
        Session.load("nowhere")


def with_engine(bundle, **changes):
    values = {
        "backend": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": ("87",),
        "profiles": (OptimizationProfile(),),
    }
    (bundle / "engine.plan").write_bytes(b"plan")
    info = EngineInfo(**(values | changes))
    seal(bundle, msgspec.structs.replace(load_bundle(bundle).manifest, engine=info))
    return bundle


@pytest.mark.parametrize(
    ("changes", "device", "words"),
    [
        (
            {"version": "10.3.1"},
            DeviceInfo("Orin", "87"),
            r"built by tensorrt 10\.3\.1 and 10\.3\.0 is installed",
        ),
        (
            {"compute_capabilities": ("110",)},
            DeviceInfo("Orin", "87"),
            "built for SM 110 and this GPU is SM 87",
        ),
        (
            {"l4t": "36.4.3"},
            DeviceInfo("Orin", "87", "36.5.0"),
            r"built on L4T 36\.4\.3 and this is 36\.5\.0",
        ),
    ],
)
def test_plan_of_other_machine_is_not_deserialized(bundle, monkeypatch, changes, device, words):
    monkeypatch.setattr(tensorrt_api, "find_backend", lambda name: tensorrt_api.Backend(name, sys, "10.3.0"))
    monkeypatch.setattr(cuda_driver, "device_info", lambda: device)
    with_engine(bundle, **changes)
    with pytest.raises(EngineIncompatible, match=words) as caught:
        Session.load(bundle, backend="tensorrt")
    assert f"fedspine-edge compile {bundle} --out {bundle}" in caught.value.remedy
    with Session.load(bundle) as session:  # auto falls back and gives the reason
        assert session.backend == "onnxruntime"
        assert "this machine" in session.why or "built" in session.why


def test_engine_without_driver_names_driver(bundle, monkeypatch):
    if cuda_driver.device_info() is not None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(tensorrt_api, "find_backend", lambda name: tensorrt_api.Backend(name, sys, "10.3.0"))
    with_engine(bundle)
    with pytest.raises(EngineIncompatible, match=r"no GPU that CUDA can see \(the") as caught:
        Session.load(bundle, backend="tensorrt")
    assert "NVIDIA driver" in caught.value.remedy
    with Session.load(bundle) as session:
        assert session.backend == "onnxruntime"
        assert "no GPU that CUDA can see" in session.why


def test_load_rejects_engine_of_other_backend(bundle):
    with_engine(bundle)
    with pytest.raises(EngineIncompatible, match="engine for tensorrt, not for tensorrt_rtx"):
        Session.load(bundle, backend="tensorrt_rtx")


def test_load_on_missing_tensorrt_names_jetpack(bundle, monkeypatch):
    with_engine(bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="tensorrt") as caught:
        Session.load(bundle, backend="tensorrt")
    assert "JetPack" in caught.value.remedy


def test_classify_on_causal_model_raises(tmp_path):
    model = tiny_model("llama", "causal_lm")
    save_model(model, tmp_path / "model")
    out = compile_engine(tmp_path / "model", backend="onnxruntime")
    assert out == tmp_path / "model.bundle"
    with Session.load(out) as session:
        logits = session.run(input_ids=ids(2, 5), attention_mask=np.ones((2, 5), np.int64))
        assert logits.shape == (2, 5, 120)
        with pytest.raises(DeployError, match="causal_lm"):
            session.classify("good")


def test_llama_classifier_ignores_padding(tmp_path):
    save_model(tiny_model("llama"), tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with Session.load(compile_engine(tmp_path / "model", backend="onnxruntime")) as session:
        short, _ = session.classify(["good", "the board not a bad bad film"], batch_size=2)
        assert short.probability == pytest.approx(session.classify("good").probability, abs=1e-5)


def test_session_without_tokenizer_runs_token_ids(tmp_path):
    save_model(tiny_model("bert"), tmp_path / "model")
    with Session.load(compile_engine(tmp_path / "model", backend="onnxruntime")) as session:
        assert session.run(input_ids=ids(1, 2), attention_mask=np.ones((1, 2), np.int64)).shape == (1, 3)
        with pytest.raises(DeployError, match=r"no tokenizer\.json"):
            session.classify("good")


def test_runtime_and_rebuild_need_no_torch(shared_bundle, tmp_path):
    program = f"""
import sys
for name in ("torch", "transformers", "peft", "onnx"):
    sys.modules[name] = None  # importing it would raise
from fedspine_edge import Session, compile_engine
copy = compile_engine({str(shared_bundle)!r}, {str(tmp_path / "again.bundle")!r}, backend="onnxruntime")
with Session.load(copy) as session:
    print(session.classify(["a good film", ("bad", "board")])[0].label, session.backend)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "onnxruntime"
    assert done.stdout.split()[0] in ("bad", "mixed", "good")
