"""A session on an engine, on the driver and the TensorRT of test_deploy_engine.py: text, adapters, the KV cache."""

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
    """Loads a bundle on the fake engine: (bundle, profiles) → session."""
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


def test_a_session_takes_the_engine_and_says_why(on_engine, shared_bundle):
    session = on_engine(shared_bundle, PROFILES)
    assert session.backend == "tensorrt"
    assert "built for this GPU" in session.why
    assert "cuda-python" in session.why
    with Session.load(shared_bundle, threads=1) as plain:
        texts = ["a good film", "bad", ("not good", "the board")]
        for a, b in zip(session.classify(texts), plain.classify(texts)):
            assert (a.label, a.probability) == (b.label, pytest.approx(b.probability, abs=1e-6))


def test_damaged_timings_do_not_keep_a_bundle_from_its_engine(on_engine, shared_bundle, caplog):
    session = on_engine(shared_bundle, PROFILES)
    timings = session.bundle.folder / "timing.cache"
    timings.write_bytes(b"timings")
    seal(timings.parent, session.manifest)
    timings.write_bytes(b"damaged")
    with Session.load(timings.parent) as again:
        assert again.backend == "tensorrt"
    assert f"{timings} was altered" in caplog.text


@pytest.mark.parametrize("unified", [0, 1])
def test_text_is_onnxruntimes_and_the_cache_stays_on_the_device(driver, on_engine, decoder_bundle, unified):
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
        assert up == 8 * (prompt + steps - 1 + masks)  # tokens and masks, nothing else
        assert down == 4 * VOCAB * steps  # the logits of last tokens, nothing else
    allocations = driver.count("cuMemAlloc_v2")
    assert session.generate("Once upon", max_new_tokens=40).tokens == expected.tokens
    assert driver.count("cuMemAlloc_v2") - allocations == 4  # the two halves of its cache, each grown once


def test_the_full_pass_of_a_decoder_gives_all_logits(on_engine, decoder_bundle):
    session = on_engine(decoder_bundle, STEPS)
    inputs = {"input_ids": np.arange(10, 19)[None], "attention_mask": np.ones((1, 9), np.int64)}
    with Session.load(decoder_bundle, threads=1) as plain:
        np.testing.assert_allclose(session.run(**inputs), plain.run(**inputs), atol=1e-5)


def test_two_texts_at_once_keep_their_caches_apart(on_engine, decoder_bundle):
    session = on_engine(decoder_bundle, STEPS)
    alone = [session.generate(prompt, max_new_tokens=20).text for prompt in ("one", "other")]
    streams = [session.stream(prompt, max_new_tokens=20) for prompt in ("one", "other")]
    together = ["", ""]
    for index in (0, 1) * 25:
        together[index] += next(streams[index], "")
    assert together == alone


def test_a_text_that_is_given_up_gives_its_memory_back(driver, on_engine, decoder_bundle):
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


def test_a_step_that_fails_gives_the_cache_back(driver, on_engine, decoder_bundle):
    session = on_engine(decoder_bundle, STEPS)
    before = driver.alive()["device"]
    for ahead in (1, 4):
        driver.fail("cuStreamSynchronize", driver.count("cuStreamSynchronize") + ahead)
        with pytest.raises(DeployError):
            session.generate("abc", max_new_tokens=8)
        driver.set("fail cuStreamSynchronize", 0)
        session.generate("abc", max_new_tokens=2)
        assert driver.alive()["device"] == before


def test_an_adapter_goes_to_the_device_once(driver, on_engine, model_folder, tmp_path):
    bundle = compile_engine(model_folder, tmp_path / "adapters", backend="onnxruntime", lora="inputs")
    session = on_engine(bundle, PROFILES)
    with Session.load(bundle, threads=1) as plain:
        for text in ("good", "bad", "good", "the film"):
            before = driver.count("bytes up")
            found, expected = session.classify(text), plain.classify(text)
            assert found.probability == pytest.approx(expected.probability, abs=1e-6)
        tokens = session.tokenize(["the film"])
        assert driver.count("bytes up") - before == sum(array.nbytes for array in tokens.values())
