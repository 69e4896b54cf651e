"""FedSpine without the bandit: the middle arm for every device, in every round. Shows what choosing is worth."""

from __future__ import annotations

from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import BaseStrategy, Choice, DeviceInfo, envelope


class Fixed(BaseStrategy):
    """u = 0.5 and the middle rank."""

    name = "fixed"
    u = 0.5

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.envelope = envelope(config)

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        p = self.envelope.ratio(self.u, server_round=server_round, previous=previous)
        return Choice(p, self.largest_fitting(self.middle_rank(), device, previous), self.u)
