"""Read access to a run's journal: the state that a server resumes from, and figures for display.

Readers never block the server, nor does the server block them.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import BlobRef, Report, RoundPlan, Status
from fedspine_edge.server.journal.schema import (
    VERSION,
    DeviceView,
    IssuedPlan,
    RecordedReport,
    RoundView,
    RunState,
)

M = TypeVar("M", Status, Report)

FILE = "journal.sqlite"
BUSY_TIMEOUT_MS = 10_000


class JournalReader:
    """A journal open for reading, created by `open_readonly`. The server itself uses the subclass `Journal`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self.path = path
        connection.row_factory = sqlite3.Row
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")

    @staticmethod
    def open_readonly(path: str | Path) -> JournalReader:
        """Open for reading while a server may be writing; neither blocks the other.

        Args:
            path: The journal, or the run folder that contains it.

        Raises `ConfigError` when there is none.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            below = sorted(path.parent.glob(f"*/{FILE}")) if path.name == FILE else []
            remedy = f"Did you mean {below[0].parent}?" if below else "Give the run_dir of a server that was started."
            raise ConfigError(f"there is no journal at {path}.", remedy=remedy)
        if not os.access(path, os.R_OK):
            raise ConfigError(
                f"this user has no permission to read journal {path}.", remedy="Run the command as the server's user."
            )
        try:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            if not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
                uri += "&immutable=1"  # SQLite would create that file; a running server always has it
            with ExitStack() as undo:
                connection = undo.enter_context(closing(sqlite3.connect(uri, uri=True, isolation_level=None)))
                journal = JournalReader(connection, path)
                journal._check_version()
                undo.pop_all()
        except sqlite3.DatabaseError as error:
            raise damaged(path, error) from error
        return journal

    def close(self) -> None:
        """Close the file. May be called repeatedly."""
        self._db.close()

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read a consistent state within the block, whatever a server writes meanwhile."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def meta(self, key: str) -> str | None:
        """Return a text stored by `set_meta`, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row["value"])

    def meta_names(self, prefix: str) -> set[str]:
        """Return the names of stored texts that begin with `prefix`, without the prefix."""
        rows = self._db.execute(
            "SELECT substr(key, ?) AS name FROM meta WHERE substr(key, 1, ?) = ?",
            (len(prefix) + 1, len(prefix), prefix),
        )
        return {row["name"] for row in rows.fetchall()}

    @property
    def spec(self) -> ModelSpec | None:
        """The model of the fleet; None before the first round."""
        text = self.meta("spec")
        return None if text is None else msgspec.json.decode(text, type=ModelSpec)

    def state(self) -> RunState:
        """Return the state to continue from."""
        text = self.meta("state")
        return RunState() if text is None else _state_from_text(text)

    def devices(self) -> list[tuple[Status, bool, str]]:
        """Return (status, online, reason for rejection or "") of every known device, by id."""
        rows = self._db.execute("SELECT status, online, refused FROM devices ORDER BY device_id").fetchall()
        found = []
        for row in rows:
            # A status from before its numbers had ranges may be unreadable; the device publishes a new one.
            with suppress(msgspec.ValidationError):
                status = msgspec.json.decode(row["status"], type=Status)
                found.append((status, bool(row["online"]), row["refused"]))
        return found

    def last_seen_wall_s(self) -> dict[str, float]:
        """Return by device the wall time of its last status, last will or report.

        It is 0 for a device of which the server found only a status that the broker had retained.
        """
        rows = self._db.execute(
            "SELECT device_id, max(updated_wall_s, coalesce(latest, 0)) AS seen FROM devices LEFT JOIN "
            "(SELECT device_id, max(received_wall_s) AS latest FROM reports GROUP BY device_id) USING (device_id)"
        ).fetchall()
        return {row["device_id"]: float(row["seen"]) for row in rows}

    def layouts(self, spec: ModelSpec) -> dict[str, tuple[Layout, float]]:
        """Return by device the layout it last reported and the pruning ratio it reported with it."""
        rows = self._db.execute(
            "SELECT device_id, layout, reported FROM devices WHERE layout IS NOT NULL ORDER BY device_id"
        ).fetchall()
        return {row["device_id"]: (_layout_from_blob(spec, row["layout"]), row["reported"]) for row in rows}

    def final_layout(self, spec: ModelSpec) -> Layout | None:
        """Return the layout of the finished model; None before the last round has ended."""
        row = self._db.execute("SELECT layout FROM final_layout").fetchone()
        if row is not None:
            return _layout_from_blob(spec, row["layout"])
        text = self.meta("layout")  # where earlier versions stored it
        return None if text is None else Layout.from_dict(spec, json.loads(text))

    def started_wall_s(self, server_round: int, attempt: int) -> float:
        """Return the wall time at which a round started."""
        row = self._db.execute(
            "SELECT started_wall_s FROM rounds WHERE number = ? AND attempt = ?", (server_round, attempt)
        ).fetchone()
        return float(row["started_wall_s"])

    def latest_wall_s(self) -> float:
        """Return the wall time of the last round or report that was journaled; 0 before the first."""
        columns = {"rounds": ("started_wall_s", "ended_wall_s"), "reports": ("received_wall_s",)}
        times = [
            self._db.execute(f"SELECT max({column}) FROM {table}").fetchone()[0]
            for table, names in columns.items()
            for column in names
        ]
        return max((float(time) for time in times if time is not None), default=0.0)

    def plans(self, server_round: int, attempt: int, *, device_id: str | None = None) -> list[IssuedPlan]:
        """Return the plans of a round by device id, or that of one device."""
        rows = self._db.execute(
            "SELECT * FROM plans WHERE number = ? AND attempt = ? AND device_id = coalesce(?, device_id) "
            "ORDER BY device_id",
            (server_round, attempt, device_id),
        ).fetchall()
        return [
            IssuedPlan(
                msgspec.json.decode(row["plan"], type=RoundPlan),
                row["plan"],
                row["plan_sha256"],
                row["u"],
                json.loads(row["explain"]),
                row["disconnects"],
            )
            for row in rows
        ]

    def has_plan(self, device_id: str, plan_sha256: str) -> bool:
        """Return whether this plan was ever issued to the device."""
        return (
            self._db.execute(
                "SELECT 1 FROM plans WHERE device_id = ? AND plan_sha256 = ?", (device_id, plan_sha256)
            ).fetchone()
            is not None
        )

    def is_open(self, device_id: str, plan_sha256: str) -> bool:
        """Return whether the round of this plan is still open."""
        return (
            self._db.execute(
                "SELECT 1 FROM plans JOIN rounds USING (number, attempt) "
                "WHERE device_id = ? AND plan_sha256 = ? AND ended_wall_s IS NULL",
                (device_id, plan_sha256),
            ).fetchone()
            is not None
        )

    def reports(self, server_round: int, attempt: int) -> list[RecordedReport]:
        """Return the recorded reports of a round, by device id."""
        rows = self._db.execute(
            "SELECT reports.*, plans.plan_sha256 FROM reports JOIN plans USING (number, attempt, device_id) "
            "WHERE number = ? AND attempt = ? ORDER BY device_id",
            (server_round, attempt),
        ).fetchall()
        return [_recorded_report(row) for row in rows]

    def recorded_status(self, device_id: str, plan_sha256: str) -> tuple[str, str] | None:
        """Return (status, reason) of the recorded report on this plan, if there is one."""
        row = self._db.execute(
            "SELECT reports.status, reports.reason FROM plans JOIN reports USING (number, attempt, device_id) "
            "WHERE plans.device_id = ? AND plans.plan_sha256 = ?",
            (device_id, plan_sha256),
        ).fetchone()
        return None if row is None else (row["status"], row["reason"])

    def published(self) -> list[BlobRef]:
        """Return the blobs whose chunks may still be retained at the broker."""
        return [
            msgspec.json.decode(row["ref"], type=BlobRef)
            for row in self._db.execute("SELECT ref FROM published ORDER BY sha256").fetchall()
        ]

    def rounds(self) -> list[RoundView]:
        """Return every attempt at every round, in order; figures of a running one cover the reports so far."""
        rows = self._db.execute(
            "SELECT rounds.*, (SELECT count(*) FROM plans WHERE plans.number = rounds.number "
            "AND plans.attempt = rounds.attempt) AS asked FROM rounds ORDER BY number, attempt"
        ).fetchall()
        views = []
        for row in rows:
            accepted, up, down = row["accepted"], row["bytes_up"], row["bytes_down"]
            if row["ended_wall_s"] is None:
                devices = self.device_rounds(row["number"], row["attempt"])
                accepted = sum(device.status == "ok" for device in devices)
                up, down = sum(d.bytes_up for d in devices), sum(d.bytes_down for d in devices)
            views.append(
                RoundView(
                    row["number"],
                    row["attempt"],
                    row["state"],
                    row["started_wall_s"],
                    row["ended_wall_s"],
                    row["mean_loss"],
                    row["mean_accuracy"],
                    row["asked"],
                    accepted,
                    up,
                    down,
                )
            )
        return views

    def device_rounds(
        self, server_round: int | None = None, attempt: int | None = None, *, device_id: str | None = None
    ) -> list[DeviceView]:
        """Return every device's part (or one device's) in every round (or in one), by round, attempt and device id."""
        where = " AND ".join(
            f"plans.{column} = {int(value)}"
            for column, value in (("number", server_round), ("attempt", attempt))
            if value is not None
        )
        rows = self._db.execute(
            "SELECT plans.*, devices.status AS device_status, reports.report, reports.status AS answer, "
            "reports.reason AS answer_reason, reports.widths, reports.sparsity, reports.achieved, "
            "outcomes.status AS outcome, outcomes.reason AS outcome_reason, outcomes.reward, outcomes.terms FROM plans "
            "LEFT JOIN devices USING (device_id) LEFT JOIN reports USING (number, attempt, device_id) "
            f"LEFT JOIN outcomes USING (number, attempt, device_id) WHERE {where or '1'} "
            "AND plans.device_id = coalesce(?, plans.device_id) "
            "ORDER BY plans.number, plans.attempt, plans.device_id",
            (device_id,),
        ).fetchall()
        return [_device_view(row) for row in rows]

    def summary(self) -> dict[str, Any]:
        """Return run_id, state (joining, running or finished), rounds, spec, devices and the result, as plain data."""
        config, spec, result = (self.meta(key) for key in ("config", "spec", "result"))
        state = self.state()
        started = self._db.execute("SELECT count(*) FROM rounds").fetchone()[0] > 0
        settings = json.loads(config) if config else {}
        return {
            "run_id": self.meta("run_id"),
            "state": "finished" if result else "running" if started else "joining",
            "server_round": min(state.server_round, settings.get("num_rounds", state.server_round)),
            "num_rounds": settings.get("num_rounds"),
            "pruning_ratio": settings.get("pruning_ratio"),
            "spec": json.loads(spec) if spec else None,
            "devices": [
                {"device_id": s.device_id, "device_class": s.device_class, "online": online, "refused": refused}
                for s, online, refused in self.devices()
            ],
            "result": json.loads(result) if result else None,
        }

    def _check_version(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            raise ConfigError(
                f"journal {self.path} has schema version {version}; this version reads {VERSION}.",
                remedy="Continue the run with the version that started it, or use another run_dir.",
            )


_REPORTED_FIGURES = (
    "num_examples",
    "completion_time_s",
    "time_kind",
    "loss_before",
    "loss_after",
    "accuracy_before",
    "accuracy_after",
    "train_loss",
    "lora_importance",
    "peak_memory_bytes",
    "bytes_up",
    "bytes_down",
)
"""Fields that a `DeviceView` takes from the report."""


def _recorded_report(row: sqlite3.Row) -> RecordedReport:
    try:
        report = msgspec.json.decode(row["report"], type=Report)
    except msgspec.ValidationError as error:
        # Earlier versions accepted numbers without limits. Such a report is set aside; the run continues without it.
        reason = f"its journaled report cannot be used: {error}."
        report = Report(
            run_id="",
            device_id=row["device_id"],
            server_round=row["number"],
            plan_sha256=row["plan_sha256"],
            status="failed",
            reason=reason,
        )
        return RecordedReport(report, "refused", reason)
    return RecordedReport(report, row["status"], row["reason"], _pairs(row["widths"]), row["sparsity"], row["achieved"])


def _device_view(row: sqlite3.Row) -> DeviceView:
    plan = msgspec.json.decode(row["plan"], type=RoundPlan)
    status, report = _readable(row["device_status"], Status), _readable(row["report"], Report)
    answer = {"accepted": "ok", None: "running"}.get(row["answer"], row["answer"])
    figures: dict[str, Any] = {}
    if report is not None:
        figures = {name: getattr(report, name) for name in _REPORTED_FIGURES}
    return DeviceView(
        server_round=row["number"],
        attempt=row["attempt"],
        device_id=row["device_id"],
        device_class="unknown" if status is None else status.device_class,
        status=row["outcome"] or answer,
        reason=row["outcome_reason"] or row["answer_reason"] or "",
        u=row["u"],
        pruning_ratio=plan.pruning_ratio,
        r=plan.r,
        achieved_ratio=row["achieved"],
        sparsity=row["sparsity"],
        widths=_pairs(row["widths"]),
        reward=row["reward"],
        reward_terms=None if row["terms"] is None else json.loads(row["terms"]),
        restarts=row["disconnects"],
        **figures,
    )


def _readable(text: str | None, kind: type[M]) -> M | None:
    """Decode `text`; None where there is none, or one with numbers beyond the limits of this version."""
    try:
        return None if text is None else msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError:
        return None


def _pairs(text: str | None) -> list[tuple[int, int]] | None:
    return None if text is None else [(heads, channels) for heads, channels in json.loads(text)]


def layout_to_blob(layout: Layout) -> bytes:
    """Return the form in which the journal stores a layout."""
    return zlib.compress(json.dumps(layout.to_dict()).encode())


def _layout_from_blob(spec: ModelSpec, data: bytes) -> Layout:
    return Layout.from_dict(spec, json.loads(zlib.decompress(data)))


def state_to_text(state: RunState) -> str:
    """Return the form in which the journal stores the run's state."""
    # Not asdict, which copies the strategy's whole state.
    plain = {name.name: getattr(state, name.name) for name in fields(state) if name.name != "adapter"}
    return json.dumps({**plain, "blob": "" if state.adapter is None else msgspec.json.encode(state.adapter).decode()})


def _state_from_text(text: str) -> RunState:
    plain = json.loads(text)
    ref = plain.pop("blob")
    return RunState(**plain, adapter=msgspec.json.decode(ref, type=BlobRef) if ref else None)


def damaged(path: Path, error: sqlite3.Error) -> ConfigError:
    """Return the error for a journal that SQLite cannot read."""
    return ConfigError(
        f"journal {path} cannot be used: {error}.", remedy="To start a new run, move it away or use another run_dir."
    )
