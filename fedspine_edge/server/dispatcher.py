"""What devices say to the server: each message is checked, journaled and handed to whom it concerns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fedspine_edge.errors import MessageError
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import Ack, Report, Status
from fedspine_edge.protocol.topics import DeviceTopic, Topics, UploadTopic
from fedspine_edge.server.device_registry import DeviceRegistry
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.planning import build_rejection_plan
from fedspine_edge.server.publisher import ServerPublisher
from fedspine_edge.server.report_collector import ReportCollector, ack_for_past_report
from fedspine_edge.server.round_context import RoundContext
from fedspine_edge.transport.base import Incoming

logger = logging.getLogger(__name__)

REPORTED = "reported/"
"""Before a device id: it has reported in this run. One row each, so that noting it costs the same in any fleet."""


class MessageDispatcher:
    """Listens for the server; the only place where it waits.

    Attributes:
        heard: Devices whose status came since the server started.
        reported: Devices that have reported in this run.
        collector: Takes reports and uploads while a round is open.
        context: What the open round's updates are measured against.

    Args:
        retry_s: The longest wait for one event.
        wall: Wall time in seconds, for the journal.
        tell: Called with a name and plain data when a device was answered for good.
    """

    def __init__(
        self,
        post: ServerPublisher,
        topics: Topics,
        journal: Journal,
        members: DeviceRegistry,
        *,
        run_id: str,
        retry_s: float,
        wall: Callable[[], float],
        tell: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self.heard: set[str] = set()
        self.reported = journal.meta_names(REPORTED)
        self.collector: ReportCollector | None = None
        self.context: RoundContext | None = None
        self._post, self._topics, self._journal, self._members = post, topics, journal, members
        self._run_id, self._retry_s, self._wall, self._tell = run_id, retry_s, wall, tell

    def wait(self, timeout_s: float) -> None:
        """Wait for one event, at most until the next retry, and react to it."""
        event = self._post.receive(min(timeout_s, self._retry_s))
        if not isinstance(event, Incoming) or not event.payload:
            return
        try:
            topic = self._topics.parse(event.topic)
            if isinstance(topic, UploadTopic):
                if self.collector is not None:
                    self._answer(self.collector.chunk(topic.device_id, topic.sha256, topic.index, event.payload))
            elif isinstance(topic, DeviceTopic) and topic.kind == "status":
                self._on_status(topic, codec.decode(event.payload, Status), retained=event.retained)
            elif isinstance(topic, DeviceTopic) and topic.kind == "report":
                self._on_report(topic, codec.decode(event.payload, Report))
        except MessageError as error:
            logger.warning("ignored a message on %s: %s", event.topic, error.message)

    def _on_status(self, topic: DeviceTopic, status: Status, *, retained: bool) -> None:
        if status.device_id != topic.device_id:
            raise MessageError(f"the status is of {status.device_id!r}.")
        collector, device_id = self.collector, status.device_id
        was_online = self._members.is_online(device_id)
        member = self._members.see(status)
        if member.refused:
            logger.warning("refused device %s: %s", device_id, member.refused)
            if member.online:
                self._post.refuse(device_id, build_rejection_plan(self._run_id, device_id, member.refused))
        self.heard.add(device_id)
        heard = None if retained else self._wall()
        self._journal.put_device(member.status, online=member.online, refused=member.refused, wall_s=heard)
        if status.state == "online" and self._journal.forget_layout_above(device_id, status.pruning_ratio):
            logger.warning("%s lost what it had pruned; it starts from %.3f", device_id, status.pruning_ratio)
            if self.context is not None:
                self.context.layouts.pop(device_id, None)
        if was_online and not member.online and collector is not None and device_id in collector.waiting_for:
            logger.warning("round %d: %s went offline", collector.server_round, device_id)
            self._journal.note_disconnect(collector.server_round, collector.attempt, device_id)

    def _on_report(self, topic: DeviceTopic, report: Report) -> None:
        if report.device_id != topic.device_id:
            raise MessageError(f"the report is of {report.device_id!r}.")
        self._members.heard(report.device_id)
        if report.run_id == self._run_id and report.device_id not in self.reported:
            self.reported.add(report.device_id)
            self._journal.set_meta(**{f"{REPORTED}{report.device_id}": "yes"})
        if self.collector is not None:
            self._answer(self.collector.report(report))
        elif not self._journal.is_open(report.device_id, report.plan_sha256):
            self._answer(ack_for_past_report(self._journal, self._run_id, report))
        # else a server that starts again is about to take its round up: the device repeats the report

    def _answer(self, ack: Ack | None) -> None:
        if ack is not None:
            self._post.acknowledge(ack)
            if ack.status != "incomplete":
                self._tell("report", {"device_id": ack.device_id, "status": ack.status, "reason": ack.reason})
