"""Fixtures of the deployment tests: model folders, bundles and the fake CUDA driver."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_tensorrt import FakeDriver
from tiny_deploy import tiny_model, write_byte_tokenizer, write_tokenizer

from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """Save a tiny BERT with unequal widths and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    save_model(tiny_model("bert"), folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def shared_bundle(model_folder, tmp_path_factory) -> Path:
    """Return its bundle for ONNX Runtime, which tests must not modify."""
    out = tmp_path_factory.mktemp("bundles") / "bert.bundle"
    return compile_engine(model_folder, out, backend="onnxruntime", labels=("bad", "mixed", "good"))


@pytest.fixture(scope="session")
def decoder_bundle(tmp_path_factory) -> Path:
    """Return the bundle of a tiny LLaMA whose layers keep 3 and 2 KV heads; tests must not modify it."""
    folder = tmp_path_factory.mktemp("decoders") / "model"
    save_model(tiny_model("llama", "causal_lm", kv_heads=4), folder)
    write_byte_tokenizer(folder)
    return compile_engine(folder, backend="onnxruntime")


@pytest.fixture
def bundle(shared_bundle, tmp_path) -> Path:
    """Return a copy of the bundle that the test may modify."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "copy.bundle"))


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory):
    """Compile fake_libcuda.cpp and load it as libcuda.so.1. It reports no device until the `driver` fixture is used."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a real driver; the tests marked gpu use it")
    except OSError:
        pass
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_libcuda.cpp")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, "-o", library, source], check=True, timeout=120)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture
def driver(driver_library):
    """Provide a fake GPU for the duration of a test."""
    driver = FakeDriver(driver_library)
    driver.reset()
    yield driver
    driver.reset(absent=1)
