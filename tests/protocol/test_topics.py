"""Topics: construction, parsing, and rejection of foreign ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspine_edge.errors import ConfigError, MessageError
from fedspine_edge.protocol.topics import BlobTopic, DeviceTopic, Topics, UploadTopic

SHA = "0f" * 32
TOPICS = Topics("farm-1")

names = st.from_regex(r"\A[A-Za-z0-9_-]{1,64}\Z")
indices = st.integers(0, 9_999_999)


def test_topics_have_the_documented_names():
    assert TOPICS.plan("a") == "fedspine/v1/farm-1/device/a/plan"
    assert TOPICS.blob(SHA, 7) == f"fedspine/v1/farm-1/blob/{SHA}/7"
    assert TOPICS.upload("a", SHA, 0) == f"fedspine/v1/farm-1/device/a/blob/{SHA}/0"
    assert TOPICS.server_filters == (
        "fedspine/v1/farm-1/device/+/status",
        "fedspine/v1/farm-1/device/+/report",
        "fedspine/v1/farm-1/device/+/blob/+/+",
    )
    assert TOPICS.device_filters("a") == ("fedspine/v1/farm-1/device/a/plan", "fedspine/v1/farm-1/device/a/ack")


@given(names, names, indices)
def test_parse_inverts_topic_construction(fleet, device, index):
    topics = Topics(fleet)
    for kind in ("status", "plan", "report", "ack"):
        assert topics.parse(getattr(topics, kind)(device)) == DeviceTopic(device, kind)
    assert topics.parse(topics.blob(SHA, index)) == BlobTopic(SHA, index)
    assert topics.parse(topics.upload(device, SHA, index)) == UploadTopic(device, SHA, index)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fedspine/v1/farm-1",
        "fedspine/v1/farm-1/",
        "fedspine/v1/farm-12/device/a/plan",
        "fedspine/v1/other/device/a/plan",
        "x/fedspine/v1/farm-1/device/a/plan",
        "fedspine/v2/farm-1/device/a/plan",
        "fedspine/v1/farm-1/device/a",
        "fedspine/v1/farm-1/device//plan",
        "fedspine/v1/farm-1/device/+/plan",
        "fedspine/v1/farm-1/device/a/plan/x",
        "fedspine/v1/farm-1/device/a/reboot",
        f"fedspine/v1/farm-1/blob/{SHA}",
        f"fedspine/v1/farm-1/blob/{SHA}/-1",
        f"fedspine/v1/farm-1/blob/{SHA}/01",
        f"fedspine/v1/farm-1/blob/{SHA}/1\n",
        f"fedspine/v1/farm-1/blob/{SHA}/99999999",
        f"fedspine/v1/farm-1/blob/{SHA.upper()}/1",
        "fedspine/v1/farm-1/blob/../1",
        f"fedspine/v1/farm-1/device/a/blob/{SHA}/x",
    ],
)
def test_foreign_topics_are_rejected(topic):
    with pytest.raises(MessageError):
        TOPICS.parse(topic)


@given(st.text(max_size=80))
def test_arbitrary_topic_raises_message_error(text):
    for topic in (text, "fedspine/v1/farm-1/" + text):
        with pytest.raises(MessageError):
            TOPICS.parse(topic)


def test_topic_with_wildcards_or_slashes_is_rejected():
    for bad in ("", "a/b", "+", "#", "a b", "x" * 65, "ä"):
        with pytest.raises(ConfigError, match="device_id"):
            TOPICS.plan(bad)
        with pytest.raises(ConfigError, match="fleet"):
            Topics(bad)
    with pytest.raises(ConfigError, match="sha256"):
        TOPICS.blob("+", 0)
    with pytest.raises(ConfigError, match="index"):
        TOPICS.blob(SHA, -1)
