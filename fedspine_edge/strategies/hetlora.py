"""HetLoRA: one rank per device class, adapters zero-padded to the largest rank, no pruning (arXiv 2401.06432)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedspine_edge.bandit.reward import RewardTerms, RoundOutcome
from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import Assignment, BaseStrategy, DeviceInfo


class HetLoRA(BaseStrategy):
    """Faster classes get larger ranks.

    The speed of a class is measured in its first finished round, which uses the middle rank, and does not change
    afterwards. Measured classes are distributed over the ranks from slowest to fastest.
    """

    name = "hetlora"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.aggregation = "zero_pad"
        self._class_of: dict[str, str] = {}
        self._class_time_s: dict[str, float] = {}

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Assignment:
        self._class_of[device.device_id] = device.device_class
        return Assignment(previous, self.largest_fitting(self._rank(device.device_class), device, previous))

    def observe(self, outcomes: Sequence[RoundOutcome], server_round: int) -> dict[str, RewardTerms | None]:
        times: dict[str, list[float]] = {}
        for o in sorted(outcomes, key=lambda o: o.device_id):
            asked = self._asked.get(o.device_id, {})
            if o.status == "ok" and asked.get("round") == server_round:
                times.setdefault(self._class_of[o.device_id], []).append(o.completion_time_s)
        for name, measured in times.items():
            self._class_time_s.setdefault(name, fmean(measured))
        return super().observe(outcomes, server_round)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "class_of": dict(self._class_of), "class_time_s": dict(self._class_time_s)}

    def load_dict(self, data: Mapping[str, Any]) -> None:
        super().load_dict(data)
        self._class_of = dict(data["class_of"])
        self._class_time_s = dict(data["class_time_s"])

    def _rank(self, device_class: str) -> int:
        if device_class not in self._class_time_s or len(self._class_time_s) < 2:
            return self.middle_rank()
        slowest_first = sorted(self._class_time_s, key=lambda name: (-self._class_time_s[name], name))
        position = slowest_first.index(device_class) / (len(slowest_first) - 1)
        return self.config.ranks[int(position * (len(self.config.ranks) - 1) + 0.5)]
