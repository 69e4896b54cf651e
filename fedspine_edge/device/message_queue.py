"""What the transport brings, in order, also while the device trains."""

from __future__ import annotations

from collections import deque

from fedspine_edge.errors import TransportError
from fedspine_edge.protocol import codec
from fedspine_edge.transport.base import Event, Incoming, Transport


class PlanSuperseded(Exception):
    """A newer plan arrived while training."""


class MessageQueue:
    """Events of `transport`; `plan_topic` is where this device's plans come."""

    def __init__(self, transport: Transport, plan_topic: str) -> None:
        self._transport = transport
        self._plan_topic = plan_topic
        self._kept: deque[Event] = deque()

    def receive(self, timeout_s: float) -> Event | None:
        """The oldest event that was not taken yet; None when `timeout_s` passes without one."""
        return self._kept.popleft() if self._kept else self._transport.receive(timeout_s=timeout_s)

    def watch(self, plan_sha256: str) -> None:
        """Keep messages that arrived during training. Raises `PlanSuperseded` at a plan other than `plan_sha256`."""
        while True:
            try:
                event = self._transport.receive(timeout_s=0.0)
            except TransportError:
                return  # training needs no broker; the loop meets the error after the round
            if event is None:
                return
            self._kept.append(event)
            if (
                isinstance(event, Incoming)
                and event.topic == self._plan_topic
                and event.payload
                and codec.digest(event.payload) != plan_sha256
            ):
                raise PlanSuperseded
