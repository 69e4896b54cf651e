"""Plans and blobs are published again after the broker has lost them."""

from __future__ import annotations

from memory_transport import MemoryBroker, MemoryTransport

from fedspine_edge.protocol.chunks import split
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.server.publisher import ServerPublisher

TOPICS = Topics("fleet")


def connected(broker):
    publisher = ServerPublisher(MemoryTransport(broker, "server"), TOPICS)
    publisher.open(1.0)
    while not publisher.connected:
        publisher.receive(0.1)
    return publisher


def test_publisher_republishes_after_the_broker_lost_its_messages():
    broker = MemoryBroker()
    publisher = connected(broker)
    ref, _ = split(bytes(5000), chunk_bytes=2048)
    publisher.publish_plans({"d0": b"plan"}, [(ref, bytes(5000))])
    published = broker.retained_topics()
    assert published == sorted([TOPICS.plan("d0"), *(TOPICS.blob(ref.sha256, i) for i in range(3))])
    broker.stop()
    broker.start()
    assert broker.retained_topics() == []
    publisher.receive(0.1)
    assert broker.retained_topics() == published


def test_publisher_sends_unsent_plans_after_reconnect():
    broker = MemoryBroker()
    publisher = connected(broker)
    broker.stop()
    publisher.publish_plans({"d0": b"plan"})
    assert publisher.has_unsent
    broker.start()
    publisher.receive(0.1)
    assert not publisher.has_unsent
    assert broker.retained_topics() == [TOPICS.plan("d0")]


def test_publisher_does_not_republish_a_cleared_blob():
    broker = MemoryBroker()
    publisher = connected(broker)
    ref, _ = split(b"x" * 100)
    publisher.publish_plans({}, [(ref, b"x" * 100)])
    assert publisher.clear(ref)
    broker.stop()
    assert not publisher.clear(ref)
    broker.start()
    publisher.receive(0.1)
    assert broker.retained_topics() == []


def test_publisher_close_twice_is_harmless():
    publisher = connected(MemoryBroker())
    publisher.close()
    publisher.close()
