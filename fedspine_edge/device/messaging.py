"""Messages of a device: those that it receives, also during training, and those that it publishes."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from fedspine_edge.errors import BrokerUnreachable, TransportError
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.chunks import chunk
from fedspine_edge.protocol.messages import Report, Status
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.transport.base import Event, Incoming, Transport

log = logging.getLogger("fedspine_edge.device")


class PlanSuperseded(Exception):
    """A newer plan arrived during training."""


class MessageQueue:
    """Events of a transport in order of arrival.

    Args:
        transport: Transport of the device.
        plan_topic: Topic of the device's plans.
    """

    def __init__(self, transport: Transport, plan_topic: str) -> None:
        self._transport = transport
        self._plan_topic = plan_topic
        self._queued: deque[Event] = deque()

    def receive(self, timeout_s: float) -> Event | None:
        """Return the oldest event, or None if `timeout_s` seconds pass without one."""
        return self._queued.popleft() if self._queued else self._transport.receive(timeout_s=timeout_s)

    def check(self, plan_sha256: str) -> None:
        """Queue messages that arrived during training. Raises `PlanSuperseded` for a plan with another digest."""
        while True:
            try:
                event = self._transport.receive(timeout_s=0.0)
            except TransportError:
                return  # Training needs no broker. The main loop meets the error after the round.
            if event is None:
                return
            self._queued.append(event)
            if (
                isinstance(event, Incoming)
                and event.topic == self._plan_topic
                and event.payload
                and codec.digest(event.payload) != plan_sha256
            ):
                raise PlanSuperseded


class UpdateStore(Protocol):
    """Storage of updates until their reports are acknowledged. `BlobStore` keeps them on disk."""

    def put(self, data: bytes) -> str:
        """Store `data` and return its SHA-256."""
        ...

    def get(self, sha256: str) -> bytes:
        """Return an update. Raises `BlobError` if it is missing or damaged."""
        ...

    def prune(self, keep: Iterable[str]) -> int:
        """Delete all updates but those in `keep`, and return how many were deleted."""
        ...


class DevicePublisher:
    """Publishes a device's messages once. The caller repeats them until they are acknowledged.

    Args:
        transport: Transport, connected or not.
        topics: Topics of the fleet.
        device_id: Id of the device.
        updates: Updates whose chunks are published.
    """

    def __init__(self, transport: Transport, topics: Topics, device_id: str, updates: UpdateStore) -> None:
        self._transport = transport
        self._topics = topics
        self._device_id = device_id
        self._updates = updates

    def publish_status(self, status: Status) -> None:
        """Publish the retained status."""
        self._publish(self._topics.status(self._device_id), codec.encode(status), retain=True)

    def publish_report(self, report: Report) -> None:
        """Publish a report without the chunks of its update."""
        self._publish(self._topics.report(self._device_id), codec.encode(report))

    def publish_chunks(self, report: Report, indices: Iterable[int]) -> None:
        """Publish chunks of the report's update, until one cannot be sent. Raises `BlobError` if it is missing."""
        if report.update is None:
            return
        data = self._updates.get(report.update.sha256)
        for index in indices:
            topic = self._topics.upload(self._device_id, report.update.sha256, index)
            if index < report.update.num_chunks and not self._publish(topic, chunk(report.update, data, index)):
                return

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Publish one message. Returns False if the broker is away; the message is repeated when it returns."""
        try:
            self._transport.publish(topic, payload, retain=retain)
        except BrokerUnreachable:
            raise
        except TransportError as error:
            log.warning("could not send: %s", error.message)
            return False
        return True
