"""The server's journal: one SQLite file that survives being killed at any moment and can be read while it is written.

A round has two transactions that matter: `open_round` (plans and the strategy that made them) before anything is
published, and `close_round` (outcomes, strategy, the next round's adapter) after everything is computed. Between them
every report is journaled before it is acknowledged. Tensors are stored beside it in content-addressed files.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from fedspine_edge.protocol.messages import BlobRef, Status
from fedspine_edge.server.journal.reader import JournalReader, damaged, layout_to_blob, state_to_text
from fedspine_edge.server.journal.schema import (
    ADDED_TABLES,
    TABLES,
    VERSION,
    ClosedRound,
    IssuedPlan,
    RecordedReport,
    RunState,
)
from fedspine_edge.strategies import RewardTerms


class Journal(JournalReader):
    """A run's journal, open for writing. Created by `open`; everything but the server uses `open_readonly`."""

    @classmethod
    def open(cls, path: str | Path) -> Journal:
        """Open for writing; created if absent. Raises `ConfigError` for another schema version or a damaged file."""
        path = Path(path)
        try:
            with ExitStack() as undo:
                connection = undo.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
                journal = cls(connection, path)
                connection.execute("PRAGMA journal_mode = WAL")
                # FULL: whatever was acknowledged to a device must survive a power cut.
                connection.execute("PRAGMA synchronous = FULL")
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                    connection.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
                journal._check_version()
                connection.executescript(ADDED_TABLES)
                undo.pop_all()
        except sqlite3.DatabaseError as error:
            raise damaged(path, error) from error
        return journal

    def set_meta(self, **values: str) -> None:
        """Store named texts: run_id, config, spec, result and the like."""
        with self._transaction():
            self._set_meta(values)

    def put_device(self, status: Status, *, online: bool, refused: str, wall_s: float | None) -> None:
        """Store a device's status.

        Args:
            status: The status.
            online: Whether the device is connected.
            refused: Why it may not take part; empty if it may.
            wall_s: Wall time at which the status was received; None for one that the broker retained, whose age is
                unknown.
        """
        # Not synced: devices publish their status again, and a fleet may have thousands of them.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(
            "INSERT INTO devices (device_id, status, online, refused, updated_wall_s) "
            "VALUES (?1, ?2, ?3, ?4, coalesce(?5, 0)) "
            "ON CONFLICT (device_id) DO UPDATE SET status = excluded.status, online = excluded.online, "
            "refused = excluded.refused, updated_wall_s = coalesce(?5, updated_wall_s)",
            (status.device_id, _text(status), int(online), refused, wall_s),
        )
        self._db.execute("PRAGMA synchronous = FULL")

    def forget_layout(self, device_id: str) -> None:
        """Remove the device's layout: it starts from the full model again."""
        self._db.execute("UPDATE devices SET layout = NULL, reported = NULL WHERE device_id = ?", (device_id,))

    def note_disconnect(self, server_round: int, attempt: int, device_id: str) -> None:
        """Count a disconnect of a participant of the round."""
        self._db.execute(
            "UPDATE plans SET disconnects = disconnects + 1 WHERE number = ? AND attempt = ? AND device_id = ?",
            (server_round, attempt, device_id),
        )

    def open_round(
        self,
        state: RunState,
        plans: Sequence[IssuedPlan],
        *,
        published: Sequence[BlobRef],
        wall_s: float,
        **meta: str,
    ) -> None:
        """Begin the round of `state`.

        Args:
            state: The run's state, with the strategy's state after making the plans.
            plans: The round's plans.
            published: Blobs that will be retained at the broker.
            wall_s: Wall time of the start.
            meta: Named texts to store in the same transaction.
        """
        key = (state.server_round, state.attempt)
        with self._transaction():
            self._set_meta({"state": state_to_text(replace(state, open=True)), **meta})
            self._db.execute(
                "INSERT INTO rounds (number, attempt, state, started_wall_s, blob) VALUES (?, ?, 'running', ?, ?)",
                (*key, wall_s, "" if state.adapter is None else _text(state.adapter)),
            )
            self._db.executemany(
                "INSERT INTO plans (number, attempt, device_id, plan, plan_sha256, u, explain) VALUES (?,?,?,?,?,?,?)",
                [(*key, p.plan.device_id, p.payload, p.sha256, p.u, json.dumps(p.explain)) for p in plans],
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO published VALUES (?, ?)", [(ref.sha256, _text(ref)) for ref in published]
            )

    def put_report(self, server_round: int, attempt: int, recorded: RecordedReport, *, wall_s: float) -> None:
        """Store the final report on a plan, before it is acknowledged. A second one on the same plan is ignored."""
        self._db.execute(
            "INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                server_round,
                attempt,
                recorded.report.device_id,
                _text(recorded.report),
                recorded.status,
                recorded.reason,
                None if recorded.widths is None else json.dumps(recorded.widths),
                recorded.sparsity,
                recorded.achieved_ratio,
                wall_s,
            ),
        )

    def reject_report(self, server_round: int, attempt: int, device_id: str, reason: str) -> None:
        """Revoke the acceptance of a report that could be judged only together with the others."""
        self._db.execute(
            "UPDATE reports SET status = 'refused', reason = ? WHERE number = ? AND attempt = ? AND device_id = ?",
            (reason, server_round, attempt, device_id),
        )

    def close_round(self, next_state: RunState, closed: ClosedRound, *, wall_s: float) -> None:
        """End an attempt at a round and store the state that the run continues with, in one transaction."""
        key = (closed.server_round, closed.attempt)
        accepted = sum(outcome.status == "ok" for outcome, _ in closed.outcomes)
        with self._transaction():
            self._set_meta({"state": state_to_text(replace(next_state, open=False))})
            self._db.executemany(
                "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (*key, outcome.device_id, outcome.status, outcome.reason, *_reward_columns(terms))
                    for outcome, terms in closed.outcomes
                ],
            )
            self._db.executemany(
                "UPDATE devices SET layout = ?, reported = ? WHERE device_id = ?",
                [(layout_to_blob(layout), ratio, device_id) for device_id, (layout, ratio) in closed.layouts.items()],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO energy VALUES (?, ?, ?)",
                [
                    (closed.server_round, module, json.dumps([float(share) for share in shares]))
                    for module, shares in closed.explained_variance.items()
                ],
            )
            if closed.final_layout is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO final_layout VALUES (1, ?)", (layout_to_blob(closed.final_layout),)
                )
            self._db.execute(
                "UPDATE rounds SET state = ?, ended_wall_s = ?, mean_loss = ?, mean_accuracy = ?, accepted = ?, "
                "bytes_up = ?, bytes_down = ? WHERE number = ? AND attempt = ?",
                (
                    "done" if closed.done else "failed",
                    wall_s,
                    closed.mean_loss,
                    closed.mean_accuracy,
                    accepted,
                    closed.bytes_up,
                    closed.bytes_down,
                    *key,
                ),
            )

    def forget_published(self, sha256: str) -> None:
        """Note that the blob's chunks are no longer retained at the broker."""
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


def _reward_columns(terms: RewardTerms | None) -> tuple[float | None, str | None]:
    if terms is None:
        return None, None
    parts = {name: value for name, value in asdict(terms).items() if name not in ("total", "reason")}
    return terms.total, json.dumps(parts)


def _text(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()
