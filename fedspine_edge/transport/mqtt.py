"""MQTT 5: bounded in both directions, reconnecting, never blocking in a callback.

    publish() → outbox (bounded by bytes) → link thread → at most `window` unacknowledged → broker
    broker → paho's thread → inbox → receive()

The link thread sends and reconnects. Each connection is a new one: what the broker has not acknowledged goes back to
the front of the outbox, and every filter is subscribed again before `Connected` is told. Back-pressure inward is
MQTT's own (see `ReceiveQueue`): a broker stops at a number of unacknowledged messages, so that neither a callback
blocks nor this process grows.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fedspine_edge.config import BrokerSettings
from fedspine_edge.errors import BrokerUnreachable, FedspineError, TransportError
from fedspine_edge.transport.base import LONGEST_PAUSE_S, Connected, Event, Incoming, Will
from fedspine_edge.transport.credentials import ConnectAttemptFailed, password, tls_context
from fedspine_edge.transport.mqtt_connection import Connection, Outgoing
from fedspine_edge.transport.receive_queue import ReceiveQueue
from fedspine_edge.transport.topic_filters import check_filter, check_topic

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.2
_STABLE_AFTER_S, _SHORT_LIVED_IS_ODD = 5.0, 3
_SESSION_TAKEN_OVER, _NOT_AUTHORIZED, _TOPIC_NAME_INVALID = 0x8E, 0x87, 0x90


class MqttTransport:
    """A `Transport` over an MQTT 5 broker. All methods may be called from any thread.

    Args:
        settings: Address, credentials, TLS, keep-alive.
        client_id: Unique at the broker.
        publish_timeout_s: How long `publish` may wait for room in the outbox, and `subscribe` for the broker's answer.
        reconnect_timeout_s: After so long without a broker `receive` and `publish` raise `BrokerUnreachable`.
        flush_timeout_s: Bound on the flush in `close`.
        outbox_bytes: Room for messages the broker has not acknowledged.
        inbox_bytes: Arrived and not yet received messages beyond which acknowledgements are held back.

    Attributes:
        reconnects: Connections made after the first.

    Raises `ConfigError` for settings that cannot work: missing files, a password without a user name.
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
        self.changed = threading.Condition()
        self._outbox: deque[Outgoing] = deque()
        self._outbox_bytes = 0
        """Bytes in the outbox and in flight."""
        self._inbox = ReceiveQueue(inbox_bytes)
        self._filters: dict[str, None] = {}
        self._will: Will | None = None
        self._connection: Connection | None = None
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
        first = self._establish(time.monotonic() + timeout_s)
        if first is None:
            raise TransportError(f"{self.client_id} was closed while it connected.")
        self._thread = threading.Thread(target=self._run, args=(first,), name=f"mqtt-{self.client_id}", daemon=True)
        self._thread.start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport.publish`; also raises `TransportError` for a message above the broker's packet limit."""
        check_topic(topic)
        message = Outgoing(topic, bytes(payload), retain)
        with self.changed:
            self._require_open()
            if self._max_packet_bytes and message.size_bytes > self._max_packet_bytes:
                raise TransportError(
                    f"a message of {len(payload):,} bytes to {topic!r} exceeds the broker's maximum packet size of "
                    f"{self._max_packet_bytes:,} bytes.",
                    remedy="Raise the broker's limit (Mosquitto: max_packet_size) or use smaller chunks.",
                )
            if not self.changed.wait_for(lambda: self._closed() or self._fits(message), self._publish_timeout_s):
                raise TransportError(
                    f"the outbox to the broker at {self._address} stayed full for {self._publish_timeout_s:g} s "
                    f"({'connected' if self._connection else 'disconnected'})."
                )
            self._require_open()
            self._outbox.append(message)
            self._outbox_bytes += message.size_bytes
            self.changed.notify_all()

    def subscribe(self, *topic_filters: str) -> None:
        """See `Transport.subscribe`; without a connection the filters are sent once there is one.

        Raises `TransportError` when the broker refuses one of them; then none is kept.
        """
        for topic_filter in topic_filters:
            check_filter(topic_filter)
        with self.changed:
            self._require_open()
            again = [topic_filter for topic_filter in topic_filters if topic_filter in self._filters]
            self._filters.update(dict.fromkeys(topic_filters))
            connection = self._connection
        if connection is None:
            return
        if again:  # rumqttd sends retained messages only for a new subscription
            connection.unsubscribe(again)
        try:
            connection.subscribe(topic_filters, self._publish_timeout_s)
        except TransportError:
            self.unsubscribe(*topic_filters)
            raise

    def unsubscribe(self, *topic_filters: str) -> None:
        """See `Transport.unsubscribe`."""
        with self.changed:
            self._require_open()
            known = [topic_filter for topic_filter in topic_filters if self._filters.pop(topic_filter, 0) is None]
            connection = self._connection
        if connection is not None and known:
            connection.unsubscribe(known)

    def receive(self, *, timeout_s: float) -> Event | None:
        """See `Transport.receive`; raises what ended the connection for good once everything received is taken."""
        with self.changed:
            self.changed.wait_for(lambda: self._inbox or self._closed(), timeout_s)
            if not self._inbox:
                self._require_open()
                return None
            event, acknowledge = self._inbox.take()
        if acknowledge is not None:
            acknowledge()
        return event

    def close(self) -> None:
        """See `Transport.close`; returns within `flush_timeout_s` and a moment. Safe to call twice."""
        with self.changed:
            if self._flush_until is None:
                self._flush_until = time.monotonic() + self._flush_timeout_s
            self.changed.notify_all()
        if self._thread is not None:
            self._thread.join(self._flush_timeout_s + 2 * _CONNECT_TIMEOUT_S)
        with self.changed:
            if self._outbox_bytes:
                log.warning("%s closed with %d bytes unsent to %s", self.client_id, self._outbox_bytes, self._address)
            self._outbox.clear()
            self._inbox.clear()
            self._outbox_bytes = 0

    @property
    def dropped(self) -> int:
        """QoS 0 messages of other publishers lost to a full inbox."""
        return self._inbox.dropped

    # ---- what a connection brings (see `Owner`), under the lock

    def arrived(self, message: Incoming, acknowledge: Callable[[], None] | None) -> None:
        self._inbox.put(message, acknowledge)

    def acknowledged(self, message: Outgoing, reason_code: Any) -> None:
        self._outbox_bytes -= message.size_bytes
        if not reason_code.is_failure:
            return
        said = (
            f"the broker at {self._address} refused {self.client_id} a publication to {message.topic!r}: {reason_code}."
        )
        if reason_code.value in (_NOT_AUTHORIZED, _TOPIC_NAME_INVALID):
            self._failure = TransportError(said, remedy="Let the broker's access list allow it for this user.")
        else:  # a quota may have room again, and the protocol repeats what is missing
            log.warning("%s", said)

    def cut_off(self, reason_code: Any) -> None:
        if reason_code.value == _SESSION_TAKEN_OVER:
            self._failure = TransportError(
                f"another client connected to {self._address} as {self.client_id!r}, which cut this one off.",
                remedy="Give every device its own device_id, and stop the second process.",
            )

    # ---- the link thread

    def _run(self, first: Connection) -> None:
        connection: Connection | None = first
        short_lived = 0
        while connection is not None:
            try:
                self._send_while_standing(connection)
            except ValueError as error:
                self._fail(TransportError(f"a message cannot be sent: {error}."))
            with self.changed:
                self._connection = None
                finished = self._closed() and not (connection.lost and self._flushing())
            connection.end(with_will=self._failure is not None)
            if finished:
                return
            with self.changed:
                self._outbox.extendleft(reversed(connection.inflight.values()))
            short_lived = 0 if time.monotonic() - connection.opened_s > _STABLE_AFTER_S else short_lived + 1
            hint = self._hint(connection) if short_lived >= _SHORT_LIVED_IS_ODD else ""
            log.warning("%s lost the broker at %s (%s)%s", self.client_id, self._address, connection.lost, hint)
            try:
                connection = self._establish(time.monotonic() + self._reconnect_timeout_s, short_lived)
            except FedspineError as error:
                self._fail(error)
                return
            self.reconnects += 1

    def _send_while_standing(self, connection: Connection) -> None:
        """Return when the connection is lost, or when everything is flushed after `close`."""

        def finished() -> bool:
            return bool(connection.lost) or (self._closed() and not self._flushing())

        def sendable() -> bool:
            return bool(self._outbox) and len(connection.inflight) < connection.window

        while True:
            with self.changed:
                while not (finished() or sendable()):
                    self.changed.wait(None if self._flush_until is None else 0.05)
                if finished():
                    return
                message = self._outbox.popleft()
            connection.send(message)

    def _establish(self, deadline: float, short_lived: int = 0) -> Connection | None:
        """Connect and subscribe, with growing pauses, until `deadline`; None when `close` makes it pointless.

        The first attempt is made at once, unless the last connections were `short_lived`.
        """
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(short_lived, 10), LONGEST_PAUSE_S)
        if short_lived and not self._pause(random.uniform(0.5, 1.0) * pause_s):
            return None
        while True:
            try:
                return self._attempt(min(_CONNECT_TIMEOUT_S, max(0.1, deadline - time.monotonic())))
            except ConnectAttemptFailed as failed:
                wait_s = random.uniform(0.5, 1.0) * pause_s
                # After the first connection even a refusal may pass: a broker is being restarted or reconfigured.
                hopeless = failed.final and self._thread is None
                if hopeless or time.monotonic() + wait_s > deadline:
                    raise BrokerUnreachable(
                        f"no connection to the MQTT broker at {self._address}: {failed.reason}.", remedy=failed.remedy
                    ) from None
                log.info("%s: %s; next attempt in %.1f s", self._address, failed.reason, wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if not self._pause(wait_s):
                return None

    def _pause(self, duration_s: float) -> bool:
        """Wait before another attempt, shorter when `close` has work to flush; False when it is pointless."""
        with self.changed:
            self.changed.wait_for(self._closed, duration_s)
            if self._flushing():
                self.changed.wait(_FIRST_PAUSE_S)
            return self._flushing() or not self._closed()

    def _attempt(self, timeout_s: float) -> Connection:
        connection = Connection(
            self, self._settings, self.client_id, will=self._will, tls=self._tls, password=self._password
        )
        connection.open(timeout_s)
        try:
            self._restore(connection)
        except BaseException:
            connection.end(with_will=True)
            raise
        return connection

    def _restore(self, connection: Connection) -> None:
        """Subscribe to everything on a new connection, then let it be used."""
        done: set[str] = set()
        while True:
            with self.changed:
                missing = [topic_filter for topic_filter in self._filters if topic_filter not in done]
                if not missing:
                    connection.require_standing()
                    self._connection = connection
                    self._max_packet_bytes = connection.max_packet_bytes
                    self._inbox.put(Connected())
                    self.changed.notify_all()
                    return
            try:
                connection.subscribe(missing, _CONNECT_TIMEOUT_S)
            except TransportError as error:
                raise ConnectAttemptFailed(f"a subscription was not restored: {error.message}", error.remedy) from error
            done.update(missing)

    # ---- small things, under the lock

    @property
    def _address(self) -> str:
        return f"{self._settings.host}:{self._settings.port}"

    def _fits(self, message: Outgoing) -> bool:
        return not self._outbox_bytes or self._outbox_bytes + message.size_bytes <= self._outbox_limit

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
        with self.changed:
            self._failure = error
            self.changed.notify_all()

    def _hint(self, connection: Connection) -> str:
        """What could end one connection after the other: brokers seldom say it."""
        hint = f"; does another client use the id {self.client_id!r}?"
        if connection.inflight and not connection.acknowledgements:
            largest = max(connection.inflight.values(), key=lambda message: message.size_bytes)
            hint += f" Or do {largest.size_bytes:,} bytes to {largest.topic!r} exceed the broker's packet limit?"
        return hint
