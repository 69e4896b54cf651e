"""FedSpine without the bandit: the middle arm for every device in every round. It shows what the bandit adds."""

from __future__ import annotations

from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import Assignment, BaseStrategy, DeviceInfo, pruning_schedule


class Fixed(BaseStrategy):
    """All devices get u = 0.5 and the middle rank."""

    name = "fixed"
    u = 0.5

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.schedule = pruning_schedule(config)

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Assignment:
        ratio = self.schedule.ratio(self.u, server_round=server_round, previous=previous)
        return Assignment(ratio, self.largest_fitting(self.middle_rank(), device, previous), self.u)
