"""Command `fedspine-edge status`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedspine_edge.cli.options import add_json_option

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fedspine_edge.monitoring.status import DeviceStatus, FleetStatus
    from fedspine_edge.server.journal.schema import DeviceView

EXAMPLE = """fedspine-edge status runs/fleet
  fedspine-edge status runs/fleet --follow"""

POLL_S = 1.0
"""Interval at which `--follow` checks whether the journal has changed."""
REREAD_S = 10.0
"""Interval after which the journal is read in any case: two writes within one tick of the file clock look like one."""
SERVER_TIMEOUT_S = 30.0
"""Time that `--follow` waits for a stopped server. A killed service restarts within seconds."""
MOST_FAILURES = 20
"""Largest number of failures to list."""
WIDE = 100
"""Width of a terminal, in characters, from which the whole table is shown."""
OTHER_LINES = 12
"""Lines of the page in addition to the devices. Live truncates what does not fit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="run folder of the server, during or after the run")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="update until the run is finished, until Ctrl-C, or until no server has been running for "
        f"{SERVER_TIMEOUT_S:.0f} s (exit code 1); redraws a terminal, and prints changed lines elsewhere",
    )
    add_json_option(parser, "print one JSON object; with --follow, one per change")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.monitoring.status import read_status

    if arguments.follow:
        try:
            return _follow(arguments.run_dir, as_json=arguments.json)
        except KeyboardInterrupt:  # the usual way to stop
            return 130
    status = read_status(arguments.run_dir)
    if arguments.json:
        print_json(status.to_dict())
    else:
        console = _console()
        console.print(_page(status, arguments.run_dir, console), highlight=False)
    return 0


def _follow(run_dir: Path, *, as_json: bool) -> int:
    from rich.live import Live

    seen: dict[str, str] = {}
    console = _console()
    if console.is_terminal and not as_json:
        with Live(console=console, auto_refresh=False) as live:
            for status in _changes(run_dir, every_tick=True):
                rows = max(3, console.height - OTHER_LINES)
                live.update(_page(status, run_dir, console, rows=rows), refresh=True)
    else:
        for status in _changes(run_dir):
            if as_json:
                print(json.dumps(status.to_dict(), sort_keys=True), flush=True)
                continue
            lines = dict(_lines(status))
            clock = time.strftime("%H:%M:%S")
            for name, line in lines.items():
                if seen.get(name) != line:
                    print(f"{clock} {line}", flush=True)
            seen = lines
    if status.state == "finished":
        return 0
    print(f"no server has been running on {run_dir} for {SERVER_TIMEOUT_S:.0f} s", file=sys.stderr)
    return 1


def _changes(run_dir: Path, *, every_tick: bool = False) -> Iterator[FleetStatus]:
    """Yield the status of the run now and after each change, until it is finished or no server runs any more."""
    from fedspine_edge.monitoring.status import read_status
    from fedspine_edge.server.run_dir import changed_wall_s, is_server_running

    status = read_status(run_dir)
    folder = run_dir if run_dir.is_dir() else run_dir.parent
    shown, read_at, alive_at = None, time.monotonic(), time.monotonic()
    while True:
        if every_tick or status.to_dict() != shown:
            shown = status.to_dict()
            yield status
        if status.server_running is not False:
            alive_at = time.monotonic()
        if status.state == "finished" or time.monotonic() - alive_at > SERVER_TIMEOUT_S:
            return
        time.sleep(POLL_S)
        try:
            now = (is_server_running(folder), changed_wall_s(folder))
        except OSError:  # the folder was removed, for which `read_status` raises a better error
            now = None
        if now != (status.server_running, status.changed_wall_s) or time.monotonic() - read_at > REREAD_S:
            status, read_at = read_status(run_dir), time.monotonic()


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def _page(status: FleetStatus, run_dir: Path, console: Console, *, rows: int | None = None) -> RenderableType:
    """Return the whole page with at most `rows` devices, those with problems first."""
    from rich.console import Group
    from rich.text import Text

    from fedspine_edge.cli.live_table import COLUMNS, cells, empty_table

    now_s = time.time()
    before = [_server_line(status, now_s), *_totals(status), *_time_left(status, now_s), *_next(status, run_dir)]
    lines = [Text(_headline(status), style="bold"), *map(Text, before)]
    without = () if console.width >= WIDE else ("class", "reward")
    table = empty_table("last seen", without=without, box=None, pad_edge=False, collapse_padding=True)
    devices = status.devices
    if rows is not None and len(devices) > rows:
        devices = sorted(devices, key=_is_well)[:rows]  # a stable sort
    for device in devices:
        shown = cells(device.newest) if device.newest else [""] * len(COLUMNS)
        shown[:3] = device.device_id, device.device_class, _device_state(device, finished=status.state == "finished")
        kept = [cell for name, cell in zip(COLUMNS, shown) if name not in without]
        table.add_row(*kept, _last_seen(device, status, now_s))
    after = list(_failures(status))
    if len(devices) < len(status.devices):
        after.insert(0, f"and {len(status.devices) - len(devices)} more devices; run without --follow to list all")
    return Group(*lines, *([table] if devices else []), *map(Text, after))


def _lines(status: FleetStatus) -> Iterator[tuple[str, str]]:
    """Yield lines that change only with an event, each with its key.

    They cover the last two rounds, because more than one event may happen between two polls.
    """
    yield "server", _SERVER[status.server_running]
    for view in status.rounds[-2:]:
        if view.ended_wall_s is not None:
            took = _duration(view.ended_wall_s - view.started_wall_s)
            line = f"round {view.server_round} {view.state} in {took}{_means(view.mean_loss, view.mean_accuracy)}"
            yield f"round {view.server_round}/{view.attempt}", line
    for part in status.view.rows:
        if part.server_round >= status.view.rows[-1].server_round - 1:
            yield f"{part.device_id}/{part.server_round}", _part_line(part)
    for device in status.devices if status.state != "finished" else ():  # the server no longer receives their status
        connected = "refused: " + device.refused if device.refused else "online" if device.online else "offline"
        yield device.device_id, f"{device.device_id} {connected}"
    yield "", _headline(status)


def _part_line(part: DeviceView) -> str:
    line = f"round {part.server_round}: {part.device_id} {part.status}, ratio {part.pruning_ratio:.3f}, rank {part.r}"
    line += f", {part.completion_time_s:.1f} s {part.time_kind}" if part.completion_time_s else ""
    line += _means(part.loss_after, part.accuracy_after)
    return f"{line}: {part.reason}" if part.reason else line


def _means(loss: float | None, accuracy: float | None) -> str:
    known = [("loss", loss), ("accuracy", accuracy)]
    return "".join(f", {name} {value:.4f}" for name, value in known if value is not None)


def _headline(status: FleetStatus) -> str:
    name = f"run {status.run_id}" if status.run_id else "a run that has not started"
    return f"{name} · {_where(status)}"


def _where(status: FleetStatus) -> str:
    number, rounds = status.server_round, status.num_rounds
    online = status.devices_online
    of = f"round {number} of {rounds}" + (f", attempt {status.attempt}" if status.attempt > 1 else "")
    if status.state == "finished":
        return f"finished after {rounds} rounds"
    if number > rounds > 0:
        text = f"all {rounds} rounds are done; the server writes the final files"
    elif status.open_round is not None:
        parts = [device.newest for device in status.devices if device.newest is not None]
        answered = sum(part.status != "running" for part in parts)
        text = f"{of} is running: {answered} of {status.open_round.num_devices} devices have answered"
    elif online < status.devices_needed:
        text = f"waiting for devices before {of}: {online} of {status.devices_needed} online"
    else:
        text = f"between rounds, {of} is next: {online} of {len(status.devices)} devices online"
    return f"stopped before it was finished; last state: {text}" if status.state == "stopped" else text


_SERVER = {
    True: "the server is running",
    False: "no server is running",
    None: "server state unknown (the lock file cannot be read)",
}


def _server_line(status: FleetStatus, now_s: float) -> str:
    parts = [_SERVER[status.server_running], f"journal written {_ago(now_s - status.changed_wall_s)}"]
    if status.virtual:
        parts.append("simulation: all other times are virtual")
    elif status.open_round is not None and status.state == "running":
        end = status.open_round.started_wall_s + status.deadline_s
        parts.append(f"the round started {_ago(now_s - status.open_round.started_wall_s)}, deadline {_clock(end)}")
    return " · ".join(parts)


def _device_state(device: DeviceStatus, *, finished: bool) -> str:
    state = "refused" if device.refused else device.newest.status if device.newest else "waiting"
    return state if device.online or finished else f"{state}, offline"


def _is_well(device: DeviceStatus) -> bool:
    return device.online and not device.refused and (device.newest is None or device.newest.status in ("ok", "running"))


def _last_seen(device: DeviceStatus, status: FleetStatus, now_s: float) -> str:
    if not device.last_seen_wall_s:
        return "not yet"
    return f"at {device.last_seen_wall_s:.0f} s" if status.virtual else _ago(now_s - device.last_seen_wall_s)


def _failures(status: FleetStatus) -> Iterator[str]:
    refused = [device for device in status.devices if device.refused]
    failed = [device.last_failure for device in status.devices if device.last_failure is not None]
    failed.sort(key=lambda part: (-part.server_round, -part.attempt, part.device_id))
    if refused or failed:
        yield "refused devices and last failures:"
    for device in refused[:MOST_FAILURES]:
        yield f"  {device.device_id}: refused: {device.refused}"
    for failure in failed[:MOST_FAILURES]:
        attempt = f", attempt {failure.attempt}" if failure.attempt > 1 else ""
        reason = f": {failure.reason}" if failure.reason else ""
        yield f"  {failure.device_id}: round {failure.server_round}{attempt}, {failure.status}{reason}"
    left_out = max(0, len(refused) - MOST_FAILURES) + max(0, len(failed) - MOST_FAILURES)
    if left_out:
        yield f"  and {left_out} more; use --json to list all"


def _totals(status: FleetStatus) -> Iterator[str]:
    total, done = status.totals(), status.last_done
    online = "" if status.state == "finished" else f", {total['devices_online']} online"
    online += " when the server stopped" if status.state == "stopped" else ""
    repeated = f", {total['attempts_failed']} attempts failed" if total["attempts_failed"] else ""
    yield (
        f"total: {total['rounds_done']} rounds done{repeated}; {total['devices']} devices{online}; "
        f"up {total['bytes_up'] / 1e6:.1f} MB, down {total['bytes_down'] / 1e6:.1f} MB"
    )
    if done is not None and (means := _means(done.mean_loss, done.mean_accuracy)):
        yield f"means of round {done.server_round}: {means[2:]}"
    kinds = {device.newest.time_kind for device in status.devices if device.newest} - {"measured", None}
    for kind in sorted(map(str, kinds)):
        yield f"time is {kind}, not measured"


def _time_left(status: FleetStatus, now_s: float) -> Iterator[str]:
    left, pace = status.time_left_s(now_s), status.round_time_range_s
    if left is not None and pace is not None:
        yield (
            f"time left: {_range(*left)}, if further rounds take as long as the last ones ({_range(*pace)} each); "
            "a longer round counts up to its deadline"
        )


def _next(status: FleetStatus, run_dir: Path) -> Iterator[str]:
    if status.state == "waiting":
        yield "next: start the devices; if one is missing here, run on it: fedspine-edge doctor --config device.toml"
    elif status.state == "finished":
        yield f"next: fedspine-edge assemble {run_dir} --model BASE --out model/"
    elif status.state == "stopped":
        why = status.stopped_because or "the server gave no reason; it was killed, or its machine stopped."
        yield f"reason: {why}"
        how = "the same simulate command" if status.virtual else "fedspine-edge server with the same --config file"
        yield f"to continue: {how}"


def _ago(duration_s: float) -> str:
    return "now" if duration_s < 1 else f"{_duration(duration_s)} ago"


def _range(shortest_s: float, longest_s: float) -> str:
    short, long = _duration(shortest_s), _duration(longest_s)
    return long if short == long else f"{short} to {long}"


def _duration(duration_s: float) -> str:
    """Return a rounded duration: 41 s, 7 min, 3.5 h, 2.1 days."""
    if duration_s < 99.5:
        return f"{duration_s:.0f} s"
    if duration_s < 99.5 * 60:
        return f"{duration_s / 60:.0f} min"
    if duration_s < 48 * 3600:
        return f"{duration_s / 3600:.1f} h"
    return f"{duration_s / 86400:.1f} days"


def _clock(wall_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(wall_s))
