"""Clocks: the monotonic clock of the machine, and a virtual one for reproducible simulations."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Clock for code that waits or measures."""

    def now(self) -> float:
        """Return the monotonic time in seconds."""
        ...

    def spend(self, duration_s: float) -> None:
        """Advance a virtual clock by `duration_s` seconds of modelled work. A real clock ignores the call."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def spend(self, duration_s: float) -> None:
        pass


class VirtualClock:
    """A clock that advances only through `spend` and `advance_to`, and never goes backwards."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def spend(self, duration_s: float) -> None:
        if duration_s < 0:
            raise ValueError(f"time cannot go backwards: spend({duration_s})")
        self._now += duration_s

    def advance_to(self, when_s: float) -> None:
        """Advance to `when_s` seconds. A time in the past is ignored."""
        self._now = max(self._now, when_s)
