"""The completion-time model: predicts the time of a device's round from the times of its earlier rounds.

    log T = a_i + θ_i · (k, r / r_max)        k = share of the model that is present, averaged over the round's steps

θ is estimated by ridge regression within devices. A device's slopes are shrunk toward those of its class, those of a
class toward the fleet's, and those of the fleet toward a weak prior; all three levels use sums of the same numbers. The
model knows nothing of hardware or links and learns from reported times only. Original to this project;
docs/concepts/s-ucb.md, "Completion-time model".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

PRIOR_SLOPES = (0.7, 0.3)
"""Slopes of log T in k and r / r_max before any time is known."""

RIDGE_STRENGTH = (0.02, 0.05, 0.1)
"""Ridge strength of the fleet, a class and a device: the level above counts as this many observations of spread 1."""


@dataclass
class _Sums:
    """Discounted sums over one device's rounds, as of round `when`, where x is (k, r / r_max) and y is log T."""

    n: float = 0.0
    x1: float = 0.0
    x2: float = 0.0
    y: float = 0.0
    x11: float = 0.0
    x12: float = 0.0
    x22: float = 0.0
    x1y: float = 0.0
    x2y: float = 0.0
    when: int = 0

    def add(self, x1: float, x2: float, y: float, now: int, discount: float) -> None:
        old = discount ** max(0, now - self.when)
        new = (1.0, x1, x2, y, x1 * x1, x1 * x2, x2 * x2, x1 * y, x2 * y)
        (self.n, self.x1, self.x2, self.y, self.x11, self.x12, self.x22, self.x1y, self.x2y) = (
            old * s + v for s, v in zip(astuple(self), new)
        )
        self.when = max(now, self.when)

    def spread(self) -> tuple[float, float, float, float, float]:
        """Return the sums of squares and products around the means: (xx11, xx12, xx22, xy1, xy2)."""
        n = self.n
        return (
            self.x11 - self.x1 * self.x1 / n,
            self.x12 - self.x1 * self.x2 / n,
            self.x22 - self.x2 * self.x2 / n,
            self.x1y - self.x1 * self.y / n,
            self.x2y - self.x2 * self.y / n,
        )


Slopes = tuple[float, float]


@dataclass(frozen=True)
class DeviceSpeed:
    """log T = level + slopes · (k, r / r_max) of one device."""

    level: float
    slopes: Slopes

    def log_time(self, kept: float, rank_share: float) -> float:
        return self.level + self.slopes[0] * kept + self.slopes[1] * rank_share


class CompletionTimeModel:
    """Completion times of a fleet's devices, by kept share and rank.

    Args:
        r_max: Largest rank of the fleet.
        discount: Weight of a time that is one round older, in (0, 1].
    """

    def __init__(self, r_max: int, discount: float = 0.9) -> None:
        self.r_max = r_max
        self.discount = discount
        self._sums: dict[str, _Sums] = {}
        self._class_of: dict[str, str] = {}

    def observe(self, device_id: str, device_class: str, *, kept: float, r: int, time_s: float, now: int) -> None:
        """Learn that a round at mean kept share `kept` and rank `r` took `time_s`; ignored unless it is positive."""
        if time_s > 0.0 and math.isfinite(time_s):
            self._class_of[device_id] = device_class
            sums = self._sums.setdefault(device_id, _Sums(when=now))
            sums.add(kept, r / self.r_max, math.log(time_s), now, self.discount)

    def speeds(self, classes: Mapping[str, str]) -> dict[str, DeviceSpeed]:
        """Return the speed of every device in `classes` (device id → class); empty while no time is known.

        A device without times of its own gets the mean level of its class, or that of the fleet.
        """
        if not self._sums:
            return {}
        spreads = {device_id: sums.spread() for device_id, sums in self._sums.items()}
        members: dict[str, list[str]] = {}
        for device_id, name in self._class_of.items():
            members.setdefault(name, []).append(device_id)
        fleet = _ridge(_total(spreads.values()), PRIOR_SLOPES, RIDGE_STRENGTH[0])
        by_class = {
            name: _ridge(_total(spreads[i] for i in ids), fleet, RIDGE_STRENGTH[1]) for name, ids in members.items()
        }
        found = {
            device_id: self._speed(
                sums, _ridge(spreads[device_id], by_class[self._class_of[device_id]], RIDGE_STRENGTH[2])
            )
            for device_id, sums in self._sums.items()
        }
        means: dict[str, DeviceSpeed] = {}
        for device_id, name in classes.items():
            if device_id not in found:
                ids = members.get(name)
                if name not in means:
                    level, slopes = [found[i].level for i in ids or found], by_class.get(name, fleet)
                    means[name] = DeviceSpeed(math.fsum(level) / len(level), slopes)
                found[device_id] = means[name]
        return {device_id: found[device_id] for device_id in classes}

    def to_dict(self) -> dict[str, Any]:
        """Return the whole state, as plain JSON data."""
        return {
            "discount": self.discount,
            "r_max": self.r_max,
            "sums": {device_id: list(astuple(sums)) for device_id, sums in self._sums.items()},
            "class_of": dict(self._class_of),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompletionTimeModel:
        """Return the inverse of `to_dict`."""
        model = cls(data["r_max"], data["discount"])
        model._sums = {device_id: _Sums(*values) for device_id, values in data["sums"].items()}
        model._class_of = dict(data["class_of"])
        return model

    @staticmethod
    def _speed(sums: _Sums, slopes: Slopes) -> DeviceSpeed:
        return DeviceSpeed((sums.y - slopes[0] * sums.x1 - slopes[1] * sums.x2) / sums.n, slopes)


def _total(spreads: Any) -> tuple[float, float, float, float, float]:
    a, b, c, d, e = (math.fsum(column) for column in zip(*spreads))
    return a, b, c, d, e


def _ridge(spread: tuple[float, float, float, float, float], toward: Slopes, ridge: float) -> Slopes:
    """Return argmin over θ ≥ 0 of Σ (y - θ·x)² + ridge |θ - toward|²: more work never takes less time."""
    a, b, c = spread[0] + ridge, spread[1], spread[2] + ridge
    p, q = spread[3] + ridge * toward[0], spread[4] + ridge * toward[1]
    determinant = a * c - b * b
    first, second = (p * c - q * b) / determinant, (q * a - p * b) / determinant
    if first < 0.0:
        first, second = 0.0, q / c
    if second < 0.0:
        first, second = p / a, 0.0
    return max(0.0, first), max(0.0, second)


@dataclass(frozen=True)
class FeasibleArms:
    """The arms that are possible in a device's next round, with their predicted times.

    Args:
        speed: Speed of the device.
        limits: Least and largest pruning ratio of the round.
        kept: Mean kept share of the round at each of them; it decreases linearly between them.
        ranks: Ranks that fit the device, ascending.
        r_max: The largest rank of the fleet.
    """

    speed: DeviceSpeed
    limits: tuple[float, float]
    kept: tuple[float, float]
    ranks: tuple[int, ...]
    r_max: int

    def log_times(self, r: int) -> tuple[float, float]:
        """Return (longest, shortest) log time at rank `r`: at the least and at the largest ratio."""
        share = r / self.r_max
        return self.speed.log_time(self.kept[0], share), self.speed.log_time(self.kept[1], share)

    @property
    def shortest(self) -> float:
        """Logarithm of the shortest time of any arm."""
        return self.log_times(self.ranks[0])[1]

    def within(self, log_time: float, tolerance: float) -> dict[int, tuple[float, float]]:
        """Return by rank the interval of ratios whose predicted log time is in [log_time - tolerance, log_time].

        If no arm is in that interval, the arms within `tolerance` of the longest time below it are returned: the device
        will wait for the others in any case. Longer times are never returned, since one slow device delays all.

        Args:
            log_time: Logarithm of the expected time of the round; not below `shortest`.
            tolerance: Width of the interval.
        """
        times = {r: self.log_times(r) for r in self.ranks}
        reachable = [min(longest, log_time) for longest, shortest in times.values() if shortest <= log_time]
        most = max(reachable, default=log_time)
        return {
            r: self._ratios(longest, shortest, most - tolerance, most)
            for r, (longest, shortest) in times.items()
            if longest >= most - tolerance and shortest <= most
        }

    def _ratios(self, longest: float, shortest: float, least: float, most: float) -> tuple[float, float]:
        if longest - shortest < 1e-9:
            return self.limits
        lo, hi = self.limits
        begin = (longest - min(longest, most)) / (longest - shortest)
        end = (longest - max(shortest, least)) / (longest - shortest)
        return lo + begin * (hi - lo), lo + end * (hi - lo)
