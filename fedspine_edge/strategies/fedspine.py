"""FedSpine: S-UCB picks every device's pruning ratio and rank. Source: arXiv 2501.02438; docs/algorithms.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedspine_edge.bandit.pruning_schedule import PruningSchedule, adjust_to_mean, spread_by_speed
from fedspine_edge.bandit.reward import RewardTerms
from fedspine_edge.bandit.sucb import SUCB, Arm
from fedspine_edge.bandit.time_model import CompletionTimeModel, DeviceSpeed, FeasibleArms
from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import BaseStrategy, Choice, DeviceInfo, RoundOutcome, envelope

DEADLINE_SHARE = 0.8
"""Nobody is planned to work longer than this share of the deadline for the sake of a slower device."""


class FedSpine(BaseStrategy):
    """One S-UCB tree per device, rewarded by what its round was worth.

    With `bandit.arm_choice = "paced"` the reported times say which arms would take as long as the fleet's slowest
    device must, and each tree chooses among those; with "uniform" it chooses among all, as in the paper.
    """

    name = "fedspine"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.envelope = envelope(config, spread=True)
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
        """By device the ratio it ends at, with `target = "fleet_mean"`; set once, when first every speed is known."""
        self._class_of: dict[str, str] = {}
        self._reach: dict[str, FeasibleArms] = {}
        self._pace: float | None = None
        """log of the time that the round is expected to take."""

    def prepare(self, devices: Mapping[str, DeviceInfo], previous: Mapping[str, float], server_round: int) -> None:
        """What the round must take: as long as the fastest arm of the slowest device, but not past the deadline."""
        self._class_of.update((i, device.device_class) for i, device in devices.items())
        self._reach, self._pace = {}, None
        if self.config.bandit.arm_choice == "uniform":
            return
        speeds = self.times.speeds({i: device.device_class for i, device in devices.items()})
        if not speeds:
            return
        if self.envelope.spread > 0.0 and not self._targets:
            self._targets = self._spread_targets(speeds)
        self._reach = {i: self._reach_of(devices[i], speeds[i], previous[i], server_round) for i in devices}
        slowest = max(reach.shortest for reach in self._reach.values())
        self._pace = min(slowest, math.log(DEADLINE_SHARE * self.config.deadline_s))

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        schedule = self._envelope(device.device_id)
        if self._pace is not None:
            reach = self._reach[device.device_id]
            ratios = reach.within(max(self._pace, reach.shortest), self.config.bandit.time_tolerance)
            feasible = {
                r: schedule.places(interval, server_round=server_round, previous=previous)
                for r, interval in ratios.items()
            }
        elif self.config.bandit.arm_choice == "paced":  # nothing is known yet: one rank, so that times can be compared
            feasible = {self.largest_fitting(self.middle_rank(), device, previous): (0.0, 1.0)}
        else:
            feasible = dict.fromkeys(self.ranks_that_fit(device, previous), (0.0, 1.0))
        arm = self.bandit.decide(
            device.device_id, device_class=device.device_class, feasible=feasible, now=server_round
        )
        return Choice(schedule.ratio(arm.u, server_round=server_round, previous=previous), arm.r, arm.u)

    def settle(self, choices: dict[str, Choice], previous: Mapping[str, float], server_round: int) -> dict[str, Choice]:
        """With `target="fleet_mean"` and no targets by device, the last pruning round brings the mean to P."""
        if self.envelope.spread == 0.0 or self._targets or server_round != self.envelope.last_pruning_round:
            return choices
        limits = {i: self.envelope.limits(server_round=server_round, previous=p) for i, p in previous.items()}
        ratios = {i: choice.pruning_ratio for i, choice in choices.items()}
        settled = adjust_to_mean(ratios, limits, self.envelope.target)
        return {i: replace(choice, pruning_ratio=settled[i]) for i, choice in choices.items()}

    def observe(self, outcomes: Sequence[RoundOutcome], server_round: int) -> dict[str, RewardTerms | None]:
        for o in sorted(outcomes, key=lambda o: o.device_id):
            asked = self._asked.get(o.device_id, {})
            if o.status in ("ok", "late") and asked.get("round") == server_round:
                # A late device took the deadline at least; its ratio is then what was asked for.
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
        return None if self._pace is None else math.exp(self._pace)

    def target_of(self, device_id: str) -> float:
        return self._targets.get(device_id, self.config.pruning_ratio)

    def learn(self, terms: Mapping[str, RewardTerms | None], server_round: int) -> None:
        for device_id, reward in terms.items():
            if reward is not None:
                asked = self._asked[device_id]
                self.bandit.update(device_id, Arm(asked["u"], asked["r"]), reward.total, now=server_round)

    def explain(self, device_id: str) -> dict[str, Any]:
        return {**super().explain(device_id), **self.bandit.explain(device_id), "pace": self._explain_pace(device_id)}

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "bandit": self.bandit.to_dict(),
            "times": self.times.to_dict(),
            "targets": dict(self._targets),
            "class_of": dict(self._class_of),
            "pace": self._pace,
        }

    def load_dict(self, data: Mapping[str, Any]) -> None:
        super().load_dict(data)
        self.bandit = SUCB.from_dict(data["bandit"])
        if "times" in data:  # a run begun before there were any begins to learn them
            self.times = CompletionTimeModel.from_dict(data["times"])
            self._targets, self._class_of = dict(data["targets"]), dict(data["class_of"])
            self._pace = data["pace"]

    # -- pace -------------------------------------------------------------------------------------------------

    def _envelope(self, device_id: str) -> PruningSchedule:
        if self.envelope.spread == 0.0 or not self._targets:
            return self.envelope
        return replace(self.envelope, target=self.target_of(device_id), spread=0.0)

    def _kept(self, before: float, after: float) -> float:
        """Mean share of the model that is there during a round's steps."""
        training = self.config.training
        pruned = training.recovery_steps / (training.tau + training.recovery_steps)
        return 1.0 - (1.0 - pruned) * before - pruned * after

    def _reach_of(self, device: DeviceInfo, speed: DeviceSpeed, previous: float, server_round: int) -> FeasibleArms:
        limits = self._envelope(device.device_id).limits(server_round=server_round, previous=previous)
        kept = (self._kept(previous, limits[0]), self._kept(previous, limits[1]))
        return FeasibleArms(speed, limits, kept, tuple(self.ranks_that_fit(device, previous)), max(self.config.ranks))

    def _spread_targets(self, speeds: Mapping[str, DeviceSpeed]) -> dict[str, float]:
        """Final ratios around P that bring the devices' times together: slow ones end smaller, fast ones larger."""
        rank_share = self.middle_rank() / max(self.config.ranks)
        full = {i: speed.log_time(1.0, rank_share) for i, speed in speeds.items()}
        falls = {i: speed.slopes[0] for i, speed in speeds.items()}
        return spread_by_speed(full, falls, self.envelope)

    def _explain_pace(self, device_id: str) -> dict[str, Any] | None:
        asked, reach = self._asked.get(device_id), self._reach.get(device_id)
        if self._pace is None or asked is None or reach is None:
            return None
        kept = self._kept(asked["previous"], asked["pruning_ratio"])
        return {
            "expected_s": math.exp(self._pace),
            "predicted_s": math.exp(reach.speed.log_time(kept, asked["r"] / reach.r_max)),
            "shortest_s": math.exp(reach.shortest),
            "sets_the_pace": reach.shortest >= self._pace,
        }
