"""Behavior specific to the in-process broker of the tests; test_transport_behaviour.py has what MQTT shares."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_transport import MemoryBroker, MemoryTransport

from fedspine_edge.errors import BrokerUnreachable, TransportError
from fedspine_edge.transport.base import Connected, Incoming, Will
from fedspine_edge.transport.topic_filters import topic_matches

LEVELS = st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("+/+", "/a", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "x/y", True),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a/b/d", False),
    ],
)
def test_topic_matches_follows_the_mqtt_specification(topic_filter: str, topic: str, expected: bool) -> None:
    assert topic_matches(topic_filter, topic) is expected


@given(LEVELS, st.lists(st.sampled_from(["a", "b", "", "+"]), min_size=1, max_size=4), st.booleans())
def test_topic_matches_agrees_with_a_regular_expression(names: list[str], levels: list[str], rest: bool) -> None:
    pattern = "/".join("[^/]*" if level == "+" else level for level in levels) + ("(/.*)?" if rest else "")
    topic_filter = "/".join([*levels, "#"] if rest else levels)
    topic = "/".join(names)
    assert topic_matches(topic_filter, topic) == bool(re.fullmatch(pattern, topic))


def test_broker_restart_clears_retained_and_keeps_filters() -> None:
    broker = MemoryBroker()
    client = MemoryTransport(broker, "one")
    client.connect(timeout_s=1)
    client.subscribe("a/#")
    client.publish("a/kept", b"1", retain=True)
    assert [client.receive(timeout_s=0) for _ in range(3)] == [Connected(), Incoming("a/kept", b"1"), None]
    broker.stop()
    with pytest.raises(TransportError, match="stopped"):
        client.publish("a/lost", b"2")
    with pytest.raises(BrokerUnreachable):
        MemoryTransport(broker, "two").connect(timeout_s=0)
    broker.start()
    assert broker.retained_topics() == []
    client.publish("a/new", b"3")
    assert [client.receive(timeout_s=0) for _ in range(3)] == [Connected(), Incoming("a/new", b"3"), None]


def test_connect_with_same_id_disconnects_first_client() -> None:
    broker = MemoryBroker()
    first, second = MemoryTransport(broker, "same"), MemoryTransport(broker, "same")
    first.connect(timeout_s=0, will=Will("s", b"offline"))
    second.connect(timeout_s=0)
    with pytest.raises(TransportError, match="not connected"):
        first.receive(timeout_s=0)
    assert broker.retained_topics() == ["s"]


def test_publish_before_connect_raises() -> None:
    client = MemoryTransport(MemoryBroker(), "one")
    with pytest.raises(TransportError, match="not connected"):
        client.publish("a", b"")
    with pytest.raises(TransportError, match="not connected"):
        client.subscribe("a")
