"""Transport interface that the server and the devices use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Union

FIRST_CONNECT_TIMEOUT_S = 10.0
"""Time allowed for the first connection, in seconds.

A broker that is unreachable at startup is an error. After the first connection, a transport reconnects.
"""

LONGEST_PAUSE_S = 30.0
"""Longest pause between two attempts to reconnect, in seconds."""


@dataclass(frozen=True)
class Incoming:
    """A received message."""

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True)
class Connected:
    """The connection was established, or re-established, and all subscriptions were restored.

    The receiver publishes its retained state again.
    """


Event = Union[Incoming, Connected]


@dataclass(frozen=True)
class Will:
    """Message that the broker publishes when the client disconnects without closing the connection."""

    topic: str
    payload: bytes
    retain: bool = True


class Transport(Protocol):
    """Publish/subscribe with retained messages and a last will; at-least-once while connected.

    Nothing relies on session state at the broker: after a reconnect, `receive` returns `Connected` and the caller
    publishes its state again. Messages may be duplicated and may arrive out of order.
    """

    def connect(self, *, timeout_s: float, will: Will | None = None) -> None:
        """Open the connection. Raises `BrokerUnreachable` after `timeout_s` seconds."""
        ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queue a message for sending with QoS 1. Blocks while the bounded send queue is full.

        An empty payload with `retain=True` clears the retained message. Raises `TransportError` when the send queue
        stays full for the transport's timeout.
        """
        ...

    def subscribe(self, *topic_filters: str) -> None:
        """Add subscriptions. Matching retained messages are delivered, also for filters subscribed to before."""
        ...

    def unsubscribe(self, *topic_filters: str) -> None:
        """Remove subscriptions."""
        ...

    def receive(self, *, timeout_s: float) -> Event | None:
        """Return the next event, or None after `timeout_s` seconds without one."""
        ...

    def close(self) -> None:
        """Send what is queued, disconnect without triggering the will, and release all resources."""
        ...
