"""All checks of `fedspine-edge doctor`, and the roles that a machine can take according to them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fedspine_edge.config import DeviceConfig, load_fleet_or_device_config
from fedspine_edge.diagnostics import system
from fedspine_edge.diagnostics.check import Check
from fedspine_edge.diagnostics.probes import PROBES, on_jetson
from fedspine_edge.errors import ConfigError

PROBE_TIMEOUT_S = 90.0
"""Time limit of a probe. A cold import of torch on a Jetson takes half a minute."""

_MACHINE = ("python", "packages", "jetson", "disk", "memory", "clock")
_CONFIG_PROBES = ("broker", "device_file", "fleet_file")
REQUESTED_CHECKS = ("config", *(name for probe in _CONFIG_PROBES for name in PROBES[probe][1]))
"""Checks that run only on request. A failure of one of them counts for every role."""
_ENGINES = ("onnxruntime", "tensorrt", "tensorrt_rtx")
ROLES: dict[str, tuple[str, ...]] = {
    "server": _MACHINE,
    "device": (*_MACHINE, "torch", "transformers"),
    "run": (*_MACHINE, "tokenizers"),
}
"""Checks that must be ok or warn, by role of the machine. The role `run` needs one of the engines too."""


class ConfigFile(NamedTuple):
    """A settings file and the probe that checks it.

    Attributes:
        probe: `device_file` or `fleet_file`.
        path: Path of the file.
    """

    probe: str
    path: Path

    @property
    def role(self) -> str:
        """Role of a machine with these settings."""
        return "device" if self.probe == "device_file" else "server"


def check_config(path: Path) -> tuple[ConfigFile | None, Check]:
    """Read a settings file. Returns None instead of the file when it cannot be used."""
    try:
        config = load_fleet_or_device_config(path)
    except ConfigError as error:
        return None, Check("config", "failed", error.message, error.remedy or "correct the file")
    if isinstance(config, DeviceConfig):
        detail = f"{path}: device {config.device_id}, fleet {config.fleet}"
        return ConfigFile("device_file", path), Check("config", "ok", detail)
    return ConfigFile("fleet_file", path), Check("config", "ok", f"{path}: fleet {config.fleet}")


def run_checks(
    *, broker: str | None = None, config_file: ConfigFile | None = None, folder: Path = Path()
) -> list[Check]:
    """Run all checks. Never raises; every check is limited in time.

    Args:
        broker: Address `HOST:PORT` of a broker to connect to.
        config_file: Settings file to check.
        folder: Folder whose disk is checked.
    """
    probes = [(name, "") for name in PROBES if name not in _CONFIG_PROBES]
    probes += [("broker", broker)] if broker else []
    probes += [(config_file.probe, str(config_file.path))] if config_file else []
    local: list[tuple[str, Callable[[], Check]]] = [
        ("python", system.python_check),
        ("jetson", system.jetson_check),
        ("disk", lambda: system.disk_check(folder.absolute())),
        ("memory", system.memory_check),
        ("clock", system.clock_check),
    ]
    machine = [_run_guarded(name, check) for name, check in local]  # before the probes occupy memory
    with ThreadPoolExecutor(max_workers=3) as pool:
        found = list(pool.map(lambda arguments: run_probe(*arguments), probes))
    return machine[:1] + [check for checks in found for check in checks] + machine[1:]


def run_probe(name: str, argument: str = "", *, timeout_s: float = PROBE_TIMEOUT_S) -> list[Check]:
    """Run a probe in a process of its own. Checks that it did not finish are `failed`."""
    names = PROBES[name][1]
    command = [sys.executable, "-m", "fedspine_edge.diagnostics.probes", name, *([argument] if argument else [])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, errors="replace"
        )
        output, reason = done.stdout, _explain_exit(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
        reason = f"did not finish within {timeout_s:g} s"
    except OSError as error:
        output, reason = "", f"could not be started: {error}"
    checks = list(_parse_checks(output.splitlines(), names))
    remedy = f"{Path(sys.executable).name} -m fedspine_edge.diagnostics.probes {name}  # shows the whole error"
    seen = {check.name for check in checks}
    return checks + [Check(name, "failed", reason, remedy) for name in names if name not in seen]


def usable_roles(checks: Iterable[Check]) -> dict[str, bool]:
    """Return for each role whether this machine can take it."""
    working = {check.name for check in checks if check.state in ("ok", "warn")}
    roles = {role: working.issuperset(needed) for role, needed in ROLES.items()}
    roles["run"] = roles["run"] and not working.isdisjoint(_ENGINES)
    if on_jetson():
        roles["device"] = roles["device"] and "cuda" in working
    return roles


def _parse_checks(lines: Iterable[str], names: Sequence[str]) -> Iterable[Check]:
    """Yield the checks in the output of a probe, to which libraries may print too."""
    for line in lines:
        try:
            check = Check(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if check.name in names:
            yield check


def _explain_exit(code: int, stderr: str) -> str:
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines()
    return f"exited with code {code}: {lines[-1][:200] if lines else 'no message'}"


def _run_guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, "failed", f"{type(error).__name__}: {error}", "fedspine-edge doctor --json  # and report it")
