"""The pruning schedule: maps an arm's u in [0, 1] to a pruning ratio. Source: docs/concepts/s-ucb.md.

The ratio may only grow, while the arm space must be the same in every round. Therefore u is not a ratio but a position
between a slow and a fast schedule that start and end together:

    x = (t - start) / (last - start)      lo = P x³      hi = P (1 - (1 - x)³)      p = lo + u (hi - lo)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MEAN_SPREAD = 0.15
"""How far final ratios may be from P with `target="fleet_mean"`."""

MIN_INTERVAL = 0.01
"""Smallest width of an interval of u."""


def rounds_needed(target: float, max_step: float) -> int:
    """Return the number of pruning rounds that `target` takes in steps of at most `max_step`."""
    return math.ceil(target / max_step - 1e-9)


@dataclass(frozen=True)
class PruningSchedule:
    """The schedule of one run.

    Args:
        target: P, the pruning ratio at the end.
        last_pruning_round: T; later rounds do not change the ratio.
        start: Rounds up to this one prune nothing (1 where the first round can only score).
        max_step: Largest increase of the ratio in one round.
        spread: How far a device's final ratio may be from `target`; with 0 all devices end at `target`.

    Raises:
        ValueError: `target` cannot be reached by `last_pruning_round`.
    """

    target: float
    last_pruning_round: int
    max_step: float
    start: int = 0
    spread: float = 0.0

    def __post_init__(self) -> None:
        if rounds_needed(self.target, self.max_step) > self.last_pruning_round - self.start:
            raise ValueError(
                f"a pruning ratio of {self.target} in steps of {self.max_step} needs "
                f"{rounds_needed(self.target, self.max_step)} pruning rounds, "
                f"not {max(0, self.last_pruning_round - self.start)}"
            )
        # A ratio below 0 or of 1 does not exist, so the spread is limited.
        object.__setattr__(self, "spread", min(self.spread, self.target, (1.0 - self.target) / 2))

    def prunes_in(self, server_round: int) -> bool:
        """Return whether ratios may increase in `server_round` (from 1)."""
        return self.start < server_round <= self.last_pruning_round

    def bounds(self, server_round: int) -> tuple[float, float]:
        """Return (lo, hi) of a pruning round, for a device that took part in all earlier ones.

        lo is raised so that P can still be reached in steps of `max_step`; otherwise the last step of a device that
        always drew u = 0 would be too large. With a spread no device exceeds P before the last pruning round, so that
        the mean over the devices can still be brought to P there.
        """
        remaining = self.last_pruning_round - server_round
        x = (server_round - self.start) / (self.last_pruning_round - self.start)
        lo = (self.target - self.spread) * x**3
        if remaining:
            lo = max(lo, self.target - self.max_step * remaining)
        end = self.target if remaining else self.target + self.spread
        return lo, max(lo, end * (1.0 - (1.0 - x) ** 3))

    def ratio(self, u: float, *, server_round: int, previous: float) -> float:
        """Return the pruning ratio at position `u` for a device that has removed `previous` so far."""
        if not self.prunes_in(server_round):
            return previous
        lo, hi = self.bounds(server_round)
        wanted = hi if u == 1.0 else lo + u * (hi - lo)
        return max(previous, min(wanted, previous + self.max_step))

    def limits(self, *, server_round: int, previous: float) -> tuple[float, float]:
        """Return the ratios at u = 0 and u = 1."""
        return (
            self.ratio(0.0, server_round=server_round, previous=previous),
            self.ratio(1.0, server_round=server_round, previous=previous),
        )

    def places(self, ratios: tuple[float, float], *, server_round: int, previous: float) -> tuple[float, float]:
        """Return the non-empty interval of u that gives `ratios` (least and largest, within `limits`)."""
        lo, hi = self.bounds(server_round) if self.prunes_in(server_round) else (0.0, 0.0)
        first, last = self.limits(server_round=server_round, previous=previous)
        if hi - lo < 1e-9 or last - first < 1e-9:
            return 0.0, 1.0
        # Beyond the limits u has no effect, so an interval that touches a limit extends to the end.
        begin = 0.0 if ratios[0] <= first + 1e-9 else (ratios[0] - lo) / (hi - lo)
        end = 1.0 if ratios[1] >= last - 1e-9 else (ratios[1] - lo) / (hi - lo)
        begin, end = min(max(begin, 0.0), 1.0), min(max(end, 0.0), 1.0)
        begin = min(begin, 1.0 - MIN_INTERVAL)
        return begin, max(end, begin + MIN_INTERVAL)


def adjust_to_mean(
    ratios: Mapping[str, float], limits: Mapping[str, tuple[float, float]], mean: float
) -> dict[str, float]:
    """Shift all `ratios` by the same amount, each clipped to its `limits`, so that their mean is `mean`.

    Where the limits do not allow that mean, the nearest possible mean results. The result does not depend on the order
    of the devices.
    """
    if not ratios:
        return {}

    def shifted(by: float) -> dict[str, float]:
        return {name: min(max(p + by, limits[name][0]), limits[name][1]) for name, p in ratios.items()}

    low, high = -1.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if math.fsum(shifted(middle).values()) < mean * len(ratios):
            low = middle
        else:
            high = middle
    return shifted(high)


def spread_by_speed(
    full: Mapping[str, float], slopes: Mapping[str, float], schedule: PruningSchedule
) -> dict[str, float]:
    """Return final ratios around the schedule's target that equalize the devices' final completion times.

    The ratios are within `schedule.spread` of the target, and the target is their mean.

    Args:
        full: By device the log time of a round with nothing removed.
        slopes: By device the decrease of the log time as the pruning ratio goes from 0 to 1.
        schedule: The schedule of the run.
    """
    least, most = schedule.target - schedule.spread, schedule.target + schedule.spread
    most = min(most, schedule.max_step * (schedule.last_pruning_round - schedule.start))

    def ratios(log_time: float) -> dict[str, float]:
        return {i: min(max((t - log_time) / max(slopes[i], 1e-3), least), most) for i, t in full.items()}

    low = min(t - most * max(slopes[i], 1e-3) for i, t in full.items()) - 1.0
    high = max(full.values()) + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if math.fsum(ratios(middle).values()) > schedule.target * len(full):
            low = middle
        else:
            high = middle
    return adjust_to_mean(ratios(high), dict.fromkeys(full, (least, most)), schedule.target)
