"""Tables of the journal, and the records it stores and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedspine_edge.model.layout import Layout
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import BlobRef, Report, RoundPlan
from fedspine_edge.strategies import RewardTerms, RoundOutcome

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

ADDED_TABLES = """
CREATE TABLE IF NOT EXISTS final_layout (only_row INTEGER PRIMARY KEY CHECK (only_row = 1), layout BLOB NOT NULL);
"""
"""Tables that journals of earlier versions lack. They are added when a server opens such a journal."""


@dataclass(frozen=True)
class RunState:
    """The state that carries over from one round to the next.

    Attributes:
        server_round: The round to run now, from 1; above num_rounds when only the final files are left to write.
        attempt: Attempt at this round, from 1.
        failures: Consecutive failed attempts.
        strategy: `Strategy.to_dict()`, the bandit's random generators included; None before the first round.
        adapter: Blob of the round's adapter, head and order; None before the first round.
        open: Whether the plans of this round and attempt are journaled and the round is not yet committed.
    """

    server_round: int = 1
    attempt: int = 1
    failures: int = 0
    strategy: dict[str, Any] | None = None
    adapter: BlobRef | None = None
    open: bool = False


@dataclass(frozen=True)
class IssuedPlan:
    """A round plan as it is published to one device.

    Attributes:
        plan: The plan.
        payload: Its bytes, as published.
        sha256: Digest of the payload; the report quotes it.
        u: The arm's position in the pruning schedule; None where no bandit chose.
        explain: The strategy's explanation of the plan, as plain JSON data.
        disconnects: Number of times the device was disconnected during the round.
    """

    plan: RoundPlan
    payload: bytes
    sha256: str
    u: float | None = None
    explain: dict[str, Any] = field(default_factory=dict)
    disconnects: int = 0

    @classmethod
    def from_plan(cls, plan: RoundPlan, *, u: float | None = None, explain: dict[str, Any] | None = None) -> IssuedPlan:
        """Encode `plan`."""
        payload = codec.encode(plan)
        return cls(plan, payload, codec.digest(payload), u, explain or {})


@dataclass(frozen=True)
class RecordedReport:
    """The final report of a device on a plan.

    Attributes:
        report: The report as received.
        status: accepted, refused, failed or out_of_memory.
        reason: Why the report was refused or the round failed, or a remark of the device.
        widths: (heads, channels) kept in each layer; None unless accepted.
        sparsity: Share of all parameters absent; None unless accepted.
        achieved_ratio: Pruning ratio of the kept layout; None unless accepted.
    """

    report: Report
    status: str
    reason: str = ""
    widths: list[tuple[int, int]] | None = None
    sparsity: float | None = None
    achieved_ratio: float | None = None


@dataclass(frozen=True)
class ClosedRound:
    """The end of one attempt at a round.

    Attributes:
        server_round: The round.
        attempt: The attempt.
        done: Whether the round was aggregated; False when it has to be repeated.
        outcomes: The outcome of every plan of the round, with its reward where there is one.
        mean_loss: Mean loss of the accepted devices after the round.
        mean_accuracy: Mean accuracy of the accepted devices after the round.
        bytes_up: Bytes that the devices reported as sent.
        bytes_down: Bytes that the devices reported as received.
        layouts: By accepted device the layout it keeps now and the pruning ratio it reported.
        explained_variance: Per module the share of the squared norm kept at each rank.
        final_layout: The layout of the finished model, with the last round.
    """

    server_round: int
    attempt: int
    done: bool
    outcomes: Sequence[tuple[RoundOutcome, RewardTerms | None]]
    mean_loss: float | None = None
    mean_accuracy: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    layouts: Mapping[str, tuple[Layout, float]] = field(default_factory=dict)
    explained_variance: Mapping[str, Sequence[float]] = field(default_factory=dict)
    final_layout: Layout | None = None


@dataclass(frozen=True)
class RoundView:
    """One attempt at a round, for display.

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
    """One device's part in one round, for display. Figures that were not measured are None.

    `status` is running (no report yet), ok, refused, failed, out_of_memory, late or lost. `pruning_ratio` and `r` are
    those of the plan; `achieved_ratio` and `sparsity` follow from the kept indices.
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
    """Number of times the device was disconnected during the round (lost connection, lost power, a restart)."""
