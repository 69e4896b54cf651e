"""MQTT 5 over paho-mqtt: bounded in both directions, reconnecting, never blocking in a callback.

paho's network thread only files what arrives under a lock. One thread of ours, the link, sends and reconnects:

    publish() → outbox (bounded by bytes) → link → at most `window` unacknowledged → broker
    broker → paho's thread → inbox → receive()

Back-pressure inward is MQTT's own (see `Inbox`): a broker stops at the announced Receive Maximum of unacknowledged
messages (rumqttd: at 100), so neither callbacks block nor this process grows. Every connection is a fresh paho
client: unacknowledged messages go back to the front of the outbox, and nothing depends on a session at the broker.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from fedspine_edge.config import BrokerSettings
from fedspine_edge.errors import BrokerUnreachable, FedspineError, TransportError
from fedspine_edge.transport.access import NotConnected, explain, no_answer, password, refusal, tls_context
from fedspine_edge.transport.base import Connected, Event, Incoming, Will
from fedspine_edge.transport.filters import check_filter, check_topic
from fedspine_edge.transport.inbox import Inbox

log = logging.getLogger(__name__)

WINDOW = 16
"""Most unacknowledged publications; below the Receive Maximum of Mosquitto (20), EMQX (32) and AWS IoT (100)."""

RECEIVE_MAXIMUM = 32
MAX_PACKET_BYTES = 4 * 1024 * 1024
"""Largest packet accepted from the broker."""

FILTERS_PER_SUBSCRIBE = 16
_CONNECT_TIMEOUT_S = 5.0
_HEADER_BYTES = 16
_FIRST_BACKOFF_S, _LAST_BACKOFF_S, _STABLE_AFTER_S = 0.2, 30.0, 5.0
_SHORT_LIVED_IS_ODD = 3
_SESSION_TAKEN_OVER = 0x8E


@dataclass
class _Outgoing:
    topic: str
    payload: bytes
    retain: bool

    @property
    def size_bytes(self) -> int:
        return len(self.topic.encode()) + len(self.payload) + _HEADER_BYTES


@dataclass
class _Link:
    """One connection and what is known of it; guarded by the transport's lock."""

    client: paho.Client
    answered: bool = False
    reason_code: Any = None
    lost: str = ""
    """Why the connection ended; empty while it stands."""
    window: int = WINDOW
    max_packet_bytes: int = 0
    opened_s: float = field(default_factory=time.monotonic)
    inflight: dict[int, _Outgoing] = field(default_factory=dict)
    acknowledged: int = 0
    early_acks: set[int] = field(default_factory=set)
    """Acknowledgements that overtook the return of paho's publish()."""
    subacks: dict[int, list[Any]] = field(default_factory=dict)


class MqttTransport:
    """A `Transport` over an MQTT 5 broker. All methods may be called from any thread.

    Args:
        settings: Address, credentials, TLS, keep-alive.
        client_id: Unique at the broker.
        publish_timeout_s: How long `publish` may wait for room in the outbox, and `subscribe` for the broker's answer.
        reconnect_timeout_s: After so long without a broker `receive` and `publish` raise `BrokerUnreachable`.
        flush_timeout_s: Bound on `close`.
        outbox_bytes: Room for messages the broker has not acknowledged.
        inbox_bytes: Arrived and not yet received messages beyond which acknowledgements are held back.

    Attributes:
        reconnects: Connections made after the first.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        client_id: str,
        *,
        publish_timeout_s: float = 60.0,
        reconnect_timeout_s: float = 3600.0,
        flush_timeout_s: float = 10.0,
        outbox_bytes: int = 16 * 1024 * 1024,
        inbox_bytes: int = 32 * 1024 * 1024,
    ) -> None:
        self._settings = settings
        self.client_id = client_id
        self._publish_timeout_s = publish_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._flush_timeout_s = flush_timeout_s
        self._outbox_limit = outbox_bytes
        self._tls = tls_context(settings)
        self._password = password(settings)
        self.reconnects = 0
        self._changed = threading.Condition()
        self._outbox: deque[_Outgoing] = deque()
        self._outbox_bytes = 0
        self._inbox = Inbox(inbox_bytes)
        self._filters: dict[str, None] = {}
        self._will: Will | None = None
        self._link: _Link | None = None
        self._max_packet_bytes = 0
        self._failure: FedspineError | None = None
        self._flush_until: float | None = None
        self._thread: threading.Thread | None = None

    # ---- the Transport interface

    def connect(self, *, timeout_s: float, will: Will | None = None) -> None:
        """See `Transport.connect`; keeps trying until `timeout_s`, except where trying again cannot help."""
        if self._thread is not None:
            raise TransportError(f"{self.client_id} is already connected.")
        self._will = will
        link = self._establish(time.monotonic() + timeout_s)
        assert link is not None
        self._thread = threading.Thread(target=self._run, args=(link,), name=f"mqtt-{self.client_id}", daemon=True)
        self._thread.start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport.publish`; also raises `TransportError` for a message above the broker's packet limit."""
        check_topic(topic)
        message = _Outgoing(topic, bytes(payload), retain)
        with self._changed:
            self._require_open()
            if self._max_packet_bytes and message.size_bytes > self._max_packet_bytes:
                raise TransportError(
                    f"a message of {len(payload):,} bytes to {topic!r} exceeds the broker's maximum packet size of "
                    f"{self._max_packet_bytes:,} bytes.",
                    remedy="Raise the broker's limit (Mosquitto: max_packet_size) or use smaller chunks.",
                )
            if not self._changed.wait_for(
                lambda: self._closed() or not self._outbox_bytes or self._fits(message), self._publish_timeout_s
            ):
                raise TransportError(
                    f"the outbox to the broker at {self._address} stayed full for {self._publish_timeout_s:g} s "
                    f"({'connected' if self._link else 'disconnected'})."
                )
            self._require_open()
            self._outbox.append(message)
            self._outbox_bytes += message.size_bytes
            self._changed.notify_all()

    def subscribe(self, *topic_filters: str) -> None:
        """See `Transport.subscribe`; without a connection the filters are sent once there is one."""
        for topic_filter in topic_filters:
            check_filter(topic_filter)
        with self._changed:
            self._require_open()
            again = [topic_filter for topic_filter in topic_filters if topic_filter in self._filters]
            self._filters.update(dict.fromkeys(topic_filters))
            link = self._link
        if link is None:
            return
        if again:  # rumqttd sends retained messages only for a new subscription
            link.client.unsubscribe(again)
        try:
            self._subscribe_on(link, topic_filters)
        except TransportError:
            with self._changed:
                for topic_filter in topic_filters:
                    self._filters.pop(topic_filter, None)
            raise

    def unsubscribe(self, *topic_filters: str) -> None:
        """See `Transport.unsubscribe`."""
        with self._changed:
            self._require_open()
            known = [topic_filter for topic_filter in topic_filters if self._filters.pop(topic_filter, 0) is None]
            link = self._link
        if link is not None and known:
            link.client.unsubscribe(known)

    def receive(self, *, timeout_s: float) -> Event | None:
        """See `Transport.receive`; raises what ended the connection for good once everything received is taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._closed(), timeout_s)
            if not self._inbox:
                self._require_open()
                return None
            event, acknowledge = self._inbox.take()
        if acknowledge is not None:
            acknowledge()
        return event

    @property
    def dropped(self) -> int:
        """QoS 0 messages of other publishers lost to a full inbox."""
        return self._inbox.dropped

    def close(self) -> None:
        """See `Transport.close`; returns within `flush_timeout_s` and a moment. Safe to call twice."""
        with self._changed:
            if self._flush_until is None:
                self._flush_until = time.monotonic() + self._flush_timeout_s
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._flush_timeout_s + 2 * _CONNECT_TIMEOUT_S)
        with self._changed:
            if self._outbox_bytes:
                log.warning("%s closed with unsent messages to %s", self.client_id, self._address)
            self._outbox.clear()
            self._inbox.clear()
            self._outbox_bytes = 0

    # ---- the link thread

    def _run(self, first: _Link) -> None:
        link: _Link | None = first
        short_lived = 0
        while link is not None:
            self._pump(link)
            with self._changed:
                self._link = None
                self._outbox.extendleft(reversed(link.inflight.values()))
                finished = self._closed() and not (link.lost and self._flushing())
            if not link.lost:
                link.client.disconnect()
            link.client.loop_stop()
            if finished:
                return
            short_lived = 0 if time.monotonic() - link.opened_s > _STABLE_AFTER_S else short_lived + 1
            hint = self._hint(link) if short_lived >= _SHORT_LIVED_IS_ODD else ""
            log.warning("%s lost the broker at %s (%s)%s", self.client_id, self._address, link.lost, hint)
            try:
                link = self._establish(time.monotonic() + self._reconnect_timeout_s, short_lived)
            except FedspineError as error:
                self._fail(error)
                return
            self.reconnects += 1

    def _pump(self, link: _Link) -> None:
        """Send while the connection stands; return when it is lost or everything is flushed after `close`."""

        def ready() -> bool:
            sendable = bool(self._outbox) and len(link.inflight) < link.window
            return bool(link.lost) or sendable or (self._closed() and not self._flushing())

        while True:
            with self._changed:
                while not ready():
                    self._changed.wait(None if self._flush_until is None else 0.05)
                if link.lost or (self._closed() and not self._flushing()):
                    return
                message = self._outbox.popleft()
            try:
                sent = link.client.publish(message.topic, message.payload, qos=1, retain=message.retain)
            except ValueError as error:
                self._fail(TransportError(f"a message to {message.topic!r} cannot be sent: {error}."))
                return
            with self._changed:
                if sent.mid in link.early_acks:
                    link.early_acks.remove(sent.mid)
                    self._acknowledged(message)
                else:
                    link.inflight[sent.mid] = message

    def _establish(self, deadline: float, short_lived: int = 0) -> _Link | None:
        """Connect and subscribe, with growing pauses, until `deadline`; None when `close` makes it pointless.

        The first attempt is made at once, unless the last connections were `short_lived`.
        """
        pause_s = min(_FIRST_BACKOFF_S * 2**short_lived, _LAST_BACKOFF_S)
        if short_lived and not self._pause(random.uniform(0.5, 1.0) * pause_s):
            return None
        while True:
            try:
                return self._attempt(min(_CONNECT_TIMEOUT_S, max(0.1, deadline - time.monotonic())))
            except NotConnected as failed:
                wait_s = random.uniform(0.5, 1.0) * pause_s
                hopeless = (
                    failed.final and self._thread is None
                )  # later it may pass, when a broker is being reconfigured
                if hopeless or time.monotonic() + wait_s > deadline:
                    raise BrokerUnreachable(
                        f"no connection to the MQTT broker at {self._address}: {failed.reason}.", remedy=failed.remedy
                    ) from None
                log.info("%s: %s; next attempt in %.1f s", self._address, failed.reason, wait_s)
            pause_s = min(2 * pause_s, _LAST_BACKOFF_S)
            if not self._pause(wait_s):
                return None

    def _pause(self, duration_s: float) -> bool:
        """Wait before another attempt, shorter when `close` has work to flush; False when it is pointless."""
        with self._changed:
            self._changed.wait_for(self._closed, duration_s)
            if self._flushing():
                self._changed.wait(_FIRST_BACKOFF_S)
            return self._flushing() or not self._closed()

    def _attempt(self, timeout_s: float) -> _Link:
        link = self._new_link(timeout_s)
        connect_properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        connect_properties.ReceiveMaximum = RECEIVE_MAXIMUM
        connect_properties.MaximumPacketSize = MAX_PACKET_BYTES
        settings = self._settings
        try:
            link.client.connect(
                settings.host, settings.port, settings.keepalive_s, clean_start=True, properties=connect_properties
            )
        except (OSError, ValueError) as error:
            raise explain(error, self._tls is not None) from error
        link.client.loop_start()
        try:
            with self._changed:
                self._changed.wait_for(lambda: link.answered or link.lost, timeout_s)
                if not link.answered:
                    raise no_answer(link.lost, self._tls is not None)
                if link.reason_code.is_failure:
                    raise refusal(link.reason_code)
            self._restore(link)
        except BaseException:
            link.client.loop_stop()
            raise
        return link

    def _restore(self, link: _Link) -> None:
        """Subscribe to everything on a new connection, then let it be used."""
        done: set[str] = set()
        while True:
            with self._changed:
                missing = [topic_filter for topic_filter in self._filters if topic_filter not in done]
                if not missing:
                    if link.lost:
                        raise no_answer(link.lost, self._tls is not None)
                    self._link = link
                    self._max_packet_bytes = link.max_packet_bytes
                    self._inbox.put(Connected())
                    self._changed.notify_all()
                    return
            try:
                self._subscribe_on(link, missing)
            except TransportError as error:
                raise NotConnected(f"a subscription was not restored: {error.message}", error.remedy) from error
            done.update(missing)

    def _subscribe_on(self, link: _Link, topic_filters: Iterable[str]) -> None:
        waiting: dict[int, list[str]] = {}
        names = list(dict.fromkeys(topic_filters))
        for start in range(0, len(names), FILTERS_PER_SUBSCRIBE):
            batch = names[start : start + FILTERS_PER_SUBSCRIBE]
            _, mid = link.client.subscribe([(name, SubscribeOptions(qos=1)) for name in batch])
            if mid is not None:
                waiting[mid] = batch
        with self._changed:
            self._changed.wait_for(
                lambda: link.lost or all(mid in link.subacks for mid in waiting), self._publish_timeout_s
            )
            if link.lost:
                return  # the next connection restores them
            for mid, batch in waiting.items():
                answers = link.subacks.pop(mid, None)
                if answers is None:
                    raise TransportError(f"the broker at {self._address} did not answer a subscription to {batch}.")
                for name, answer in zip(batch, answers):
                    if answer.is_failure:
                        raise TransportError(
                            f"the broker at {self._address} refused {self.client_id} a subscription "
                            f"to {name!r}: {answer}.",
                            remedy="Let the broker's access list allow it for this user.",
                        )

    # ---- paho's callbacks: file it and return

    def _new_link(self, timeout_s: float) -> _Link:
        client = paho.Client(
            paho.CallbackAPIVersion.VERSION2,  # type: ignore[attr-defined]
            client_id=self.client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        link = _Link(client)
        client.connect_timeout = timeout_s
        client.max_inflight_messages_set(0)  # the window is ours
        client.on_connect = self._callback(link, self._on_connect)
        client.on_disconnect = self._callback(link, self._on_disconnect)
        client.on_message = self._callback(link, self._on_message)
        client.on_publish = self._callback(link, self._on_publish)
        client.on_subscribe = self._callback(link, self._on_subscribe)
        if self._settings.username:
            client.username_pw_set(self._settings.username, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=1, retain=self._will.retain)
        return link

    def _callback(self, link: _Link, handler: Callable[..., None]) -> Callable[..., None]:
        def locked(client: paho.Client, userdata: Any, *arguments: Any) -> None:
            with self._changed:
                handler(link, *arguments)
                self._changed.notify_all()

        return locked

    def _on_connect(self, link: _Link, flags: Any, reason_code: Any, properties: Any) -> None:
        link.answered, link.reason_code = True, reason_code
        link.window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        link.max_packet_bytes = getattr(properties, "MaximumPacketSize", 0)

    def _on_disconnect(self, link: _Link, flags: Any, reason_code: Any, properties: Any) -> None:
        link.lost = str(reason_code) or "connection closed"
        if reason_code.value == _SESSION_TAKEN_OVER:
            self._failure = TransportError(
                f"another client connected to {self._address} as {self.client_id!r}, which cut this one off.",
                remedy="Give every device its own device_id, and stop the second process.",
            )

    def _on_subscribe(self, link: _Link, mid: int, reason_codes: list[Any], properties: Any) -> None:
        link.subacks[mid] = reason_codes

    def _on_publish(self, link: _Link, mid: int, reason_code: Any, properties: Any) -> None:
        message = link.inflight.pop(mid, None)
        link.acknowledged += 1
        if reason_code.is_failure:
            name = f" to {message.topic!r}" if message else ""
            self._failure = TransportError(
                f"the broker at {self._address} refused {self.client_id} a publication{name}: {reason_code}.",
                remedy="Let the broker's access list and quotas allow it for this user.",
            )
        if message is not None:
            self._acknowledged(message)
        else:
            link.early_acks.add(mid)

    def _on_message(self, link: _Link, message: paho.MQTTMessage) -> None:
        def acknowledge() -> None:
            if not link.lost:
                link.client.ack(message.mid, message.qos)

        event = Incoming(message.topic, bytes(message.payload), bool(message.retain))
        self._inbox.put(event, acknowledge if message.qos else None)

    # ---- small things, under the lock

    @property
    def _address(self) -> str:
        return f"{self._settings.host}:{self._settings.port}"

    def _acknowledged(self, message: _Outgoing) -> None:
        self._outbox_bytes -= message.size_bytes

    def _fits(self, message: _Outgoing) -> bool:
        return self._outbox_bytes + message.size_bytes <= self._outbox_limit

    def _closed(self) -> bool:
        return self._failure is not None or self._flush_until is not None

    def _flushing(self) -> bool:
        """Whether `close` still waits for messages to be acknowledged."""
        if self._failure is not None or self._flush_until is None:
            return False
        return self._outbox_bytes > 0 and time.monotonic() < self._flush_until

    def _require_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._thread is None or self._flush_until is not None:
            raise TransportError(f"{self.client_id} is not connected.", remedy="Call connect() first.")

    def _fail(self, error: FedspineError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _hint(self, link: _Link) -> str:
        """What could end one connection after the other: brokers seldom say it."""
        hint = f"; does another client use the id {self.client_id!r}?"
        if link.inflight and not link.acknowledged:
            largest = max(link.inflight.values(), key=lambda message: message.size_bytes)
            hint += f" Or do {largest.size_bytes:,} bytes to {largest.topic!r} exceed the broker's packet limit?"
        return hint
