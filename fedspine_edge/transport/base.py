"""The small face that server and devices know of any transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Union

FIRST_CONNECT_TIMEOUT_S = 10.0
"""A broker that is not there when a program starts is a mistake told at once; later its absence is waited for."""

LONGEST_PAUSE_S = 30.0
"""The longest that a client pauses between two attempts to reach a broker that was there before."""


@dataclass(frozen=True)
class Incoming:
    """One message as it arrived."""

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True)
class Connected:
    """The connection was (re)established and subscriptions restored: restate whatever must be known."""


Event = Union[Incoming, Connected]


@dataclass(frozen=True)
class Will:
    """What the broker says in our name when we vanish."""

    topic: str
    payload: bytes
    retain: bool = True


class Transport(Protocol):
    """Publish/subscribe with retained messages and a last will; at-least-once while connected.

    Nothing relies on the broker remembering a session: after a reconnect `receive` returns `Connected`
    and the caller restates its desired state. Messages may repeat and may arrive out of order.
    """

    def connect(self, *, timeout_s: float, will: Will | None = None) -> None:
        """Open the connection. Raises `BrokerUnreachable` after `timeout_s` seconds."""
        ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand one message over (QoS 1); blocks while the bounded outbox is full.

        An empty payload with `retain=True` clears the topic. Raises `TransportError` when the outbox stays
        full for the transport's timeout.
        """
        ...

    def subscribe(self, *topic_filters: str) -> None:
        """Add subscriptions; retained messages that match are delivered (again)."""
        ...

    def unsubscribe(self, *topic_filters: str) -> None:
        """Drop subscriptions."""
        ...

    def receive(self, *, timeout_s: float) -> Event | None:
        """The next event, or None after `timeout_s` seconds without one."""
        ...

    def close(self) -> None:
        """Flush what was published, disconnect cleanly (the will is not sent) and free everything."""
        ...
