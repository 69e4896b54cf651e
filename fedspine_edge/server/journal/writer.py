"""The server's memory: one SQLite file that survives being killed at any moment, readable while it is written.

A round has two transactions that matter: `open_round` (plans and the strategy that made them) before anything is
published, and `close_round` (outcomes, strategy, the next round's blob) after everything is computed. Between them
every answer is journaled before it is acknowledged. Tensors lie beside it in content-addressed files.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path

import msgspec

from fedspine_edge.model.layout import Layout
from fedspine_edge.protocol.messages import BlobRef, Status
from fedspine_edge.server.journal.reader import JournalReader, damaged
from fedspine_edge.server.journal.schema import (
    TABLES,
    VERSION,
    OutcomeRow,
    PlanRow,
    ReportRow,
    RunState,
)


class Journal(JournalReader):
    """A run's journal, open for writing. Made by `open`; `open_readonly` is for everybody else."""

    @classmethod
    def open(cls, path: str | Path) -> Journal:
        """Open for writing; created if absent. Raises `ConfigError` for another schema version or a damaged file."""
        path = Path(path)
        try:
            with ExitStack() as undo:
                connection = undo.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
                journal = cls(connection, path)
                connection.execute("PRAGMA journal_mode = WAL")
                # FULL: what a device was told is journaled must outlive a power cut.
                connection.execute("PRAGMA synchronous = FULL")
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                    connection.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
                journal._check_version()
                undo.pop_all()
        except sqlite3.DatabaseError as error:
            raise damaged(path, error) from error
        return journal

    def set_meta(self, **values: str) -> None:
        """Keep named texts: run_id, config, spec, result and the like."""
        with self._transaction():
            self._set_meta(values)

    def put_device(self, status: Status, *, online: bool, refused: str, wall_s: float | None) -> None:
        """Note what a device said of itself; `wall_s` is None if the broker kept it, and nobody knows since when.

        Not synced: a device says hello again, and a fleet has thousands.
        """
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(
            "INSERT INTO devices (device_id, status, online, refused, updated_wall_s) "
            "VALUES (?1, ?2, ?3, ?4, coalesce(?5, 0)) "
            "ON CONFLICT (device_id) DO UPDATE SET status = excluded.status, online = excluded.online, "
            "refused = excluded.refused, updated_wall_s = coalesce(?5, updated_wall_s)",
            (status.device_id, _text(status), int(online), refused, wall_s),
        )
        self._db.execute("PRAGMA synchronous = FULL")

    def forget_layout_above(self, device_id: str, ratio: float) -> bool:
        """A device says it has removed only `ratio`: if it had reported more, it starts from the full model again."""
        cursor = self._db.execute(
            "UPDATE devices SET layout = NULL, reported = NULL WHERE device_id = ? AND reported > ?",
            (device_id, ratio + 1e-6),
        )
        return cursor.rowcount > 0

    def note_disconnect(self, server_round: int, attempt: int, device_id: str) -> None:
        """A participant of the round was cut off."""
        self._db.execute(
            "UPDATE plans SET disconnects = disconnects + 1 WHERE number = ? AND attempt = ? AND device_id = ?",
            (server_round, attempt, device_id),
        )

    def open_round(
        self,
        state: RunState,
        plans: Sequence[PlanRow],
        *,
        published: Sequence[BlobRef],
        wall_s: float,
        **meta: str,
    ) -> None:
        """Begin the round of `state`: its plans, the blobs that will be at the broker, and the strategy's state after
        making them."""
        key = (state.server_round, state.attempt)
        with self._transaction():
            self._set_meta({"state": _state_text(replace(state, open=True)), **meta})
            self._db.execute(
                "INSERT INTO rounds (number, attempt, state, started_wall_s, blob) VALUES (?, ?, 'running', ?, ?)",
                (*key, wall_s, state.blob),
            )
            self._db.executemany(
                "INSERT INTO plans (number, attempt, device_id, plan, plan_sha256, u, explain) VALUES (?,?,?,?,?,?,?)",
                [(*key, p.device_id, p.payload, p.sha256, p.u, json.dumps(p.explain)) for p in plans],
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO published VALUES (?, ?)", [(ref.sha256, _text(ref)) for ref in published]
            )

    def put_report(self, server_round: int, attempt: int, row: ReportRow, *, wall_s: float) -> None:
        """Keep the final answer to a plan, before it is acknowledged. A second one for the same plan is ignored."""
        self._db.execute(
            "INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                server_round,
                attempt,
                row.device_id,
                row.report.decode(),
                row.status,
                row.reason,
                None if row.widths is None else json.dumps(row.widths),
                row.sparsity,
                row.achieved,
                wall_s,
            ),
        )

    def refuse_report(self, server_round: int, attempt: int, device_id: str, reason: str) -> None:
        """Take an acceptance back: only together could the reports be judged."""
        self._db.execute(
            "UPDATE reports SET status = 'refused', reason = ? WHERE number = ? AND attempt = ? AND device_id = ?",
            (reason, server_round, attempt, device_id),
        )

    def close_round(
        self,
        next_state: RunState,
        *,
        server_round: int,
        attempt: int,
        done: bool,
        outcomes: Sequence[OutcomeRow],
        layouts: Mapping[str, tuple[Layout, float]],
        energy: Mapping[str, Sequence[float]],
        wall_s: float,
        means: tuple[float | None, float | None] = (None, None),
        traffic: tuple[int, int] = (0, 0),
        **meta: str,
    ) -> None:
        """End a round, for good (`done`) or to be repeated, and say how the run goes on.

        Args:
            layouts: By accepted device what it keeps now and the ratio it reported.
            energy: Per module the share of the squared norm kept at each rank.
            means: Mean loss and accuracy of the accepted devices.
            traffic: Bytes up and down.
        """
        key = (server_round, attempt)
        accepted = sum(outcome.status == "ok" for outcome in outcomes)
        with self._transaction():
            self._set_meta({"state": _state_text(replace(next_state, open=False)), **meta})
            self._db.executemany(
                "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (*key, o.device_id, o.status, o.reason, o.reward, None if o.terms is None else json.dumps(o.terms))
                    for o in outcomes
                ],
            )
            self._db.executemany(
                "UPDATE devices SET layout = ?, reported = ? WHERE device_id = ?",
                [
                    (zlib.compress(json.dumps(layout.to_dict()).encode()), reported, device_id)
                    for device_id, (layout, reported) in layouts.items()
                ],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO energy VALUES (?, ?, ?)",
                [(server_round, module, json.dumps([float(x) for x in kept])) for module, kept in energy.items()],
            )
            self._db.execute(
                "UPDATE rounds SET state = ?, ended_wall_s = ?, mean_loss = ?, mean_accuracy = ?, accepted = ?, "
                "bytes_up = ?, bytes_down = ? WHERE number = ? AND attempt = ?",
                ("done" if done else "failed", wall_s, *means, accepted, *traffic, *key),
            )

    def forget_published(self, sha256: str) -> None:
        """The blob's chunks were cleared."""
        self._db.execute("DELETE FROM published WHERE sha256 = ?", (sha256,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _set_meta(self, values: Mapping[str, str]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))


def _state_text(state: RunState) -> str:
    # not asdict, which copies the whole strategy's state
    return json.dumps({field.name: getattr(state, field.name) for field in fields(state)})


def _text(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()
