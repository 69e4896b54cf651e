"""FedSpine: S-UCB selects every device's pruning ratio and rank. Source: arXiv 2501.02438; docs/concepts/s-ucb.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedspine_edge.bandit.pruning_schedule import PruningSchedule, adjust_to_mean, spread_by_speed
from fedspine_edge.bandit.reward import RewardTerms, RoundOutcome
from fedspine_edge.bandit.sucb import SUCB, Arm
from fedspine_edge.bandit.time_model import CompletionTimeModel, DeviceSpeed, FeasibleArms
from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import Assignment, BaseStrategy, DeviceInfo, pruning_schedule

DEADLINE_SHARE = 0.8
"""Share of the deadline up to which devices are given more work because another device is slower."""


class FedSpine(BaseStrategy):
    """One S-UCB tree per device, which learns from the device's rewards.

    With `bandit.arm_choice = "paced"` the completion-time model predicts which arms take as long as the shortest round
    of the slowest device, and each tree selects among those; with "uniform" it selects among all arms, as in the paper.
    """

    name = "fedspine"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.schedule = pruning_schedule(config, spread=True)
        self.bandit = SUCB(
            config.ranks,
            discount=config.bandit.discount,
            exploration=config.bandit.exploration,
            min_leaf_width=config.bandit.min_leaf_width,
            seed=config.seed,
            prior=config.bandit.prior,
        )
        self.times = CompletionTimeModel(max(config.ranks))
        self._targets: dict[str, float] = {}
        """By device the final ratio with `target = "fleet_mean"`; set once, when the speeds become known."""
        self._class_of: dict[str, str] = {}
        self._feasible: dict[str, FeasibleArms] = {}
        self._expected_log_s: float | None = None
        """Logarithm of the expected time of the round in seconds; None while no completion time is known."""

    def prepare(self, devices: Mapping[str, DeviceInfo], previous: Mapping[str, float], server_round: int) -> None:
        """Predict the time of the round: the fastest arm of the slowest device, limited by the deadline."""
        self._class_of.update((i, device.device_class) for i, device in devices.items())
        self._feasible, self._expected_log_s = {}, None
        if self.config.bandit.arm_choice == "uniform":
            return
        speeds = self.times.speeds({i: device.device_class for i, device in devices.items()})
        if not speeds:
            return
        if self.schedule.spread > 0.0 and not self._targets:
            self._targets = self._spread_targets(speeds)
        self._feasible = {i: self._feasible_arms(devices[i], speeds[i], previous[i], server_round) for i in devices}
        slowest = max(arms.shortest for arms in self._feasible.values())
        self._expected_log_s = min(slowest, math.log(DEADLINE_SHARE * self.config.deadline_s))

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Assignment:
        schedule = self._schedule_of(device.device_id)
        if self._expected_log_s is not None:
            arms = self._feasible[device.device_id]
            ratios = arms.within(max(self._expected_log_s, arms.shortest), self.config.bandit.time_tolerance)
            feasible = {
                r: schedule.places(interval, server_round=server_round, previous=previous)
                for r, interval in ratios.items()
            }
        elif self.config.bandit.arm_choice == "paced":  # no times yet: one rank for all, so that they are comparable
            feasible = {self.largest_fitting(self.middle_rank(), device, previous): (0.0, 1.0)}
        else:
            feasible = dict.fromkeys(self.ranks_that_fit(device, previous), (0.0, 1.0))
        arm = self.bandit.decide(
            device.device_id, device_class=device.device_class, feasible=feasible, now=server_round
        )
        return Assignment(schedule.ratio(arm.u, server_round=server_round, previous=previous), arm.r, arm.u)

    def adjust(
        self, assignments: dict[str, Assignment], previous: Mapping[str, float], server_round: int
    ) -> dict[str, Assignment]:
        """Bring the mean ratio to P in the last pruning round, with `target="fleet_mean"` and no targets by device."""
        if self.schedule.spread == 0.0 or self._targets or server_round != self.schedule.last_pruning_round:
            return assignments
        limits = {i: self.schedule.limits(server_round=server_round, previous=p) for i, p in previous.items()}
        ratios = {i: assignment.pruning_ratio for i, assignment in assignments.items()}
        adjusted = adjust_to_mean(ratios, limits, self.schedule.target)
        return {i: replace(assignment, pruning_ratio=adjusted[i]) for i, assignment in assignments.items()}

    def observe(self, outcomes: Sequence[RoundOutcome], server_round: int) -> dict[str, RewardTerms | None]:
        for o in sorted(outcomes, key=lambda o: o.device_id):
            asked = self._asked.get(o.device_id, {})
            if o.status in ("ok", "late") and asked.get("round") == server_round:
                # A late device took at least the deadline; it reported no ratio, so the assigned one is used.
                late = o.status == "late"
                self.times.observe(
                    o.device_id,
                    self._class_of.get(o.device_id, ""),
                    kept=self._kept(asked["previous"], asked["pruning_ratio"] if late else o.pruning_ratio),
                    r=asked["r"],
                    time_s=self.config.deadline_s if late else o.completion_time_s,
                    now=server_round,
                )
        return super().observe(outcomes, server_round)

    def expected_s(self) -> float | None:
        return None if self._expected_log_s is None else math.exp(self._expected_log_s)

    def target_of(self, device_id: str) -> float:
        return self._targets.get(device_id, self.config.pruning_ratio)

    def learn(self, terms: Mapping[str, RewardTerms | None], server_round: int) -> None:
        for device_id, reward in terms.items():
            if reward is not None:
                asked = self._asked[device_id]
                self.bandit.update(device_id, Arm(asked["u"], asked["r"]), reward.total, now=server_round)

    def explain(self, device_id: str) -> dict[str, Any]:
        # "pace" is the key under which journals store the predicted times.
        return {**super().explain(device_id), **self.bandit.explain(device_id), "pace": self._explain_time(device_id)}

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "bandit": self.bandit.to_dict(),
            "times": self.times.to_dict(),
            "targets": dict(self._targets),
            "class_of": dict(self._class_of),
            "pace": self._expected_log_s,
        }

    def load_dict(self, data: Mapping[str, Any]) -> None:
        super().load_dict(data)
        self.bandit = SUCB.from_dict(data["bandit"])
        if "times" in data:  # absent in runs of versions without a completion-time model
            self.times = CompletionTimeModel.from_dict(data["times"])
            self._targets, self._class_of = dict(data["targets"]), dict(data["class_of"])
            self._expected_log_s = data["pace"]

    # Completion times

    def _schedule_of(self, device_id: str) -> PruningSchedule:
        if self.schedule.spread == 0.0 or not self._targets:
            return self.schedule
        return replace(self.schedule, target=self.target_of(device_id), spread=0.0)

    def _kept(self, before: float, after: float) -> float:
        """Return the mean share of the model that is present during the steps of a round."""
        training = self.config.training
        pruned = training.recovery_steps / (training.tau + training.recovery_steps)
        return 1.0 - (1.0 - pruned) * before - pruned * after

    def _feasible_arms(
        self, device: DeviceInfo, speed: DeviceSpeed, previous: float, server_round: int
    ) -> FeasibleArms:
        limits = self._schedule_of(device.device_id).limits(server_round=server_round, previous=previous)
        kept = (self._kept(previous, limits[0]), self._kept(previous, limits[1]))
        return FeasibleArms(speed, limits, kept, tuple(self.ranks_that_fit(device, previous)), max(self.config.ranks))

    def _spread_targets(self, speeds: Mapping[str, DeviceSpeed]) -> dict[str, float]:
        """Return final ratios around P that equalize the devices' times: slow devices end smaller, fast ones larger."""
        rank_share = self.middle_rank() / max(self.config.ranks)
        full = {i: speed.log_time(1.0, rank_share) for i, speed in speeds.items()}
        slopes = {i: speed.slopes[0] for i, speed in speeds.items()}
        return spread_by_speed(full, slopes, self.schedule)

    def _explain_time(self, device_id: str) -> dict[str, Any] | None:
        asked, arms = self._asked.get(device_id), self._feasible.get(device_id)
        if self._expected_log_s is None or asked is None or arms is None:
            return None
        kept = self._kept(asked["previous"], asked["pruning_ratio"])
        return {
            "expected_s": math.exp(self._expected_log_s),
            "predicted_s": math.exp(arms.speed.log_time(kept, asked["r"] / arms.r_max)),
            "shortest_s": math.exp(arms.shortest),
            "sets_the_pace": arms.shortest >= self._expected_log_s,
        }
