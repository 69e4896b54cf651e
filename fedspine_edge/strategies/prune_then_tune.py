"""Prune+FedLoRA: everything is removed at the beginning, at once; all other rounds only tune."""

from __future__ import annotations

from fedspine_edge.strategies.base import BaseStrategy, Choice, DeviceInfo


class PruneThenTune(BaseStrategy):
    """The whole ratio in the first round in which an order exists; `bandit.max_step` does not apply.

    With the consensus layout round 1 must score for the fleet: it takes its τ scored iterations and nothing more,
    round 2 prunes after one, and the tuning that was left out follows there, so all strategies tune equally long.
    """

    name = "prune_then_tune"

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        r = self.largest_fitting(self.middle_rank(), device, previous)
        tau, recovery = self.config.training.tau, self.config.training.recovery_steps
        target = max(previous, self.config.pruning_ratio)
        if self.config.layout == "local" or server_round > 2:
            return Choice(target, r)
        if server_round == 1:
            return Choice(previous, r, steps=(tau, 0))
        return Choice(target, r, steps=(1, tau - 1 + 2 * recovery))
