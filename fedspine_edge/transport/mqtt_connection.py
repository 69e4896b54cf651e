"""One MQTT 5 connection: the only module that knows paho-mqtt.

paho's network thread calls back; what it brings is filed under the owner's lock and nothing else happens there.
A lost connection is never revived, a new one replaces it, so nothing depends on a session at the broker.
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
from fedspine_edge.transport.credentials import explain, no_answer, refusal

WINDOW = 16
"""Most unacknowledged publications; below the Receive Maximum of Mosquitto (20), EMQX (32) and AWS IoT (100)."""

RECEIVE_MAXIMUM = 32
"""Unacknowledged messages a broker may have on their way to us; rumqttd ignores it and stops at 100."""

MAX_PACKET_BYTES = 4 * 1024 * 1024
"""Largest packet accepted from the broker."""

FILTERS_PER_SUBSCRIBE = 16
_HEADER_BYTES = 16
_DISCONNECT_WITH_WILL = 0x04


@dataclass(frozen=True)
class Outgoing:
    """A publication on its way."""

    topic: str
    payload: bytes
    retain: bool

    @property
    def size_bytes(self) -> int:
        """Size of the packet, to a few bytes."""
        return len(self.topic.encode()) + len(self.payload) + _HEADER_BYTES


class Owner(Protocol):
    """Who is told what a connection brings, each time with `changed` held, on paho's thread."""

    changed: threading.Condition

    def arrived(self, message: Incoming, acknowledge: Callable[[], None] | None) -> None:
        """A message; `acknowledge` is None when it needs none (QoS 0)."""
        ...

    def acknowledged(self, message: Outgoing, reason_code: Any) -> None:
        """The broker has answered a publication."""
        ...

    def cut_off(self, reason_code: Any) -> None:
        """The connection is lost."""
        ...


class Connection:
    """A connection from `open` to `end`.

    Attributes:
        lost: Why the connection ended; empty while it stands.
        inflight: Publications without an answer yet, by packet identifier, in the order they were sent.
        window: How many of them the broker allows.
        max_packet_bytes: The broker's limit; 0 when it announced none.
        acknowledgements: Publications the broker has answered.
        opened_s: Monotonic time of `open` in seconds.
    """

    def __init__(
        self,
        owner: Owner,
        settings: BrokerSettings,
        client_id: str,
        *,
        will: Will | None,
        tls: ssl.SSLContext | None,
        password: str | None,
    ) -> None:
        self._owner = owner
        self._changed = owner.changed
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
        """Answers that overtook the return of paho's publish()."""
        self._subscribed: dict[int, list[Any]] = {}
        client = self._new_client(client_id)
        client.max_inflight_messages_set(0)  # the window is ours
        if settings.username:
            client.username_pw_set(settings.username, password)
        if tls is not None:
            client.tls_set_context(tls)
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        self._client: paho.Client | None = client

    def open(self, timeout_s: float) -> None:
        """Connect. Raises `NotConnected`; looking a host name up may take longer than `timeout_s`."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        settings, client = self._settings, self._standing_client()
        client.connect_timeout = timeout_s
        try:
            client.connect(settings.host, settings.port, settings.keepalive_s, clean_start=True, properties=properties)
        except (OSError, ValueError) as error:
            raise explain(error, self._has_tls) from error
        client.loop_start()
        del client
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None or self.lost, timeout_s)
            failed = no_answer(self.lost, self._has_tls) if self._answer is None else None
            if self._answer is not None and self._answer.is_failure:
                failed = refusal(self._answer)
        if failed is not None:
            self._stop()
            raise failed

    def require_standing(self) -> None:
        """Raise `NotConnected` when it is lost already."""
        if self.lost:
            raise no_answer(self.lost, self._has_tls)

    def send(self, message: Outgoing) -> None:
        """Publish with QoS 1; the owner learns of the answer. Raises ValueError for what no broker takes."""
        sent = self._standing_client().publish(message.topic, message.payload, qos=1, retain=message.retain)
        with self._changed:
            answer = self._early.pop(sent.mid, None)
            if answer is None:
                self.inflight[sent.mid] = message
            else:
                self._owner.acknowledged(message, answer)

    def subscribe(self, topic_filters: Iterable[str], timeout_s: float) -> None:
        """Subscribe and wait for the answer, at most `timeout_s` seconds; returns early when the connection is lost.

        Raises `TransportError` when the broker refuses one or does not answer.
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
                    raise TransportError(f"the broker did not answer a subscription to {batch} in {timeout_s:g} s.")
                for name, answer in zip(batch, answers):
                    if answer.is_failure:
                        raise TransportError(
                            f"the broker refused a subscription to {name!r}: {answer}.",
                            remedy="Let the broker's access list allow it for this user.",
                        )

    def unsubscribe(self, topic_filters: list[str]) -> None:
        """Unsubscribe without waiting."""
        client = self._client
        if client is not None:
            client.unsubscribe(topic_filters)

    def end(self, *, with_will: bool = False) -> None:
        """Disconnect if it still stands, and stop paho's thread. `with_will` lets the broker publish the will."""
        if not self.lost:
            reason = ReasonCode(PacketTypes.DISCONNECT, identifier=_DISCONNECT_WITH_WILL) if with_will else None
            self._standing_client().disconnect(reason)
        self._stop()

    def _stop(self) -> None:
        """paho closes its sockets when its client is freed; letting go of it here makes that now."""
        client, self._client = self._standing_client(), None
        client.loop_stop()

    def _standing_client(self) -> paho.Client:
        if self._client is None:
            raise RuntimeError("the connection has ended; its owner must open a new one")
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
        client.on_socket_open = _send_at_once
        client.on_connect = self._filed(self._on_connect)
        client.on_disconnect = self._filed(self._on_disconnect)
        client.on_message = self._filed(self._on_message)
        client.on_publish = self._filed(self._on_publish)
        client.on_subscribe = self._filed(self._on_subscribe)
        return client

    def _filed(self, handler: Callable[..., None]) -> Callable[..., None]:
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
        self._owner.cut_off(reason_code)

    def _on_subscribe(self, mid: int, reason_codes: list[Any], properties: Any) -> None:
        self._subscribed[mid] = reason_codes

    def _on_publish(self, mid: int, reason_code: Any, properties: Any) -> None:
        self.acknowledgements += 1
        message = self.inflight.pop(mid, None)
        if message is None:
            self._early[mid] = reason_code
        else:
            self._owner.acknowledged(message, reason_code)

    def _on_message(self, message: paho.MQTTMessage) -> None:
        def acknowledge() -> None:
            client = self._client
            if client is not None and not self.lost:
                client.ack(message.mid, message.qos)

        incoming = Incoming(message.topic, bytes(message.payload), bool(message.retain))
        self._owner.arrived(incoming, acknowledge if message.qos else None)


def _send_at_once(client: paho.Client, userdata: Any, connection: Any) -> None:
    """Without this a round trip over rumqttd takes 44 ms and not 0.5: Nagle's algorithm meets delayed TCP acks."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
