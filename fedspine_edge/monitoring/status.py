"""Where a fleet's run stands, read from the server's folder while the server is at work or after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedspine_edge.monitoring.run_view import RunView, view_of
from fedspine_edge.server.journal.reader import JournalReader
from fedspine_edge.server.journal.schema import DeviceView, RoundView
from fedspine_edge.server.run_dir import changed_wall_s, server_at_work

State = Literal["waiting", "running", "finished", "stopped"]

ENDED_WELL = ("ok", "running")
PACE_ROUNDS = 5
"""Time left is told from so many rounds, the newest."""


@dataclass(frozen=True)
class DeviceStatus:
    """One device as the server last heard of it.

    Attributes:
        online: As of the last status; stays as it was while no server is there to hear.
        refused: Why it may not take part; empty if it may.
        heard_wall_s: When its last status (or the broker's word that it is gone) or report came; 0 if none has in
            this run: the broker had kept an older status.
        part: Its part in the newest round; None if it has none.
        failure: Its newest part, in any attempt at any round, that did not end well; None without one.
    """

    device_id: str
    device_class: str
    online: bool
    refused: str
    heard_wall_s: float
    part: DeviceView | None
    failure: DeviceView | None


@dataclass(frozen=True)
class FleetStatus:
    """A run at one moment. Times are in seconds since the epoch, and virtual in a simulation (`virtual`).

    Attributes:
        state: waiting (for devices, before a round), running, finished, or stopped: not finished and no server at work.
        server_at_work: None where it cannot be told.
        changed_wall_s: When the journal was last written, in real time even in a simulation.
        server_round: The round that runs or comes next; above `num_rounds` while the last files are written.
        attempt: At that round, from 1.
        devices_needed: How many must be online before it begins.
        open_round: The round that runs; None between rounds.
        deadline_s: Limit of one round, in seconds.
        stopped_because: What the server said when it stopped; empty if it could not say anything, or has not stopped.
        rounds: Every attempt at every round.
        devices: All that were ever heard, by id.
        view: The rows of the newest attempts, as the report takes them.
    """

    run_id: str
    state: State
    server_at_work: bool | None
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
        """The newest round that ended well."""
        return next((view for view in reversed(self.rounds) if view.state == "done"), None)

    @property
    def pace_s(self) -> tuple[float, float] | None:
        """Shortest and longest of the newest finished rounds, in seconds; None before there are two."""
        done = [v.ended_wall_s - v.started_wall_s for v in self.rounds if v.state == "done" and v.ended_wall_s]
        return (min(done[-PACE_ROUNDS:]), max(done[-PACE_ROUNDS:])) if len(done) > 1 else None

    def time_left_s(self, now_s: float) -> tuple[float, float] | None:
        """Seconds left if every round to come takes as long as the newest ones took: by the shortest, by the longest.

        A round that is running for longer than any of them is counted to its deadline. None where that
        would be a guess: before two rounds are done, while no server is at work or a round waits for devices, and in
        virtual time.
        """
        if self.pace_s is None or self.open_round is None or self.virtual or self.server_at_work is False:
            return None
        spent = max(0.0, now_s - self.open_round.started_wall_s)
        later = self.num_rounds - self.server_round
        shortest, longest = self.pace_s
        most = longest if spent < longest else self.deadline_s
        return max(0.0, shortest - spent) + later * shortest, max(0.0, most - spent) + later * longest

    @property
    def devices_online(self) -> int:
        """How many could be given a plan, as the server last heard."""
        return sum(device.online and not device.refused for device in self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`: the same as long as the run does not change."""
        view = self.open_round or self.last_done
        return {
            "run_id": self.run_id,
            "state": self.state,
            "server_at_work": self.server_at_work,
            "stopped_because": self.stopped_because,
            "journal_changed_wall_s": self.changed_wall_s,
            "virtual_time": self.virtual,
            "server_round": min(self.server_round, self.num_rounds),
            "num_rounds": self.num_rounds,
            "attempt": self.attempt,
            "round_open": self.open_round is not None,
            "devices_needed": self.devices_needed,
            "newest_round": None if view is None else asdict(view),
            "pace_s": self.pace_s,
            "totals": self.totals(),
            "devices": [_plain(device) for device in self.devices],
            "result": self.view.result or None,
        }

    def totals(self) -> dict[str, Any]:
        """Figures over the whole run; loss and accuracy are means of the newest round that ended well."""
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
    """Where the run in `run_dir` stands. Changes nothing and keeps no server waiting.

    Raises `ConfigError` when there is no journal, or one that cannot be read.
    """
    with JournalReader.open_readonly(run_dir) as journal:
        folder = journal.path.parent
        # Asked first: a server that ends in between has written its result by the time that is read.
        at_work, changed = server_at_work(folder), changed_wall_s(folder)
        with journal.snapshot():
            summary, parts, rounds = journal.summary(), journal.device_rounds(), journal.rounds()
            state, known, heard = journal.state(), journal.devices(), journal.heard_wall_s()
            texts = {key: journal.meta(key) for key in ("config", "clock", "stopped")}
    settings = json.loads(texts["config"] or "{}")
    open_round = rounds[-1] if state.open else None
    first = (state.server_round, state.attempt) == (1, 1)
    view = view_of(summary, parts)
    newest = {p.device_id: p for p in view.rows if p.server_round == view.rows[-1].server_round}
    failed = {p.device_id: p for p in parts if p.status not in ENDED_WELL}
    devices = [
        DeviceStatus(
            status.device_id,
            status.device_class,
            online,
            refused,
            heard[status.device_id],
            newest.get(status.device_id),
            failed.get(status.device_id),
        )
        for status, online, refused in known
    ]
    needed = max(settings.get("min_reports", 1), settings.get("min_devices", 1) if first else 1)
    online = sum(device.online and not device.refused for device in devices)
    return FleetStatus(
        run_id=summary["run_id"] or "",
        state=_state(view, at_work, waiting=not state.open and online < needed),
        server_at_work=at_work,
        changed_wall_s=changed,
        virtual=texts["clock"] == "virtual",
        server_round=state.server_round,
        num_rounds=view.num_rounds,
        attempt=state.attempt,
        devices_needed=needed,
        open_round=open_round,
        deadline_s=settings.get("deadline_s", 0.0),
        stopped_because="" if at_work else texts["stopped"] or "",
        rounds=rounds,
        devices=devices,
        view=view,
    )


def _state(view: RunView, at_work: bool | None, *, waiting: bool) -> State:
    if view.result:
        return "finished"
    if at_work is False:
        return "stopped"
    return "waiting" if waiting else "running"


def _plain(device: DeviceStatus) -> dict[str, Any]:
    def part(row: DeviceView | None, names: Sequence[str]) -> dict[str, Any] | None:
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
        "heard_wall_s": device.heard_wall_s,
        "part": part(device.part, figures),
        "failure": part(device.failure, ("server_round", "attempt", "status", "reason")),
    }
