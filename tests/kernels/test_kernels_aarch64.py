"""The CPU kernels on aarch64: compiled with the flags of CMakeLists.txt and, on other machines, run by QEMU."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_kernels_sanitizers import SANITIZERS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "g++-aarch64-linux-gnu qemu-user-static"


def tool(*names: str) -> str:
    """Return the first of `names` that is installed, searching beside this Python first. Skips the test if none is."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for name in names:
        found = shutil.which(name, path=path)
        if found is not None:
            return found
    pytest.skip(f"{names[0]} is not installed; on Debian and Ubuntu: sudo apt install {PACKAGES}")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return the command line with which CMakeLists.txt compiles each source on aarch64."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("configured")
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": tool("aarch64-linux-gnu-g++"),
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "FEDSPINE_CUDA": "OFF",
        "SKBUILD_PROJECT_VERSION": "0.0.0",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    configured = subprocess.run(
        [tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, *defines], capture_output=True, text=True
    )
    assert configured.returncode == 0, configured.stderr
    units = json.loads((folder / "compile_commands.json").read_text())
    return {Path(unit["file"]).name: shlex.split(unit["command"]) for unit in units}


def build(commands: dict[str, list[str]], folder: Path, *flags: str) -> Path:
    """Build one program of the kernels and sanitized.cpp, which compares them with plain loops."""
    compiler = commands["dispatch.cpp"][0]
    builds = {name: list(command) for name, command in commands.items() if name != "bindings.cpp"}
    main = Path(__file__).parent / "sanitized.cpp"
    builds[main.name] = [compiler, "-std=c++17", "-O1", f"-I{ROOT}/csrc", "-o", "", "-c", str(main)]

    def compile_unit(name: str) -> None:
        command = builds[name]
        command[command.index("-o") + 1] = str(folder / f"{name}.o")
        subprocess.run([*command, *flags], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_unit, builds))
    target = folder / "kernels"
    subprocess.run([compiler, *flags, *folder.glob("*.o"), "-pthread", "-o", target], check=True)
    return target


def run(program: Path) -> subprocess.CompletedProcess[str]:
    emulator = []
    if platform.machine() != "aarch64":
        # Cortex-A76 is an Armv8.2 core without SVE like the A78AE of Orin. QEMU's default core has every extension.
        emulator = [tool("qemu-aarch64-static", "qemu-aarch64"), "-L", "/usr/aarch64-linux-gnu", "-cpu", "cortex-a76"]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # LeakSanitizer needs ptrace
    return subprocess.run([*emulator, program], capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def program(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the program with the optimisation of CMakeLists.txt: link-time optimisation keeps each object's options."""
    return build(commands, tmp_path_factory.mktemp("aarch64"), "-flto=auto", "-static")


def test_build_for_aarch64_has_no_x86_sources_or_flags(commands: dict[str, list[str]]) -> None:
    assert "isa_baseline.cpp" in commands
    assert not [name for name in commands if "avx" in name]
    assert not [word for command in commands.values() for word in command if word.startswith("-m")]


def test_kernels_on_aarch64_agree_with_plain_loops(program: Path) -> None:
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.strip() == "neon: 0 failures"


def test_kernels_on_aarch64_stay_within_their_buffers(commands: dict[str, list[str]], tmp_path: Path) -> None:
    program = build(commands, tmp_path, *SANITIZERS, "-static-libasan", "-static-libubsan", "-O1", "-fno-lto")
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.strip() == "neon: 0 failures"


def innermost_loops(assembly: str) -> Iterator[list[str]]:
    """Yield the instructions of every innermost loop in the output of objdump."""
    lines = re.findall(r"^ +([0-9a-f]+):\t(.+)", assembly, re.MULTILINE)
    places = {int(address, 16): place for place, (address, _) in enumerate(lines)}
    latest_start = -1
    for place, (_, instruction) in enumerate(lines):
        jump = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\t(?:.*, )?([0-9a-f]+) <", instruction)
        start = places.get(int(jump[1], 16), place + 1) if jump else place + 1
        if start <= place:
            if latest_start < start:  # no other loop began inside this one
                yield [instruction for _, instruction in lines[start : place + 1]]
            latest_start = max(latest_start, start)


def test_inner_loops_keep_accumulators_in_registers(program: Path) -> None:
    """A tile that does not fit into registers is still correct but takes twice the time (docs/results/kernels.md)."""
    listing = [tool("aarch64-linux-gnu-objdump"), "-d", "--no-show-raw-insn", program]
    assembly = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    loops = [loop for loop in innermost_loops(assembly) if sum("fmla" in line for line in loop) >= 16]
    assert len(loops) == 7  # the projection, and importance by rows and by columns in three dtypes
    for loop in loops:
        assert not [line for line in loop if "[sp" in line], "\n".join(loop)
