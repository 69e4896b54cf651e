"""The kernels under sanitizers: those of the CPU for every instruction set of this machine, those of CUDA emulated.

ThreadSanitizer knows the fibers of the emulation as threads that only barriers order: it finds a missing barrier
wherever two threads of a launch touch the same byte of shared or global memory, whatever the order they ran in.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulated_cuda import HERE, KERNELS, compile_units

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMMON = ["dispatch", "gather", "importance_accumulate", "lora_linear", "tiles_baseline"]
# As in CMakeLists.txt.
X86 = {"tiles_avx2": ["-mavx2", "-mfma"], "tiles_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels and sanitized.cpp as one program, without Python in between."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    linked = subprocess.run([compiler, *SANITIZERS, probe, "-o", folder / "probe"], capture_output=True, text=True)
    ran = linked.returncode == 0 and subprocess.run([folder / "probe"], capture_output=True).returncode == 0
    if not ran:
        pytest.skip(f"{compiler} has no sanitizer runtime here: {linked.stderr.strip()[-200:]}")
    x86 = platform.machine() in ("x86_64", "AMD64")
    units: dict[Path, list[str]] = {ROOT / f"csrc/cpu/{name}.cpp": [] for name in COMMON}
    units |= {ROOT / f"csrc/cpu/{name}.cpp": flags for name, flags in X86.items() if x86}
    units[Path(__file__).parent / "sanitized.cpp"] = []

    def compile_unit(item: tuple[Path, list[str]]) -> Path:
        source, flags = item
        out = folder / f"{source.stem}.o"
        options = ["-std=c++17", "-O1", "-g", "-ffp-contract=fast", "-Wno-psabi", *SANITIZERS, f"-I{ROOT}/csrc"]
        subprocess.run([compiler, *options, *flags, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units.items()))
    target = folder / "sanitized"
    subprocess.run([compiler, *SANITIZERS, *objects, "-pthread", "-o", target], check=True)
    return target


@pytest.mark.parametrize("isa", ["baseline", "avx2", ""])
def test_no_kernel_leaves_its_buffers(program: Path, isa: str) -> None:
    if isa == "avx2" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 machine")
    environment = {**os.environ, "FEDSPINE_ISA": isa, "ASAN_OPTIONS": "detect_leaks=0"}  # LSan needs ptrace
    result = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert ": 0 failures" in result.stdout


def test_the_sanitizers_would_have_said_so(program: Path, tmp_path: Path) -> None:
    """A read one element past a buffer of this build stops it: the build is what it claims to be."""
    source = tmp_path / "bad.cpp"
    source.write_text(
        "#include <cstdlib>\nint main(int n, char**) { volatile int* p = new int[4]; return p[n + 3]; }\n"
    )
    compiler = shutil.which("g++") or shutil.which("clang++") or ""
    subprocess.run([compiler, *SANITIZERS, source, "-o", tmp_path / "bad"], check=True)
    result = subprocess.run([tmp_path / "bad"], capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


def link_emulation(main: Path, folder: Path, sanitizers: list[str], emulator: list[str]) -> Path:
    """A program of the emulation, the kernels and `main`; `emulator` are flags of the scheduler alone."""
    units: list[tuple[Path, list[str]]] = [(path, []) for path in (*KERNELS, HERE / "ptx.cpp", main)]
    units.append((HERE / "emulator.cpp", emulator))
    objects = compile_units(units, folder, ["-O1", *sanitizers])
    subprocess.run(["g++", *sanitizers, *objects, "-o", folder / "program"], check=True)
    return folder / "program"


BUILDS = {
    "address": (SANITIZERS, []),
    "thread": (["-fsanitize=thread"], ["-fno-sanitize=thread", "-DEMULATE_WITH_TSAN"]),
}


@pytest.fixture(scope="module", params=BUILDS)
def emulation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The sanitizer, the program that runs every kernel, and the one with deliberate faults."""
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
def test_no_cuda_kernel_leaves_its_buffers_or_races(emulation: tuple[str, Path, Path]) -> None:
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
def test_the_sanitizers_find_faults_of_a_kernel(
    emulation: tuple[str, Path, Path], sanitizer: str, fault: str, message: str
) -> None:
    if emulation[0] != sanitizer:
        pytest.skip("a matter of the other sanitizer")
    result = run_emulation(emulation[2], fault, "0", "0")
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr[-2000:]
    assert run_emulation(emulation[2], "exchange", "0", "0").returncode == 0
