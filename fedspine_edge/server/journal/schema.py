"""The journal's tables and the rows it hands out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VERSION = 2

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE devices (
    device_id TEXT PRIMARY KEY, status TEXT NOT NULL, online INTEGER NOT NULL, refused TEXT NOT NULL DEFAULT '',
    layout BLOB, reported REAL, updated_wall_s REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE rounds (
    number INTEGER, attempt INTEGER, state TEXT NOT NULL, started_wall_s REAL NOT NULL, ended_wall_s REAL,
    blob TEXT NOT NULL, mean_loss REAL, mean_accuracy REAL, accepted INTEGER, bytes_up INTEGER, bytes_down INTEGER,
    PRIMARY KEY (number, attempt)
) WITHOUT ROWID;
CREATE TABLE plans (
    number INTEGER, attempt INTEGER, device_id TEXT, plan BLOB NOT NULL, plan_sha256 TEXT NOT NULL, u REAL,
    explain TEXT NOT NULL, disconnects INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (number, attempt, device_id)
) WITHOUT ROWID;
CREATE INDEX plans_by_digest ON plans (device_id, plan_sha256);
CREATE TABLE reports (
    number INTEGER, attempt INTEGER, device_id TEXT, report TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    widths TEXT, sparsity REAL, achieved REAL, received_wall_s REAL NOT NULL,
    PRIMARY KEY (number, attempt, device_id)
) WITHOUT ROWID;
CREATE TABLE outcomes (
    number INTEGER, attempt INTEGER, device_id TEXT, status TEXT NOT NULL, reason TEXT NOT NULL, reward REAL,
    terms TEXT,
    PRIMARY KEY (number, attempt, device_id)
) WITHOUT ROWID;
CREATE TABLE energy (number INTEGER, module TEXT, kept TEXT NOT NULL, PRIMARY KEY (number, module)) WITHOUT ROWID;
CREATE TABLE published (sha256 TEXT PRIMARY KEY, ref TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class RunState:
    """Everything that carries over from one round to the next.

    Attributes:
        server_round: The round to run now, from 1; above num_rounds when only finishing is left.
        attempt: From 1, above it when the round is repeated.
        failures: Consecutive failed attempts.
        strategy: `Strategy.to_dict()`, the bandit's random generators included; None before the first round.
        blob: JSON of the `BlobRef` of the round's adapter, head and order; empty before the first round.
        open: Whether plans of this round and attempt are journaled and the round is not yet committed.
    """

    server_round: int = 1
    attempt: int = 1
    failures: int = 0
    strategy: dict[str, Any] | None = None
    blob: str = ""
    open: bool = False


@dataclass(frozen=True)
class PlanRow:
    """A plan as it was published."""

    device_id: str
    payload: bytes
    sha256: str
    u: float | None
    explain: dict[str, Any] = field(default_factory=dict)
    disconnects: int = 0


@dataclass(frozen=True)
class ReportRow:
    """A device's final answer to a plan; `status` is accepted, refused, failed or out_of_memory."""

    device_id: str
    report: bytes
    status: str
    reason: str = ""
    widths: list[tuple[int, int]] | None = None
    sparsity: float | None = None
    achieved: float | None = None


@dataclass(frozen=True)
class OutcomeRow:
    """What became of a plan; `status` as in `RoundOutcome`, with `refused` where the gate said no."""

    device_id: str
    status: str
    reason: str = ""
    reward: float | None = None
    terms: dict[str, Any] | None = None


@dataclass(frozen=True)
class RoundView:
    """One attempt at a round, for people.

    `state` is running, done or failed. Times are wall clock in seconds since the epoch (virtual in simulations);
    means are over accepted devices, None before the end.
    """

    server_round: int
    attempt: int
    state: str
    started_wall_s: float
    ended_wall_s: float | None
    mean_loss: float | None
    mean_accuracy: float | None
    num_devices: int
    accepted: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class DeviceView:
    """One device's part in one round, for people. Figures that were not measured are None.

    `status` is running (no answer yet), ok, refused, failed, out_of_memory, late or lost. `pruning_ratio` and `r` are
    what the plan asked for, `achieved_ratio` and `sparsity` what the kept indices say.
    """

    server_round: int
    attempt: int
    device_id: str
    device_class: str
    status: str
    reason: str
    u: float | None
    pruning_ratio: float
    r: int
    achieved_ratio: float | None = None
    sparsity: float | None = None
    widths: list[tuple[int, int]] | None = None
    """(heads, channels) kept in each layer."""
    num_examples: int | None = None
    completion_time_s: float | None = None
    time_kind: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    train_loss: float | None = None
    lora_importance: float | None = None
    peak_memory_bytes: int | None = None
    reward: float | None = None
    reward_terms: dict[str, float] | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    restarts: int = 0
    """Times the device was cut off during the round (lost connection, lost power, a restart)."""
