"""A strategy of your own: every class gets its own rank, and everybody prunes on the fast schedule.

    PYTHONPATH=examples fedspine-edge server --config fleet.toml      # with strategy = "my_strategy:RankByClass"

Nothing of fedspine_edge has to be changed. `choose` decides for one device at a time; bookkeeping, memory limits and
the journal are the base class's.
"""

from __future__ import annotations

from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import BaseStrategy, Choice, DeviceInfo, envelope

RANKS = {"tx2": 4, "nx": 8, "agx": 16}


class RankByClass(BaseStrategy):
    """The rank that `RANKS` says, the middle one for a class that is not there; u = 1 for all."""

    name = "rank_by_class"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.envelope = envelope(config)

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        wanted = RANKS.get(device.device_class, self.middle_rank())
        allowed = max((r for r in self.config.ranks if r <= wanted), default=self.config.ranks[0])
        ratio = self.envelope.ratio(1.0, server_round=server_round, previous=previous)
        return Choice(ratio, self.largest_fitting(allowed, device, previous), 1.0)
