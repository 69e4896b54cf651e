"""The demo with real processes over a real broker, some of which are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedspine_edge.demo.demo import DemoSettings, run_demo
from fedspine_edge.errors import ConfigError
from fedspine_edge.monitoring.run_view import by_round, peek_run, read_run
from fedspine_edge.monitoring.status import read_status

pytestmark = pytest.mark.broker

FIGURES = {
    *("accuracy_unpruned", "accuracy_final", "accuracy_majority", "pruning_ratio", "sparsity", "rounds", "devices"),
    *("idle_share", "params_before", "params_after", "latency_ms_before", "latency_ms_after", "onnx_max_abs_diff"),
    *("bytes_up", "bytes_down", "wall_s", "report"),
}


def command(tiny_model: Path, tiny_csv: Path, out: Path) -> list[str]:
    options = {"--model": tiny_model, "--data": tiny_csv, "--out": out, "--num-rounds": 5, "--num-devices": 2}
    return [
        sys.executable,
        "-m",
        "fedspine_edge",
        "demo",
        "--json",
        *(str(x) for pair in options.items() for x in pair),
    ]


def wait_for_round(run_dir: Path, number: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if number in by_round(peek_run(run_dir).rows):
            return
        time.sleep(0.05)
    raise AssertionError(f"round {number} did not begin within {timeout_s} s")


def wait_until_stopped(run_dir: Path, timeout_s: float = 5) -> None:
    """Wait until `status` reports that the server has stopped. The demo restarts it after about a second."""
    deadline = time.monotonic() + timeout_s
    while read_status(run_dir).state != "stopped":
        assert time.monotonic() < deadline, "a killed server still counts as running"
        time.sleep(0.01)


def child_pid(parent: int, pattern: str) -> int:
    """The child process of `parent` whose command line matches."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ppid = int(re.search(r"^PPid:\s*(\d+)", (entry / "status").read_text(), re.MULTILINE).group(1))
            arguments = (entry / "cmdline").read_text().replace("\0", " ")
        except (OSError, AttributeError):
            continue
        if ppid == parent and re.search(pattern, arguments):
            return int(entry.name)
    raise AssertionError(f"no child of {parent} matches {pattern!r}")


def test_demo_survives_kills_and_prints_json(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    out = tmp_path / "demo"
    with ExitStack() as stack:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        demo = stack.enter_context(subprocess.Popen(command(tiny_model, tiny_csv, out), text=True, **pipes))
        wait_for_round(out / "run", 2)
        follow = [sys.executable, "-m", "fedspine_edge", "status", str(out / "run"), "--follow"]
        follower = stack.enter_context(subprocess.Popen(follow, stdout=subprocess.PIPE, text=True))
        status = read_status(out / "run")
        assert (status.state, status.server_running, status.devices_online) == ("running", True, 2)
        os.kill(child_pid(demo.pid, r" device --config .*agx-1"), signal.SIGKILL)
        wait_for_round(out / "run", 3)
        os.kill(child_pid(demo.pid, r" server --config"), signal.SIGKILL)
        wait_until_stopped(out / "run")
        wait_for_round(out / "run", 4)
        os.kill(child_pid(demo.pid, r" broker --port"), signal.SIGKILL)
        stdout, stderr = demo.communicate(timeout=240)
        followed = follower.communicate(timeout=30)[0].splitlines()
    assert demo.returncode == 0, stderr
    assert follower.returncode == 0
    assert followed[-1].endswith("finished after 5 rounds")
    assert sum("agx-1 ok" in line for line in followed) >= 3  # rounds 3, 4 and 5
    summary = json.loads(stdout)
    assert set(summary) >= FIGURES
    assert summary["restarts"].keys() == {"agx-1", "server", "broker"}
    assert summary["rounds"] == 5
    assert summary["devices"] == 2
    assert summary["pruning_ratio"] == pytest.approx(0.5, abs=0.13)
    assert summary["params_after"] < summary["params_before"]
    assert summary["onnx_max_abs_diff"] < 1e-3
    assert summary["accuracy_final"] > summary["accuracy_majority"] + 0.1
    assert summary["bytes_up"] > 0 < summary["bytes_down"]
    assert Path(summary["report"]).read_text().startswith("<!doctype html>")
    rounds = by_round(read_run(out / "run").rows)
    assert [row.status for row in rounds[5]] == ["ok", "ok"]


def test_demo_invalid_settings_raise_before_any_change(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not created by the demo"):
        run_demo(DemoSettings(out=precious))
    assert (precious / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ConfigError, match=r"pruning_ratio"):
        run_demo(DemoSettings(out=tmp_path / "a", model=tiny_model, data=tiny_csv, pruning_ratio=1.2))
    with pytest.raises(ConfigError, match=r"num_rounds >= 5"):
        run_demo(DemoSettings(out=tmp_path / "c", model=tiny_model, data=tiny_csv, num_rounds=3))
    with pytest.raises(ConfigError, match="does not exist"):
        run_demo(DemoSettings(out=tmp_path / "b", model=tmp_path / "absent", data=tiny_csv))
