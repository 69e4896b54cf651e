"""One round's answers: reports and uploads in, acknowledgements out, everything journaled in between."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fedspine_edge.errors import BlobError, UpdateRejected
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.chunks import BlobStore, Download
from fedspine_edge.protocol.codec import Tensor, unpack
from fedspine_edge.protocol.messages import Ack, Report, RoundPlan
from fedspine_edge.server.journal.schema import PlanRow, ReportRow
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.rejected_updates import RejectedUpdates
from fedspine_edge.server.update_validation import Update, max_update_bytes

logger = logging.getLogger(__name__)

MAX_MISSING = 64
"""Chunk indices named in one ack."""

MAX_CORRUPT = 3
"""Uploads of one report with a wrong hash after which it is refused."""

FINAL = {"accepted": "accepted", "failed": "accepted", "out_of_memory": "accepted", "refused": "refused"}
"""What a device is told of a journaled answer: that it failed is an answer too."""

Gate = Callable[[Report, RoundPlan, Mapping[str, Tensor]], Update]


@dataclass
class _Upload:
    report: Report
    download: Download
    corrupt: int = 0
    asked: set[int] = field(default_factory=set)


class ReportCollector:
    """Takes what participants of one round send.

    Args:
        server_round: The round.
        attempt: Its attempt.
        run_id: The run.
        spec: The fleet's model.
        num_labels: Its number of classes.
        plans: The round's plans as journaled.
        journal: Where answers are kept before they are acknowledged.
        blobs: Where accepted updates are kept.
        uploads: Folder of unfinished uploads; those of other rounds are deleted.
        gate: Checks an update, raising `UpdateRejected`.
        rejected: Where refused updates are kept.
        wall: Wall time in seconds.
        resumed: Whether this server was restarted within the round: devices then repeat reports without chunks.
    """

    def __init__(
        self,
        server_round: int,
        attempt: int,
        *,
        run_id: str,
        spec: ModelSpec,
        num_labels: int,
        plans: list[PlanRow],
        journal: Journal,
        blobs: BlobStore,
        uploads: Path,
        gate: Gate,
        rejected: RejectedUpdates,
        wall: Callable[[], float],
        resumed: bool,
    ) -> None:
        self.server_round, self.attempt = server_round, attempt
        self.plans = {row.device_id: msgspec.json.decode(row.payload, type=RoundPlan) for row in plans}
        self._sha256 = {row.device_id: row.sha256 for row in plans}
        self._run_id, self._spec, self._num_labels = run_id, spec, num_labels
        self._journal, self._blobs, self._gate, self._rejected, self._wall = journal, blobs, gate, rejected, wall
        self._resumed = resumed
        self._answered = {row.device_id for row in journal.reports(server_round, attempt)}
        self._uploads: dict[str, _Upload] = {}
        self._folder = uploads / f"{server_round}-{attempt}"
        for other in uploads.iterdir() if uploads.is_dir() else ():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)

    @property
    def complete(self) -> bool:
        """Whether every participant has answered."""
        return self._answered >= self.plans.keys()

    @property
    def waiting_for(self) -> list[str]:
        """Participants that have not answered, by id."""
        return sorted(self.plans.keys() - self._answered)

    def report(self, report: Report) -> Ack | None:
        """Take a report; the acknowledgement, or None while its first chunks are on their way."""
        device_id = report.device_id
        if report.run_id != self._run_id or self._sha256.get(device_id) != report.plan_sha256:
            return ack_for_past_report(self._journal, self._run_id, report)
        if device_id in self._answered:
            return ack_for_past_report(self._journal, self._run_id, report)
        if report.server_round != self.server_round:
            return _ack(report, "refused", "it names another round than its plan.")
        if report.status != "ok":
            return self._settle(report, report.status, report.reason)
        if report.update is None:
            return self._settle(report, "refused", "it announces no update.")
        upload = self._uploads.get(device_id)
        if upload is not None and upload.report.update == report.update:
            upload.report = report
            return self._ask(upload)
        limit = max_update_bytes(self._spec, self.plans[device_id], self._num_labels)
        try:
            download = Download(report.update, self._folder / device_id, max_bytes=limit)
        except BlobError as error:
            return self._settle(report, "refused", error.message)
        upload = self._uploads[device_id] = _Upload(report, download)
        if download.complete:
            return self._finish(upload)
        return self._ask(upload) if self._resumed or download.received else None

    def chunk(self, device_id: str, sha256: str, index: int, payload: bytes) -> Ack | None:
        """Take a chunk; the acknowledgement if it was the last, or the next request if it ended one."""
        upload = self._uploads.get(device_id)
        if upload is None or upload.download.ref.sha256 != sha256:
            return None
        try:
            upload.download.feed(index, payload)
        except BlobError as error:
            logger.warning("ignored a chunk of %s: %s", device_id, error.message)
            return None
        if upload.download.complete:
            return self._finish(upload)
        if index in upload.asked:
            upload.asked.discard(index)
            if not upload.asked:
                return self._ask(upload)
        return None

    def _ask(self, upload: _Upload) -> Ack:
        missing = tuple(upload.download.missing(MAX_MISSING))
        upload.asked = set(missing)
        return _ack(upload.report, "incomplete", missing=missing)

    def _finish(self, upload: _Upload) -> Ack:
        """All chunks are here: check the hash, then the content."""
        report = upload.report
        try:
            data = upload.download.data()
        except BlobError as error:
            upload.corrupt += 1
            logger.warning("upload of %s, round %d: %s", report.device_id, self.server_round, error.message)
            if upload.corrupt >= MAX_CORRUPT:
                return self._settle(report, "refused", f"its upload was corrupt {MAX_CORRUPT} times.")
            return self._ask(upload)
        try:
            update = self._gate(report, self.plans[report.device_id], unpack(data))
        except (UpdateRejected, BlobError) as error:
            self._rejected.put(report, self.attempt, data, error.message)
            return self._settle(report, "refused", error.message)
        self._blobs.put(data)
        return self._settle(report, "accepted", report.reason, update)

    def _settle(self, report: Report, status: str, reason: str, update: Update | None = None) -> Ack:
        """Journal the final answer of a device, then say so."""
        device_id = report.device_id
        layout = None if update is None else update.layout
        row = ReportRow(
            device_id=device_id,
            report=msgspec.json.encode(report),
            status=status,
            reason=reason[:500],
            widths=None if layout is None else layout.counts,
            sparsity=None if layout is None else layout.sparsity,
            achieved=None if layout is None else layout.pruning_ratio,
        )
        self._journal.put_report(self.server_round, self.attempt, row, wall_s=self._wall())
        self._answered.add(device_id)
        upload = self._uploads.pop(device_id, None)
        if upload is not None:
            upload.download.discard()
        log = logger.info if status == "accepted" else logger.warning
        log("round %d: %s %s%s", self.server_round, device_id, status, f" ({row.reason})" if row.reason else "")
        told = FINAL[status]
        return _ack(report, told, row.reason if told == "refused" else "")


def ack_for_past_report(journal: Journal, run_id: str, report: Report) -> Ack:
    """The acknowledgement of a report that is not awaited: repeated, late, of another run, or of no plan of ours."""
    if report.run_id != run_id:
        return _stray(report, "refused", f"it belongs to another run; this is run {run_id}.")
    answer = journal.answer_to(report.device_id, report.plan_sha256)
    if answer is not None:
        status, reason = answer
        return _ack(report, FINAL[status], reason if status == "refused" else "")
    if journal.has_plan(report.device_id, report.plan_sha256):
        return _stray(report, "late", f"round {report.server_round} ended without it.")
    return _stray(report, "refused", "it answers no plan of this run.")


def _stray(report: Report, status: str, reason: str) -> Ack:
    logger.warning("report of %s for round %d is %s: %s", report.device_id, report.server_round, status, reason)
    return _ack(report, status, reason)


def _ack(report: Report, status: str, reason: str = "", missing: tuple[int, ...] = ()) -> Ack:
    return Ack(
        run_id=report.run_id,
        device_id=report.device_id,
        server_round=report.server_round,
        status=status,  # type: ignore[arg-type]  # callers pass literals; checked again when encoded
        missing=missing,
        reason=reason,
    )
