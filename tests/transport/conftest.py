"""Fixtures that run a test against every broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transport_support import MQTT_BROKERS, MemorySetup, Mosquitto, MqttSetup, Setup, start_mqtt


@pytest.fixture(params=["memory", *MQTT_BROKERS])
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Setup]:
    """Return a setup for each broker in turn."""
    if request.param == "memory":
        yield MemorySetup()
        return
    mqtt = start_mqtt(request.param, tmp_path)
    yield mqtt
    mqtt.close()


@pytest.fixture(params=MQTT_BROKERS)
def mqtt_setup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MqttSetup]:
    """Return a setup for each real broker in turn."""
    mqtt = start_mqtt(request.param, tmp_path)
    yield mqtt
    mqtt.close()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Callable[[str], Mosquitto]]:
    """Return a function that starts Mosquitto with the given configuration lines."""
    started: list[Mosquitto] = []

    def start(extra: str) -> Mosquitto:
        started.append(Mosquitto(tmp_path, extra).start())
        return started[-1]

    yield start
    for broker in started:
        broker.stop()
