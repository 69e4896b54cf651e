"""Reading a run's journal: what the server itself resumes from, and the figures for people.

Readers never wait for the server, nor it for them. Everything is returned as plain data.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import BlobRef, Report, RoundPlan, Status
from fedspine_edge.server.journal.schema import (
    VERSION,
    DeviceView,
    PlanRow,
    ReportRow,
    RoundView,
    RunState,
)

FILE = "journal.sqlite"
BUSY_TIMEOUT_MS = 10_000


class JournalReader:
    """A journal open for reading. Made by `open_readonly`; the server's own is a `Journal`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self.path = path
        connection.row_factory = sqlite3.Row
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")

    @staticmethod
    def open_readonly(path: str | Path) -> JournalReader:
        """Open for reading while a server may be writing; neither waits for the other.

        Args:
            path: The journal, or the run folder that holds it.

        Raises `ConfigError` when there is none.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            below = sorted(path.parent.glob(f"*/{FILE}")) if path.name == FILE else []
            meant = f"Did you mean {below[0].parent}?" if below else "Give the run_dir of a server that was started."
            raise ConfigError(f"there is no journal at {path}.", remedy=meant)
        if not os.access(path, os.R_OK):
            raise ConfigError(f"journal {path} may not be read by this user.", remedy="Ask as the server's user.")
        try:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            if not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
                uri += "&immutable=1"  # SQLite would make that file, which no server at work is without
            with ExitStack() as undo:
                connection = undo.enter_context(closing(sqlite3.connect(uri, uri=True, isolation_level=None)))
                journal = JournalReader(connection, path)
                journal._check_version()
                undo.pop_all()
        except sqlite3.DatabaseError as error:
            raise damaged(path, error) from error
        return journal

    def close(self) -> None:
        """Release the file. Harmless when repeated."""
        self._db.close()

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read within the block is of one moment, whatever a server writes meanwhile."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def meta(self, key: str) -> str | None:
        """A value of `set_meta`, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row["value"])

    def meta_names(self, prefix: str) -> set[str]:
        """What follows `prefix` in the names of the values that begin with it."""
        rows = self._db.execute(
            "SELECT substr(key, ?) AS name FROM meta WHERE substr(key, 1, ?) = ?",
            (len(prefix) + 1, len(prefix), prefix),
        )
        return {row["name"] for row in rows.fetchall()}

    @property
    def spec(self) -> ModelSpec | None:
        """The fleet's model; None before the first round."""
        text = self.meta("spec")
        return None if text is None else msgspec.json.decode(text, type=ModelSpec)

    def state(self) -> RunState:
        """Where the run stands."""
        text = self.meta("state")
        return RunState() if text is None else RunState(**json.loads(text))

    def devices(self) -> list[tuple[Status, bool, str]]:
        """(status, online, reason it was refused or "") of every device ever seen, by id."""
        rows = self._db.execute("SELECT status, online, refused FROM devices ORDER BY device_id").fetchall()
        return [(msgspec.json.decode(row["status"], type=Status), bool(row["online"]), row["refused"]) for row in rows]

    def heard_wall_s(self) -> dict[str, float]:
        """By device the wall time of the last status or report that came from it, or from the broker in its name; 0 if
        the server only found a status that the broker had kept."""
        rows = self._db.execute(
            "SELECT device_id, max(updated_wall_s, coalesce(latest, 0)) AS heard FROM devices LEFT JOIN "
            "(SELECT device_id, max(received_wall_s) AS latest FROM reports GROUP BY device_id) USING (device_id)"
        ).fetchall()
        return {row["device_id"]: float(row["heard"]) for row in rows}

    def layouts(self, spec: ModelSpec) -> dict[str, tuple[Layout, float]]:
        """By device: the layout it last reported, and the pruning ratio it reported with it."""
        rows = self._db.execute("SELECT * FROM devices WHERE layout IS NOT NULL ORDER BY device_id").fetchall()
        return {
            row["device_id"]: (Layout.from_dict(spec, json.loads(zlib.decompress(row["layout"]))), row["reported"])
            for row in rows
        }

    def started_wall_s(self, server_round: int, attempt: int) -> float:
        """Wall time at which an open round began."""
        row = self._db.execute(
            "SELECT started_wall_s FROM rounds WHERE number = ? AND attempt = ?", (server_round, attempt)
        ).fetchone()
        return float(row["started_wall_s"])

    def latest_wall_s(self) -> float:
        """Wall time of the last thing that was written down; 0 before anything was."""
        columns = {"rounds": ("started_wall_s", "ended_wall_s"), "reports": ("received_wall_s",)}
        times = [
            self._db.execute(f"SELECT max({column}) FROM {table}").fetchone()[0]
            for table, names in columns.items()
            for column in names
        ]
        return max((float(time) for time in times if time is not None), default=0.0)

    def plans(self, server_round: int, attempt: int, *, device_id: str | None = None) -> list[PlanRow]:
        """Plans of a round, by device id, or that of one device."""
        rows = self._db.execute(
            "SELECT * FROM plans WHERE number = ? AND attempt = ? AND device_id = coalesce(?, device_id) "
            "ORDER BY device_id",
            (server_round, attempt, device_id),
        ).fetchall()
        return [
            PlanRow(
                row["device_id"],
                row["plan"],
                row["plan_sha256"],
                row["u"],
                json.loads(row["explain"]),
                row["disconnects"],
            )
            for row in rows
        ]

    def has_plan(self, device_id: str, plan_sha256: str) -> bool:
        """Whether this plan was ever given to the device."""
        return (
            self._db.execute(
                "SELECT 1 FROM plans WHERE device_id = ? AND plan_sha256 = ?", (device_id, plan_sha256)
            ).fetchone()
            is not None
        )

    def is_open(self, device_id: str, plan_sha256: str) -> bool:
        """Whether the round of this plan has not ended."""
        return (
            self._db.execute(
                "SELECT 1 FROM plans JOIN rounds USING (number, attempt) "
                "WHERE device_id = ? AND plan_sha256 = ? AND ended_wall_s IS NULL",
                (device_id, plan_sha256),
            ).fetchone()
            is not None
        )

    def reports(self, server_round: int, attempt: int) -> list[ReportRow]:
        """Answers of a round, by device id."""
        rows = self._db.execute(
            "SELECT * FROM reports WHERE number = ? AND attempt = ? ORDER BY device_id", (server_round, attempt)
        ).fetchall()
        return [
            ReportRow(
                row["device_id"],
                row["report"].encode(),
                row["status"],
                row["reason"],
                _pairs(row["widths"]),
                row["sparsity"],
                row["achieved"],
            )
            for row in rows
        ]

    def answer_to(self, device_id: str, plan_sha256: str) -> tuple[str, str] | None:
        """(status, reason) of the report that answered this plan, if there was one."""
        row = self._db.execute(
            "SELECT reports.status, reports.reason FROM plans JOIN reports USING (number, attempt, device_id) "
            "WHERE plans.device_id = ? AND plans.plan_sha256 = ?",
            (device_id, plan_sha256),
        ).fetchone()
        return None if row is None else (row["status"], row["reason"])

    def published(self) -> list[BlobRef]:
        """Blobs whose chunks may still be retained at the broker."""
        return [
            msgspec.json.decode(row["ref"], type=BlobRef)
            for row in self._db.execute("SELECT ref FROM published ORDER BY sha256").fetchall()
        ]

    def rounds(self) -> list[RoundView]:
        """Every attempt at every round, in order; figures of a running one are those of the reports so far."""
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
        """Every device's part (or one device's) in every round (or in one), by round, attempt and device id."""
        where = " AND ".join(
            f"plans.{column} = {int(value)}"
            for column, value in (("number", server_round), ("attempt", attempt))
            if value is not None
        )
        rows = self._db.execute(
            "SELECT plans.*, devices.status AS hello, reports.report, reports.status AS answer, "
            "reports.reason AS answer_reason, reports.widths, reports.sparsity, reports.achieved, "
            "outcomes.status AS outcome, outcomes.reason AS outcome_reason, outcomes.reward, outcomes.terms FROM plans "
            "LEFT JOIN devices USING (device_id) LEFT JOIN reports USING (number, attempt, device_id) "
            f"LEFT JOIN outcomes USING (number, attempt, device_id) WHERE {where or '1'} "
            "AND plans.device_id = coalesce(?, plans.device_id) "
            "ORDER BY plans.number, plans.attempt, plans.device_id",
            (device_id,),
        ).fetchall()
        return [_device_view(row) for row in rows]

    def energy(self, server_round: int) -> dict[str, list[float]]:
        """Per module the share of the squared norm that each rank keeps, after `server_round`."""
        rows = self._db.execute("SELECT module, kept FROM energy WHERE number = ? ORDER BY module", (server_round,))
        return {row["module"]: json.loads(row["kept"]) for row in rows.fetchall()}

    def summary(self) -> dict[str, Any]:
        """run_id, state (joining, running or finished), round, num_rounds, spec and the result, as plain data."""
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
                remedy="Continue the run with the version that began it, or use another run_dir.",
            )


def _device_view(row: sqlite3.Row) -> DeviceView:
    plan = msgspec.json.decode(row["plan"], type=RoundPlan)
    hello = None if row["hello"] is None else msgspec.json.decode(row["hello"], type=Status)
    answer = {"accepted": "ok", None: "running"}.get(row["answer"], row["answer"])
    figures: dict[str, Any] = {}
    if row["report"] is not None:
        report = msgspec.json.decode(row["report"], type=Report)
        named = (
            *("num_examples", "completion_time_s", "time_kind", "loss_before", "loss_after", "accuracy_before"),
            *("accuracy_after", "train_loss", "lora_importance", "peak_memory_bytes", "bytes_up", "bytes_down"),
        )
        figures = {name: getattr(report, name) for name in named}
    return DeviceView(
        server_round=row["number"],
        attempt=row["attempt"],
        device_id=row["device_id"],
        device_class="unknown" if hello is None else hello.device_class,
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


def _pairs(text: str | None) -> list[tuple[int, int]] | None:
    return None if text is None else [(heads, channels) for heads, channels in json.loads(text)]


def damaged(path: Path, error: sqlite3.Error) -> ConfigError:
    return ConfigError(
        f"journal {path} cannot be used: {error}.", remedy="If it is a run's journal, move it away to start a new run."
    )
