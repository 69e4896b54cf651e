"""The command doctor: checks, their states, and the remedies."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transport_support import Mosquitto, needs_mosquitto

from fedspine_edge.cli.main import main
from fedspine_edge.diagnostics import doctor, probes, system
from fedspine_edge.diagnostics.check import Check, State
from fedspine_edge.transport.broker import EmbeddedBroker

ROOT = Path(__file__).parents[2]


def block(folder: Path, *packages: str) -> dict[str, str]:
    """Return an environment in which importing `packages` fails as if they were not installed."""
    for package in packages:
        raising = f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')\n"
        (folder / f"{package}.py").write_text(raising)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def beside(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` with the modules in `folder` before the installed ones."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """Replace the probes by a list of checks, which may be changed, and return it."""
    always = [names for key, (_, names) in probes.PROBES.items() if key not in ("broker", "device_file", "fleet_file")]
    found = [Check(name, "ok", "present") for names in always for name in names]

    def run_probe(name: str, argument: str = "", **_: object) -> list[Check]:
        return [check for check in found if check.name in probes.PROBES[name][1]]

    monkeypatch.setattr(doctor, "run_probe", run_probe)
    monkeypatch.setattr(system, "disk_check", lambda _: Check("disk", "ok", "enough"))
    monkeypatch.setattr(system, "memory_check", lambda: Check("memory", "ok", "enough"))
    return found


def replace(found: list[Check], name: str, state: State) -> None:
    found[:] = [Check(name, state, "changed", "fix it") if check.name == name else check for check in found]


def test_json_report_contains_every_check() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedspine_edge", "doctor", "--json"], capture_output=True, text=True, cwd=ROOT
    )
    report = json.loads(done.stdout)
    names = [check["name"] for check in report["checks"]]
    assert {"python", "torch", "cuda", "native", "tensorrt", "onnxruntime", "disk", "memory", "clock"} <= set(names)
    assert len(names) == len(set(names))
    assert done.returncode == (0 if report["usable"] else 1)
    for check in report["checks"]:
        assert check["state"] in ("ok", "warn", "missing", "failed")
        assert check["detail"]
        assert check["state"] == "ok" or check["remedy"], check


def test_server_without_torch_is_usable(tmp_path: Path) -> None:
    """In a server installation, packages that train, export or run models are missing."""
    environment = block(tmp_path, "torch", "transformers", "onnxruntime", "tokenizers", "tensorrt", "tensorrt_rtx")
    command = [sys.executable, "-m", "fedspine_edge", "doctor", "--json"]
    # From another folder: `-m` puts the current one before PYTHONPATH.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    report = json.loads(done.stdout)
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["torch"]["state"] == "missing"
    assert by_name["torch"]["remedy"] == "pip install 'fedspine-edge[device]'"
    assert by_name["native"]["state"] == "missing"
    assert by_name["onnxruntime"]["remedy"] == "pip install 'fedspine-edge[run]'"
    assert report["roles"] == {"server": True, "device": False, "run": False}
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_package_that_does_not_load_is_failed_not_missing(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libonnxruntime.so.1: cannot open')\n")
    found = json.loads(beside(tmp_path, "fedspine_edge.diagnostics.probes", "onnxruntime").stdout)
    assert found["state"] == "failed"
    assert "cannot open" in found["detail"]


def test_transformers_too_new_for_torch_is_failed_with_remedy(tmp_path: Path) -> None:
    """With an old torch, as on some boards, transformers can be imported but has no models."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '2.0.0' if name == 'torch' else real(name)\n"
    )
    found = json.loads(beside(tmp_path, "fedspine_edge.diagnostics.probes", "transformers").stdout)
    assert found["state"] == "failed"
    assert "does not work with torch" in found["detail"]
    assert found["remedy"] == "pip install 'transformers>=5.15,<5.16'"
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "x.csv").write_text("text,label\nfine,1\nbad,0\n")
    done = beside(tmp_path, "fedspine_edge", "tune", "--model", ".", "--data", "x.csv", "--out", "out")
    assert done.returncode == 2
    assert "pip install 'transformers>=5.15,<5.16'" in done.stderr, done.stderr


def test_each_role_has_its_requirements(quick: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    replace(quick, "transformers", "missing")
    assert main(["doctor", "--role", "server"]) == 0
    assert main(["doctor", "--role", "device"]) == 1
    assert main(["doctor", "--role", "run"]) == 0
    for engine in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        replace(quick, engine, "missing")
    assert main(["doctor", "--role", "run"]) == 1
    shown = capsys.readouterr().out
    assert "fix it" in shown
    assert "not as: device, run" in shown


def test_failed_check_counts_unless_the_role_does_not_need_it(quick: list[Check]) -> None:
    assert main(["doctor"]) == 0
    replace(quick, "tensorrt", "failed")
    assert main(["doctor"]) == 1
    assert main(["doctor", "--role", "device"]) == 0


@pytest.mark.parametrize("address", ["broker", "host:", ":1883", "host:0", "host:70000", "host:mqtt"])
def test_invalid_broker_address_is_a_usage_error(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--broker", address]) == 2
    assert "HOST:PORT" in capsys.readouterr().err


def test_missing_broker_is_failed_with_a_command_to_start_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, never listening: refused at once
        port = taken.getsockname()[1]
        (found,) = doctor.run_probe("broker", f"127.0.0.1:{port}")
    assert found.state == "failed"
    assert "does not answer" in found.detail
    assert f"fedspine-edge broker --host 127.0.0.1 --port {port}" in found.remedy


def test_listener_without_mqtt_is_reported_as_such() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        (found,) = doctor.run_probe("broker", f"127.0.0.1:{mute.getsockname()[1]}")
    assert found.state == "failed"
    assert "accepts TCP" in found.detail


@pytest.mark.broker
def test_running_broker_is_ok() -> None:
    with EmbeddedBroker() as broker:
        (found,) = doctor.run_probe("broker", f"127.0.0.1:{broker.port}")
    assert (found.state, found.remedy) == ("ok", "")


DEVICE = """
device_id = "nx-1"
fleet = "farm"
model = "base"
state_dir = "state"
[data]
path = "train.csv"
holdout = 2
"""


@pytest.fixture
def device_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a device with its settings, without a broker, and everything that they refer to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "base" / name).write_text("{}")
    (tmp_path / "train.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 3)
    (tmp_path / "device.toml").write_text(DEVICE)
    return tmp_path


def checks_of(file: str, more: str = "") -> dict[str, Check]:
    """Append `more` to a settings file and return its checks by name."""
    Path(file).write_text(Path(file).read_text() + more)
    config_file, config = doctor.check_config(Path(file))
    found = doctor.run_probe(config_file.probe, file) if config_file else []
    return {check.name: check for check in (config, *found)}


@pytest.mark.broker
def test_device_config_checks_broker_data_and_model(device_folder: Path) -> None:
    with EmbeddedBroker() as broker:
        found = checks_of("device.toml", f"[broker]\nport = {broker.port}\n")
    assert {name: check.state for name, check in found.items()} == dict.fromkeys(
        ("config", "broker", "data", "model", "state_dir"), "ok"
    )
    assert "4 examples to train on, 2 held out" in found["data"].detail


def test_device_config_names_each_problem_with_remedy(device_folder: Path, dead_port: int) -> None:
    (device_folder / "train.csv").write_text("text,label\ngood,1\nsecret,7\n")
    (device_folder / "base" / "tokenizer.json").unlink()
    (device_folder / "state").write_text("a file")
    found = checks_of("device.toml", f"[broker]\nport = {dead_port}\n")
    assert {name for name, check in found.items() if check.state == "failed"} == found.keys() - {"config"}
    assert all(check.remedy for name, check in found.items() if name != "config")
    assert "connection refused" in found["broker"].detail
    assert "train.csv, line 3: label 7" in found["data"].detail
    assert "secret" not in found["data"].detail
    assert "has no tokenizer" in found["model"].detail
    shutil.rmtree(device_folder / "base")
    assert checks_of("device.toml")["model"].state == "warn"  # "base" may be a hub id


def test_fleet_config_checks_broker_strategy_and_run_dir(device_folder: Path, dead_port: int) -> None:
    (device_folder / "fleet.toml").write_text(f"num_rounds = 3\n[broker]\nport = {dead_port}\n")
    found = checks_of("fleet.toml")
    assert found["strategy"].state == found["broker"].state == "failed"
    assert found["run_dir"] == Check("run_dir", "ok", "runs/fleet will be created")
    assert not (device_folder / "runs").exists()


def test_config_with_unknown_key_is_failed(
    quick: list[Check], device_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--config", "device.toml", "--role", "server"]) == 0
    (device_folder / "device.toml").write_text(DEVICE.replace("device_id", "device_Id"))
    capsys.readouterr()
    assert main(["doctor", "--config", "device.toml", "--role", "server", "--json"]) == 1
    (config,) = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "config"]
    assert config["remedy"] == "Did you mean 'device_id'?"


@pytest.mark.broker
@needs_mosquitto
def test_doctor_logs_in_and_reports_access_list_refusals(device_folder: Path) -> None:
    subprocess.run(["mosquitto_passwd", "-b", "-c", "users", "nx-1", "s3cret"], check=True, capture_output=True)
    Path("acl").write_text("pattern write fedspine/v1/farm/device/%u/report\n")
    Path("secret").write_text("s3cret\n")
    rules = f"password_file {device_folder}/users\nacl_file {device_folder}/acl\n"
    broker = Mosquitto(device_folder, f"allow_anonymous false\n{rules}").start()
    try:
        login = f'[broker]\nport = {broker.port}\nusername = "nx-1"\npassword_file = "secret"\n'
        found = checks_of("device.toml", login)["broker"]
        assert (found.state, "user nx-1" in found.detail) == ("ok", True), found
        Path("device.toml").write_text(DEVICE.replace('"farm"', '"fram"') + login)
        found = checks_of("device.toml")["broker"]
        assert (found.state, "Not authorized" in found.detail) == ("failed", True)
        assert "access list" in found.remedy
        Path("secret").write_text("wrong\n")
        assert "password_file" in checks_of("device.toml")["broker"].remedy
    finally:
        broker.stop()


def test_hanging_or_crashing_probe_is_reported_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = executable(tmp_path / "python", "echo 'noise from a library'; exec sleep 60")
    monkeypatch.setattr(sys, "executable", script)
    begun = time.monotonic()
    found = doctor.run_probe("torch", timeout_s=0.5)
    assert time.monotonic() - begun < 10
    assert [(check.name, check.state) for check in found] == [(n, "failed") for n in ("torch", "cuda", "native")]
    assert "within 0.5 s" in found[0].detail

    first = json.dumps(Check("torch", "ok", "2.9").to_dict())
    executable(tmp_path / "python", f"echo '{first}'; kill -SEGV $$")
    torch, cuda, _ = doctor.run_probe("torch")
    assert torch.state == "ok"  # what was found before the crash is kept
    assert (cuda.state, cuda.detail) == ("failed", "crashed with SIGSEGV")


def test_check_that_raises_is_failed(quick: list[Check], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise RuntimeError("no such sensor")

    monkeypatch.setattr(system, "clock_check", broken)
    clock = next(check for check in doctor.run_checks() if check.name == "clock")
    assert clock.state == "failed"
    assert "no such sensor" in clock.detail


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", (36, 4)),
        ("# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64", (38, 2)),
        ("# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t186ref, EABI: aarch64", (32, 7)),
        ("something else", None),
    ],
)
def test_l4t_version_parses_the_release_file(release: str, version: tuple[int, int] | None) -> None:
    assert system.l4t_version(release) == version


def test_missing_tensorrt_remedy_works_on_every_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(probes, "on_jetson", lambda: False)
    (check,) = probes.tensorrt_check("")
    assert check.state == "missing"
    # the extra is empty on aarch64, where a board brings its own
    assert "tensorrt" in check.remedy.removeprefix("pip install ").split()


def test_jetson_check_names_board_and_power_mode(tmp_path: Path) -> None:
    (tmp_path / "release").write_text("# R36 (release), REVISION: 5.0, GCID: 1")
    (tmp_path / "model").write_text("NVIDIA Jetson Orin NX\0")
    nvpmodel = executable(tmp_path / "nvpmodel", "printf 'NV Power Mode: MAXN_SUPER\\n2\\n'")
    found = system.jetson_check(tmp_path / "release", tmp_path / "model", nvpmodel)
    assert (found.state, found.detail) == ("ok", "NVIDIA Jetson Orin NX, L4T 36.5, power mode MAXN_SUPER")

    (tmp_path / "release").write_text("# R32 (release), REVISION: 7.1, GCID: 1")
    old = system.jetson_check(tmp_path / "release", tmp_path / "model", str(tmp_path / "absent"))
    assert old.state == "failed"
    assert "power mode unknown" in old.detail
    assert "JetPack 6 or 7" in old.remedy


def test_memory_check_respects_the_container_limit(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 4096000 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert system.memory_check(tmp_path / "meminfo", tmp_path / "memory.max") == Check(
        "memory", "ok", "4,000 MiB available"
    )
    (tmp_path / "memory.max").write_text(f"{1024 * system.MIB}\n")
    (tmp_path / "memory.current").write_text(f"{724 * system.MIB}\n")
    limited = system.memory_check(tmp_path / "meminfo", tmp_path / "memory.max")
    assert limited.state == "failed"
    assert limited.detail.startswith("300 MiB")


def test_missing_folder_and_unset_clock_are_failed(tmp_path: Path) -> None:
    assert system.disk_check(tmp_path / "absent").remedy == f"mkdir -p {tmp_path / 'absent'}"
    unset = system.clock_check(now_s=86400.0 * 30)
    assert (unset.state, unset.remedy) == ("failed", "sudo timedatectl set-ntp true")
    drifting = system.clock_check(timedatectl=executable(tmp_path / "timedatectl", "echo no"))
    assert drifting.state == "warn"
    assert system.clock_check(timedatectl=executable(tmp_path / "timedatectl", "echo yes")).state == "ok"
