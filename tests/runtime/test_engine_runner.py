"""`EngineRunner` on a fake driver and a fake TensorRT: see fake_libcuda.cpp and fake_tensorrt.py.

cuda-python is the real package, and every result is compared with ONNX Runtime's. These tests cover bookkeeping:
memory, copies, contexts, CUDA graphs, threads and errors. test_engine_gpu.py covers the speed and arithmetic of a GPU.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_tensorrt import FakeTensorRT
from tiny_deploy import VOCAB

from fedspine_edge.bundle.bundle import EngineInfo, OptimizationProfile, load_bundle
from fedspine_edge.engine import cuda_driver
from fedspine_edge.errors import DataError, DeployError, EngineIncompatible
from fedspine_edge.runtime import engine_runner, execution
from fedspine_edge.runtime.engine_runner import EngineRunner, Plan
from fedspine_edge.runtime.session import Session

PROFILES = (
    OptimizationProfile(batch=(1, 1, 2), tokens=(1, 4, 8)),
    OptimizationProfile(batch=(2, 3, 4), tokens=(4, 16, 32)),
)
STEPS = (
    OptimizationProfile(batch=(1, 1, 1), tokens=(1, 8, 32)),
    OptimizationProfile(batch=(1, 1, 1), tokens=(1, 1, 1), past=(0, 16, 65)),
)


def runner_of(bundle, module, profiles=PROFILES):
    """Return the runner of `bundle` on the fake TensorRT `module`."""
    checked = load_bundle(bundle)
    info = EngineInfo(backend=module.backend.name, version="10.3.0", compute_capabilities=("87",), profiles=profiles)
    plan = Plan(str(checked.model_path).encode(), info, "fedspine-edge compile B --out B")
    return EngineRunner(plan, checked.manifest, backend=module.backend, cuda=cuda_driver.open_cuda())


@pytest.fixture
def module(driver):
    return FakeTensorRT(driver, PROFILES)


@pytest.fixture
def runner(shared_bundle, module):
    runner = runner_of(shared_bundle, module)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def reference(shared_bundle):
    with Session.load(shared_bundle, threads=1) as session:
        yield lambda inputs: session.run(**inputs)


def inputs_of(batch, tokens, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, tokens), np.int64)
    mask[-1, (tokens + 1) // 2 :] = 0
    ids = rng.integers(1, VOCAB, (batch, tokens))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros((batch, tokens), np.int64)}


def test_engine_runner_agrees_for_any_order_of_shapes(runner, reference):
    for batch, tokens in [(1, 8), (2, 4), (4, 32), (2, 4), (1, 1), (3, 20), (1, 8)]:
        inputs = inputs_of(batch, tokens)
        np.testing.assert_allclose(runner.run(inputs)["logits"], reference(inputs), atol=1e-6)
    assert (runner.max_batch, runner.max_tokens) == (4, 32)


def test_buffers_grow_only_for_larger_shapes(driver, runner):
    calls = ("cuMemAlloc_v2", "cuMemHostAlloc")
    before = [driver.count(call) for call in calls]
    for seed in range(5):
        runner.run(inputs_of(3, 16, seed))
        runner.run(inputs_of(1, 4, seed))
    assert [driver.count(call) for call in calls] == before
    runner.run(inputs_of(4, 32))
    grown = [driver.count(call) for call in calls]
    assert grown != before
    runner.run(inputs_of(4, 30))
    assert [driver.count(call) for call in calls] == grown
    assert driver.count("pageable copies") == 0


def test_results_are_copies(runner):
    first = runner.run(inputs_of(1, 4))["logits"]
    kept = first.copy()
    assert (runner.run(inputs_of(1, 4, seed=1))["logits"] != kept).any()
    np.testing.assert_array_equal(first, kept)


def test_run_accepts_non_contiguous_inputs(runner, reference):
    inputs = inputs_of(2, 8)
    strided = {name: np.asfortranarray(array) for name, array in inputs.items()}
    np.testing.assert_allclose(runner.run(strided)["logits"], reference(inputs), atol=1e-6)


def test_unified_memory_is_not_copied(driver, shared_bundle, module, reference):
    driver.set("unified", 1)
    runner = runner_of(shared_bundle, module)
    for batch, tokens in [(1, 4), (1, 4), (1, 4), (4, 32), (2, 8)]:
        inputs = inputs_of(batch, tokens, seed=tokens)
        np.testing.assert_allclose(runner.run(inputs)["logits"], reference(inputs), atol=1e-6)
    assert driver.count("bytes up") == driver.count("bytes down") == 0
    runner.close()
    assert driver.alive() == {}


def test_third_run_of_shape_launches_cuda_graph(driver, runner, module, reference):
    for launches in (0, 0, 1, 2, 3):
        inputs = inputs_of(1, 4, seed=launches)
        np.testing.assert_allclose(runner.run(inputs)["logits"], reference(inputs), atol=1e-6)
        assert driver.count("cuGraphLaunch") == launches
    copies = driver.count("cuMemcpyHtoDAsync_v2")
    runner.run(inputs_of(1, 4))
    assert driver.count("cuMemcpyHtoDAsync_v2") == copies  # the copies are in the graph
    assert driver.alive()["instance"] == 1
    assert "graph" not in driver.alive()  # the captured graph is destroyed when its instance exists


def test_cuda_graphs_are_evicted_by_count_and_growth(driver, runner, reference):
    for _ in range(3):
        for tokens in range(1, 9):
            for batch in (1, 2):
                inputs = inputs_of(batch, tokens)
                np.testing.assert_allclose(runner.run(inputs)["logits"], reference(inputs), atol=1e-6)
    assert driver.alive()["instance"] == execution.MAX_CUDA_GRAPHS
    runner.run(inputs_of(4, 32))
    assert "instance" not in driver.alive()
    np.testing.assert_allclose(runner.run(inputs_of(2, 8))["logits"], reference(inputs_of(2, 8)), atol=1e-6)


def test_uncapturable_runs_use_individual_calls(driver, runner, reference):
    driver.set("uncapturable", 1)
    for seed in range(5):
        inputs = inputs_of(1, 4, seed)
        np.testing.assert_allclose(runner.run(inputs)["logits"], reference(inputs), atol=1e-6)
    assert driver.count("cuStreamBeginCapture_v2") == 1
    assert driver.count("cuGraphLaunch") == 0


def test_rtx_engine_is_not_captured(driver, shared_bundle, reference):
    runner = runner_of(shared_bundle, FakeTensorRT(driver, PROFILES, rtx=True))
    for _ in range(4):
        np.testing.assert_allclose(runner.run(inputs_of(1, 4))["logits"], reference(inputs_of(1, 4)), atol=1e-6)
    assert driver.count("cuStreamBeginCapture_v2") == 0
    runner.close()
    assert driver.alive() == {}


@pytest.mark.parametrize("runs", [500, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_engine_runner_frees_everything_after_many_runs(driver, shared_bundle, module, runs):
    runner = runner_of(shared_bundle, module)
    for number in range(40):
        runner.run(inputs_of(1 + number % 2, 1 + number % 8))
    names = ("cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamCreate")
    alive, calls, contexts = driver.alive(), [driver.count(name) for name in names], module.contexts
    inputs = [inputs_of(1, 4, seed) for seed in range(10)]
    for number in range(runs):
        runner.run(inputs[number % 10])
    assert driver.alive() | {"instance": 0} == alive | {"instance": 0}
    assert [driver.count(name) for name in names] == calls
    assert module.contexts <= contexts + 1  # that of the one new graph
    runner.close()
    runner.close()
    assert driver.alive() == {}
    with pytest.raises(DeployError, match="closed"):
        runner.run(inputs_of(1, 4))


def test_threads_share_two_execution_slots(driver, runner, reference):
    work = [inputs_of(1 + n % 2, 1 + n % 8, seed=n) for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        for inputs, result in zip(work, pool.map(runner.run, work)):
            np.testing.assert_allclose(result["logits"], reference(inputs), atol=1e-6)
        depths = pool.map(lambda _: driver.alive().get("context", 0), range(16))
        assert set(depths) == {0}  # the context stack of every thread is unchanged
    assert 1 <= driver.alive()["stream"] <= engine_runner.MAX_SLOTS


def test_run_restores_context_of_calling_thread(driver, runner):
    with runner._cuda.active():
        runner.run(inputs_of(1, 4))
        assert driver.alive()["context"] == 1


@pytest.fixture
def pycuda(driver):
    """Return the real pycuda with lazy symbol lookup, because the fake driver lacks functions that are not called."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        return pytest.importorskip("pycuda.driver", reason="pycuda is not installed")
    finally:
        sys.setdlopenflags(flags)


@pytest.mark.parametrize("unified", [0, 1])
def test_pycuda_agrees_without_cuda_graphs(driver, pycuda, shared_bundle, module, reference, monkeypatch, unified):
    driver.reset(unified=unified)
    monkeypatch.setattr(cuda_driver, "open_cuda", lambda: cuda_driver.PyCuda(0))
    runner = runner_of(shared_bundle, module)
    for batch, tokens in [(1, 4), (1, 4), (1, 4), (4, 32), (2, 8)]:
        inputs = inputs_of(batch, tokens, seed=tokens)
        np.testing.assert_allclose(runner.run(inputs)["logits"], reference(inputs), atol=1e-6)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(runner.run, [inputs_of(1, 4)] * 20):
            np.testing.assert_allclose(result["logits"], reference(inputs_of(1, 4)), atol=1e-6)
    assert driver.count("cuStreamBeginCapture_v2") == 0
    assert (driver.count("bytes up") == 0) == bool(unified)
    driver.fail("cuStreamSynchronize", driver.count("cuStreamSynchronize") + 1, code=2)
    with pytest.raises(DeployError, match="out of memory"):
        runner.run(inputs_of(1, 4))
    closer = threading.Thread(target=runner.close)  # not the thread that created the context
    closer.start()
    closer.join(10)
    assert driver.alive() == {}
    driver.reset(absent=1)
    with pytest.raises(DeployError, match="CUDA driver call failed"):
        cuda_driver.PyCuda(0)


def test_waiting_for_execution_slot_times_out(runner, monkeypatch):
    monkeypatch.setattr(engine_runner, "SLOT_TIMEOUT_S", 0.05)
    with runner._slot(), runner._slot(), pytest.raises(DeployError, match="busy"), runner._slot():
        pass


def test_close_waits_for_runs_in_progress(driver, shared_bundle, module):
    runner = runner_of(shared_bundle, module)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with runner._slot():
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(10)
    closer = threading.Thread(target=runner.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    assert driver.alive()["stream"] == 1
    leave.set()
    closer.join(10)
    holder.join(10)
    assert driver.alive() == {}


def test_shape_outside_profiles_names_profiles(runner):
    with pytest.raises(
        DataError, match=r"batch 5 × 4 tokens\. Its profiles: batch 1–2, tokens 1–8; batch 2–4, tokens 4–32"
    ):
        runner.run(inputs_of(5, 4))


@pytest.mark.parametrize("refuse", ["context", "profile", "shape", "address", "run"])
def test_tensorrt_failure_raises_and_frees_everything(driver, shared_bundle, module, refuse):
    runner = runner_of(shared_bundle, module)
    module.refuse = refuse
    with pytest.raises(DeployError, match=r"tensorrt 10\.3\.0 could not"):
        runner.run(inputs_of(1, 4))
    assert "context" not in driver.alive()
    module.refuse = ""
    assert runner.run(inputs_of(1, 4))["logits"].shape == (1, 3)  # in a new slot
    runner.close()
    assert driver.alive() == {}


def scenario(bundle, module):
    """Load a runner, run it with and without CUDA graphs, grow its buffers, use a second slot, and close it."""
    runner = runner_of(bundle, module)
    try:
        for batch, tokens in [(1, 4)] * 4 + [(4, 32)] * 3:
            runner.run(inputs_of(batch, tokens))
        with runner._slot():
            runner.run(inputs_of(1, 2))
    finally:
        runner.close()


CALLS = ("cuDevicePrimaryCtxRetain", "cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamCreate", "cuMemcpyHtoDAsync_v2")
CALLS += ("cuMemcpyDtoHAsync_v2", "cuStreamSynchronize", "cuStreamBeginCapture_v2", "cuStreamEndCapture")
CALLS += ("cuGraphInstantiateWithFlags", "cuGraphLaunch", "cuCtxPushCurrent_v2")


@pytest.mark.parametrize("unified", [0, 1])
@pytest.mark.parametrize("call", CALLS)
def test_failed_driver_call_frees_everything(driver, shared_bundle, module, call, unified):
    driver.reset(unified=unified)
    scenario(shared_bundle, module)
    assert driver.alive() == {}
    total, launches = driver.count(call), driver.count("cuGraphLaunch")
    if call == "cuCtxPushCurrent_v2":
        total -= 1  # the last call is in `close`: without a context, the driver frees everything
    for number in sorted({1, 2, 3, total // 2, total - 1, total} & set(range(1, total + 1))):
        driver.reset(unified=unified)
        driver.fail(call, number, code=2)
        message = ""
        try:
            scenario(shared_bundle, module)
        except DeployError as error:
            message = error.message
        # Without a CUDA graph, runs use individual calls. Every other failure raises an error that names its cause.
        assert "OUT_OF_MEMORY" in message or (message == "" and driver.count("cuGraphLaunch") < launches)
        assert driver.alive() == {}, f"{call} number {number}"


def test_out_of_memory_is_explained(driver, shared_bundle, module):
    driver.set("memory", 3000)
    with pytest.raises(DeployError, match="out of memory") as caught:
        runner_of(shared_bundle, module)
    assert "smaller maximum batch" in caught.value.remedy
    assert driver.alive() == {}


def test_invalid_plan_error_contains_tensorrt_message(driver, shared_bundle, module):
    module.refuse = "plan"
    with pytest.raises(EngineIncompatible, match=r"could not deserialize the plan.*magic tag") as caught:
        runner_of(shared_bundle, module)
    assert "fedspine-edge compile B --out B" in caught.value.remedy
    assert driver.alive() == {}


def test_engine_runner_rejects_plan_of_other_model(driver, shared_bundle, decoder_bundle, module):
    manifest = load_bundle(shared_bundle).manifest
    info = EngineInfo(backend="tensorrt", version="10.3.0", compute_capabilities=("87",), profiles=PROFILES)
    plan = Plan(str(load_bundle(decoder_bundle).model_path).encode(), info, "")
    with pytest.raises(EngineIncompatible, match="past_key_values"):
        EngineRunner(plan, manifest, backend=module.backend, cuda=cuda_driver.open_cuda())
    assert driver.alive() == {}
