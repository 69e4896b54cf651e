"""Collects the reports and updates of one round, and acknowledges each one after it has been journaled."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedspine_edge.errors import BlobError, UpdateRejected
from fedspine_edge.protocol.chunks import Download
from fedspine_edge.protocol.codec import unpack
from fedspine_edge.protocol.messages import Ack, Report
from fedspine_edge.server.device_registry import DeviceRegistry
from fedspine_edge.server.journal.schema import RecordedReport
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.open_round import OpenRound
from fedspine_edge.server.rejected_updates import RejectedUpdates
from fedspine_edge.server.run_context import RunContext
from fedspine_edge.server.update_validation import (
    AcceptedUpdate,
    HeadShapes,
    load_accepted_update,
    max_update_bytes,
    validate_update,
)

logger = logging.getLogger(__name__)

MAX_MISSING = 64
"""Chunk indices named in one acknowledgement."""

MAX_CORRUPT = 3
"""Uploads of one report with a wrong hash after which the report is refused."""

MAX_REASON = 500
"""Characters of a reason that are journaled."""


@dataclass
class _Upload:
    report: Report
    download: Download
    corrupt: int = 0
    requested: set[int] = field(default_factory=set)


class ReportCollector:
    """Collects what the participants of one round send.

    Args:
        run: The run.
        opened: The round.
        registry: Devices of the fleet.
    """

    def __init__(self, run: RunContext, opened: OpenRound, registry: DeviceRegistry) -> None:
        self.round = opened
        self.recorded: dict[str, RecordedReport] = {}
        """The final report of each device that has reported, as journaled."""
        self.disconnected = {device_id for device_id, issued in opened.plans.items() if issued.disconnects > 0}
        """Participants that were disconnected at any time of the round."""
        self._run, self._registry = run, registry
        self._rejected = RejectedUpdates(run.folder / "rejected", run.config.validation.keep_rejected)
        self._head_shapes: dict[str, HeadShapes] = {}
        self._uploads: dict[str, _Upload] = {}
        if opened.resumed:
            reports = run.journal.reports(opened.server_round, opened.attempt)
            self.recorded = {recorded.report.device_id: recorded for recorded in reports}
        uploads = run.folder / "uploads"
        self._folder = uploads / f"{opened.server_round}-{opened.attempt}"
        for other in uploads.iterdir() if uploads.is_dir() else ():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)

    @property
    def complete(self) -> bool:
        """Whether every participant has reported."""
        return self.recorded.keys() >= self.round.plans.keys()

    @property
    def waiting_for(self) -> list[str]:
        """Ids of the participants that have not reported, sorted."""
        return sorted(self.round.plans.keys() - self.recorded.keys())

    def record_disconnect(self, device_id: str) -> None:
        """Note that a participant was disconnected."""
        logger.warning("round %d: %s went offline", self.round.server_round, device_id)
        self.disconnected.add(device_id)
        self._run.journal.note_disconnect(self.round.server_round, self.round.attempt, device_id)

    def add_report(self, report: Report) -> Ack | None:
        """Take a report; return its acknowledgement, or None while the first chunks of its update are on their way."""
        device_id = report.device_id
        issued = self.round.plans.get(device_id)
        if (
            report.run_id != self._run.run_id
            or issued is None
            or issued.sha256 != report.plan_sha256
            or device_id in self.recorded
        ):
            return ack_for_past_report(self._run.journal, self._run.run_id, report)
        if report.server_round != self.round.server_round:
            return _ack(report, "refused", "it names another round than its plan.")
        if report.status != "ok":
            return self._record_answer(report, report.status, report.reason)
        if report.update is None:
            return self._record_answer(report, "refused", "it announces no update.")
        upload = self._uploads.get(device_id)
        if upload is not None and upload.report.update == report.update:
            upload.report = report
            return self._request_missing(upload)
        if upload is not None:
            upload.download.discard()  # a device has at most one unfinished upload on the server's disk
        limit = max_update_bytes(self._registry.spec, issued.plan, self._registry.num_labels)
        try:
            download = Download(report.update, self._folder / device_id, max_bytes=limit)
        except BlobError as error:
            return self._record_answer(report, "refused", error.message)
        upload = self._uploads[device_id] = _Upload(report, download)
        if download.complete:
            return self._finish_upload(upload)
        return self._request_missing(upload) if self.round.resumed or download.received else None

    def add_chunk(self, device_id: str, sha256: str, index: int, payload: bytes) -> Ack | None:
        """Take a chunk; return the acknowledgement after the last one, or a request after the last requested one."""
        upload = self._uploads.get(device_id)
        if upload is None or upload.download.ref.sha256 != sha256:
            return None
        try:
            upload.download.feed(index, payload)
        except BlobError as error:
            logger.warning("ignored a chunk of %s: %s", device_id, error.message)
            return None
        if upload.download.complete:
            return self._finish_upload(upload)
        if index in upload.requested:
            upload.requested.discard(index)
            if not upload.requested:
                return self._request_missing(upload)
        return None

    def accepted_reports(self) -> dict[str, Report]:
        """Return the accepted reports by device id, sorted.

        In the first round, updates whose task head differs from that of most devices are rejected here, when all of
        them are known, so that the result does not depend on which device was first.
        """
        if self.round.rules.head_shapes is None:
            self._reject_unusual_heads()
        return {i: one.report for i, one in sorted(self.recorded.items()) if one.status == "accepted"}

    def _reject_unusual_heads(self) -> None:
        shapes: dict[str, HeadShapes] = {}
        for device_id, recorded in self.recorded.items():
            if recorded.status == "accepted":
                known = self._head_shapes.get(device_id)  # absent for reports from before a restart
                shapes[device_id] = known if known is not None else self._load_head_shapes(recorded.report)
        usual = _most_common(shapes)
        for device_id in sorted(shapes):
            if shapes[device_id] != usual:
                reason = "its task head differs from most devices'."
                logger.warning("round %d: rejected %s: %s", self.round.server_round, device_id, reason)
                self._run.journal.reject_report(self.round.server_round, self.round.attempt, device_id, reason)
                self.recorded[device_id] = replace(self.recorded[device_id], status="refused", reason=reason)

    def _load_head_shapes(self, report: Report) -> HeadShapes:
        return load_accepted_update(self._run.blobs, report, self._registry.spec).head_shapes

    def _request_missing(self, upload: _Upload) -> Ack:
        missing = tuple(upload.download.missing(MAX_MISSING))
        upload.requested = set(missing)
        return _ack(upload.report, "incomplete", missing=missing)

    def _finish_upload(self, upload: _Upload) -> Ack:
        """Check the hash of a complete upload, then validate the update."""
        report = upload.report
        try:
            data = upload.download.data()
        except BlobError as error:
            upload.corrupt += 1
            logger.warning("upload of %s, round %d: %s", report.device_id, self.round.server_round, error.message)
            if upload.corrupt >= MAX_CORRUPT:
                return self._record_answer(report, "refused", f"its upload was corrupt {MAX_CORRUPT} times.")
            return self._request_missing(upload)
        try:
            update = validate_update(
                unpack(data),
                report,
                self.round.plans[report.device_id].plan,
                previous=self._registry.layout(report.device_id),
                rules=self.round.rules,
            )
        except (UpdateRejected, BlobError) as error:
            self._rejected.put(report, self.round.attempt, data, error.message)
            return self._record_answer(report, "refused", error.message)
        self._run.blobs.put(data)
        self._head_shapes[report.device_id] = update.head_shapes
        return self._record_answer(report, "accepted", report.reason, update)

    def _record_answer(self, report: Report, status: str, reason: str, update: AcceptedUpdate | None = None) -> Ack:
        """Journal the final answer to a device's report, then return its acknowledgement."""
        device_id = report.device_id
        layout = None if update is None else update.layout
        recorded = RecordedReport(
            report=report,
            status=status,
            reason=escape_unprintable(reason)[:MAX_REASON],
            widths=None if layout is None else layout.counts,
            sparsity=None if layout is None else layout.sparsity,
            achieved_ratio=None if layout is None else layout.pruning_ratio,
        )
        self._run.journal.put_report(
            self.round.server_round, self.round.attempt, recorded, wall_s=self._run.wall_time()
        )
        self.recorded[device_id] = recorded
        upload = self._uploads.pop(device_id, None)
        if upload is not None:
            upload.download.discard()
        log = logger.info if status == "accepted" else logger.warning
        remark = f" ({recorded.reason})" if recorded.reason else ""
        log("round %d: %s %s%s", self.round.server_round, device_id, status, remark)
        return _final_ack(report, status, recorded.reason)


def ack_for_past_report(journal: Journal, run_id: str, report: Report) -> Ack:
    """Return the acknowledgement of a report that is repeated, late, of another run or on an unknown plan."""
    if report.run_id != run_id:
        return _ack_unmatched(report, "refused", f"it belongs to another run; this is run {run_id}.")
    recorded = journal.recorded_status(report.device_id, report.plan_sha256)
    if recorded is not None:
        return _final_ack(report, *recorded)
    if journal.has_plan(report.device_id, report.plan_sha256):
        return _ack_unmatched(report, "late", f"round {report.server_round} ended without it.")
    return _ack_unmatched(report, "refused", "its plan is not one of this run.")


def escape_unprintable(text: str) -> str:
    """Return `text` with line breaks, control and direction characters escaped, so that it is safe in logs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _final_ack(report: Report, status: str, reason: str) -> Ack:
    # A reported failure is acknowledged as accepted: the server has recorded it.
    return _ack(report, "refused", reason) if status == "refused" else _ack(report, "accepted")


def _ack_unmatched(report: Report, status: str, reason: str) -> Ack:
    logger.warning("report of %s for round %d is %s: %s", report.device_id, report.server_round, status, reason)
    return _ack(report, status, reason)


def _ack(report: Report, status: str, reason: str = "", missing: tuple[int, ...] = ()) -> Ack:
    return Ack(
        run_id=report.run_id,
        device_id=report.device_id,
        server_round=report.server_round,
        status=status,  # type: ignore[arg-type]  # callers pass literals; encoding checks them
        missing=missing,
        reason=reason,
    )


def _most_common(values: Mapping[str, HeadShapes]) -> HeadShapes | None:
    """Return the most common value; among equally common ones that of the smallest device id."""
    counts = Counter(values.values())
    first = min(values, key=lambda device_id: (-counts[values[device_id]], device_id), default=None)
    return None if first is None else values[first]
