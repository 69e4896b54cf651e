"""What the updates of one round are measured against: the order that was sent, who kept what, the task head."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec

from fedspine_edge.config import FleetConfig
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.blobs import head_tensors, order_from_tensors
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.codec import Tensor, unpack
from fedspine_edge.protocol.messages import Report, RoundPlan
from fedspine_edge.server import round_results
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.report_collector import ReportCollector
from fedspine_edge.server.update_validation import Update, check_update

logger = logging.getLogger(__name__)


class RoundContext:
    """The gate of one round, with everything it compares to.

    Args:
        config: The fleet's settings.
        spec: The fleet's model.
        blobs: Where accepted updates are.
        tensors: The blob that the round started from.
        layouts: By device what it kept before the round, and the ratio it reported with it.
        first: Whether this is round 1, in which nobody knows the task head yet, if there is one.
    """

    def __init__(
        self,
        config: FleetConfig,
        spec: ModelSpec,
        blobs: BlobStore,
        *,
        tensors: Mapping[str, Tensor],
        layouts: Mapping[str, tuple[Layout, float]],
        first: bool,
    ) -> None:
        self.spec = spec
        self.sent = tensors
        self.order = order_from_tensors(spec, tensors)
        self.layouts = {device_id: layout for device_id, (layout, _) in layouts.items()}
        self._config, self._blobs = config, blobs
        heads = {name: value.shape for name, value in head_tensors(tensors).items()}
        self._head_shapes = None if first and config.task != "causal_lm" else heads  # a language model has its own

    def check(self, report: Report, plan: RoundPlan, tensors: Mapping[str, Tensor]) -> Update:
        """The update, checked. Raises `UpdateRejected`."""
        return check_update(
            tensors,
            report,
            plan,
            spec=self.spec,
            config=self._config,
            previous=self.layouts.get(report.device_id) or Layout.full(self.spec),
            order=self.order,
            head_shapes=self._head_shapes,
        )

    def load(self, report: Report, plan: RoundPlan) -> Update:
        """An accepted update, from the disk."""
        assert report.update is not None  # the collector refuses others
        return self.check(report, plan, unpack(self._blobs.get(report.update.sha256)))

    def agreed(self, journal: Journal, collector: ReportCollector) -> dict[str, Report]:
        """Accepted reports by device id.

        In the first round without those whose task head the majority lacks: decided when all are there, so that it
        does not depend on who came first.
        """
        reports = {
            row.device_id: msgspec.json.decode(row.report, type=Report)
            for row in journal.reports(collector.server_round, collector.attempt)
            if row.status == "accepted"
        }
        if self._head_shapes is None and reports:
            heads = {i: str(self.load(report, collector.plans[i]).head_shapes) for i, report in reports.items()}
            usual = round_results.majority(heads)
            for device_id in [i for i, head in heads.items() if head != usual]:
                reason = "its task head differs from most devices'."
                logger.warning("round %d: refused %s: %s", collector.server_round, device_id, reason)
                journal.refuse_report(collector.server_round, collector.attempt, device_id, reason)
                del reports[device_id]
        return reports
