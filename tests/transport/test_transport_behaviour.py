"""Transport behavior that server and devices rely on, over the in-process broker, the embedded one and Mosquitto."""

from __future__ import annotations

import threading

import pytest
from transport_support import Setup, collect, quiet, until_connected

from fedspine_edge.errors import TransportError
from fedspine_edge.transport.base import Connected, Incoming, Will

CHUNK = bytes(range(256)) * 384  # 96 KiB


def test_publish_reaches_matching_subscribers_only(setup: Setup) -> None:
    sender, exact, wild, other = (setup.transport() for _ in range(4))
    for transport in (sender, exact, wild, other):
        transport.connect(timeout_s=5)
        assert transport.receive(timeout_s=5) == Connected()
    exact.subscribe("f/v1/device/a/report")
    wild.subscribe("f/v1/device/+/report", "f/v1/blob/#")
    other.subscribe("f/v1/device/b/#")
    sender.publish("f/v1/device/a/report", b"\x00payload\xff")
    sender.publish("f/v1/blob/x/0", b"chunk")
    assert collect(exact, 1) == [Incoming("f/v1/device/a/report", b"\x00payload\xff")]
    assert {(message.topic, message.payload) for message in collect(wild, 2)} == {
        ("f/v1/device/a/report", b"\x00payload\xff"),
        ("f/v1/blob/x/0", b"chunk"),
    }
    assert quiet(other)


def test_publish_reaches_the_sender_if_subscribed(setup: Setup) -> None:
    transport = setup.transport()
    transport.connect(timeout_s=5)
    transport.subscribe("self")
    transport.publish("self", b"1")
    assert collect(transport, 1) == [Incoming("self", b"1")]


def test_retained_message_reaches_late_subscribers_until_cleared(setup: Setup) -> None:
    server, late = setup.transport(), setup.transport()
    server.connect(timeout_s=5)
    late.connect(timeout_s=5)
    server.subscribe("plan/+")
    server.publish("plan/a", b"old", retain=True)
    server.publish("plan/a", b"new", retain=True)
    server.publish("plan/b", b"", retain=True)
    assert [message.payload for message in collect(server, 3)] == [b"old", b"new", b""]
    late.subscribe("plan/+")
    assert collect(late, 1) == [Incoming("plan/a", b"new", retained=True)]
    server.publish("plan/a", b"", retain=True)
    assert [message.payload for message in collect(late, 1)] == [b""]
    later = setup.transport()
    later.connect(timeout_s=5)
    later.subscribe("plan/+")
    assert quiet(later)


def test_subscribe_again_delivers_retained_messages_again(setup: Setup) -> None:
    transport = setup.transport()
    transport.connect(timeout_s=5)
    transport.publish("plan/a", b"1", retain=True)
    for _ in range(3):
        transport.subscribe("plan/a")
        assert [message.payload for message in collect(transport, 1)] == [b"1"]
    transport.unsubscribe("plan/a")
    transport.subscribe("plan/a")
    assert [message.payload for message in collect(transport, 1)] == [b"1"]
    # rumqttd may deliver it twice for a known filter: at least once, and nothing else
    assert {message.payload for message in collect(transport, 3, timeout_s=0.3)} <= {b"1"}


def test_unsubscribe_ends_delivery(setup: Setup) -> None:
    transport = setup.transport()
    transport.connect(timeout_s=5)
    transport.subscribe("a", "b")
    transport.unsubscribe("a", "never-subscribed")
    transport.publish("a", b"1")
    transport.publish("b", b"2")
    assert [message.topic for message in collect(transport, 2, timeout_s=1)] == ["b"]


def test_subscribe_to_window_delivers_each_retained_chunk_once(setup: Setup) -> None:
    server, device = setup.transport(), setup.transport()
    server.connect(timeout_s=5)
    device.connect(timeout_s=5)
    topics = [f"fedspine/v1/f/blob/{'ab' * 32}/{index}" for index in range(40)]
    for index, topic in enumerate(topics):
        server.publish(topic, bytes([index]) + CHUNK[1:], retain=True)
    server.subscribe("flush")
    server.publish("flush", b"")
    assert len(collect(server, 1)) == 1  # the broker has handled everything published before
    fetched: dict[str, int] = {}
    for start in range(0, 40, 16):
        window = topics[start : start + 16]
        device.subscribe(*window)
        arrived = collect(device, len(window))
        device.unsubscribe(*window)
        assert quiet(device, for_s=0.05)
        assert sorted(message.topic for message in arrived) == sorted(window)
        assert all(message.payload[1:] == CHUNK[1:] for message in arrived)
        fetched.update((message.topic, message.payload[0]) for message in arrived)
    assert fetched == {topic: index for index, topic in enumerate(topics)}
    assert quiet(device)


def test_chunk_published_after_subscription_arrives(setup: Setup) -> None:
    server, device = setup.transport(), setup.transport()
    server.connect(timeout_s=5)
    device.connect(timeout_s=5)
    topics = [f"fedspine/v1/f/blob/{'cd' * 32}/{index}" for index in range(16)]
    device.subscribe(*topics)
    assert quiet(device, for_s=0.1)
    for topic in topics:
        server.publish(topic, CHUNK, retain=True)
    assert sorted(message.topic for message in collect(device, 16)) == sorted(topics)
    for topic in topics:
        server.publish(topic, b"", retain=True)
    assert {message.payload for message in collect(device, 16)} == {b""}


def test_twenty_megabytes_from_six_devices_arrive_complete(setup: Setup) -> None:
    server = setup.transport()
    server.connect(timeout_s=5)
    server.subscribe("f/v1/device/+/blob/#")

    def upload(name: str) -> None:
        device = setup.transport(name)
        device.connect(timeout_s=5)
        for index in range(36):
            device.publish(f"f/v1/device/{name}/blob/sha/{index}", CHUNK)
        device.close()

    threads = [threading.Thread(target=upload, args=(f"d{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    arrived = collect(server, 6 * 36, timeout_s=60)
    for thread in threads:
        thread.join(60)
    assert len({message.topic for message in arrived}) == 6 * 36
    assert all(message.payload == CHUNK for message in arrived)


def test_close_sends_queued_messages_and_no_will(setup: Setup) -> None:
    server, device = setup.transport(), setup.transport()
    server.connect(timeout_s=5)
    server.subscribe("status", "bulk")
    device.connect(timeout_s=5, will=Will("status", b"offline"))
    for _ in range(30):
        device.publish("bulk", CHUNK)
    device.close()
    assert [message.topic for message in collect(server, 30)] == ["bulk"] * 30
    assert quiet(server)
    with pytest.raises(TransportError, match="not connected"):
        device.publish("bulk", b"")
    with pytest.raises(TransportError, match="not connected"):
        device.receive(timeout_s=1)
    device.close()


def test_broker_crash_restores_subscriptions_and_connected(setup: Setup) -> None:
    server, device = setup.transport(), setup.transport()
    server.connect(timeout_s=5)
    server.subscribe("status/+")
    device.connect(timeout_s=5)
    device.subscribe("plan")
    until_connected(server)
    until_connected(device)
    server.publish("plan", b"round 1", retain=True)
    assert [message.payload for message in collect(device, 1)] == [b"round 1"]
    setup.crash()
    assert quiet(device)
    setup.restart()
    until_connected(server)
    until_connected(device)
    server.publish("plan", b"round 2", retain=True)
    device.publish("status/a", b"online")
    assert [message.payload for message in collect(device, 1)] == [b"round 2"]
    assert [message.payload for message in collect(server, 1)] == [b"online"]


@pytest.mark.parametrize("topic", ["", "a/+/b", "a/#", "a\0b"])
def test_invalid_topics_and_filters_raise(setup: Setup, topic: str) -> None:
    transport = setup.transport()
    transport.connect(timeout_s=5)
    with pytest.raises(TransportError, match="cannot be published to"):
        transport.publish(topic, b"1")
    for bad_filter in ("", "a+/b", "a/#/b"):
        with pytest.raises(TransportError, match="malformed"):
            transport.subscribe(bad_filter)
