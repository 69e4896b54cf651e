"""Time as a dependency: the wall clock for real fleets, a virtual one for reproducible simulation."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What code that waits or measures may ask of time."""

    def now(self) -> float:
        """Monotonic time in seconds."""
        ...

    def spend(self, duration_s: float) -> None:
        """Account for `duration_s` of modelled work; real time passes by itself, virtual time must be told."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def spend(self, duration_s: float) -> None:
        pass


class VirtualClock:
    """A clock that moves only when told to. Never goes backwards."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def spend(self, duration_s: float) -> None:
        if duration_s < 0:
            raise ValueError(f"time cannot run backwards: spend({duration_s})")
        self._now += duration_s

    def advance_to(self, when_s: float) -> None:
        """Move to `when_s` seconds, or stay if that is in the past."""
        self._now = max(self._now, when_s)
