"""A publish/subscribe network in virtual time: one thread, one event queue, no randomness.

The server runs its ordinary blocking loop; whenever it waits in `receive`, the network plays the devices'
events in order of virtual time. A device that trains spends its own clock, so what it publishes afterwards is
delivered that much later. The same inputs therefore give the same run, bit for bit.
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
    """What the network needs of a simulated device (`FleetDevice` has it)."""

    def handle(self, event: Event) -> None: ...

    def tick(self) -> None: ...

    def next_wakeup(self) -> float | None:
        """Clock time in seconds at which `tick` wants to run; None for never."""
        ...


class VirtualNetwork:
    """The event queue, the retained messages and everybody's subscriptions.

    Args:
        latency_s: Virtual seconds that any message takes.
    """

    def __init__(self, *, latency_s: float = 0.02) -> None:
        self.latency_s = latency_s
        self._queue: list[tuple[float, int, _Delivery]] = []
        self._sequence = itertools.count()
        self._retained: dict[str, bytes] = {}
        self._endpoints: dict[str, VirtualTransport] = {}
        # by filter: a fleet of thousands subscribes to as many exact topics, and each message concerns one of them
        self._exact: dict[str, set[str]] = defaultdict(set)
        self._wild: dict[str, set[str]] = defaultdict(set)

    def join(self, client_id: str, clock: VirtualClock) -> VirtualTransport:
        """A transport for `client_id`, whose own time is `clock`."""
        transport = VirtualTransport(self, client_id, clock)
        self._endpoints[client_id] = transport
        return transport

    def publish(self, when_s: float, topic: str, payload: bytes, retain: bool) -> None:
        """Schedule a message for everybody who subscribes to `topic` at its arrival."""
        self._push(when_s + self.latency_s, _Delivery(topic=topic, payload=payload, retain=retain))

    def deliver(self, when_s: float, client_id: str, event: Event | None) -> None:
        """Schedule `event` for one endpoint; None wakes its `tick`."""
        self._push(when_s, _Delivery(client_id=client_id, event=event))

    def subscribe(self, client_id: str, topic_filter: str) -> None:
        """Let `client_id` hear of matching publications from now on."""
        (self._wild if _is_wild(topic_filter) else self._exact)[topic_filter].add(client_id)

    def unsubscribe(self, client_id: str, topic_filter: str) -> None:
        """Undo `subscribe`; harmless when there was none."""
        table = self._wild if _is_wild(topic_filter) else self._exact
        table[topic_filter].discard(client_id)
        if not table[topic_filter]:
            del table[topic_filter]

    def retained(self, topic_filter: str) -> list[Incoming]:
        """Retained messages that match, in topic order."""
        if not _is_wild(topic_filter):
            payload = self._retained.get(topic_filter)
            return [] if payload is None else [Incoming(topic_filter, payload, retained=True)]
        return [
            Incoming(topic, payload, retained=True)
            for topic, payload in sorted(self._retained.items())
            if topic_matches(topic_filter, topic)
        ]

    def run_next(self, until_s: float) -> float | None:
        """Play the next event at or before `until_s`; its time, or None if there is none."""
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
        wanted = set(self._exact.get(delivery.topic, ()))
        for topic_filter, clients in self._wild.items():
            if topic_matches(topic_filter, delivery.topic):
                wanted |= clients
        for client_id in sorted(wanted):
            self._endpoints[client_id].accept(when_s, message)
        return when_s

    def _push(self, when_s: float, delivery: _Delivery) -> None:
        heapq.heappush(self._queue, (when_s, next(self._sequence), delivery))


class VirtualTransport:
    """One endpoint of a `VirtualNetwork`; implements `transport.base.Transport`."""

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
        """Let the network drive `participant` instead of queueing its events."""
        self._participant = participant

    def connect(self, *, timeout_s: float, will: Will | None = None) -> None:
        self._will = will
        self._network.deliver(self._clock.now(), self._client_id, Connected())

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self._offline:
            raise TransportError(f"{self._client_id} is cut off.")
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

    def cut(self, duration_s: float) -> None:
        """Lose the connection now: the last will is published, and for `duration_s` nothing comes or goes."""
        now = self._clock.now()
        if self._will is not None:
            self._network.publish(now, self._will.topic, self._will.payload, self._will.retain)
        self._offline = True
        self._network.deliver(now + duration_s, self._client_id, Connected())

    def receive(self, *, timeout_s: float) -> Event | None:
        """The next event; plays the whole network until one arrives or `timeout_s` virtual seconds have passed."""
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
        """Take an event: queue it, or let the attached participant handle it when its clock allows."""
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


def _is_wild(topic_filter: str) -> bool:
    return "+" in topic_filter or "#" in topic_filter


class _Delivery:
    """Either a publication (topic, payload, retain) or an event for one endpoint."""

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
