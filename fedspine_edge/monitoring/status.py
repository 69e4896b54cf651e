"""Status of a fleet's run, read from the server's run folder while the server runs or afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedspine_edge.config import required_devices
from fedspine_edge.monitoring.run_view import RunView, build_run_view, printable
from fedspine_edge.server.journal.reader import JournalReader
from fedspine_edge.server.journal.schema import DeviceView, RoundView
from fedspine_edge.server.report_collector import escape_unprintable
from fedspine_edge.server.run_dir import changed_wall_s, is_server_running

State = Literal["waiting", "running", "finished", "stopped"]

SUCCESS_STATES = ("ok", "running")
RECENT_ROUNDS = 5
"""Number of finished rounds, the newest ones, from which the time left is estimated."""


@dataclass(frozen=True)
class DeviceStatus:
    """One device as the server last saw it.

    Attributes:
        online: Whether the device's last status was "online". The value does not change while no server runs.
        refused: Reason why the device may not take part; empty if it may.
        last_seen_wall_s: Time of the device's last status, last will or report; 0 if none was received in this run
            (the server knows the device only from a status that the broker had retained).
        newest: The device's row in the newest round; None if it has none.
        last_failure: The device's newest row, of any attempt at any round, that did not end well; None without one.
    """

    device_id: str
    device_class: str
    online: bool
    refused: str
    last_seen_wall_s: float
    newest: DeviceView | None
    last_failure: DeviceView | None


@dataclass(frozen=True)
class FleetStatus:
    """A run at one moment. Times are in seconds since the epoch, or virtual in a simulation (`virtual`).

    Attributes:
        state: waiting (for devices, before a round), running, finished, or stopped (not finished, and no server runs).
        server_running: Whether a server runs on the folder; None if that cannot be determined.
        changed_wall_s: Time of the last write to the journal, in real time even in a simulation.
        server_round: The round that runs or comes next; above `num_rounds` while the final files are written.
        attempt: Attempt at that round, from 1.
        devices_needed: Number of devices that must be online before the round begins.
        open_round: The round that runs; None between rounds.
        deadline_s: Deadline of a round in seconds.
        stopped_because: The error with which the server stopped; empty if it has not stopped or could not record one.
        rounds: Every attempt at every round.
        devices: All devices that the server has seen, by id.
        view: The rows of the newest attempts, in the form that the report takes.
    """

    run_id: str
    state: State
    server_running: bool | None
    changed_wall_s: float
    virtual: bool
    server_round: int
    num_rounds: int
    attempt: int
    devices_needed: int
    open_round: RoundView | None
    deadline_s: float
    stopped_because: str
    rounds: list[RoundView]
    devices: list[DeviceStatus]
    view: RunView

    @property
    def last_done(self) -> RoundView | None:
        """The newest round that succeeded."""
        return next((view for view in reversed(self.rounds) if view.state == "done"), None)

    @property
    def round_time_range_s(self) -> tuple[float, float] | None:
        """Shortest and longest duration of the newest finished rounds in seconds; None before two have finished."""
        done = [v.ended_wall_s - v.started_wall_s for v in self.rounds if v.state == "done" and v.ended_wall_s]
        return (min(done[-RECENT_ROUNDS:]), max(done[-RECENT_ROUNDS:])) if len(done) > 1 else None

    def time_left_s(self, now_s: float) -> tuple[float, float] | None:
        """Return the estimated time left in seconds, from the shortest and from the longest of the newest rounds.

        A round that has been running for longer than any of them is assumed to last until its deadline. The result is
        None if any estimate would be a guess: before two rounds have finished, while no server runs, while a round
        waits for devices, and in virtual time.
        """
        duration_s = self.round_time_range_s
        if duration_s is None or self.open_round is None or self.virtual or self.server_running is False:
            return None
        elapsed_s = max(0.0, now_s - self.open_round.started_wall_s)
        rounds_after = self.num_rounds - self.server_round
        shortest, longest = duration_s
        latest = longest if elapsed_s < longest else self.deadline_s
        return (
            max(0.0, shortest - elapsed_s) + rounds_after * shortest,
            max(0.0, latest - elapsed_s) + rounds_after * longest,
        )

    @property
    def devices_online(self) -> int:
        """Number of devices that could be given a plan, according to their last status."""
        return sum(device.online and not device.refused for device in self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `--json`. The result does not change as long as the run does not."""
        view = self.open_round or self.last_done
        return {
            "run_id": self.run_id,
            "state": self.state,
            "server_running": self.server_running,
            "server_at_work": self.server_running,  # deprecated name
            "stopped_because": self.stopped_because,
            "journal_changed_wall_s": self.changed_wall_s,
            "virtual_time": self.virtual,
            "server_round": min(self.server_round, self.num_rounds),
            "num_rounds": self.num_rounds,
            "attempt": self.attempt,
            "round_open": self.open_round is not None,
            "devices_needed": self.devices_needed,
            "newest_round": None if view is None else asdict(view),
            "round_time_range_s": self.round_time_range_s,
            "pace_s": self.round_time_range_s,  # deprecated name
            "totals": self.totals(),
            "devices": [_plain(device) for device in self.devices],
            "result": self.view.result or None,
        }

    def totals(self) -> dict[str, Any]:
        """Return figures over the whole run. Loss and accuracy are means of the newest round that succeeded."""
        done = self.last_done
        loss, accuracy = (None, None) if done is None else (done.mean_loss, done.mean_accuracy)
        return {
            "rounds_done": sum(view.state == "done" for view in self.rounds),
            "attempts_failed": sum(view.state == "failed" for view in self.rounds),
            "devices": len(self.devices),
            "devices_online": self.devices_online,
            "devices_refused": sum(bool(device.refused) for device in self.devices),
            "bytes_up": sum(view.bytes_up for view in self.rounds),
            "bytes_down": sum(view.bytes_down for view in self.rounds),
            "mean_loss": loss,
            "mean_accuracy": accuracy,
        }


def read_status(run_dir: Path) -> FleetStatus:
    """Read the status of the run in `run_dir`, without changing anything and without blocking the server.

    Raises `ConfigError` if the folder has no journal, or one that cannot be read.
    """
    with JournalReader.open_readonly(run_dir) as journal:
        folder = journal.path.parent
        # Read first: a server that ends in between has written its result by the time the journal is read.
        running, changed = is_server_running(folder), changed_wall_s(folder)
        with journal.snapshot():
            summary, rounds = journal.summary(), journal.rounds()
            device_rounds = [printable(row) for row in journal.device_rounds()]
            state, known, last_seen = journal.state(), journal.devices(), journal.last_seen_wall_s()
            texts = {key: journal.meta(key) for key in ("config", "clock", "stopped")}
    settings = json.loads(texts["config"] or "{}")
    open_round = rounds[-1] if state.open else None
    view = build_run_view(summary, device_rounds)
    newest = {row.device_id: row for row in view.rows if row.server_round == view.rows[-1].server_round}
    failures = {row.device_id: row for row in device_rounds if row.status not in SUCCESS_STATES}
    devices = [
        DeviceStatus(
            status.device_id,
            status.device_class,
            online,
            escape_unprintable(refused),
            last_seen[status.device_id],
            newest.get(status.device_id),
            failures.get(status.device_id),
        )
        for status, online, refused in known
    ]
    needed = required_devices(
        settings.get("min_reports", 1),
        settings.get("min_devices", 1),
        first_attempt=(state.server_round, state.attempt) == (1, 1),
    )
    online = sum(device.online and not device.refused for device in devices)
    return FleetStatus(
        run_id=summary["run_id"] or "",
        state=_state(view, running, waiting=not state.open and online < needed),
        server_running=running,
        changed_wall_s=changed,
        virtual=texts["clock"] == "virtual",
        server_round=state.server_round,
        num_rounds=view.num_rounds,
        attempt=state.attempt,
        devices_needed=needed,
        open_round=open_round,
        deadline_s=settings.get("deadline_s", 0.0),
        stopped_because="" if running else "\n".join(map(escape_unprintable, (texts["stopped"] or "").split("\n"))),
        rounds=rounds,
        devices=devices,
        view=view,
    )


def _state(view: RunView, running: bool | None, *, waiting: bool) -> State:
    if view.result:
        return "finished"
    if running is False:
        return "stopped"
    return "waiting" if waiting else "running"


def _plain(device: DeviceStatus) -> dict[str, Any]:
    def pick(row: DeviceView | None, names: Sequence[str]) -> dict[str, Any] | None:
        return None if row is None else {name: getattr(row, name) for name in names}

    figures = (
        *("server_round", "attempt", "status", "reason", "pruning_ratio", "achieved_ratio", "r", "completion_time_s"),
        *("time_kind", "loss_before", "loss_after", "accuracy_before", "accuracy_after", "reward"),
        *("bytes_up", "bytes_down", "restarts"),
    )
    return {
        "device_id": device.device_id,
        "device_class": device.device_class,
        "online": device.online,
        "refused": device.refused,
        "last_seen_wall_s": device.last_seen_wall_s,
        "heard_wall_s": device.last_seen_wall_s,  # deprecated name
        "part": pick(device.newest, figures),
        "failure": pick(device.last_failure, ("server_round", "attempt", "status", "reason")),
    }
