"""The server's end of the wire: what is announced stays announced, whatever the broker forgets."""

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
    """Publishes plans, chunks and acknowledgements, and restates what is announced after every reconnect.

    Args:
        transport: Not yet connected.
        topics: The fleet's.
    """

    def __init__(self, transport: Transport, topics: Topics) -> None:
        self._transport = transport
        self._topics = topics
        self._plans: dict[str, bytes] = {}
        self._blobs: Sequence[tuple[BlobRef, bytes]] = ()
        self._open = False
        self.connected = False
        """Whether the broker has said so since `open`."""
        self.behind = False
        """Whether something could not be published; it is restated."""

    def open(self, timeout_s: float) -> None:
        """Connect and subscribe. Raises `BrokerUnreachable`."""
        self._open = True
        self._transport.connect(timeout_s=timeout_s)
        self._transport.subscribe(*self._topics.server_filters)

    def close(self) -> None:
        """Flush and disconnect. Harmless when repeated."""
        if self._open:
            self._open = False
            try:
                self._transport.close()
            except TransportError as error:
                logger.warning("disconnecting: %s", error.message)

    def receive(self, timeout_s: float) -> Event | None:
        """The next event other than a reconnect, which is dealt with here; None after `timeout_s` seconds."""
        event = self._transport.receive(timeout_s=timeout_s)
        if isinstance(event, Connected):
            self.connected = True
            self._restate()
            return None
        if event is None and self.behind:
            self._restate()
        return event

    def announce(self, plans: Mapping[str, bytes], blobs: Sequence[tuple[BlobRef, bytes]] = ()) -> None:
        """Publish the blobs' chunks, then the plans by device id, and keep them published; replaces the last call."""
        self._plans, self._blobs = dict(plans), blobs
        self._restate()

    def clear(self, ref: BlobRef) -> bool:
        """Remove the blob's chunks from the broker; False when not all could be."""
        self._blobs = [blob for blob in self._blobs if blob[0].sha256 != ref.sha256]
        return all(self._publish(self._topics.blob(ref.sha256, i), b"", retain=True) for i in range(ref.num_chunks))

    def refuse(self, device_id: str, payload: bytes) -> None:
        """Answer a status that may not take part; not retained, since the device may come back with other settings."""
        self._publish(self._topics.plan(device_id), payload)

    def acknowledge(self, ack: Ack) -> None:
        """Answer a report; a lost answer is asked for again by the device."""
        self._publish(self._topics.ack(ack.device_id), codec.encode(ack))

    def _restate(self) -> None:
        self.behind = False
        for ref, data in self._blobs:
            for index in range(ref.num_chunks):
                self._publish(self._topics.blob(ref.sha256, index), chunk(ref, data, index), retain=True)
        for device_id, payload in self._plans.items():
            self._publish(self._topics.plan(device_id), payload, retain=True)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over one message; False when the broker is away."""
        try:
            self._transport.publish(topic, payload, retain=retain)
        except BrokerUnreachable:
            raise
        except TransportError as error:
            if not self.behind:
                logger.warning("could not publish: %s", error.message)
            self.behind = True
            return False
        return True
