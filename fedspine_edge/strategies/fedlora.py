"""FedLoRA: federated averaging of LoRA adapters of one rank; nothing is pruned."""

from __future__ import annotations

from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import BaseStrategy, Choice, DeviceInfo


class FedLoRA(BaseStrategy):
    """The middle rank for everyone; A and B are averaged separately, as FedAvg does with any parameter."""

    name = "fedlora"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.aggregation = "zero_pad"

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        return Choice(previous, self.largest_fitting(self.middle_rank(), device, previous))
