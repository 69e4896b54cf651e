"""Arrived and not yet received events, bounded by bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fedspine_edge.transport.base import Event, Incoming

_OVERHEAD_BYTES = 256
"""Charged per message, so that a flood of empty ones is bounded too."""


class ReceiveQueue:
    """Decides when an arrived message is acknowledged; not thread-safe by itself.

    While there is room, at once: the fastest way. Without room, when it is taken out: the broker then stops at the
    number of unacknowledged messages that the client announced, and the inbox holds at most `limit_bytes` plus that
    many messages. Acknowledgements keep the order of arrival, since some brokers want them in order. A message that
    needs no acknowledgement (QoS 0) cannot be held back; without room it is dropped and counted.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: deque[tuple[Event, int, Callable[[], None] | None]] = deque()
        self._bytes = 0
        self._held = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, event: Event, acknowledge: Callable[[], None] | None = None) -> None:
        """File `event`; calls `acknowledge` now or lets `take` return it."""
        size = _OVERHEAD_BYTES + (len(event.payload) if isinstance(event, Incoming) else 0)
        full = self._bytes + size > self._limit_bytes
        if isinstance(event, Incoming) and full and acknowledge is None:
            self.dropped += 1
            return
        if acknowledge is not None:
            if full or self._held:
                self._held += 1
            else:
                acknowledge()
                acknowledge = None
        self._entries.append((event, size, acknowledge))
        self._bytes += size

    def take(self) -> tuple[Event, Callable[[], None] | None]:
        """The oldest event and what is to be called now that there is room. Raises IndexError when empty."""
        event, size, acknowledge = self._entries.popleft()
        self._bytes -= size
        self._held -= acknowledge is not None
        return event, acknowledge

    def clear(self) -> None:
        """Forget everything, unacknowledged."""
        self._entries.clear()
        self._bytes = self._held = 0
