"""Common interface to three brokers, so that the same tests run against each."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Protocol

import pytest
from memory_transport import MemoryBroker, MemoryTransport

from fedspine_edge.config import BrokerSettings
from fedspine_edge.transport.base import Connected, Event, Incoming, Transport
from fedspine_edge.transport.broker import EmbeddedBroker, accepts_mqtt, free_port
from fedspine_edge.transport.mqtt import MqttTransport

_NUMBERS = itertools.count()


class Setup(Protocol):
    """A broker under test."""

    def transport(self, client_id: str = "") -> Transport: ...

    def crash(self) -> None: ...

    def restart(self) -> None: ...


class MemorySetup:
    def __init__(self) -> None:
        self.broker = MemoryBroker()

    def transport(self, client_id: str = "") -> Transport:
        return MemoryTransport(self.broker, client_id or f"client-{next(_NUMBERS)}", publish_timeout_s=10)

    def crash(self) -> None:
        self.broker.stop()

    def restart(self) -> None:
        self.broker.start()


class Mosquitto:
    """Mosquitto as a child process with extra configuration lines."""

    def __init__(self, folder: Path, extra: str = "allow_anonymous true\n") -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self._config = folder / f"mosquitto-{self.port}.conf"
        # When started by root, Mosquitto would switch to a user who cannot read pytest's folders.
        self._config.write_text(f"user root\nlistener {self.port} {self.host}\n{extra}")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> Mosquitto:
        program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        assert program is not None
        self._process = subprocess.Popen([program, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        return self

    def wait_for_tcp(self) -> None:
        deadline = time.monotonic() + 10
        while not accepts_mqtt(self.host, self.port, timeout_s=0.5):
            assert time.monotonic() < deadline, "mosquitto did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class MqttSetup:
    def __init__(self, broker: EmbeddedBroker | Mosquitto) -> None:
        self.broker = broker
        self._open: list[MqttTransport] = []

    def settings(self) -> BrokerSettings:
        return BrokerSettings(host=self.broker.host, port=self.broker.port, keepalive_s=5)

    def transport(self, client_id: str = "") -> Transport:
        transport = MqttTransport(
            self.settings(), client_id or f"client-{next(_NUMBERS)}", publish_timeout_s=20, flush_timeout_s=3
        )
        self._open.append(transport)
        return transport

    def crash(self) -> None:
        assert self.broker.pid is not None
        os.kill(self.broker.pid, signal.SIGKILL)
        self.broker.stop()

    def restart(self) -> None:
        self.broker.start()

    def close(self) -> None:
        for transport in self._open:
            transport.close()
        self.broker.stop()


needs_mosquitto = pytest.mark.skipif(
    not shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"),
    reason="mosquitto is not installed (apt-get install mosquitto)",
)


def start_mqtt(name: str, folder: Path) -> MqttSetup:
    if name == "embedded":
        pytest.importorskip("iotcore", reason="the embedded broker needs the extra 'broker'")
        return MqttSetup(EmbeddedBroker().start())
    mosquitto = Mosquitto(folder).start()
    mosquitto.wait_for_tcp()
    return MqttSetup(mosquitto)


MQTT_BROKERS = [
    pytest.param("embedded", marks=pytest.mark.broker),
    pytest.param("mosquitto", marks=[pytest.mark.broker, needs_mosquitto]),
]


def collect(transport: Transport, count: int, *, timeout_s: float = 20.0) -> list[Incoming]:
    """Return the next `count` messages, or those received within `timeout_s` seconds. Skips `Connected`."""
    found: list[Incoming] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < count and (left := deadline - time.monotonic()) > 0:
        event = transport.receive(timeout_s=left)
        if isinstance(event, Incoming):
            found.append(event)
    return found


def quiet(transport: Transport, *, for_s: float = 0.3) -> bool:
    """Return whether no message arrives for `for_s` seconds."""
    return collect(transport, 1, timeout_s=for_s) == []


def until_connected(transport: Transport, *, timeout_s: float = 20.0) -> list[Incoming]:
    """Wait for `Connected` and return the messages received before it."""
    before: list[Incoming] = []
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        event: Event | None = transport.receive(timeout_s=left)
        if isinstance(event, Connected):
            return before
        if isinstance(event, Incoming):
            before.append(event)
    raise AssertionError(f"no Connected within {timeout_s} s")
