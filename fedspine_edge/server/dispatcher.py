"""Dispatches incoming messages: decodes each one, records it in the journal and passes it to its handler."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fedspine_edge.errors import MessageError
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import Ack, Report, Status
from fedspine_edge.protocol.topics import DeviceTopic, Topics, UploadTopic
from fedspine_edge.server.device_registry import MAX_DEVICES, DeviceRegistry
from fedspine_edge.server.planning import build_rejection_plan
from fedspine_edge.server.publisher import ServerPublisher
from fedspine_edge.server.report_collector import ReportCollector, ack_for_past_report
from fedspine_edge.server.run_context import RunContext
from fedspine_edge.transport.base import Incoming

logger = logging.getLogger(__name__)

REPORTED = "reported/"
"""Prefix of journal entries: the device has reported in this run. One entry per device, so that adding one has the
same cost in a fleet of any size."""


class MessageDispatcher:
    """Receives messages; the only place where the server waits.

    Args:
        run: The run.
        publisher: Connection to the broker.
        topics: Topics of the fleet.
        registry: Devices of the fleet.
        retry_s: Longest wait for one event, in seconds.

    Attributes:
        seen: Ids of devices whose status was received since the server started.
        reported: Ids of devices that have reported in this run.
    """

    def __init__(
        self, run: RunContext, publisher: ServerPublisher, topics: Topics, registry: DeviceRegistry, retry_s: float
    ) -> None:
        self.seen: set[str] = set()
        self.reported = run.journal.meta_names(REPORTED)
        self._run, self._publisher, self._topics, self._registry = run, publisher, topics, registry
        self._retry_s = retry_s

    def process_next(self, timeout_s: float, collector: ReportCollector | None = None) -> None:
        """Wait for one event, at most until the next retry, and handle it.

        Args:
            timeout_s: Longest wait, in seconds.
            collector: Takes reports and uploads while a round is open.
        """
        event = self._publisher.receive(min(timeout_s, self._retry_s))
        if not isinstance(event, Incoming) or not event.payload:
            return
        try:
            topic = self._topics.parse(event.topic)
            if isinstance(topic, UploadTopic):
                self._registry.mark_seen(topic.device_id)
                if collector is not None:
                    self._answer(collector.add_chunk(topic.device_id, topic.sha256, topic.index, event.payload))
            elif isinstance(topic, DeviceTopic) and topic.kind == "status":
                status = codec.decode(event.payload, Status)
                self._on_status(topic, status, collector, retained=event.retained)
            elif isinstance(topic, DeviceTopic) and topic.kind == "report":
                self._on_report(topic, codec.decode(event.payload, Report), collector)
        except MessageError as error:
            logger.warning("ignored a message on %s: %s", event.topic, error.message)

    def _on_status(
        self, topic: DeviceTopic, status: Status, collector: ReportCollector | None, *, retained: bool
    ) -> None:
        device_id = status.device_id
        if device_id != topic.device_id:
            raise MessageError(f"the status is of {device_id!r}.")
        if self._registry.is_full_for(device_id):
            raise MessageError(f"the fleet already has {MAX_DEVICES:,} devices.")
        journal = self._run.journal
        was_online = self._registry.is_online(device_id)
        device = self._registry.update(status, retained=retained)
        rejection = self._registry.rejection(device_id)
        if rejection:
            self._reject(device_id, rejection, online=device.online)
        self.seen.add(device_id)
        received_wall_s = None if retained else self._run.wall_time()
        journal.put_device(device.status, online=device.online, refused=rejection, wall_s=received_wall_s)
        if status.state == "online" and self._registry.drop_outdated_layout(status):
            journal.forget_layout(device_id)
            logger.warning("%s lost what it had pruned; it starts from %.3f", device_id, status.pruning_ratio)
        if was_online and not device.online and collector is not None and device_id in collector.waiting_for:
            collector.record_disconnect(device_id)

    def announce_rejections(self, device_ids: Iterable[str]) -> None:
        """Journal and publish the rejection of devices that had been acceptable before the model was decided."""
        for device_id in device_ids:
            device, rejection = self._registry[device_id], self._registry.rejection(device_id)
            self._reject(device_id, rejection, online=device.online)
            self._run.journal.put_device(device.status, online=device.online, refused=rejection, wall_s=None)

    def _reject(self, device_id: str, reason: str, *, online: bool) -> None:
        logger.warning("rejected device %s: %s", device_id, reason)
        if online:
            self._publisher.reject(device_id, codec.encode(build_rejection_plan(self._run.run_id, device_id, reason)))

    def _on_report(self, topic: DeviceTopic, report: Report, collector: ReportCollector | None) -> None:
        device_id = report.device_id
        if device_id != topic.device_id:
            raise MessageError(f"the report is of {device_id!r}.")
        journal = self._run.journal
        self._registry.mark_online(device_id)
        if self._registry.is_known(device_id) and report.run_id == self._run.run_id and device_id not in self.reported:
            self.reported.add(device_id)
            journal.set_meta(**{f"{REPORTED}{device_id}": "yes"})
        if collector is not None:
            self._answer(collector.add_report(report))
        elif not journal.is_open(device_id, report.plan_sha256):
            self._answer(ack_for_past_report(journal, self._run.run_id, report))
        # Otherwise a restarted server is about to resume the round, and the device repeats its report.

    def _answer(self, ack: Ack | None) -> None:
        if ack is not None:
            self._publisher.acknowledge(ack)
            if ack.status != "incomplete":
                data = {"device_id": ack.device_id, "status": ack.status, "reason": ack.reason}
                self._run.on_event("report", data)
