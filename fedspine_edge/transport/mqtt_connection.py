"""One MQTT 5 connection over paho-mqtt. No other module imports paho.

paho's network thread runs the callbacks. They record events under the listener's lock and do nothing else. A lost
connection is never reused; a new one replaces it, so nothing depends on session state at the broker.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fedspine_edge.config import BrokerSettings
from fedspine_edge.errors import TransportError
from fedspine_edge.transport.base import Incoming, Will
from fedspine_edge.transport.credentials import explain_connect_error, explain_no_answer, explain_refusal

WINDOW = 16
"""Largest number of unacknowledged publications.

It is below the Receive Maximum of Mosquitto (20), EMQX (32) and AWS IoT (100).
"""

RECEIVE_MAXIMUM = 32
"""Receive Maximum announced to the broker. rumqttd ignores it and stops at 100 unacknowledged messages."""

MAX_PACKET_BYTES = 4 * 1024 * 1024
"""Maximum Packet Size announced to the broker, in bytes."""

FILTERS_PER_SUBSCRIBE = 16
_HEADER_BYTES = 16
_DISCONNECT_WITH_WILL = 0x04


@dataclass(frozen=True)
class Outgoing:
    """A message to publish."""

    topic: str
    payload: bytes
    retain: bool

    @property
    def size_bytes(self) -> int:
        """Approximate size of the packet in bytes."""
        return len(self.topic.encode()) + len(self.payload) + _HEADER_BYTES


class ConnectionListener(Protocol):
    """Receives the events of a connection. Every method is called on paho's thread with `changed` held."""

    changed: threading.Condition

    def on_message(self, message: Incoming, acknowledge: Callable[[], None] | None) -> None:
        """Handle a received message. `acknowledge` is None for QoS 0."""
        ...

    def on_acknowledged(self, message: Outgoing, reason_code: Any) -> None:
        """Handle the broker's acknowledgement of a publication."""
        ...

    def on_disconnected(self, reason_code: Any) -> None:
        """Handle the loss of the connection."""
        ...


class Connection:
    """A single MQTT connection, from `open` to `close`.

    Args:
        listener: Receiver of the events.
        settings: Address, user name and keep-alive.
        client_id: Client identifier, unique at the broker.
        will: Last will, or None.
        tls: TLS context, or None for a plain connection.
        password: Password, or None.

    Attributes:
        lost: Reason for the loss of the connection; empty while it is alive.
        inflight: Unacknowledged publications by packet identifier, in the order of sending.
        window: Number of unacknowledged publications that the broker allows.
        max_packet_bytes: Maximum Packet Size of the broker in bytes; 0 when it announced none.
        acknowledgements: Number of acknowledged publications.
        opened_s: Monotonic time at which the connection was opened, in seconds.
    """

    def __init__(
        self,
        listener: ConnectionListener,
        settings: BrokerSettings,
        client_id: str,
        *,
        will: Will | None,
        tls: ssl.SSLContext | None,
        password: str | None,
    ) -> None:
        self._listener = listener
        self._changed = listener.changed
        self._settings = settings
        self._has_tls = tls is not None
        self.lost = ""
        self.inflight: dict[int, Outgoing] = {}
        self.window = WINDOW
        self.max_packet_bytes = 0
        self.acknowledgements = 0
        self.opened_s = time.monotonic()
        self._answer: Any = None
        self._early: dict[int, Any] = {}
        """Acknowledgements that arrived before paho's publish() returned."""
        self._subscribed: dict[int, list[Any]] = {}
        client = self._new_client(client_id)
        client.max_inflight_messages_set(0)  # this package limits the window itself
        if settings.username:
            client.username_pw_set(settings.username, password)
        if tls is not None:
            client.tls_set_context(tls)
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        self._client: paho.Client | None = client

    def open(self, timeout_s: float) -> None:
        """Connect. Raises `ConnectAttemptFailed`. Resolving the host name may take longer than `timeout_s` seconds."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        settings, client = self._settings, self._require_client()
        client.connect_timeout = timeout_s
        try:
            client.connect(settings.host, settings.port, settings.keepalive_s, clean_start=True, properties=properties)
        except (OSError, ValueError) as error:
            raise explain_connect_error(error, self._has_tls) from error
        client.loop_start()
        del client
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None or self.lost, timeout_s)
            failed = explain_no_answer(self.lost, self._has_tls) if self._answer is None else None
            if self._answer is not None and self._answer.is_failure:
                failed = explain_refusal(self._answer)
        if failed is not None:
            self._stop()
            raise failed

    def require_alive(self) -> None:
        """Raise `ConnectAttemptFailed` when the connection is already lost."""
        if self.lost:
            raise explain_no_answer(self.lost, self._has_tls)

    def send(self, message: Outgoing) -> None:
        """Publish with QoS 1. The listener receives the acknowledgement. Raises ValueError for an invalid message."""
        sent = self._require_client().publish(message.topic, message.payload, qos=1, retain=message.retain)
        with self._changed:
            answer = self._early.pop(sent.mid, None)
            if answer is None:
                self.inflight[sent.mid] = message
            else:
                self._listener.on_acknowledged(message, answer)

    def subscribe(self, topic_filters: Iterable[str], timeout_s: float) -> None:
        """Subscribe and wait up to `timeout_s` seconds for the answer. Returns early when the connection is lost.

        Raises `TransportError` when the broker refuses a filter or does not answer.
        """
        waiting: dict[int, list[str]] = {}
        names = list(dict.fromkeys(topic_filters))
        client = self._client
        if client is None:
            return
        for start in range(0, len(names), FILTERS_PER_SUBSCRIBE):
            batch = names[start : start + FILTERS_PER_SUBSCRIBE]
            _, mid = client.subscribe([(name, SubscribeOptions(qos=1)) for name in batch])
            if mid is not None:
                waiting[mid] = batch
        with self._changed:
            self._changed.wait_for(lambda: self.lost or waiting.keys() <= self._subscribed.keys(), timeout_s)
            if self.lost:
                return
            for mid, batch in waiting.items():
                answers = self._subscribed.pop(mid, None)
                if answers is None:
                    raise TransportError(f"the broker did not answer a subscription to {batch} within {timeout_s:g} s.")
                for name, answer in zip(batch, answers):
                    if answer.is_failure:
                        raise TransportError(
                            f"the broker refused a subscription to {name!r}: {answer}.",
                            remedy="Allow this user to subscribe in the broker's access list.",
                        )

    def unsubscribe(self, topic_filters: list[str]) -> None:
        """Unsubscribe without waiting for the answer."""
        client = self._client
        if client is not None:
            client.unsubscribe(topic_filters)

    def close(self, *, with_will: bool = False) -> None:
        """Disconnect and stop paho's thread. With `with_will` the broker publishes the last will."""
        if not self.lost:
            reason = ReasonCode(PacketTypes.DISCONNECT, identifier=_DISCONNECT_WITH_WILL) if with_will else None
            self._require_client().disconnect(reason)
        self._stop()

    def _stop(self) -> None:
        """Stop paho's thread and drop its client, since paho closes its sockets when the client is freed."""
        client, self._client = self._require_client(), None
        client.loop_stop()

    def _require_client(self) -> paho.Client:
        if self._client is None:
            raise RuntimeError("the connection is closed; open a new one")
        return self._client

    # ---- callbacks

    def _new_client(self, client_id: str) -> paho.Client:
        client = paho.Client(
            paho.CallbackAPIVersion.VERSION2,  # type: ignore[attr-defined]
            client_id=client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.on_socket_open = _disable_nagle
        client.on_connect = self._locked(self._on_connect)
        client.on_disconnect = self._locked(self._on_disconnect)
        client.on_message = self._locked(self._on_message)
        client.on_publish = self._locked(self._on_publish)
        client.on_subscribe = self._locked(self._on_subscribe)
        return client

    def _locked(self, handler: Callable[..., None]) -> Callable[..., None]:
        """Return a paho callback that runs `handler` with the lock held and wakes all waiters."""

        def locked(client: paho.Client, userdata: Any, *arguments: Any) -> None:
            with self._changed:
                handler(*arguments)
                self._changed.notify_all()

        return locked

    def _on_connect(self, flags: Any, reason_code: Any, properties: Any) -> None:
        self._answer = reason_code
        self.window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", 0)

    def _on_disconnect(self, flags: Any, reason_code: Any, properties: Any) -> None:
        self.lost = str(reason_code) or "connection closed"
        self._listener.on_disconnected(reason_code)

    def _on_subscribe(self, mid: int, reason_codes: list[Any], properties: Any) -> None:
        self._subscribed[mid] = reason_codes

    def _on_publish(self, mid: int, reason_code: Any, properties: Any) -> None:
        self.acknowledgements += 1
        message = self.inflight.pop(mid, None)
        if message is None:
            self._early[mid] = reason_code
        else:
            self._listener.on_acknowledged(message, reason_code)

    def _on_message(self, message: paho.MQTTMessage) -> None:
        def acknowledge() -> None:
            client = self._client
            if client is not None and not self.lost:
                client.ack(message.mid, message.qos)

        incoming = Incoming(message.topic, bytes(message.payload), bool(message.retain))
        self._listener.on_message(incoming, acknowledge if message.qos else None)


def _disable_nagle(client: paho.Client, userdata: Any, connection: Any) -> None:
    """Set TCP_NODELAY: with Nagle's algorithm and delayed TCP acks a round trip over rumqttd takes 44 ms, not 0.5."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
