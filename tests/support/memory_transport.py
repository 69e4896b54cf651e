"""In-process broker with the semantics of MQTT, for tests.

It implements retained messages, wildcards, last wills, takeover of a client identifier, and subscriptions that
survive a reconnect. Messages are delivered in the order of publication. Every method is thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from fedspine_edge.errors import BrokerUnreachable, TransportError
from fedspine_edge.transport.base import Connected, Event, Incoming, Will
from fedspine_edge.transport.topic_filters import check_filter, check_topic, topic_matches


class MemoryBroker:
    """Broker that connects `MemoryTransport`s."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._retained: dict[str, bytes] = {}
        self._clients: dict[str, MemoryTransport] = {}
        self.running = True

    def stop(self) -> None:
        """Disconnect all clients, drop retained messages, and refuse connections until `start`."""
        with self._changed:
            self.running = False
            self._retained.clear()
            self._changed.notify_all()

    def start(self) -> None:
        """Restart without retained messages, as a broker without persistence does. Connected clients reconnect."""
        with self._changed:
            self.running = True
            for client in list(self._clients.values()):
                client._restored()
            self._changed.notify_all()

    def retained_topics(self) -> list[str]:
        """Return the topics of all retained messages, sorted."""
        with self._changed:
            return sorted(self._retained)

    def _publish(self, topic: str, payload: bytes, retain: bool) -> None:
        with self._changed:
            if retain and payload:
                self._retained[topic] = payload
            elif retain:
                self._retained.pop(topic, None)
            for client in self._clients.values():
                if any(topic_matches(topic_filter, topic) for topic_filter in client._filters):
                    client._receive_queue.append(Incoming(topic, payload))
            self._changed.notify_all()


class MemoryTransport:
    """A `Transport` over a `MemoryBroker`.

    Args:
        broker: Broker to connect to.
        client_id: Client identifier. A second connection with the same identifier closes the first one.
        publish_timeout_s: Longest wait of `publish` for a stopped broker, in seconds.
    """

    def __init__(self, broker: MemoryBroker, client_id: str, *, publish_timeout_s: float = 0.0) -> None:
        self._broker = broker
        self.client_id = client_id
        self._publish_timeout_s = publish_timeout_s
        self._receive_queue: deque[Event] = deque()
        self._filters: dict[str, None] = {}
        self._will: Will | None = None
        self._connected = False

    def connect(self, *, timeout_s: float, will: Will | None = None) -> None:
        """See `Transport.connect`. A call after `vanish` reconnects and restores subscriptions."""
        broker = self._broker
        with broker._changed:
            if not broker._changed.wait_for(lambda: broker.running, timeout_s):
                raise BrokerUnreachable(
                    f"the in-process broker did not start within {timeout_s:g} s.", remedy="Call MemoryBroker.start()."
                )
            previous = broker._clients.get(self.client_id)
            if previous is not None and previous is not self:
                previous.vanish()
            self._will = will
            self._connected = True
            broker._clients[self.client_id] = self
            self._restored()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport.publish`."""
        check_topic(topic)
        broker = self._broker
        with broker._changed:
            if not broker._changed.wait_for(lambda: broker.running or not self._connected, self._publish_timeout_s):
                raise TransportError(f"{self.client_id} cannot publish to {topic!r}: the in-process broker is stopped.")
            self._require_connection()
            broker._publish(topic, bytes(payload), retain)

    def subscribe(self, *topic_filters: str) -> None:
        """See `Transport.subscribe`."""
        for topic_filter in topic_filters:
            check_filter(topic_filter)
        with self._broker._changed:
            self._require_connection()
            self._filters.update(dict.fromkeys(topic_filters))
            if self._broker.running:
                self._deliver_retained(topic_filters)
            self._broker._changed.notify_all()

    def unsubscribe(self, *topic_filters: str) -> None:
        """See `Transport.unsubscribe`."""
        with self._broker._changed:
            for topic_filter in topic_filters:
                self._filters.pop(topic_filter, None)

    def receive(self, *, timeout_s: float) -> Event | None:
        """See `Transport.receive`. Raises `TransportError` after a takeover of the identifier or after `vanish`."""
        deadline = time.monotonic() + timeout_s
        with self._broker._changed:
            while not self._receive_queue:
                self._require_connection()
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._broker._changed.wait(remaining):
                    break
            return self._receive_queue.popleft() if self._receive_queue else None

    def close(self) -> None:
        """See `Transport.close`."""
        with self._broker._changed:
            self._leave()
            self._filters.clear()

    def vanish(self) -> None:
        """Drop the connection as a crash or a broken cable does. The broker publishes the will."""
        with self._broker._changed:
            if not self._connected:
                return
            self._leave()
            if self._will is not None and self._broker.running:
                self._broker._publish(self._will.topic, self._will.payload, self._will.retain)

    def _leave(self) -> None:
        self._connected = False
        self._receive_queue.clear()
        if self._broker._clients.get(self.client_id) is self:
            del self._broker._clients[self.client_id]
        self._broker._changed.notify_all()

    def _require_connection(self) -> None:
        if not self._connected:
            raise TransportError(f"{self.client_id} is not connected.", remedy="Call connect() first.")

    def _restored(self) -> None:
        self._receive_queue.append(Connected())
        self._deliver_retained(tuple(self._filters))
        self._broker._changed.notify_all()

    def _deliver_retained(self, topic_filters: tuple[str, ...]) -> None:
        for topic, payload in self._broker._retained.items():
            if any(topic_matches(topic_filter, topic) for topic_filter in topic_filters):
                self._receive_queue.append(Incoming(topic, payload, retained=True))
