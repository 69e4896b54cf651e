"""Publish/subscribe network in virtual time, with one thread, one event queue and no randomness.

The server runs its ordinary blocking loop. Whenever it waits in `receive`, the network processes the devices' events in
order of virtual time. Training advances the device's own clock, so messages that it publishes afterwards are delivered
correspondingly later. The same inputs therefore give the same run, bit for bit.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict, deque
from typing import Protocol

from fedspine_edge.clock import VirtualClock
from fedspine_edge.errors import TransportError
from fedspine_edge.transport.base import Connected, Event, Incoming, Will
from fedspine_edge.transport.topic_filters import topic_matches


class Participant(Protocol):
    """Interface of a simulated device. `FleetDevice` implements it."""

    def handle(self, event: Event) -> None: ...

    def tick(self) -> None: ...

    def next_wakeup(self) -> float | None:
        """Return the clock time in seconds at which `tick` has to run; None for never."""
        ...


class VirtualNetwork:
    """Event queue, retained messages and subscriptions.

    Args:
        latency_s: Latency of every message in virtual seconds.
    """

    def __init__(self, *, latency_s: float = 0.02) -> None:
        self.latency_s = latency_s
        self._queue: list[tuple[float, int, _Delivery]] = []
        self._sequence = itertools.count()
        self._retained: dict[str, bytes] = {}
        self._endpoints: dict[str, VirtualTransport] = {}
        # Clients by filter. Exact topics are looked up, because thousands of devices subscribe to as many of them.
        self._exact: dict[str, set[str]] = defaultdict(set)
        self._wildcard: dict[str, set[str]] = defaultdict(set)

    def join(self, client_id: str, clock: VirtualClock) -> VirtualTransport:
        """Create the transport of `client_id`, whose local time is `clock`."""
        transport = VirtualTransport(self, client_id, clock)
        self._endpoints[client_id] = transport
        return transport

    def publish(self, when_s: float, topic: str, payload: bytes, retain: bool) -> None:
        """Schedule a message for all clients that are subscribed to `topic` when it arrives."""
        self._push(when_s + self.latency_s, _Delivery(topic=topic, payload=payload, retain=retain))

    def deliver(self, when_s: float, client_id: str, event: Event | None) -> None:
        """Schedule `event` for one endpoint; None runs its `tick`."""
        self._push(when_s, _Delivery(client_id=client_id, event=event))

    def subscribe(self, client_id: str, topic_filter: str) -> None:
        """Deliver matching messages to `client_id` from now on."""
        (self._wildcard if _has_wildcard(topic_filter) else self._exact)[topic_filter].add(client_id)

    def unsubscribe(self, client_id: str, topic_filter: str) -> None:
        """Remove a subscription. Does nothing if there is none."""
        table = self._wildcard if _has_wildcard(topic_filter) else self._exact
        table[topic_filter].discard(client_id)
        if not table[topic_filter]:
            del table[topic_filter]

    def retained(self, topic_filter: str) -> list[Incoming]:
        """Return the retained messages that match, in order of topics."""
        if not _has_wildcard(topic_filter):
            payload = self._retained.get(topic_filter)
            return [] if payload is None else [Incoming(topic_filter, payload, retained=True)]
        return [
            Incoming(topic, payload, retained=True)
            for topic, payload in sorted(self._retained.items())
            if topic_matches(topic_filter, topic)
        ]

    def run_next(self, until_s: float) -> float | None:
        """Process the next event at or before `until_s`. Returns its time, or None if there is none."""
        if not self._queue or self._queue[0][0] > until_s:
            return None
        when_s, _, delivery = heapq.heappop(self._queue)
        if delivery.client_id:
            self._endpoints[delivery.client_id].accept(when_s, delivery.event)
            return when_s
        if delivery.retain:
            if delivery.payload:
                self._retained[delivery.topic] = delivery.payload
            else:
                self._retained.pop(delivery.topic, None)
        message = Incoming(delivery.topic, delivery.payload)
        receivers = set(self._exact.get(delivery.topic, ()))
        for topic_filter, clients in self._wildcard.items():
            if topic_matches(topic_filter, delivery.topic):
                receivers |= clients
        for client_id in sorted(receivers):
            self._endpoints[client_id].accept(when_s, message)
        return when_s

    def _push(self, when_s: float, delivery: _Delivery) -> None:
        heapq.heappush(self._queue, (when_s, next(self._sequence), delivery))


class VirtualTransport:
    """Endpoint of a `VirtualNetwork`. Implements `transport.base.Transport`."""

    def __init__(self, network: VirtualNetwork, client_id: str, clock: VirtualClock) -> None:
        self._network = network
        self._client_id = client_id
        self._clock = clock
        self._filters: set[str] = set()
        self._will: Will | None = None
        self._offline = False
        self._inbox: deque[Event] = deque()
        self._participant: Participant | None = None
        self._wakeup_s = math.inf

    def attach(self, participant: Participant) -> None:
        """Deliver events to `participant` instead of queueing them for `receive`."""
        self._participant = participant

    def connect(self, *, timeout_s: float, will: Will | None = None) -> None:
        self._will = will
        self._network.deliver(self._clock.now(), self._client_id, Connected())

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self._offline:
            raise TransportError(f"{self._client_id} is disconnected.")
        self._network.publish(self._clock.now(), topic, payload, retain)

    def subscribe(self, *topic_filters: str) -> None:
        for topic_filter in topic_filters:
            self._filters.add(topic_filter)
            self._network.subscribe(self._client_id, topic_filter)
            for message in self._network.retained(topic_filter):
                self._network.deliver(self._clock.now() + self._network.latency_s, self._client_id, message)

    def unsubscribe(self, *topic_filters: str) -> None:
        for topic_filter in topic_filters:
            self._filters.discard(topic_filter)
            self._network.unsubscribe(self._client_id, topic_filter)

    def disconnect(self, duration_s: float) -> None:
        """Disconnect for `duration_s` seconds: the last will is published, and no message is received or sent."""
        now = self._clock.now()
        if self._will is not None:
            self._network.publish(now, self._will.topic, self._will.payload, self._will.retain)
        self._offline = True
        self._network.deliver(now + duration_s, self._client_id, Connected())

    def receive(self, *, timeout_s: float) -> Event | None:
        """Return the next event, or None after `timeout_s` virtual seconds. Runs the whole network meanwhile."""
        deadline_s = self._clock.now() + timeout_s
        while not self._inbox:
            when_s = self._network.run_next(deadline_s)
            if when_s is None:
                self._clock.advance_to(deadline_s)
                return None
            self._clock.advance_to(when_s)
        return self._inbox.popleft()

    def close(self) -> None:
        self.unsubscribe(*self._filters.copy())

    def accept(self, when_s: float, event: Event | None) -> None:
        """Accept an event: queue it, or pass it to the attached participant at its local time."""
        if self._offline:
            if not isinstance(event, Connected):
                return
            self._offline = False
            self._wakeup_s = math.inf
            for topic_filter in sorted(self._filters):
                for message in self._network.retained(topic_filter):
                    self._network.deliver(when_s + self._network.latency_s, self._client_id, message)
        if self._participant is None:
            if event is not None:
                self._inbox.append(event)
            return
        self._clock.advance_to(when_s)
        if event is not None:
            self._participant.handle(event)
        else:
            self._wakeup_s = math.inf
        self._participant.tick()
        wakeup_s = self._participant.next_wakeup()
        if wakeup_s is not None and wakeup_s < self._wakeup_s:
            self._wakeup_s = wakeup_s
            self._network.deliver(max(wakeup_s, self._clock.now()), self._client_id, None)


def _has_wildcard(topic_filter: str) -> bool:
    return "+" in topic_filter or "#" in topic_filter


class _Delivery:
    """A publication (topic, payload, retain), or an event for one endpoint."""

    __slots__ = ("client_id", "event", "payload", "retain", "topic")

    def __init__(
        self,
        *,
        topic: str = "",
        payload: bytes = b"",
        retain: bool = False,
        client_id: str = "",
        event: Event | None = None,
    ) -> None:
        self.topic, self.payload, self.retain = topic, payload, retain
        self.client_id, self.event = client_id, event
