"""Error messages if the driver, pycuda, cuda-python or TensorRT is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedspine_edge.engine import cuda_driver, tensorrt_api
from fedspine_edge.errors import DeployError, MissingDependency

ROOT = Path(__file__).resolve().parents[2]


def in_new_process(program, **environment):
    """Return the error that `program` prints, in a process that has not loaded the fake driver."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program + EPILOGUE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
import sys
from fedspine_edge.engine import cuda_driver
try:
"""
EPILOGUE = """
except Exception as error:
    print(type(error).__name__, error)
"""

# Evaluated while the tests are collected, before the fake driver is loaded.
no_driver = pytest.mark.skipif(not cuda_driver.why_no_device(), reason="this machine has a driver")


@no_driver
def test_cuda_python_without_driver_names_driver():
    assert "libcuda.so.1 is not installed" in in_new_process("    print(cuda_driver.why_no_device())")
    if importlib.util.find_spec("cuda") is not None:
        words = in_new_process("    cuda_driver.open_cuda()")
        assert words.startswith("DeployError cuda-python is installed, but the NVIDIA driver is not")
        assert "JetPack" in words


@no_driver
def test_pycuda_without_driver_names_driver():
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("pycuda is not installed")
    words = in_new_process("    sys.modules['cuda'] = None; cuda_driver.open_cuda()")
    assert words.startswith("DeployError pycuda is installed, but the NVIDIA driver is not: libcuda.so.1")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_find_backend_missing_tensorrt_names_jetpack():
    with pytest.raises(MissingDependency, match="No module named 'tensorrt'") as caught:
        tensorrt_api.find_backend("tensorrt")
    assert "python3-libnvinfer" in caught.value.remedy
    assert "fedspine-edge[tensorrt]" in caught.value.remedy


def test_l4t_release_reads_nv_tegra_release(tmp_path):
    file = tmp_path / "nv_tegra_release"
    file.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert cuda_driver.l4t_release(str(file)) == "36.4.3"
    file.write_text("something else\n")
    assert cuda_driver.l4t_release(str(file)) == ""
    assert cuda_driver.l4t_release(str(tmp_path / "absent")) == ""


def test_driver_without_device_names_failed_call(driver):
    assert cuda_driver.device_info() == cuda_driver.DeviceInfo("Fake Orin", "87")
    assert cuda_driver.why_no_device() == ""
    driver.reset(absent=1)
    assert cuda_driver.device_info() is None
    assert cuda_driver.why_no_device() == "the driver is installed, but cuInit returns error 100"
    with pytest.raises(DeployError, match="CUDA_ERROR_NO_DEVICE"):
        cuda_driver.open_cuda()


def test_open_cuda_names_both_missing_packages(monkeypatch):
    for name in ("pycuda", "pycuda.driver", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"cuda-python: .*pycuda: ") as caught:
        cuda_driver.open_cuda()
    assert "pip install" in caught.value.remedy
