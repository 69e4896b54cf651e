"""FedLoRA+Prune: the full model is tuned to the end and pruned in the last step, without recovery."""

from __future__ import annotations

from fedspine_edge.strategies.base import Assignment, BaseStrategy, DeviceInfo


class TuneThenPrune(BaseStrategy):
    """Prunes the whole ratio at the end of the last round; `bandit.max_step` does not apply."""

    name = "tune_then_prune"

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Assignment:
        r = self.largest_fitting(self.middle_rank(), device, previous)
        if server_round < self.config.num_rounds:
            return Assignment(previous, r)
        steps = self.config.training.tau + self.config.training.recovery_steps
        return Assignment(max(previous, self.config.pruning_ratio), r, tau=steps, recovery_steps=0)
