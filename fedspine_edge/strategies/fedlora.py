"""FedLoRA: federated averaging of LoRA adapters of one rank, without pruning."""

from __future__ import annotations

from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import Assignment, BaseStrategy, DeviceInfo


class FedLoRA(BaseStrategy):
    """All devices train the middle rank; A and B are averaged separately, as FedAvg does with any parameter."""

    name = "fedlora"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.aggregation = "zero_pad"

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Assignment:
        return Assignment(previous, self.largest_fitting(self.middle_rank(), device, previous))
