"""What the server announced is at the broker again after the broker forgot it."""

from __future__ import annotations

from memory_transport import MemoryBroker, MemoryTransport

from fedspine_edge.protocol.chunks import split
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.server.publisher import ServerPublisher

TOPICS = Topics("fleet")


def connected(broker):
    post = ServerPublisher(MemoryTransport(broker, "server"), TOPICS)
    post.open(1.0)
    while not post.connected:
        post.receive(0.1)
    return post


def test_an_announcement_outlives_the_brokers_memory():
    broker = MemoryBroker()
    post = connected(broker)
    ref, _ = split(bytes(5000), chunk_bytes=2048)
    post.announce({"d0": b"plan"}, [(ref, bytes(5000))])
    announced = broker.retained_topics()
    assert announced == sorted([TOPICS.plan("d0"), *(TOPICS.blob(ref.sha256, i) for i in range(3))])
    broker.stop()
    broker.start()
    assert broker.retained_topics() == []
    post.receive(0.1)
    assert broker.retained_topics() == announced


def test_what_could_not_be_published_is_published_when_the_broker_is_back():
    broker = MemoryBroker()
    post = connected(broker)
    broker.stop()
    post.announce({"d0": b"plan"})
    assert post.behind
    broker.start()
    post.receive(0.1)
    assert not post.behind
    assert broker.retained_topics() == [TOPICS.plan("d0")]


def test_a_cleared_blob_is_not_restated():
    broker = MemoryBroker()
    post = connected(broker)
    ref, _ = split(b"x" * 100)
    post.announce({}, [(ref, b"x" * 100)])
    assert post.clear(ref)
    broker.stop()
    assert not post.clear(ref)
    broker.start()
    post.receive(0.1)
    assert broker.retained_topics() == []


def test_closing_twice_is_harmless():
    post = connected(MemoryBroker())
    post.close()
    post.close()
