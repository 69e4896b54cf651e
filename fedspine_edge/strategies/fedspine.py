"""FedSpine: S-UCB picks every device's pruning ratio and rank. Source: arXiv 2501.02438; docs/algorithms.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedspine_edge.bandit.envelope import settle_mean
from fedspine_edge.bandit.reward import RewardTerms
from fedspine_edge.bandit.sucb import SUCB, Arm
from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import BaseStrategy, Choice, DeviceInfo, envelope


class FedSpine(BaseStrategy):
    """One S-UCB tree per device, rewarded by what its round was worth."""

    name = "fedspine"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.envelope = envelope(config, spread=True)
        self.bandit = SUCB(
            config.ranks,
            discount=config.bandit.discount,
            exploration=config.bandit.exploration,
            min_side=config.bandit.min_side,
            seed=config.seed,
            prior=config.bandit.prior,
        )

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        feasible = dict.fromkeys(self.ranks_that_fit(device, previous), (0.0, 1.0))
        arm = self.bandit.decide(
            device.device_id, device_class=device.device_class, feasible=feasible, now=server_round
        )
        return Choice(self.envelope.ratio(arm.u, server_round=server_round, previous=previous), arm.r, arm.u)

    def settle(self, choices: dict[str, Choice], previous: Mapping[str, float], server_round: int) -> dict[str, Choice]:
        """With `target="mean"`, the last pruning round brings the mean over the devices to P."""
        if self.envelope.spread == 0.0 or server_round != self.envelope.last_pruning_round:
            return choices
        limits = {i: self.envelope.limits(server_round=server_round, previous=p) for i, p in previous.items()}
        ratios = {i: choice.pruning_ratio for i, choice in choices.items()}
        settled = settle_mean(ratios, limits, self.envelope.target)
        return {i: replace(choice, pruning_ratio=settled[i]) for i, choice in choices.items()}

    def learn(self, terms: Mapping[str, RewardTerms | None], server_round: int) -> None:
        for device_id, reward in terms.items():
            if reward is not None:
                asked = self._asked[device_id]
                self.bandit.update(device_id, Arm(asked["u"], asked["r"]), reward.total, now=server_round)

    def explain(self, device_id: str) -> dict[str, Any]:
        return {**super().explain(device_id), **self.bandit.explain(device_id)}

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "bandit": self.bandit.to_dict()}

    def load_dict(self, data: Mapping[str, Any]) -> None:
        super().load_dict(data)
        self.bandit = SUCB.from_dict(data["bandit"])
