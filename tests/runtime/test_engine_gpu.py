"""Engines on a real GPU: agreement with ONNX Runtime, CUDA graphs, threads and memory.

These tests are skipped without a GPU, a driver package or TensorRT. scripts/gpu_check runs them.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_deploy import VOCAB, tiny_model, write_byte_tokenizer

from fedspine_edge.bundle.bundle import OptimizationProfile, load_bundle
from fedspine_edge.engine import cuda_driver, tensorrt_api
from fedspine_edge.errors import DeployError, EngineIncompatible, MissingDependency
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.runtime.session import Session

pytestmark = pytest.mark.gpu

PROFILES = (
    OptimizationProfile(batch=(1, 1, 2), tokens=(1, 4, 8)),
    OptimizationProfile(batch=(2, 3, 4), tokens=(4, 16, 32)),
)
STEPS = (
    OptimizationProfile(batch=(1, 1, 1), tokens=(1, 8, 32)),
    OptimizationProfile(batch=(1, 1, 1), tokens=(1, 1, 1), past=(0, 16, 65)),
)


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def backend(request):
    if cuda_driver.device_info() is None:
        pytest.skip(f"no GPU: {cuda_driver.why_no_device()}")
    try:
        tensorrt_api.find_backend(request.param)
        cuda_driver.open_cuda().close()
    except (MissingDependency, EngineIncompatible, DeployError) as error:
        pytest.skip(error.message)
    return request.param


@pytest.fixture
def bundle(backend, model_folder, tmp_path):
    bundle = compile_engine(model_folder, tmp_path / "out", backend=backend, profiles=PROFILES)
    assert load_bundle(bundle).manifest.engine.verification is not None
    return bundle


@pytest.fixture
def sessions(backend, bundle):
    with Session.load(bundle, backend=backend) as engine, Session.load(bundle, backend="onnxruntime") as reference:
        yield engine, reference


def inputs_of(batch, tokens, seed=0):
    ids = np.random.default_rng(seed).integers(1, VOCAB, (batch, tokens))
    return {"input_ids": ids, "attention_mask": np.ones((batch, tokens), np.int64)}


def free_bytes():
    """Return the free device memory reported by cuMemGetInfo."""
    driver = ctypes.CDLL("libcuda.so.1")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    opened = cuda_driver.open_cuda()
    with opened.active():
        assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    opened.close()
    return free.value


def test_engine_agrees_before_and_after_graph_capture(sessions):
    engine, reference = sessions
    for _ in range(4):
        for batch, tokens in [(1, 1), (1, 8), (2, 4), (4, 32), (3, 17)]:
            inputs = inputs_of(batch, tokens)
            np.testing.assert_allclose(engine.run(**inputs), reference.run(**inputs), atol=1e-3)


def test_threads_get_their_own_results(sessions):
    engine, reference = sessions
    work = [inputs_of(1 + n % 2, 1 + n % 8, seed=n) for n in range(100)]
    with ThreadPoolExecutor(4) as pool:
        for inputs, logits in zip(work, pool.map(lambda each: engine.run(**each), work)):
            np.testing.assert_allclose(logits, reference.run(**inputs), atol=1e-3)


def test_engine_memory_is_constant_over_runs(sessions):
    engine, _ = sessions
    for number in range(200):
        engine.run(**inputs_of(1 + number % 2, 1 + number % 8))
    before = free_bytes()
    for number in range(20_000):
        engine.run(**inputs_of(1, 1 + number % 8))
    assert before - free_bytes() < 4 * 2**20


def test_engine_generates_same_tokens_as_onnxruntime(backend, tmp_path):
    save_model(tiny_model("llama", "causal_lm", kv_heads=4), tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    bundle = compile_engine(tmp_path / "model", backend=backend, profiles=STEPS)
    with Session.load(bundle, backend=backend) as engine, Session.load(bundle, backend="onnxruntime") as reference:
        for prompt in ("Once upon", "a", "Once upon"):
            expected = reference.generate(prompt, max_new_tokens=40)
            assert engine.generate(prompt, max_new_tokens=40).tokens == expected.tokens
