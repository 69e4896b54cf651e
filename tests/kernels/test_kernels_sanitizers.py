"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, for every instruction set of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMMON = ["dispatch", "elementwise", "gather", "importance_accumulate", "lora_linear", "isa_baseline"]
# The flags of CMakeLists.txt.
X86 = {"isa_avx2": ["-mavx2", "-mfma"], "isa_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build one program of the kernels and sanitized.cpp, without Python."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    linked = subprocess.run([compiler, *SANITIZERS, probe, "-o", folder / "probe"], capture_output=True, text=True)
    ran = linked.returncode == 0 and subprocess.run([folder / "probe"], capture_output=True).returncode == 0
    if not ran:
        pytest.skip(f"{compiler} has no sanitizer runtime: {linked.stderr.strip()[-200:]}")
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
def test_cpu_kernels_stay_within_their_buffers(program: Path, isa: str) -> None:
    if isa == "avx2" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 machine")
    environment = {**os.environ, "FEDSPINE_ISA": isa, "ASAN_OPTIONS": "detect_leaks=0"}  # LeakSanitizer needs ptrace
    result = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert ": 0 failures" in result.stdout


def test_sanitizer_build_reports_a_read_beyond_a_buffer(program: Path, tmp_path: Path) -> None:
    """A read one element beyond a buffer aborts a program that is built with the same options."""
    source = tmp_path / "bad.cpp"
    source.write_text(
        "#include <cstdlib>\nint main(int n, char**) { volatile int* p = new int[4]; return p[n + 3]; }\n"
    )
    compiler = shutil.which("g++") or shutil.which("clang++") or ""
    subprocess.run([compiler, *SANITIZERS, source, "-o", tmp_path / "bad"], check=True)
    result = subprocess.run([tmp_path / "bad"], capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
