"""FedLoRA+Prune: the full model is tuned to the end and pruned in the last step; nothing recovers from it."""

from __future__ import annotations

from fedspine_edge.strategies.base import BaseStrategy, Choice, DeviceInfo


class TuneThenPrune(BaseStrategy):
    """The whole ratio at the end of the last round; `bandit.max_step` does not apply."""

    name = "tune_then_prune"

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        r = self.largest_fitting(self.middle_rank(), device, previous)
        if server_round < self.config.num_rounds:
            return Choice(previous, r)
        tuning = self.config.training.tau + self.config.training.recovery_steps
        return Choice(max(previous, self.config.pruning_ratio), r, steps=(tuning, 0))
