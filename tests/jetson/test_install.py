"""Checks of jetson/ without a board: the steps of the script in a dry run, and the unit by systemd."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedspine_edge.cli.main import make_parser
from fedspine_edge.model.loading import TRANSFORMERS_FOR_OLD_TORCH

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jetson" / "install.sh"
UNIT = ROOT / "jetson" / "fedspine-edge-device.service"


def install(tmp_path: Path, l4t: str, *options: str, board: str = "") -> subprocess.CompletedProcess[str]:
    """Run the script with the release file of a board with L4T `l4t`, such as 36.5."""
    major, minor = l4t.split(".")
    release, model = tmp_path / "nv_tegra_release", tmp_path / "model"
    release.write_text(f"# R{major} (release), REVISION: {minor}.0, GCID: 1, BOARD: generic, EABI: aarch64\n")
    model.write_bytes(f"{board}\0".encode())
    overrides = {"FEDSPINE_TEGRA_RELEASE": str(release), "FEDSPINE_BOARD_MODEL": str(model)}
    return subprocess.run(
        ["bash", str(SCRIPT), *options], capture_output=True, text=True, env={**os.environ, **overrides}, cwd=tmp_path
    )


@pytest.mark.parametrize(
    ("l4t", "board", "python", "sm", "index"),
    [
        ("36.5", "NVIDIA Jetson Orin Nano", "python3.10", 87, "jp6/cu126"),
        ("38.2", "NVIDIA Jetson AGX Thor Developer Kit", "python3.12", 110, "sbsa/cu130"),
        ("39.2", "NVIDIA Jetson AGX Thor Developer Kit", "python3.12", 110, "sbsa/cu130"),
        ("39.2", "NVIDIA Jetson AGX Orin", "python3.12", 87, "sbsa/cu130"),
        ("36.5", "", "python3.10", 87, "jp6/cu126"),
        ("38.2", "", "python3.12", 110, "sbsa/cu130"),
    ],
)
def test_dry_run_selects_python_and_sm_by_board(
    tmp_path: Path, l4t: str, board: str, python: str, sm: int, index: str
) -> None:
    done = install(tmp_path, l4t, "--dry-run", board=board)
    assert done.returncode == 0, done.stderr
    assert f"{python} -m venv --system-site-packages" in done.stdout
    assert f"FEDSPINE_CUDA_ARCHITECTURES={sm} ." in done.stdout
    assert "FEDSPINE_CUDA=ON" in done.stdout
    assert index in SCRIPT.read_text()
    assert done.stdout.rstrip().splitlines()[-1].endswith("fedspine-edge doctor --role device")


@pytest.mark.parametrize("l4t", ["32.7", "35.6"])
def test_unsupported_old_board_is_refused_with_reason(tmp_path: Path, l4t: str) -> None:
    done = install(tmp_path, l4t, "--dry-run")
    assert done.returncode == 2
    assert f"L4T {l4t}" in done.stderr
    assert "Python older than 3.10" in done.stderr
    assert "flash JetPack 6 or 7" in done.stderr
    assert "+" not in done.stdout  # not one step


def test_unknown_release_is_refused(tmp_path: Path) -> None:
    done = install(tmp_path, "41.0", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "not supported" in done.stderr


def test_dry_run_writes_nothing_and_never_replaces_torch(tmp_path: Path) -> None:
    before = sorted(path.name for path in ROOT.iterdir())
    done = install(tmp_path, "36.5", "--dry-run", "--service")
    assert sorted(path.name for path in ROOT.iterdir()) == before
    pip = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(pip) == 2
    for line in pip:
        assert "--constraint" in line or "--no-deps" in line, line
        assert "upgrade" not in line
        assert not re.search(r"\storch\b", line), line
    apt = [line for line in done.stdout.splitlines() if "apt-get install" in line]
    assert apt
    assert all("--no-upgrade" in line for line in apt)


def test_requirements_are_those_of_pyproject_without_torch() -> None:
    code = re.search(r"<<'PYTHON' \|\| true\n(.*?)\nPYTHON\n", SCRIPT.read_text(), flags=re.DOTALL)
    assert code
    done = subprocess.run([sys.executable, "-c", code.group(1)], capture_output=True, text=True, cwd=ROOT, check=True)
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in done.stdout.splitlines()}
    assert {"msgspec", "numpy", "paho-mqtt", "transformers", "accelerate", "onnxruntime"} <= names
    assert not {"torch", "tensorrt", "fedspine-edge"} & names


def test_old_torch_gets_the_transformers_that_doctor_names() -> None:
    assert f"old_torch='{TRANSFORMERS_FOR_OLD_TORCH}'" in SCRIPT.read_text()
    code = re.search(r"has_models='(.*)'", SCRIPT.read_text())
    assert code
    older = "import importlib.metadata as m; at = m.version; m.version = lambda n: '2.0' if n == 'torch' else at(n); "
    for before, works in (("", True), (older, False)):
        done = subprocess.run([sys.executable, "-c", before + code.group(1)], capture_output=True, text=True)
        assert (done.returncode == 0) is works, done.stderr


def test_service_is_installed_only_on_request(tmp_path: Path) -> None:
    plain, service = install(tmp_path, "36.5", "--dry-run"), install(tmp_path, "36.5", "--dry-run", "--service")
    assert "systemctl" not in plain.stdout
    assert "install -m 0644 jetson/fedspine-edge-device.service /etc/systemd/system/" in service.stdout
    assert "systemctl daemon-reload" in service.stdout
    assert "/opt/fedspine-edge/venv" in service.stdout


def test_no_apt_prints_the_command(tmp_path: Path) -> None:
    done = install(tmp_path, "36.5", "--dry-run", "--no-apt")
    assert "+ apt-get" not in done.stdout
    assert "+ sudo apt-get" not in done.stdout
    assert "sudo apt-get install --no-upgrade python3.10-venv" in done.stdout


def test_other_machine_allows_dry_run_only(tmp_path: Path) -> None:
    environment = {**os.environ, "FEDSPINE_TEGRA_RELEASE": str(tmp_path / "absent")}
    command = ["bash", str(SCRIPT)]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert "not a Jetson" in refused.stderr
    assert "--dry-run" in refused.stderr
    shown = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0
    assert "showing the steps" in shown.stdout


def test_unknown_option_is_named(tmp_path: Path) -> None:
    done = install(tmp_path, "36.5", "--dryrun")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--dryrun" in done.stderr


def test_shellcheck_passes() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    program = tmp_path / "fedspine-edge"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/fedspine-edge/venv/bin/fedspine-edge", str(program)))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    # Units of the machine itself may be complained about: only lines about ours count.
    assert not [line for line in done.stderr.splitlines() if UNIT.stem in line or "Unknown key" in line], done.stderr


def test_unit_starts_an_existing_command_and_restarts_it() -> None:
    lines = UNIT.read_text().splitlines()
    (start,) = (line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart="))
    arguments = make_parser().parse_args(start.split()[1:])
    assert arguments.command == "device"
    for wanted in ("Restart=always", "User=fedspine", "StateDirectory=fedspine-edge", "NoNewPrivileges=yes"):
        assert wanted in lines
    # Each of these would take the GPU away from the agent.
    for forbidden in ("PrivateDevices", "ProtectClock", "DevicePolicy", "MemoryDenyWriteExecute"):
        assert not any(line.startswith(f"{forbidden}=") for line in lines)
