"""`fedspine-edge doctor`."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedspine_edge.diagnostics import system
from fedspine_edge.diagnostics.check import Check
from fedspine_edge.diagnostics.probes import PROBES, on_jetson
from fedspine_edge.errors import ConfigError
from fedspine_edge.version import __version__

EXAMPLE = """fedspine-edge doctor --role device --broker broker.local:1883
  fedspine-edge doctor --config device.toml"""

PROBE_TIMEOUT_S = 90.0
"""A cold import of torch on a board takes half a minute."""

_MACHINE = ("python", "packages", "jetson", "disk", "memory", "clock")
_ASKED_FOR = ("config", *(name for key in ("broker", "device_file", "fleet_file") for name in PROBES[key][1]))
"""Checks that are made only on request: a failure counts in every role."""
_ENGINES = ("onnxruntime", "tensorrt", "tensorrt_rtx")
ROLES: dict[str, tuple[str, ...]] = {
    "server": _MACHINE,
    "device": (*_MACHINE, "torch", "transformers"),
    "run": (*_MACHINE, "tokenizers"),
}
"""Checks that must be neither missing nor failed, by what the machine is to do. `run` needs one of the engines too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--role",
        choices=["auto", *ROLES],
        default="auto",
        help="what this machine is to do; default: device on a Jetson, else at least server",
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--broker", metavar="HOST:PORT", type=_address, default=None, help="also connect to this broker, anonymously"
    )
    asked.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=None,
        help="a device.toml or fleet.toml: also log in to its broker as it says, and look at what else it names",
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="folder whose disk is looked at; default: the current one"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json

    settings, config_check = _settings(arguments.config)
    checks = examine(broker=arguments.broker, settings=settings, folder=arguments.dir) + config_check
    role = arguments.role
    if role == "auto":
        role = _role_of(settings[0]) if settings else "device" if on_jetson() else "server"
    roles = usable_roles(checks)
    exact = arguments.role != "auto" or settings
    failed = [check.name for check in checks if check.state == "failed" and (check.name in _ASKED_FOR or not exact)]
    usable = roles[role] and not failed
    if arguments.json:
        found = [check.to_dict() for check in checks]
        print_json({"usable": usable, "role": role, "roles": roles, "checks": found, "version": __version__})
    else:
        _print_table(checks, roles)
    return 0 if usable else 1


def _settings(path: Path | None) -> tuple[tuple[str, Path] | None, list[Check]]:
    """The probe for a config file with its path, and the finding that the file itself is."""
    from fedspine_edge.config import DeviceConfig, load_fleet_or_device_config

    if path is None:
        return None, []
    try:
        config = load_fleet_or_device_config(path)
    except ConfigError as error:
        return None, [Check("config", "failed", error.message, error.remedy or "correct the file")]
    if isinstance(config, DeviceConfig):
        return ("device_file", path), [
            Check("config", "ok", f"{path}: device {config.device_id}, fleet {config.fleet}")
        ]
    return ("fleet_file", path), [Check("config", "ok", f"{path}: fleet {config.fleet}")]


def _role_of(probe_name: str) -> str:
    return probe_name.removesuffix("_file").replace("fleet", "server")


def examine(
    *, broker: str | None = None, settings: tuple[str, Path] | None = None, folder: Path = Path()
) -> list[Check]:
    """Every check. Never raises; each is bounded in time.

    Args:
        broker: `HOST:PORT` to connect to.
        settings: `device_file` or `fleet_file`, and the file.
        folder: Folder whose disk is looked at.
    """
    probes = [(name, "") for name in PROBES if name not in ("broker", "device_file", "fleet_file")]
    probes += [("broker", broker)] if broker else []
    probes += [(settings[0], str(settings[1]))] if settings else []
    local: list[tuple[str, Callable[[], Check]]] = [
        ("python", system.python_check),
        ("jetson", system.jetson_check),
        ("disk", lambda: system.disk_check(folder.absolute())),
        ("memory", system.memory_check),
        ("clock", system.clock_check),
    ]
    machine = [_guarded(name, check) for name, check in local]  # before the probes take their memory
    with ThreadPoolExecutor(max_workers=3) as pool:
        found = list(pool.map(lambda one: probe(*one), probes))
    return machine[:1] + [check for checks in found for check in checks] + machine[1:]


def probe(name: str, argument: str = "", *, timeout_s: float = PROBE_TIMEOUT_S) -> list[Check]:
    """The checks of one probe, run in a process of its own; those it did not live to finish are `failed`."""
    names = PROBES[name][1]
    command = [sys.executable, "-m", "fedspine_edge.diagnostics.probes", name, *([argument] if argument else [])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, errors="replace"
        )
        output, ending = done.stdout, _ending(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
        ending = f"did not answer within {timeout_s:g} s"
    except OSError as error:
        output, ending = "", f"could not be started: {error}"
    checks = list(_checks(output.splitlines(), names))
    remedy = f"{Path(sys.executable).name} -m fedspine_edge.diagnostics.probes {name}  # shows the whole error"
    seen = {check.name for check in checks}
    return checks + [Check(name, "failed", ending, remedy) for name in names if name not in seen]


def usable_roles(checks: Iterable[Check]) -> dict[str, bool]:
    """Which roles this machine can take."""
    works = {check.name for check in checks if check.state in ("ok", "warn")}
    roles = {role: works.issuperset(needed) for role, needed in ROLES.items()}
    roles["run"] = roles["run"] and not works.isdisjoint(_ENGINES)
    if on_jetson():
        roles["device"] = roles["device"] and "cuda" in works
    return roles


def _checks(lines: Iterable[str], names: Sequence[str]) -> Iterable[Check]:
    """Checks among the lines a probe printed; libraries print there too."""
    for line in lines:
        try:
            check = Check(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if check.name in names:
            yield check


def _ending(code: int, stderr: str) -> str:
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    last = stderr.strip().splitlines()
    return f"ended with code {code}: {last[-1][:200] if last else 'no message'}"


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, "failed", f"{type(error).__name__}: {error}", "fedspine-edge doctor --json  # and report it")


def _print_table(checks: Sequence[Check], roles: dict[str, bool]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "missing": "cyan", "failed": "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("check", "state", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(Text(check.name), Text(check.state, style=colours[check.state]), Text(check.detail))
        if check.remedy:
            table.add_row("", "", Text(f"→ {check.remedy}", style="dim"))
    console = Console()
    console.print(table)
    good, bad = ([role for role in roles if roles[role] is wanted] for wanted in (True, False))
    verdict = f"usable as: {', '.join(good) or 'nothing yet'}"
    console.print(Text(f"{verdict}; not as: {', '.join(bad)}" if bad else verdict))


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 192.168.1.10:1883")
    return text
