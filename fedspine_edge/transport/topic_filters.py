"""MQTT's rules for topics and topic filters (MQTT 5, section 4.7)."""

from __future__ import annotations

from fedspine_edge.errors import TransportError


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether `topic` falls under `topic_filter` with `+` (one level) and `#` (the level above and all below)."""
    levels, names = topic_filter.split("/"), topic.split("/")
    for position, level in enumerate(levels):
        if level == "#":
            return True
        if position >= len(names) or level not in ("+", names[position]):
            return False
    return len(levels) == len(names)


def check_topic(topic: str) -> None:
    """Raise `TransportError` for a topic that no broker accepts in a publication."""
    if not topic or any(character in topic for character in "+#\0"):
        raise TransportError(f"topic {topic!r} cannot be published to: it is empty or holds a wildcard.")


def check_filter(topic_filter: str) -> None:
    """Raise `TransportError` for a malformed filter, which would make a broker close the connection."""
    levels = topic_filter.split("/")
    misplaced = any(("#" in level or "+" in level) and len(level) > 1 for level in levels) or "#" in levels[:-1]
    if not topic_filter or "\0" in topic_filter or misplaced:
        raise TransportError(f"topic filter {topic_filter!r} is malformed.")
