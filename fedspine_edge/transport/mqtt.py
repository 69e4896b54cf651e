"""MQTT 5 transport: bounded in both directions, reconnecting, without blocking callbacks.

    publish() → send queue (bounded by bytes) → link thread → at most `window` unacknowledged messages → broker
    broker → paho's thread → receive queue → receive()

The link thread sends and reconnects. Every reconnect opens a new connection: unacknowledged messages return to the
front of the send queue, and all filters are subscribed to again before `Connected` is delivered. Incoming traffic is
limited by MQTT's flow control (see `ReceiveQueue`): the broker stops at a number of unacknowledged messages, so no
callback blocks and memory stays bounded.
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
from fedspine_edge.transport.credentials import ConnectAttemptFailed, read_password, tls_context
from fedspine_edge.transport.mqtt_connection import Connection, Outgoing
from fedspine_edge.transport.topic_filters import check_filter, check_topic

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.2
_STABLE_AFTER_S = 5.0
"""A connection that lasted longer than this is not counted as short-lived."""
_SHORT_LIVED_BEFORE_HINT = 3
_SESSION_TAKEN_OVER, _NOT_AUTHORIZED, _TOPIC_NAME_INVALID = 0x8E, 0x87, 0x90
_MESSAGE_OVERHEAD_BYTES = 256
"""Bytes charged per queued message in addition to its payload, which also bounds a flood of empty messages."""


class ReceiveQueue:
    """Queue of received events, bounded by bytes. It decides when a message is acknowledged; not thread-safe.

    While the queue has space, a message is acknowledged on arrival, which is fastest. Otherwise it is acknowledged
    when it is taken out: the broker then stops at the announced number of unacknowledged messages, and the queue
    holds at most `limit_bytes` plus that many messages. Acknowledgements are sent in the order of arrival, which some
    brokers require. A message without acknowledgement (QoS 0) cannot be held back. It is dropped when the queue is
    full, and counted.

    Args:
        limit_bytes: Capacity in bytes.

    Attributes:
        dropped: Number of dropped QoS 0 messages.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: deque[tuple[Event, int, Callable[[], None] | None]] = deque()
        self._bytes = 0
        self._unacknowledged = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, event: Event, acknowledge: Callable[[], None] | None = None) -> None:
        """Append `event`. Calls `acknowledge` now, or leaves that to the caller of `take`."""
        size = _MESSAGE_OVERHEAD_BYTES + (len(event.payload) if isinstance(event, Incoming) else 0)
        full = self._bytes + size > self._limit_bytes
        if isinstance(event, Incoming) and full and acknowledge is None:
            self.dropped += 1
            return
        if acknowledge is not None:
            if full or self._unacknowledged:
                self._unacknowledged += 1
            else:
                acknowledge()
                acknowledge = None
        self._entries.append((event, size, acknowledge))
        self._bytes += size

    def take(self) -> tuple[Event, Callable[[], None] | None]:
        """Return the oldest event and its pending acknowledgement, if any. Raises IndexError when empty."""
        event, size, acknowledge = self._entries.popleft()
        self._bytes -= size
        self._unacknowledged -= acknowledge is not None
        return event, acknowledge

    def clear(self) -> None:
        """Remove all events without acknowledging them."""
        self._entries.clear()
        self._bytes = self._unacknowledged = 0


class MqttTransport:
    """A `Transport` over an MQTT 5 broker. All methods are thread-safe.

    Args:
        settings: Address, credentials, TLS files and keep-alive.
        client_id: Client identifier, unique at the broker.
        publish_timeout_s: Longest wait of `publish` for space in the send queue, and of `subscribe` for the broker's
            answer, in seconds.
        reconnect_timeout_s: Time without a connection after which `receive` and `publish` raise `BrokerUnreachable`,
            in seconds.
        flush_timeout_s: Longest wait of `close` for queued messages to be acknowledged, in seconds.
        send_queue_bytes: Capacity for messages that the broker has not acknowledged, in bytes.
        receive_queue_bytes: Capacity for received messages, in bytes. Beyond it, acknowledgements are held back.

    Attributes:
        reconnects: Number of connections after the first one.

    Raises `ConfigError` for settings that cannot work: missing files, or a password without a user name.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        client_id: str,
        *,
        publish_timeout_s: float = 60.0,
        reconnect_timeout_s: float = 3600.0,
        flush_timeout_s: float = 10.0,
        send_queue_bytes: int = 16 * 1024 * 1024,
        receive_queue_bytes: int = 32 * 1024 * 1024,
    ) -> None:
        self._settings = settings
        self.client_id = client_id
        self._publish_timeout_s = publish_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._flush_timeout_s = flush_timeout_s
        self._send_queue_limit = send_queue_bytes
        self._tls = tls_context(settings)
        self._password = read_password(settings)
        self.reconnects = 0
        self.changed = threading.Condition()
        self._send_queue: deque[Outgoing] = deque()
        self._unsent_bytes = 0
        """Bytes in the send queue and in flight."""
        self._receive_queue = ReceiveQueue(receive_queue_bytes)
        self._filters: dict[str, None] = {}
        self._will: Will | None = None
        self._connection: Connection | None = None
        self._max_packet_bytes = 0
        self._failure: FedspineError | None = None
        self._flush_until: float | None = None
        self._thread: threading.Thread | None = None

    # ---- Transport interface

    def connect(self, *, timeout_s: float, will: Will | None = None) -> None:
        """See `Transport.connect`. Retries until `timeout_s` seconds have passed, unless retrying cannot help."""
        if self._thread is not None:
            raise TransportError(f"{self.client_id} is already connected.")
        self._will = will
        first = self._establish(time.monotonic() + timeout_s)
        if first is None:
            raise TransportError(f"{self.client_id} was closed while connecting.")
        self._thread = threading.Thread(target=self._run, args=(first,), name=f"mqtt-{self.client_id}", daemon=True)
        self._thread.start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport.publish`. Also raises `TransportError` for a message above the broker's packet limit."""
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
                    f"the send queue to the broker at {self._address} stayed full for {self._publish_timeout_s:g} s "
                    f"({'connected' if self._connection else 'disconnected'})."
                )
            self._require_open()
            self._send_queue.append(message)
            self._unsent_bytes += message.size_bytes
            self.changed.notify_all()

    def subscribe(self, *topic_filters: str) -> None:
        """See `Transport.subscribe`. Without a connection, the filters are sent after the next reconnect.

        Raises `TransportError` when the broker refuses one of the filters. None of them is kept then.
        """
        for topic_filter in topic_filters:
            check_filter(topic_filter)
        with self.changed:
            self._require_open()
            repeated = [topic_filter for topic_filter in topic_filters if topic_filter in self._filters]
            self._filters.update(dict.fromkeys(topic_filters))
            connection = self._connection
        if connection is None:
            return
        if repeated:  # rumqttd sends retained messages for new subscriptions only
            connection.unsubscribe(repeated)
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
        """See `Transport.receive`. Once the queue is empty, raises the error that ended the connection for good."""
        with self.changed:
            self.changed.wait_for(lambda: self._receive_queue or self._closed(), timeout_s)
            if not self._receive_queue:
                self._require_open()
                return None
            event, acknowledge = self._receive_queue.take()
        if acknowledge is not None:
            acknowledge()
        return event

    def close(self) -> None:
        """See `Transport.close`. Returns shortly after `flush_timeout_s` at the latest; may be called twice."""
        with self.changed:
            if self._flush_until is None:
                self._flush_until = time.monotonic() + self._flush_timeout_s
            self.changed.notify_all()
        if self._thread is not None:
            self._thread.join(self._flush_timeout_s + 2 * _CONNECT_TIMEOUT_S)
        with self.changed:
            if self._unsent_bytes:
                log.warning("%s closed with %d bytes unsent to %s", self.client_id, self._unsent_bytes, self._address)
            self._send_queue.clear()
            self._receive_queue.clear()
            self._unsent_bytes = 0

    @property
    def dropped(self) -> int:
        """Number of QoS 0 messages dropped because the receive queue was full."""
        return self._receive_queue.dropped

    # ---- ConnectionListener interface; called with `changed` held

    def on_message(self, message: Incoming, acknowledge: Callable[[], None] | None) -> None:
        """Queue a received message."""
        self._receive_queue.put(message, acknowledge)

    def on_acknowledged(self, message: Outgoing, reason_code: Any) -> None:
        """Release the message's share of the send queue, and record a permanent refusal."""
        self._unsent_bytes -= message.size_bytes
        if not reason_code.is_failure:
            return
        text = (
            f"the broker at {self._address} refused a publication of {self.client_id} to {message.topic!r}: "
            f"{reason_code}."
        )
        if reason_code.value in (_NOT_AUTHORIZED, _TOPIC_NAME_INVALID):
            self._failure = TransportError(text, remedy="Allow this user to publish there in the broker's access list.")
        else:  # an exceeded quota may be temporary, and the protocol repeats lost messages
            log.warning("%s", text)

    def on_disconnected(self, reason_code: Any) -> None:
        """Record a takeover of the session, which is permanent."""
        if reason_code.value == _SESSION_TAKEN_OVER:
            self._failure = TransportError(
                f"another client connected to {self._address} as {self.client_id!r}, which closed this connection.",
                remedy="Give every device its own device_id, and stop the second process.",
            )

    # ---- link thread

    def _run(self, first: Connection) -> None:
        connection: Connection | None = first
        short_lived = 0
        while connection is not None:
            try:
                self._send_until_lost(connection)
            except ValueError as error:
                self._fail(TransportError(f"a message cannot be sent: {error}."))
            with self.changed:
                self._connection = None
                finished = self._closed() and not (connection.lost and self._flushing())
            connection.close(with_will=self._failure is not None)
            if finished:
                return
            with self.changed:
                self._send_queue.extendleft(reversed(connection.inflight.values()))
            short_lived = 0 if time.monotonic() - connection.opened_s > _STABLE_AFTER_S else short_lived + 1
            hint = self._hint(connection) if short_lived >= _SHORT_LIVED_BEFORE_HINT else ""
            log.warning(
                "%s lost the connection to the broker at %s (%s)%s",
                self.client_id,
                self._address,
                connection.lost,
                hint,
            )
            try:
                connection = self._establish(time.monotonic() + self._reconnect_timeout_s, short_lived)
            except FedspineError as error:
                self._fail(error)
                return
            self.reconnects += 1

    def _send_until_lost(self, connection: Connection) -> None:
        """Send queued messages. Returns when the connection is lost, or when all is sent after `close`."""

        def finished() -> bool:
            return bool(connection.lost) or (self._closed() and not self._flushing())

        def sendable() -> bool:
            return bool(self._send_queue) and len(connection.inflight) < connection.window

        while True:
            with self.changed:
                while not (finished() or sendable()):
                    self.changed.wait(None if self._flush_until is None else 0.05)
                if finished():
                    return
                message = self._send_queue.popleft()
            connection.send(message)

    def _establish(self, deadline: float, short_lived: int = 0) -> Connection | None:
        """Connect and subscribe with exponential backoff until `deadline`. Returns None when closed meanwhile.

        The first attempt is made immediately, unless the last connections were short-lived.

        Args:
            deadline: Monotonic time in seconds.
            short_lived: Number of consecutive short-lived connections.
        """
        pause_s = min(_FIRST_PAUSE_S * 2 ** min(short_lived, 10), LONGEST_PAUSE_S)
        if short_lived and not self._pause(random.uniform(0.5, 1.0) * pause_s):
            return None
        while True:
            try:
                return self._attempt(min(_CONNECT_TIMEOUT_S, max(0.1, deadline - time.monotonic())))
            except ConnectAttemptFailed as failed:
                wait_s = random.uniform(0.5, 1.0) * pause_s
                # After the first connection even a refusal may be temporary, such as a broker being reconfigured.
                permanent = failed.permanent and self._thread is None
                if permanent or time.monotonic() + wait_s > deadline:
                    raise BrokerUnreachable(
                        f"no connection to the MQTT broker at {self._address}: {failed.reason}.", remedy=failed.remedy
                    ) from None
                log.info("%s: %s; next attempt in %.1f s", self._address, failed.reason, wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if not self._pause(wait_s):
                return None

    def _pause(self, duration_s: float) -> bool:
        """Wait before the next attempt, for a shorter time while flushing. Returns False when there is no next one."""
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
            connection.close(with_will=True)
            raise
        return connection

    def _restore(self, connection: Connection) -> None:
        """Subscribe to all filters on a new connection, then make it the current one."""
        done: set[str] = set()
        while True:
            with self.changed:
                missing = [topic_filter for topic_filter in self._filters if topic_filter not in done]
                if not missing:
                    connection.require_alive()
                    self._connection = connection
                    self._max_packet_bytes = connection.max_packet_bytes
                    self._receive_queue.put(Connected())
                    self.changed.notify_all()
                    return
            try:
                connection.subscribe(missing, _CONNECT_TIMEOUT_S)
            except TransportError as error:
                raise ConnectAttemptFailed(f"a subscription was not restored: {error.message}", error.remedy) from error
            done.update(missing)

    # ---- helpers; called with `changed` held

    @property
    def _address(self) -> str:
        return f"{self._settings.host}:{self._settings.port}"

    def _fits(self, message: Outgoing) -> bool:
        return not self._unsent_bytes or self._unsent_bytes + message.size_bytes <= self._send_queue_limit

    def _closed(self) -> bool:
        return self._failure is not None or self._flush_until is not None

    def _flushing(self) -> bool:
        """Return whether `close` still waits for messages to be acknowledged."""
        if self._failure is not None or self._flush_until is None:
            return False
        return self._unsent_bytes > 0 and time.monotonic() < self._flush_until

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
        """Return likely causes of repeated disconnects, since brokers rarely report them."""
        hint = f"; does another client use the id {self.client_id!r}?"
        if connection.inflight and not connection.acknowledgements:
            largest = max(connection.inflight.values(), key=lambda message: message.size_bytes)
            hint += f" Or do {largest.size_bytes:,} bytes to {largest.topic!r} exceed the broker's packet limit?"
        return hint
