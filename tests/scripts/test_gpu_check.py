"""scripts/gpu_check without a GPU: its requirements, its steps and time limits with substitutes for the tools."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_summary  # noqa: E402

TOOLS = ("bash", "mkdir", "cat", "cp", "touch", "git", "sleep")

# Behaves like a Python on a machine with an Orin. $RESULTS is a folder with a JSON file per program.
PYTHON = """
out=""
for a in "$@"; do
  case "$previous" in --out) out="$a" ;; esac
  case "$a" in --junitxml=*) cat "$RESULTS/tests.xml" >"${a#--junitxml=}" ;; esac
  previous="$a"
done
case "$*" in
  *get_device_capability*) echo 87 ;;
  *get_device_name*) echo Orin; echo 2.9 ;;
  "-m pybind11 --cmakedir") echo /nowhere ;;
  *"import peft"*) exit 1 ;;
  *"cuda.is_available"*) exit "${NO_GPU:-0}" ;;
  "-m benchmarks."*) cp "$RESULTS/$2.json" "$out" ;;
esac
"""
CMAKE = 'if [ "$1" = --build ]; then touch "$2/_C.so"; else mkdir -p "$4"; fi'
SANITIZER = 'if [ "$1" = --help ]; then echo "--kernel-regex"; else echo "$*"; fi'
TESTS = '<testsuites><testsuite tests="9" failures="0" errors="0" skipped="2"/></testsuites>'
ALL_STEPS = (
    *("build", "smoke", "speed", "memcheck", "racecheck", "training", "trainer-paths", "tests"),
    *("synccheck", "initcheck", "engines"),
)


def row(op: str, **values: Any) -> dict[str, Any]:
    return {"op": op, "case": "4096x4096", "dtype": "torch.bfloat16", **values}


ROWS = [
    row("importance_accumulate", ratio_to_fedspine={"eager torch": 1.1}),  # timed as calls: decides no target
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
CASES = [
    {"kernel": "gather", "dtype": "torch.uint8", "shape": [40, 72, 8], "passed": True},
    {"kernel": "lora_linear expand", "dtype": "torch.float16", "shape": [40, 72, 8], "passed": False},
]
RESULTS = {
    "benchmarks.gpu": {"results": ROWS},
    "benchmarks.gpu_smoke": {"results": CASES},
    "benchmarks.gpu_training": {"comparison": {"peak memory": "1 / 2"}, "results": []},
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder `bin` with common tools, nvcc, cmake, g++, compute-sanitizer and a Python."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (tmp_path / "bin" / name).symlink_to(found)
    add(tmp_path, "nvcc", 'echo "Cuda compilation tools, release 12.6, V12.6.68"')
    add(tmp_path, "g++")
    add(tmp_path, "cmake", CMAKE)
    add(tmp_path, "compute-sanitizer", SANITIZER)
    add(tmp_path, "python3", PYTHON)
    (tmp_path / "tests.xml").write_text(TESTS)
    for name, results in RESULTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    return tmp_path


def add(machine: Path, name: str, text: str = "") -> None:
    path = machine / "bin" / name
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def gpu_check(machine: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": str(machine / "bin"),
        "RESULTS": str(machine),
        "TMPDIR": str(machine),
        **environment,
    }
    command = [sys.executable, ROOT / "scripts/gpu_check", *arguments, "--build-dir", str(machine / "build")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def read(machine: Path, name: str) -> Any:
    return json.loads((machine / "out" / name).read_text())


def statuses(machine: Path) -> dict[str, str]:
    return {name: step["status"] for name, step in read(machine, "summary.json")["steps"].items()}


def load_script() -> ModuleType:
    loader = SourceFileLoader("gpu_check_script", str(ROOT / "scripts/gpu_check"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up there
    loader.exec_module(module)
    return module


def test_gpu_check_help_describes_usage(machine: Path) -> None:
    result = gpu_check(machine, "--help")
    assert result.returncode == 0
    assert "scripts/gpu_check DIR [--minutes 8]" in result.stdout


def test_gpu_check_without_folder_or_with_unknown_step_exits_2(machine: Path) -> None:
    assert gpu_check(machine).returncode == 2
    result = gpu_check(machine, str(machine / "out"), "--only", "tset")
    assert result.returncode == 2
    assert "there is no step tset; the steps are build, smoke" in result.stderr


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("nvcc", "nvcc is not on PATH nor in /usr/local/cuda/bin"),
        ("cmake", "sudo apt install cmake"),
        ("g++", "sudo apt install g++"),
    ],
)
def test_gpu_check_with_missing_tool_names_it(machine: Path, missing: str, message: str) -> None:
    if missing == "nvcc" and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is in its standard folder")
    (machine / "bin" / missing).unlink()
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 2
    assert message in result.stderr
    assert not (machine / "out").exists()


def test_gpu_check_without_gpu_exits_2(machine: Path) -> None:
    result = gpu_check(machine, str(machine / "out"), NO_GPU="1")
    assert result.returncode == 2
    assert "has no torch that sees a GPU; set PYTHON to another interpreter" in result.stderr


def test_gpu_check_runs_every_step_and_writes_one_page(machine: Path) -> None:
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 0, result.stderr
    assert statuses(machine) == dict.fromkeys(ALL_STEPS, "passed")
    summary = read(machine, "summary.json")
    assert (summary["gpu"], summary["sm"], summary["nvcc"]) == ("Orin", "87", "12.6.68")
    assert summary["peft"] == "not installed: no comparison with it"
    assert summary["tests"] == {"tests": 9, "failures": 0, "errors": 0, "skipped": 2}
    assert summary["smoke"] == {"cases": 2, "failed": ["lora_linear expand torch.float16 [40, 72, 8]"]}
    assert len(summary["targets"]) == 7
    for step in ALL_STEPS:
        report = read(machine, f"{step}.json")
        assert report["step"] == step
        assert report["limit_s"] > 0
    assert read(machine, "smoke.json")["results"] == {"results": CASES}
    log = (machine / "out/racecheck.log").read_text()
    assert "--tool racecheck --error-exitcode 9 --kernel-regex kns=fedspine python3 -m benchmarks.gpu_smoke" in log
    assert "--smallest" in log
    text = (machine / "out/summary.txt").read_text()
    assert text == result.stdout.removesuffix("\n")
    assert len(text.splitlines()) <= gpu_summary.PAGE_LINES
    assert not list(machine.glob("gpu_check-*"))


def test_gpu_check_step_that_crashes_does_not_stop_others(machine: Path) -> None:
    crash = 'case "$*" in *gpu_smoke*) kill -SEGV $$ ;; "-m benchmarks.gpu "*) exit 3 ;; esac\n'
    add(machine, "python3", crash + PYTHON)
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 1
    found = statuses(machine)
    assert (found["smoke"], found["speed"]) == ("failed", "failed")
    assert found["training"] == found["tests"] == found["engines"] == "passed"
    assert read(machine, "smoke.json")["exit_code"] == -11
    assert read(machine, "speed.json")["reason"] == "exit code 3"


def test_gpu_check_after_failed_build_skips_the_rest(machine: Path) -> None:
    add(machine, "cmake", "echo no compiler; exit 3")
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 1
    found = statuses(machine)
    assert found.pop("build") == "failed"
    assert set(found.values()) == {"skipped"}
    assert read(machine, "engines.json")["reason"] == "build failed"
    assert "no compiler" in (machine / "out/build.log").read_text()


def test_gpu_check_with_missing_packages_skips_their_steps(machine: Path) -> None:
    missing = 'case "$*" in *"import "*pytest_timeout* | *"import transformers"*) exit 1 ;; esac\n'
    add(machine, "python3", missing + PYTHON)
    add(machine, "compute-sanitizer", f'{SANITIZER}\nif [ "$1" = --tool ]; then echo Device not supported; exit 1; fi')
    result = gpu_check(machine, str(machine / "out"))
    assert result.returncode == 0, result.stderr
    found = statuses(machine)
    assert [name for name, status in found.items() if status == "passed"] == ["build", "smoke", "speed"]
    assert read(machine, "memcheck.json")["reason"] == "compute-sanitizer does not support this device"
    assert "is not installed" in read(machine, "training.json")["reason"]


def test_gpu_check_only_runs_the_build_and_selected_steps(machine: Path) -> None:
    assert gpu_check(machine, str(machine / "out"), "--only", "smoke").returncode == 0
    assert [name for name, status in statuses(machine).items() if status == "passed"] == ["build", "smoke"]


def test_gpu_check_with_little_time_skips_what_does_not_fit(machine: Path) -> None:
    begin = time.monotonic()
    result = gpu_check(machine, str(machine / "out"), "--minutes", "0.5")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - begin < 30
    assert statuses(machine)["speed"] == "skipped"
    assert "s were left and it needs 30 s" in read(machine, "speed.json")["reason"]


def test_step_beyond_its_limit_is_killed_and_keeps_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script()
    machine = script.Machine(sys.executable, "87", tmp_path, tmp_path, tmp_path)
    program = (
        "import pathlib, subprocess, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text('{\"results\": [1]}')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )

    def slow(machine: Any, results: Path, limit_s: float) -> list[list[str]]:
        return [[sys.executable, "-c", program, str(results)]]

    def quick(machine: Any, results: Path, limit_s: float) -> list[list[str]]:
        return [[sys.executable, "-c", "print(1)"]]

    monkeypatch.setattr(script, "STEPS", (script.Step("slow", 2, 0, slow), script.Step("quick", 30, 0, quick)))
    begin = time.monotonic()
    assert script.run_steps(machine, begin + 60, None)
    assert time.monotonic() - begin < 20
    report = json.loads((tmp_path / "slow.json").read_text())
    assert (report["status"], report["reason"], report["results"]) == ("timeout", "stopped after 2 s", {"results": [1]})
    child = int((tmp_path / "slow.log").read_text())
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"  # children are killed too
    assert json.loads((tmp_path / "quick.json").read_text())["status"] == "passed"


def test_targets_take_the_worst_case_that_they_cover() -> None:
    found = {row["target"]: row for row in gpu_summary.targets(ROWS)}
    measured = {target: (row["measured"], row.get("reached")) for target, row in found.items()}
    assert measured == {
        "importance, 4096x4096, against eager torch": (9.0, True),
        "importance, 4096x4096, share of a copy's bandwidth": (0.5, False),
        "lora_linear, 2048 tokens or more, against PEFT": (1.2, True),
        "lora_linear, 2048 tokens or more, time relative to its base GEMMs": (1.111, True),
        "lora_linear, 128 tokens or fewer, CUDA graph, against PEFT": (1.4, False),
        "time of low-rank kernels / addmm, 2048 tokens or more": ([0.97, 0.97], None),
        "time of low-rank kernels / addmm, 128 tokens or fewer, CUDA graph": ([0.8, 0.8], None),
    }


def test_summary_of_many_failures_fits_one_page() -> None:
    cases = {"cases": 900, "failed": [f"kernel {i}" for i in range(900)]}
    steps = {name: {"status": "failed", "seconds": 1.0, "reason": "exit code 1"} for name in ALL_STEPS}
    paths = [{"path": f"path {i}", "passed": False} for i in range(40)]
    summary = {"date": "now", "steps": steps, "targets": list(gpu_summary.targets(ROWS)), "smoke": cases}
    summary |= {"memcheck": cases, "racecheck": cases, "trainer-paths": {"results": paths}}
    lines = gpu_summary.page(summary).splitlines()
    assert len(lines) <= gpu_summary.PAGE_LINES
    assert "more lines: see summary.json" in lines[-1]


def test_gpu_benchmarks_on_cpu_produce_every_target(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "LARGER_THAN_CACHES", 1 << 16)
    monkeypatch.setattr(gpu, "IMPORTANCE", {"4096x4096": (24, 16)})
    monkeypatch.setattr(gpu, "LAYERS", {"4096x4096": (24, 16)})
    reported: list[int] = []
    rows = gpu.run(seconds=0.1, quick=True, torch_device="cpu", report=lambda rows: reported.append(len(rows)))
    assert reported == list(range(1, len(rows) + 1))
    targets = {row["target"] for row in gpu_summary.targets(rows)}
    assert "importance, 4096x4096, share of a copy's bandwidth" in targets
    assert "lora_linear, 2048 tokens or more, time relative to its base GEMMs" in targets
    assert "time of low-rank kernels / addmm, 128 tokens or fewer, CUDA graph" in targets
    assert all(milliseconds > 0 for row in rows for milliseconds in row["median_ms"].values())


def test_trainer_paths_on_cpu_pass() -> None:
    from benchmarks import gpu_training

    rows: list[dict[str, Any]] = []
    assert gpu_training.try_paths("cpu", lambda found: rows.extend(found[-1:]), tokens=16, steps=2), rows
    assert len(rows) == len(gpu_training.PATHS)


@pytest.mark.slow
def test_training_with_kernels_on_and_off_on_cpu_agrees() -> None:
    from benchmarks import gpu_training

    results = gpu_training.compare_kernels("cpu", tokens=8, steps=3)
    assert results["passed"], results["comparison"]
