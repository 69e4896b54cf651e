"""scripts/gpu_check without a GPU: what it asks for, the order of its steps on stand-ins for the tools, its summary."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_summary  # noqa: E402

TOOLS = ("bash", "dirname", "sed", "mkdir", "mktemp", "rm", "cp", "cat", "grep", "git", "env", "touch")

# Answers as a Python on a machine with an Orin would; the summary is the real one.
PYTHON = """
case "$*" in
  *get_device_capability*) echo 87 ;;
  *get_device_name*) echo Orin ;;
  *torch.__version__*) echo 2.9 ;;
  "-m pybind11 --cmakedir") echo /nowhere ;;
  *"import peft"* | *", tensorrt") exit 1 ;;
  "-m pytest"*)
    echo "$*"
    for a in "$@"; do case "$a" in --junitxml=*) cat "$TESTS" >"${a#--junitxml=}" ;; esac; done ;;
  "benchmarks/run"*) cat "$BENCHMARKS" >"${@: -1}" ;;
  *gpu_summary.py*) exec "$REAL_PYTHON" "$@" ;;
  "-c "*) exit "${NO_GPU:-0}" ;;
esac
"""
TESTS = '<testsuites><testsuite tests="9" failures="0" errors="0" skipped="2"/></testsuites>'


def row(op: str, **values: Any) -> dict[str, Any]:
    return {"op": op, "case": "4096x4096", "dtype": "torch.bfloat16", **values}


ROWS = [
    row("importance_accumulate", ratio_to_fedspine={"eager torch": 1.1}),  # calls, not the GPU's time: no aim's measure
    row(
        "importance_accumulate on the GPU",
        adapter_dtype="torch.bfloat16",
        how="graph",
        share_of_copy_bandwidth=0.5,
        ratio_to_fedspine={"eager torch": 9.0, "CUDA cores": 2.0},
    ),
    row(
        "importance_accumulate on the GPU",
        adapter_dtype="torch.float32",
        how="graph",
        share_of_copy_bandwidth=0.1,
        ratio_to_fedspine={"eager torch": 2.0},
    ),
    row(
        "lora_linear on the GPU",
        tokens=2048,
        how="calls",
        ratio_to_fedspine={"peft": 1.2, "base GEMMs alone": 0.9, "low-rank kernels": 0.97},
    ),
    row(
        "lora_linear on the GPU",
        tokens=8,
        how="graph",
        ratio_to_fedspine={"peft": 1.4, "base GEMMs alone": 0.5, "low-rank kernels": 0.8},
    ),
]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A bin folder with everyday tools and a Python; tests add what else the machine has."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (tmp_path / "bin" / name).symlink_to(found)
    add(tmp_path, "python3", PYTHON)
    (tmp_path / "tests.xml").write_text(TESTS)
    (tmp_path / "benchmarks.json").write_text(json.dumps({"results": ROWS}))
    return tmp_path


def add(machine: Path, name: str, text: str = "") -> None:
    path = machine / "bin" / name
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def gpu_check(machine: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": str(machine / "bin"),
        "TESTS": str(machine / "tests.xml"),
        "BENCHMARKS": str(machine / "benchmarks.json"),
        "REAL_PYTHON": sys.executable,
        "TMPDIR": str(machine),
        **environment,
    }
    return subprocess.run([ROOT / "scripts/gpu_check", *arguments], env=environment, capture_output=True, text=True)


def with_toolkit(machine: Path) -> None:
    for name in ("cmake", "g++"):
        add(machine, name)
    add(machine, "nvcc", 'echo "Cuda compilation tools, release 12.6, V12.6.68"')


def test_help_and_a_missing_folder(machine: Path) -> None:
    help_text = gpu_check(machine, "--help")
    assert help_text.returncode == 0
    assert "scripts/gpu_check DIR" in help_text.stdout
    assert gpu_check(machine).returncode == 2


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("nvcc", "nvcc is not on PATH nor in /usr/local/cuda/bin"),
        ("cmake", "sudo apt install cmake"),
        ("g++", "sudo apt install g++"),
    ],
)
def test_what_is_missing_is_named_and_nothing_written(machine: Path, missing: str, message: str) -> None:
    if missing == "nvcc" and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is in its standard folder")
    with_toolkit(machine)
    (machine / "bin" / missing).unlink()
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 2
    assert message in result.stderr
    assert not (machine / "out").exists()


def test_no_gpu_is_said(machine: Path) -> None:
    with_toolkit(machine)
    result = gpu_check(machine, str(machine / "out"), NO_GPU="1")
    assert result.returncode == 2
    assert "has no torch that sees a GPU; name another interpreter with PYTHON=" in result.stderr


def test_every_step_is_run_and_summed_up(machine: Path) -> None:
    with_toolkit(machine)
    add(machine, "cmake", 'if [ "$1" = --build ]; then touch "$2/_C.so"; else mkdir -p "$4"; fi')
    add(machine, "compute-sanitizer", 'if [ "$1" = --help ]; then echo "--kernel-regex"; else echo "$*"; fi')
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 0, result.stderr
    summary = json.loads((machine / "out/summary.json").read_text())
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    steps = ("build", "tests", "engines", "benchmarks", *(f"sanitizer-{tool}" for tool in tools))
    assert summary["exit_codes"] == dict.fromkeys(sorted(steps), 0)
    assert summary["skipped"] == {"peft": "peft is not installed: no comparison with it"}
    assert (summary["gpu"], summary["sm"], summary["nvcc"]) == ("Orin", "87", "12.6.68")
    assert summary["tests"] == {"tests": 9, "failures": 0, "errors": 0, "skipped": 2}
    sanitizer = (machine / "out/sanitizer-racecheck.log").read_text()
    assert "--tool racecheck --error-exitcode 9 --kernel-regex kns=fedspine" in sanitizer
    assert not list(machine.glob("tmp.*"))


def test_a_failed_step_fails_the_check_but_not_the_rest(machine: Path) -> None:
    with_toolkit(machine)
    add(machine, "cmake", 'if [ "$1" = --build ]; then touch "$2/_C.so"; else mkdir -p "$4"; fi')
    add(machine, "python3", f'case "$*" in "-m pytest"* | *tensorrt*) exit 1 ;; esac\n{PYTHON}')
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 1
    summary = json.loads((machine / "out/summary.json").read_text())
    assert summary["exit_codes"] == {"benchmarks": 0, "build": 0, "tests": 1}
    assert "tensorrt_rtx" in summary["skipped"]["engines"]
    assert summary["skipped"]["sanitizer"] == "compute-sanitizer is not installed"


def test_a_failed_build_ends_with_a_summary(machine: Path) -> None:
    with_toolkit(machine)
    add(machine, "cmake", "echo no compiler; exit 3")
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 1
    assert json.loads((machine / "out/summary.json").read_text())["exit_codes"] == {"build": 3}
    assert "no compiler" in (machine / "out/build.log").read_text()


def test_aims_take_the_worst_case_they_cover() -> None:
    found = {row["aim"]: row for row in gpu_summary.aims(ROWS)}
    measured = {aim: (row["measured"], row.get("reached")) for aim, row in found.items()}
    assert measured == {
        "importance, 4096x4096, against eager torch": (9.0, True),
        "importance, 4096x4096, share of a copy's bandwidth": (0.5, False),
        "lora_linear, 2048 tokens or more, against PEFT": (1.2, True),
        "lora_linear, 2048 tokens or more, times its base GEMMs": (1.111, True),
        "lora_linear, 128 tokens or fewer, CUDA graph, against PEFT": (1.4, False),
        "time of low-rank kernels / addmm, 2048 tokens or more": ([0.97, 0.97], None),
        "time of low-rank kernels / addmm, 128 tokens or fewer, CUDA graph": ([0.8, 0.8], None),
    }


def test_the_benchmarks_of_a_gpu_run_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU and tiny shapes: every contestant works, and the rows are what the summary reads."""
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "LARGER_THAN_CACHES", 1 << 16)
    monkeypatch.setattr(gpu, "IMPORTANCE", {"4096x4096": (24, 16)})
    monkeypatch.setattr(gpu, "LAYERS", {"4096x4096": (24, 16)})
    rows = gpu.run(seconds=0.1, quick=True, torch_device="cpu")
    aims = {row["aim"] for row in gpu_summary.aims(rows)}
    assert "importance, 4096x4096, share of a copy's bandwidth" in aims
    assert "lora_linear, 2048 tokens or more, times its base GEMMs" in aims
    assert "time of low-rank kernels / addmm, 128 tokens or fewer, CUDA graph" in aims
    assert all(milliseconds > 0 for row in rows for milliseconds in row["median_ms"].values())
