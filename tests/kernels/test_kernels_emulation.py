"""The emulation of CUDA: the faults that it must report, and the kernels under sanitizers.

ThreadSanitizer sees the fibers of the emulation as threads that only barriers order. It reports a missing barrier
wherever two threads of a launch access the same byte of shared or global memory, in whatever order they ran.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from emulated_cuda import HERE, KERNELS, ORDERS, compile_units

WHOLE = " ".join(str(i) for i in range(64))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    sources: list[tuple[Path, list[str]]] = [(HERE / f"{name}.cpp", []) for name in ("emulator", "ptx")]
    objects = compile_units([*sources, (HERE.parent / "cuda_on_cpu_faults.cpp", [])], folder, ["-O0"])
    subprocess.run(["g++", *objects, "-o", folder / "faults"], check=True)
    return folder / "faults"


def run_fault(program: Path, fault: str, order: tuple[int, bool]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, fault, str(order[0]), str(int(order[1]))], capture_output=True, text=True)


def test_correct_kernels_in_every_order_give_the_same_result(faults: Path) -> None:
    for order in ORDERS:
        assert run_fault(faults, "copy", order).stdout.strip() == WHOLE
        assert run_fault(faults, "exchange", order).stdout.split() == WHOLE.split()[::-1]


@pytest.mark.parametrize("fault", ["race", "unwaited"])
def test_missing_barrier_or_wait_changes_some_result(faults: Path, fault: str) -> None:
    assert len({run_fault(faults, fault, order).stdout for order in ORDERS}) > 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_barrier", "thread 63 ended while thread 0 still waits"),
        ("divergent_warp", "thread 63 ended while thread 0 still waits"),
        ("misaligned", "cp.async from an address that is no multiple of 16"),
    ],
)
def test_invalid_kernel_aborts_the_program(faults: Path, fault: str, message: str) -> None:
    result = run_fault(faults, fault, (0, False))
    assert result.returncode != 0
    assert message in result.stderr


def link_emulation(main: Path, folder: Path, sanitizers: list[str], emulator: list[str]) -> Path:
    """Link the emulation, the kernels and `main`. `emulator` contains additional flags of the scheduler."""
    units: list[tuple[Path, list[str]]] = [(path, []) for path in (*KERNELS, HERE / "ptx.cpp", main)]
    units.append((HERE / "emulator.cpp", emulator))
    objects = compile_units(units, folder, ["-O1", *sanitizers])
    subprocess.run(["g++", *sanitizers, *objects, "-o", folder / "program"], check=True)
    return folder / "program"


BUILDS = {
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []),
    "thread": (["-fsanitize=thread"], ["-fno-sanitize=thread", "-DEMULATE_WITH_TSAN"]),
}


@pytest.fixture(scope="module", params=BUILDS)
def emulation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Return the sanitizer, the program that runs every kernel, and the program with deliberate faults."""
    flags = BUILDS[request.param]
    programs = []
    for name in ("sanitized_cuda", "cuda_on_cpu_faults"):
        folder = tmp_path_factory.mktemp(f"{request.param}-{name}")
        programs.append(link_emulation(Path(__file__).parent / f"{name}.cpp", folder, *flags))
    return request.param, programs[0], programs[1]


def run_emulation(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cuda_kernels_under_sanitizers_are_clean(emulation: tuple[str, Path, Path]) -> None:
    for order in (("0", "0"), ("1", "1"), ("7", "1")):
        result = run_emulation(emulation[1], *order)
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
        assert "emulated: 0 failures" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("sanitizer", "fault", "message"),
    [
        ("address", "outside_shared", "index 64 out of bounds|heap-buffer-overflow"),
        ("address", "outside_global", "heap-buffer-overflow"),
        ("thread", "race", "data race"),
    ],
)
def test_sanitizers_report_deliberate_faults(
    emulation: tuple[str, Path, Path], sanitizer: str, fault: str, message: str
) -> None:
    if emulation[0] != sanitizer:
        pytest.skip("the other sanitizer reports this fault")
    result = run_emulation(emulation[2], fault, "0", "0")
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr[-2000:]
    assert run_emulation(emulation[2], "exchange", "0", "0").returncode == 0
