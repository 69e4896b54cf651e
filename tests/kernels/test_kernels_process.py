"""The extension in a process: the GIL, threads, fork, linked libraries and the build configuration."""

from __future__ import annotations

import importlib
import multiprocessing
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import adapted, needs_extension

from fedspine_edge.kernels import native, ops

ROOT = Path(__file__).resolve().parents[2]


def score(size: int = 96) -> torch.Tensor:
    case = adapted(size, 2 * size, 8)
    group = torch.arange(size, dtype=torch.int32)
    return ops.importance_accumulate(*case.tensors, 2.0, group_of_row=group, num_groups=size)


@needs_extension
def test_kernel_releases_the_gil() -> None:
    case = adapted(2048, 2048, 256)
    group = torch.zeros(2048, dtype=torch.int32)
    done = threading.Event()

    def work() -> None:
        native.importance_accumulate(*case.tensors, 2.0, group, True, 1, "abs")
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    ticks = 0
    while not done.is_set():
        ticks += 1
        time.sleep(0.002)
    worker.join()
    assert ticks >= 3  # the call takes about 50 ms; if it held the GIL, this loop would run once or twice


def test_importance_in_threads_gives_the_same_bits() -> None:
    expected = score()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, expected) for result in pool.map(lambda _: score(), range(16)))


def trained(tokens: int = 96) -> list[Any]:
    """Return results and adapter gradients of lora_linear and lora_gate_up."""
    generator = torch.Generator().manual_seed(5)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((4, 64), (48, 4))]
    weight, x = torch.randn(48, 64, generator=generator), torch.randn(tokens, 64, generator=generator)
    y = ops.lora_linear(x, weight, None, *leaves, 2.0)
    gate, up = ops.lora_gate_up(x, *[ops.Projection(weight, None, *leaves)] * 2, 2.0)
    gradients = torch.autograd.grad((y * gate + up).sum(), leaves)
    return [t.tolist() for t in (y, gate, up, *gradients)]


def test_lora_ops_in_threads_give_the_same_bits() -> None:
    expected = trained()
    with ThreadPoolExecutor(4) as pool:
        assert all(result == expected for result in pool.map(lambda _: trained(), range(16)))


def _in_child(queue: Any) -> None:
    queue.put((score().tolist(), trained()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ops_in_child_process_give_the_same_bits(method: str) -> None:
    expected = (score().tolist(), trained())  # the parent uses threads before it forks
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    result = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert result == expected


@needs_extension
def test_extension_is_not_linked_against_torch() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    path = importlib.import_module("fedspine_edge._C").__file__
    assert path is not None
    output = subprocess.run([readelf, "-d", path], capture_output=True, text=True, check=True).stdout
    needed = [line for line in output.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "torch" in line or "c10" in line or "libgomp" in line]


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the configuration step of CMake without building."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    make = shutil.which("make") or shutil.which("ninja")
    if make is None:
        pytest.skip("neither make nor ninja is installed")
    generator = "Unix Makefiles" if make.endswith("make") else "Ninja"
    command = [cmake, "-G", generator, f"-DCMAKE_MAKE_PROGRAM={make}", "-S", str(ROOT), "-B", str(folder)]
    command += ["-DSKBUILD_PROJECT_VERSION=0.0.0", *options]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": str(folder)})


def test_build_without_compiler_names_the_package(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DFEDSPINE_CUDA=OFF")
    assert result.returncode != 0
    assert "sudo apt install g++" in result.stderr


def test_build_with_unknown_cuda_option_names_it(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DFEDSPINE_CUDA=YES")
    assert result.returncode != 0
    assert "FEDSPINE_CUDA is 'YES'; it must be AUTO, ON or OFF" in result.stderr


def test_compile_cuda_without_nvcc_reports_the_skip(tmp_path: Path) -> None:
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is in its standard folder")
    result = subprocess.run(
        [shutil.which("python3") or "python3", str(ROOT / "scripts/compile_cuda")],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    assert "skipped, because nvcc is not on PATH" in result.stdout
