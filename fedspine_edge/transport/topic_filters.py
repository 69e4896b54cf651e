"""Topic names and topic filters (MQTT 5, section 4.7)."""

from __future__ import annotations

from fedspine_edge.errors import TransportError


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Return whether `topic_filter` matches `topic`; `+` matches one level, `#` the parent and all below it."""
    levels, names = topic_filter.split("/"), topic.split("/")
    for position, level in enumerate(levels):
        if level == "#":
            return True
        if position >= len(names) or level not in ("+", names[position]):
            return False
    return len(levels) == len(names)


def check_topic(topic: str) -> None:
    """Raise `TransportError` for an invalid topic name of a publication."""
    if not topic or any(character in topic for character in "+#\0"):
        raise TransportError(f"topic {topic!r} cannot be published to: it is empty or contains a wildcard.")


def check_filter(topic_filter: str) -> None:
    """Raise `TransportError` for a malformed filter, on which a broker would close the connection."""
    levels = topic_filter.split("/")
    misplaced = any(("#" in level or "+" in level) and len(level) > 1 for level in levels) or "#" in levels[:-1]
    if not topic_filter or "\0" in topic_filter or misplaced:
        raise TransportError(f"topic filter {topic_filter!r} is malformed.")
