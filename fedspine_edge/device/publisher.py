"""What a device says: status, reports and their chunks, to a broker that may be away."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fedspine_edge.errors import BrokerUnreachable, TransportError
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.chunks import BlobStore, chunk
from fedspine_edge.protocol.messages import Report, Status
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.transport.base import Transport

log = logging.getLogger("fedspine_edge.device")


class DevicePublisher:
    """Sends what it is given once; everything is stated again by the agent until it was heard.

    Args:
        transport: Connected or not.
        topics: Of the fleet.
        device_id: Whose topics to speak on.
        blobs: Where updates are kept until their report has its final ack.
    """

    def __init__(self, transport: Transport, topics: Topics, device_id: str, blobs: BlobStore) -> None:
        self._transport = transport
        self._topics = topics
        self._device_id = device_id
        self._blobs = blobs

    def status(self, status: Status) -> None:
        """The retained status."""
        self._publish(self._topics.status(self._device_id), codec.encode(status), retain=True)

    def report(self, report: Report) -> None:
        """A report without its chunks."""
        self._publish(self._topics.report(self._device_id), codec.encode(report))

    def chunks(self, report: Report, indices: Iterable[int]) -> None:
        """Some chunks of the report's update, until one cannot be sent. Raises `BlobError` if the update is gone."""
        if report.update is None:
            return
        data = self._blobs.get(report.update.sha256)
        for index in indices:
            topic = self._topics.upload(self._device_id, report.update.sha256, index)
            if index < report.update.num_chunks and not self._publish(topic, chunk(report.update, data, index)):
                return

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over one message; False when the broker is away (everything is restated when it returns)."""
        try:
            self._transport.publish(topic, payload, retain=retain)
        except BrokerUnreachable:
            raise
        except TransportError as error:
            log.warning("could not send: %s", error.message)
            return False
        return True
