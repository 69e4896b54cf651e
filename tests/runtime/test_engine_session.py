"""Sessions on an engine, with a fake driver and a fake TensorRT: text, adapters and the KV cache."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from fake_tensorrt import FakeTensorRT
from tiny_deploy import VOCAB

from fedspine_edge.bundle.bundle import EngineInfo, OptimizationProfile, load_bundle
from fedspine_edge.bundle.publish import seal
from fedspine_edge.engine import tensorrt_api
from fedspine_edge.errors import DeployError
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.runtime.session import Session

PROFILES = (
    OptimizationProfile(batch=(1, 1, 2), tokens=(1, 4, 8)),
    OptimizationProfile(batch=(2, 3, 4), tokens=(4, 16, 32)),
)
STEPS = (
    OptimizationProfile(batch=(1, 1, 1), tokens=(1, 8, 32)),
    OptimizationProfile(batch=(1, 1, 1), tokens=(1, 1, 1), past=(0, 16, 65)),
)


@pytest.fixture
def on_engine(driver, tmp_path, monkeypatch):
    """Return a function (bundle, profiles) → session that loads a bundle on the fake engine."""
    sessions = []

    def load(bundle, profiles, **kind):
        module = FakeTensorRT(driver, profiles, **kind)
        monkeypatch.setattr(tensorrt_api, "find_backend", lambda name: module.backend)
        folder = tmp_path / f"engine-{len(sessions)}"
        folder.mkdir()
        for file in bundle.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "engine.plan").write_bytes(str(bundle / "model.onnx").encode())
        info = EngineInfo(
            backend=module.backend.name, version="10.3.0", compute_capabilities=("87",), profiles=tuple(profiles)
        )
        seal(folder, msgspec.structs.replace(load_bundle(folder).manifest, engine=info))
        sessions.append(Session.load(folder))
        return sessions[-1]

    yield load
    for session in sessions:
        session.close()
    assert driver.alive() == {}


def test_session_uses_engine_and_gives_reason(on_engine, shared_bundle):
    session = on_engine(shared_bundle, PROFILES)
    assert session.backend == "tensorrt"
    assert "built for this GPU" in session.why
    assert "cuda-python" in session.why
    with Session.load(shared_bundle, threads=1) as plain:
        texts = ["a good film", "bad", ("not good", "the board")]
        for a, b in zip(session.classify(texts), plain.classify(texts)):
            assert (a.label, a.probability) == (b.label, pytest.approx(b.probability, abs=1e-6))


def test_damaged_timing_cache_keeps_engine_usable(on_engine, shared_bundle, caplog):
    session = on_engine(shared_bundle, PROFILES)
    timing_cache = session.bundle.folder / "timing.cache"
    timing_cache.write_bytes(b"timings")
    seal(timing_cache.parent, session.manifest)
    timing_cache.write_bytes(b"damaged")
    with Session.load(timing_cache.parent) as again:
        assert again.backend == "tensorrt"
    assert f"{timing_cache} was altered" in caplog.text


@pytest.mark.parametrize("unified", [0, 1])
def test_engine_generation_keeps_cache_on_device(driver, on_engine, decoder_bundle, unified):
    driver.set("unified", unified)
    session = on_engine(decoder_bundle, STEPS)
    with Session.load(decoder_bundle, threads=1) as plain:
        expected = plain.generate("Once upon", max_new_tokens=40)
    up, down = driver.count("bytes up"), driver.count("bytes down")
    assert session.generate("Once upon", max_new_tokens=40).tokens == expected.tokens
    up, down = driver.count("bytes up") - up, driver.count("bytes down") - down
    steps, prompt = len(expected.tokens), expected.prompt_tokens
    if unified:
        assert up == down == 0
    else:
        masks = sum(range(prompt, prompt + steps))
        assert up == 8 * (prompt + steps - 1 + masks)  # only tokens and masks
        assert down == 4 * VOCAB * steps  # only the logits of the last tokens
    allocations = driver.count("cuMemAlloc_v2")
    assert session.generate("Once upon", max_new_tokens=40).tokens == expected.tokens
    assert driver.count("cuMemAlloc_v2") - allocations == 4  # the two buffers of its cache, each grown once


def test_engine_full_pass_of_decoder_returns_all_logits(on_engine, decoder_bundle):
    session = on_engine(decoder_bundle, STEPS)
    inputs = {"input_ids": np.arange(10, 19)[None], "attention_mask": np.ones((1, 9), np.int64)}
    with Session.load(decoder_bundle, threads=1) as plain:
        np.testing.assert_allclose(session.run(**inputs), plain.run(**inputs), atol=1e-5)


def test_concurrent_texts_have_separate_caches(on_engine, decoder_bundle):
    session = on_engine(decoder_bundle, STEPS)
    alone = [session.generate(prompt, max_new_tokens=20).text for prompt in ("one", "other")]
    streams = [session.stream(prompt, max_new_tokens=20) for prompt in ("one", "other")]
    together = ["", ""]
    for index in (0, 1) * 25:
        together[index] += next(streams[index], "")
    assert together == alone


def test_closed_stream_frees_kv_cache(driver, on_engine, decoder_bundle):
    session = on_engine(decoder_bundle, STEPS)
    before = driver.alive()
    for _ in range(3):
        stream = session.stream("abc", max_new_tokens=30)
        next(stream)
        assert driver.alive()["device"] == before["device"] + 2
        stream.close()
        assert driver.alive() == before
    unfinished = session.stream("abc", max_new_tokens=30)
    next(unfinished)
    session.close()
    assert driver.alive() == {}
    with pytest.raises(DeployError, match="closed"):
        list(unfinished)


def test_failed_step_frees_kv_cache(driver, on_engine, decoder_bundle):
    session = on_engine(decoder_bundle, STEPS)
    before = driver.alive()["device"]
    for ahead in (1, 4):
        driver.fail("cuStreamSynchronize", driver.count("cuStreamSynchronize") + ahead)
        with pytest.raises(DeployError):
            session.generate("abc", max_new_tokens=8)
        driver.set("fail cuStreamSynchronize", 0)
        session.generate("abc", max_new_tokens=2)
        assert driver.alive()["device"] == before


def test_adapter_is_uploaded_once(driver, on_engine, model_folder, tmp_path):
    bundle = compile_engine(model_folder, tmp_path / "adapters", backend="onnxruntime", lora="inputs")
    session = on_engine(bundle, PROFILES)
    with Session.load(bundle, threads=1) as plain:
        for text in ("good", "bad", "good", "the film"):
            before = driver.count("bytes up")
            found, expected = session.classify(text), plain.classify(text)
            assert found.probability == pytest.approx(expected.probability, abs=1e-6)
        tokens = session.tokenize(["the film"])
        assert driver.count("bytes up") - before == sum(array.nbytes for array in tokens.values())
