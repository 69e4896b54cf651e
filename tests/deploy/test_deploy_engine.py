"""The engine runner's own logic, against a stand-in for TensorRT and CUDA that computes on host memory.

This proves the bookkeeping (shapes, profiles, buffers, contexts, errors). It proves nothing about a GPU: the test
at the end runs a real engine where there is one.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from fedspine_edge.deploy import cuda, trt
from fedspine_edge.deploy.bundle import EngineInfo, Profile, TensorInfo, load_bundle
from fedspine_edge.deploy.compile import compile_engine
from fedspine_edge.deploy.runner import EngineRunner
from fedspine_edge.deploy.session import Session
from fedspine_edge.errors import DataError, DeployError, EngineIncompatible, MissingDependency

INPUTS = tuple(
    TensorInfo(name=name, dtype="int64", shape=("batch", "sequence")) for name in ("input_ids", "attention_mask")
)
OUTPUTS = (TensorInfo(name="logits", dtype="float32", shape=("batch", 3)),)
PROFILES = (Profile(batch=(1, 1, 2), tokens=(1, 4, 8)), Profile(batch=(2, 3, 4), tokens=(4, 16, 32)))


class HostCuda:
    """`Cuda` on host memory; insists on an active context, as the driver does."""

    name = "host"

    def __init__(self):
        self.memory, self.depth, self.closed, self.local = {}, 0, False, threading.local()

    @contextmanager
    def active(self):
        self.local.depth = getattr(self.local, "depth", 0) + 1
        try:
            yield
        finally:
            self.local.depth -= 1

    def _require(self):
        assert self.local.depth == 1, "called outside an active context"

    def stream(self):
        self._require()
        return 7

    def synchronize(self, stream):
        self._require()
        assert stream == 7

    def alloc(self, size_bytes):
        self._require()
        address = 4096 * (len(self.memory) + 1)
        self.memory[address] = np.zeros(size_bytes, np.uint8)
        return address

    def free(self, address):
        del self.memory[address]

    def pinned(self, size_bytes):
        return np.zeros(size_bytes, np.uint8)

    def to_device(self, address, host, stream):
        self._require()
        self.memory[address][: host.nbytes] = host

    def to_host(self, host, address, stream):
        self._require()
        host[:] = self.memory[address][: host.nbytes]

    def close(self):
        self.memory.clear()
        self.closed = True


class Engine:
    """logits[b] = (sum of masked ids, number of tokens in the mask, active profile)."""

    def __init__(self, driver, names=("input_ids", "attention_mask", "logits"), refuse=""):
        self.driver, self.names, self.refuse = driver, names, refuse
        self.num_io_tensors = len(names)
        self.shapes, self.addresses, self.profile = {}, {}, 0

    def get_tensor_name(self, index):
        return self.names[index]

    def create_execution_context(self):
        return None if self.refuse == "context" else self

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.refuse != "address"

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return PROFILES[self.profile].covers(*shape) and self.refuse != "shape"

    def get_tensor_shape(self, name):
        return (self.shapes["input_ids"][0], 3)

    def execute_async_v3(self, stream):
        def read(name):
            raw = self.driver.memory[self.addresses[name]]
            return raw.view(np.int64)[: np.prod(self.shapes[name])].reshape(self.shapes[name])

        ids, mask = read("input_ids"), read("attention_mask")
        out = np.stack([(ids * mask).sum(1), mask.sum(1), np.full(len(ids), self.profile)], 1).astype(np.float32)
        self.driver.memory[self.addresses["logits"]][: out.nbytes] = out.reshape(-1).view(np.uint8)
        return self.refuse != "run"


class Logger:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


def backend_of(engine):
    def runtime(logger):
        logger.log(Logger.Severity.INFO, "hello")
        if engine is None:
            logger.log(Logger.Severity.ERROR, "magic tag does not match")
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)

    return trt.Backend("tensorrt", SimpleNamespace(ILogger=Logger, Runtime=runtime), "10.3.0")


def runner_of(driver, engine):
    info = EngineInfo(backend="tensorrt", version="10.3.0", compute_capabilities=("87",), profiles=PROFILES)
    return EngineRunner(
        b"plan",
        info,
        INPUTS,
        OUTPUTS,
        backend=backend_of(engine),
        cuda=driver,
        rebuild="fedspine-edge compile B --out B",
    )


def inputs_of(batch, tokens, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(0, 1000, (batch, tokens)),
        "attention_mask": rng.integers(0, 2, (batch, tokens)),
    }


def expected(inputs, profile):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return np.stack([(ids * mask).sum(1), mask.sum(1), np.full(len(ids), profile)], 1)


def test_shapes_in_any_order_give_the_right_rows_and_profile():
    driver = HostCuda()
    runner = runner_of(driver, Engine(driver))
    # Within both profiles the one already active is kept: switching costs.
    for (batch, tokens), profile in [((1, 8), 0), ((2, 4), 0), ((4, 32), 1), ((2, 4), 1), ((1, 1), 0)]:
        inputs = inputs_of(batch, tokens)
        np.testing.assert_array_equal(runner.run(inputs)["logits"], expected(inputs, profile))
    assert (runner.max_batch, runner.max_tokens) == (4, 32)


def test_buffers_are_made_once_for_the_largest_profile():
    driver = HostCuda()
    runner = runner_of(driver, Engine(driver))
    sizes = [buffer.nbytes for buffer in driver.memory.values()]
    assert sizes == [4 * 32 * 8, 4 * 32 * 8, 4 * 3 * 4]
    runner.run(inputs_of(4, 32))
    assert len(driver.memory) == 3


def test_results_are_not_overwritten_by_the_next_run():
    driver = HostCuda()
    runner = runner_of(driver, Engine(driver))
    first = runner.run(inputs_of(1, 4))["logits"]
    kept = first.copy()
    runner.run(inputs_of(1, 4, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_inputs_need_not_be_contiguous():
    driver = HostCuda()
    inputs = {name: array.T for name, array in inputs_of(8, 2).items()}
    result = runner_of(driver, Engine(driver)).run(inputs)["logits"]
    np.testing.assert_array_equal(result, expected(inputs, 0))


def test_threads_do_not_mix_their_results():
    driver = HostCuda()
    runner = runner_of(driver, Engine(driver))
    work = [inputs_of(1 + n % 2, 1 + n % 8, seed=n) for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        for inputs, result in zip(work, pool.map(runner.run, work)):
            np.testing.assert_array_equal(result["logits"][:, :2], expected(inputs, 0)[:, :2])


def test_shapes_outside_every_profile_are_named_with_what_there_is():
    driver = HostCuda()
    with pytest.raises(DataError, match=r"batch 5 × 4 tokens; it has: batch 1–2, tokens 1–8; batch 2–4, tokens 4–32"):
        runner_of(driver, Engine(driver)).run(inputs_of(5, 4))


@pytest.mark.parametrize("refuse", ["shape", "run"])
def test_every_refusal_while_running_is_an_error(refuse):
    driver = HostCuda()
    runner = runner_of(driver, Engine(driver, refuse=refuse))
    with pytest.raises(DeployError, match="TensorRT could not"):
        runner.run(inputs_of(1, 4))
    assert driver.local.depth == 0


@pytest.mark.parametrize("refuse", ["context", "address"])
def test_a_failed_start_frees_everything(refuse):
    driver = HostCuda()
    with pytest.raises(DeployError):
        runner_of(driver, Engine(driver, refuse=refuse))
    assert driver.closed
    assert driver.local.depth == 0


def test_a_plan_that_does_not_deserialise_carries_tensorrts_words():
    driver = HostCuda()
    with pytest.raises(EngineIncompatible, match=r"could not deserialise the plan.*magic tag") as caught:
        runner_of(driver, None)
    assert "fedspine-edge compile B --out B" in caught.value.remedy
    assert driver.closed


def test_a_plan_of_another_model_is_refused():
    driver = HostCuda()
    with pytest.raises(EngineIncompatible, match="pixels"):
        runner_of(driver, Engine(driver, names=("pixels", "logits")))


def test_closing_frees_once_and_ends_running():
    driver = HostCuda()
    runner = runner_of(driver, Engine(driver))
    runner.close()
    runner.close()
    assert driver.closed
    with pytest.raises(DeployError, match="closed"):
        runner.run(inputs_of(1, 4))


def test_l4t_release_is_read_from_the_boards_file(tmp_path):
    file = tmp_path / "nv_tegra_release"
    file.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert cuda.l4t_release(str(file)) == "36.4.3"
    file.write_text("something else\n")
    assert cuda.l4t_release(str(file)) == ""
    assert cuda.l4t_release(str(tmp_path / "absent")) == ""


def test_without_a_cuda_package_both_are_named(monkeypatch):
    import sys

    for name in ("pycuda", "pycuda.driver", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"pycuda: .*cuda-python: ") as caught:
        cuda.open_cuda()
    assert "pip install" in caught.value.remedy


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_real_engine_agrees_with_onnxruntime(name, model_folder, tmp_path):
    if cuda.device_info() is None:
        pytest.skip("no GPU that CUDA can see")
    try:
        trt.find_backend(name)
        cuda.open_cuda().close()
    except (MissingDependency, EngineIncompatible) as error:
        pytest.skip(error.message)
    out = compile_engine(model_folder, tmp_path / "out", backend=name)
    assert load_bundle(out).manifest.engine.verification is not None
    with Session.load(out, backend=name) as engine, Session.load(out, backend="onnxruntime") as reference:
        for a, b in zip(engine.classify(["a good film", "bad"]), reference.classify(["a good film", "bad"])):
            assert a.probability == pytest.approx(b.probability, abs=1e-3)
