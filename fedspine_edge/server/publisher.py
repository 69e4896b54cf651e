"""Publishes the server's messages, and publishes the current plans and blobs again after every reconnect."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fedspine_edge.errors import BrokerUnreachable, TransportError
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.chunks import chunk
from fedspine_edge.protocol.messages import Ack, BlobRef
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.transport.base import Connected, Event, Transport

logger = logging.getLogger(__name__)


class ServerPublisher:
    """Publishes plans, chunks and acknowledgements.

    The broker may lose its retained messages, so the current plans and blobs are published again after a reconnect.

    Args:
        transport: Transport that is not connected yet.
        topics: Topics of the fleet.

    Attributes:
        connected: Whether the transport has reported a connection since `open`.
        has_unsent: Whether a message could not be published; it is published again by `receive`.
    """

    def __init__(self, transport: Transport, topics: Topics) -> None:
        self._transport = transport
        self._topics = topics
        self._plans: dict[str, bytes] = {}
        self._blobs: Sequence[tuple[BlobRef, bytes]] = ()
        self._open = False
        self.connected = False
        self.has_unsent = False

    def open(self, timeout_s: float) -> None:
        """Connect and subscribe. Raises `BrokerUnreachable`."""
        self._open = True
        self._transport.connect(timeout_s=timeout_s)
        self._transport.subscribe(*self._topics.server_filters)

    def close(self) -> None:
        """Flush and disconnect. May be called repeatedly."""
        if self._open:
            self._open = False
            try:
                self._transport.close()
            except TransportError as error:
                logger.warning("disconnecting failed: %s", error.message)

    def receive(self, timeout_s: float) -> Event | None:
        """Return the next event, or None after `timeout_s` seconds or after a reconnect, which is handled here."""
        event = self._transport.receive(timeout_s=timeout_s)
        if isinstance(event, Connected):
            self.connected = True
            self._republish()
            return None
        if event is None and self.has_unsent:
            self._republish()
        return event

    def publish_plans(self, plans: Mapping[str, bytes], blobs: Sequence[tuple[BlobRef, bytes]] = ()) -> None:
        """Publish a round: the chunks of the blobs, then the plans, all retained.

        Args:
            plans: Encoded plan by device id.
            blobs: Blobs that the plans refer to.

        They replace those of the previous call and are published again after every reconnect.
        """
        self._plans, self._blobs = dict(plans), blobs
        self._republish()

    def clear(self, ref: BlobRef) -> bool:
        """Remove the blob's chunks from the broker; return False when not all could be removed."""
        self._blobs = [blob for blob in self._blobs if blob[0].sha256 != ref.sha256]
        return all(self._publish(self._topics.blob(ref.sha256, i), b"", retain=True) for i in range(ref.num_chunks))

    def reject(self, device_id: str, payload: bytes) -> None:
        """Answer the status of a device that may not take part with an encoded plan.

        It is not retained, since the device may come back with other settings.
        """
        self._publish(self._topics.plan(device_id), payload)

    def acknowledge(self, ack: Ack) -> None:
        """Answer a report. If the answer is lost, the device repeats its report."""
        self._publish(self._topics.ack(ack.device_id), codec.encode(ack))

    def _republish(self) -> None:
        self.has_unsent = False
        for ref, data in self._blobs:
            for index in range(ref.num_chunks):
                self._publish(self._topics.blob(ref.sha256, index), chunk(ref, data, index), retain=True)
        for device_id, payload in self._plans.items():
            self._publish(self._topics.plan(device_id), payload, retain=True)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Publish one message; return False when the broker is not connected."""
        try:
            self._transport.publish(topic, payload, retain=retain)
        except BrokerUnreachable:
            raise
        except TransportError as error:
            if not self.has_unsent:
                logger.warning("publishing failed: %s", error.message)
            self.has_unsent = True
            return False
        return True
