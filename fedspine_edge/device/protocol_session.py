"""Device side of the fleet protocol, without the training.

`ProtocolSession` is a state machine driven by events and time: `start`, `handle(event)`, `tick()`. It announces the
device, accepts plans, downloads the adapter, hands it to a `RoundHandler`, and repeats the report until the server has
acknowledged it. A real device, a simulated device and the fake devices of the tests share it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

from fedspine_edge.clock import Clock
from fedspine_edge.device.adapter_download import AdapterDownload
from fedspine_edge.device.messaging import DevicePublisher, UpdateStore
from fedspine_edge.errors import BlobError, MessageError, TransportError
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import (
    MAX_RETRY_S,
    Ack,
    FinishedPlan,
    Report,
    RoundPlan,
    Status,
    WaitPlan,
    retry_interval_s,
)
from fedspine_edge.protocol.topics import BlobTopic, DeviceTopic, Topics
from fedspine_edge.transport.base import Connected, Event, Transport, Will

log = logging.getLogger("fedspine_edge.device")


@dataclass(frozen=True)
class RoundOutcome:
    """Result of one plan.

    Attributes:
        report: The report for the server.
        update: The update that the report announces; None if the round failed.
    """

    report: Report
    update: bytes | None = None


class RoundHandler(Protocol):
    """Interface of the code that carries out the plans that a session receives."""

    def status(self, state: Literal["online", "offline"]) -> Status:
        """Return the device's status."""
        ...

    @property
    def max_adapter_bytes(self) -> int:
        """Size in bytes that the adapter of a round cannot exceed. It limits what a plan can make a device store."""
        ...

    def begin_round(self, plan: RoundPlan) -> None:
        """Prepare for a plan that was accepted. The download of its adapter follows."""
        ...

    def run_round(self, plan: RoundPlan, plan_sha256: str, blobs: list[bytes]) -> RoundOutcome | None:
        """Carry out a plan with its blobs, and return the outcome, or None if a newer plan has superseded it."""
        ...

    def fail_round(self, plan: RoundPlan, plan_sha256: str, error: BlobError) -> RoundOutcome:
        """Return the outcome of a plan whose adapter could not be downloaded."""
        ...

    def save_outcome(self, report: Report) -> None:
        """Make the outcome of a round durable, before the report is sent."""
        ...

    def report_acknowledged(self, report: Report, ack: Ack) -> None:
        """Record that the server has given a final answer to the report."""
        ...

    def lost_update(self, error: BlobError) -> Exception:
        """Return the exception to raise if the update that a report announces is missing or damaged."""
        ...

    def finish_run(self, run_id: str) -> None:
        """Clean up after the server has finished the run."""
        ...


class ProtocolSession:
    """The protocol state of one device.

    Args:
        fleet: Name of the fleet.
        device_id: Id of the device.
        transport: Transport, not yet connected.
        clock: Clock of timeouts. A session spends the modelled or simulated time of a round on it.
        handler: Carries out the plans.
        updates: Storage of updates.
        download: Download of the adapters.
    """

    def __init__(
        self,
        fleet: str,
        device_id: str,
        transport: Transport,
        clock: Clock,
        handler: RoundHandler,
        *,
        updates: UpdateStore,
        download: AdapterDownload,
    ) -> None:
        self.finished = False
        """Whether the server has finished the run."""
        self.report: Report | None = None
        """The last report of the current run."""
        self.acked = True
        """Whether the report has a final answer, or a newer plan has replaced it."""
        self._fleet = fleet
        self._device_id = device_id
        self._transport = transport
        self._clock = clock
        self._handler = handler
        self._updates = updates
        self._download = download
        self._topics = Topics(fleet)
        self._publisher = DevicePublisher(transport, self._topics, device_id, updates)
        self._plan: RoundPlan | None = None
        self._plan_sha256 = ""
        self._refusal = ""
        self._retry_s = MAX_RETRY_S
        self._retry_at: float | None = None

    def restore(self, report: Report | None, *, acked: bool) -> None:
        """Restore the state of an earlier process, before `start`."""
        self.report, self.acked = report, acked
        self._retry_at = None if acked else self._clock.now()

    def start(self, *, timeout_s: float) -> None:
        """Connect, subscribe and publish the status. Raises `BrokerUnreachable` after `timeout_s` seconds."""
        will = Will(self._topics.status(self._device_id), codec.encode(self._handler.status("offline")))
        self._transport.connect(timeout_s=timeout_s, will=will)
        self._transport.subscribe(*self._topics.device_filters(self._device_id))
        self.publish_status()

    def close(self) -> None:
        """Publish that the device is offline, and disconnect."""
        try:
            topic = self._topics.status(self._device_id)
            self._transport.publish(topic, codec.encode(self._handler.status("offline")), retain=True)
            self._transport.close()
        except TransportError as error:
            log.warning("could not publish the offline status: %s", error.message)

    def publish_status(self) -> None:
        """Publish that the device is online."""
        self._publisher.publish_status(self._handler.status("online"))

    def handle(self, event: Event) -> None:
        """Handle one event of the transport. Runs the round as soon as its adapter is complete."""
        if isinstance(event, Connected):
            self.publish_status()
            self._resend()
            return
        try:
            topic = self._topics.parse(event.topic)
            if isinstance(topic, BlobTopic):
                self._on_chunk(topic, event.payload)
            elif isinstance(topic, DeviceTopic) and topic.device_id == self._device_id and event.payload:
                if topic.kind == "plan":
                    self._on_plan(event.payload)
                elif topic.kind == "ack":
                    self._on_ack(codec.decode(event.payload, Ack))
        except MessageError as error:
            log.warning("ignored a message on %s: %s", event.topic, error.message)

    def tick(self) -> None:
        """Repeat what has not been answered in time: the request for chunks, or the report."""
        if self._retry_at is not None and self._clock.now() >= self._retry_at:
            self._resend()

    def next_wakeup(self) -> float | None:
        """Return the clock's time in seconds at which `tick` has to run; None if only an event can change anything."""
        return self._retry_at

    # Plans

    def _on_plan(self, payload: bytes) -> None:
        sha256 = codec.digest(payload)
        if self._plan is not None and sha256 == self._plan_sha256:
            return  # published again
        plan = codec.decode_plan(payload)
        if plan.device_id != self._device_id:
            raise MessageError(f"the plan is for device {plan.device_id!r}.")
        last = self.report if self.report is not None and self.report.run_id == plan.run_id else None
        if last is not None and last.plan_sha256 == sha256:
            self._repeat_report()
            return
        if last is not None and isinstance(plan, RoundPlan) and plan.server_round < last.server_round:
            raise MessageError(f"round {plan.server_round} is over; this device has reported {last.server_round}.")
        self._drop_plan()
        self.acked, self._retry_at = True, None  # The server does not wait for the last report any more.
        if isinstance(plan, WaitPlan):
            self._on_wait(plan)
        elif isinstance(plan, FinishedPlan):
            self._on_finished(plan)
        else:
            self._on_round(plan, sha256)

    def _repeat_report(self) -> None:
        """Answer a plan that this device has already reported, without running it again."""
        self._drop_plan()
        self.acked = False
        self._resend()

    def _on_wait(self, plan: WaitPlan) -> None:
        if plan.reason and plan.reason != self._refusal:  # The server repeats the reason after every status.
            log.error("fleet %s does not accept this device: %s", self._fleet, plan.reason)
        self._refusal = plan.reason
        if not plan.reason:
            self.publish_status()  # The server takes this device for offline; only a fresh status shows the opposite.

    def _on_finished(self, plan: FinishedPlan) -> None:
        log.info("run %s is finished", plan.run_id)
        self._handler.finish_run(plan.run_id)
        self.finished = True

    def _on_round(self, plan: RoundPlan, sha256: str) -> None:
        self._refusal = ""
        if self.report is not None and self.report.run_id != plan.run_id:
            self.report = None
        self._plan, self._plan_sha256 = plan, sha256
        self._retry_s = retry_interval_s(plan.deadline_s)
        self._handler.begin_round(plan)
        size_bytes = sum(ref.size_bytes for ref in plan.adapter)
        if size_bytes > self._handler.max_adapter_bytes:
            error = BlobError(f"the adapter has {size_bytes:,} bytes, more than an adapter of this model can have.")
            self._conclude(self._handler.fail_round(plan, sha256, error))
            return
        if plan.adapter:
            self._download.start(plan.adapter)
            self._request_chunks()
        self._run_if_complete(plan)

    def _drop_plan(self) -> None:
        self._download.stop()
        self._plan, self._plan_sha256 = None, ""

    # Adapter and training

    def _on_chunk(self, topic: BlobTopic, payload: bytes) -> None:
        if self._plan is not None and self._download.add_chunk(topic.sha256, topic.index, payload):
            self._retry_at = self._clock.now() + self._retry_s
            self._run_if_complete(self._plan)

    def _request_chunks(self) -> None:
        self._retry_at = self._clock.now() + self._retry_s
        self._download.request()

    def _run_if_complete(self, plan: RoundPlan) -> None:
        if self._download.pending:
            return
        outcome: RoundOutcome | None
        try:
            blobs = self._download.result()
        except BlobError as error:
            outcome = self._handler.fail_round(plan, self._plan_sha256, error)
        else:
            if blobs is None:
                return
            self._retry_at = None
            outcome = self._handler.run_round(plan, self._plan_sha256, blobs)
        if outcome is None:
            self._drop_plan()
        else:
            self._conclude(outcome)

    # Reports

    def _conclude(self, outcome: RoundOutcome) -> None:
        """Make the outcome durable, then report it."""
        report = outcome.report
        self._clock.spend(0.0 if report.time_kind == "measured" else report.completion_time_s)
        if outcome.update is not None:
            self._updates.put(outcome.update)
        self.report, self.acked = report, False
        self._handler.save_outcome(report)
        self._updates.prune([] if report.update is None else [report.update.sha256])
        self._download.discard()
        self._drop_plan()
        if outcome.update is not None:
            self.publish_status()  # with the new pruning ratio
        self._publish_report(report)
        if report.update is not None:
            self._publish_chunks(report, range(report.update.num_chunks))

    def _on_ack(self, ack: Ack) -> None:
        report = self.report
        if report is None or self.acked:
            return
        if (ack.run_id, ack.server_round) != (report.run_id, report.server_round):
            return
        if ack.status == "incomplete":
            self._publish_chunks(report, ack.missing)
            return
        self.acked, self._retry_at = True, None
        self._handler.report_acknowledged(report, ack)

    def _resend(self) -> None:
        """Request missing chunks again, or repeat a report that has no final answer."""
        self._retry_at = None
        if self._plan is not None and self._download.pending:
            self._request_chunks()
        elif self.report is not None and not self.acked:
            self._publish_report(self.report)

    def _publish_report(self, report: Report) -> None:
        self._retry_at = self._clock.now() + self._retry_s
        self._publisher.publish_report(report)

    def _publish_chunks(self, report: Report, indices: range | tuple[int, ...]) -> None:
        try:
            self._publisher.publish_chunks(report, indices)
        except BlobError as error:
            raise self._handler.lost_update(error) from error
