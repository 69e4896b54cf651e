"""Command `fedspine-edge doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedspine_edge.cli.options import add_json_option
from fedspine_edge.version import __version__

if TYPE_CHECKING:
    from fedspine_edge.diagnostics.check import Check

EXAMPLE = """fedspine-edge doctor --role device --broker broker.local:1883
  fedspine-edge doctor --config device.toml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--role",
        choices=["auto", "server", "device", "run"],
        default="auto",
        help="role of this machine; auto: device on a Jetson, otherwise server",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--broker", metavar="HOST:PORT", type=_address, default=None, help="also connect to this broker, anonymously"
    )
    target.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=None,
        help="settings of a device or fleet; also log in to its broker and check everything that the file refers to",
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="folder whose disk is checked (default: the current folder)"
    )
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.diagnostics import doctor
    from fedspine_edge.diagnostics.probes import on_jetson

    config_file, config_checks = None, []
    if arguments.config is not None:
        config_file, check = doctor.check_config(arguments.config)
        config_checks.append(check)
    checks = doctor.run_checks(broker=arguments.broker, config_file=config_file, folder=arguments.dir) + config_checks
    role = arguments.role
    if role == "auto":
        role = config_file.role if config_file else "device" if on_jetson() else "server"
    roles = doctor.usable_roles(checks)
    role_is_given = arguments.role != "auto" or config_file is not None
    failed = [
        check.name
        for check in checks
        if check.state == "failed" and (check.name in doctor.REQUESTED_CHECKS or not role_is_given)
    ]
    usable = roles[role] and not failed
    if arguments.json:
        found = [check.to_dict() for check in checks]
        print_json({"usable": usable, "role": role, "roles": roles, "checks": found, "version": __version__})
    else:
        _print_table(checks, roles)
    return 0 if usable else 1


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
    usable, unusable = ([role for role in roles if roles[role] is wanted] for wanted in (True, False))
    verdict = f"usable as: {', '.join(usable) or 'nothing yet'}"
    console.print(Text(f"{verdict}; not as: {', '.join(unusable)}" if unusable else verdict))


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 192.168.1.10:1883")
    return text
