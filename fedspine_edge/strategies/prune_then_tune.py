"""Prune+FedLoRA: the whole pruning ratio is removed at once at the beginning; all other rounds only tune."""

from __future__ import annotations

from fedspine_edge.strategies.base import Assignment, BaseStrategy, DeviceInfo


class PruneThenTune(BaseStrategy):
    """Prunes in the first round in which an order exists; `bandit.max_step` does not apply.

    With the consensus layout, round 1 must score for the fleet: it consists of its τ scored iterations. Round 2 prunes
    after one iteration and adds the tuning that round 1 left out, so all strategies tune equally long.
    """

    name = "prune_then_tune"

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Assignment:
        r = self.largest_fitting(self.middle_rank(), device, previous)
        tau, recovery = self.config.training.tau, self.config.training.recovery_steps
        target = max(previous, self.config.pruning_ratio)
        if self.config.layout == "local" or server_round > 2:
            return Assignment(target, r)
        if server_round == 1:
            return Assignment(previous, r, tau=tau, recovery_steps=0)
        return Assignment(target, r, tau=1, recovery_steps=tau - 1 + 2 * recovery)
