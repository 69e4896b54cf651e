"""Two custom strategies: a fixed rank per device class, and S-UCB with another reward.

    PYTHONPATH=examples fedspine-edge server --config fleet.toml      # with strategy = "my_strategy:RankByClass"
    fedspine-edge experiment examples/experiment.toml                 # compares both on the same seeds

A strategy needs no change to fedspine_edge. `choose` decides for one device at a time. The base class takes care of
bookkeeping, memory limits and the journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedspine_edge import BaseStrategy, FleetConfig
from fedspine_edge.strategies import (
    Assignment,
    DeviceInfo,
    FedSpine,
    RewardTerms,
    RoundOutcome,
    pruning_schedule,
)

RANKS = {"tx2": 4, "nx": 8, "agx": 16, "bench": 4, "rack": 16}


class RankByClass(BaseStrategy):
    """Assign the rank in `RANKS`, or the middle rank to unknown classes. Every device prunes on the same schedule."""

    name = "rank_by_class"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.schedule = pruning_schedule(config)

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Assignment:
        wanted = RANKS.get(device.device_class, self.middle_rank())
        allowed = max((r for r in self.config.ranks if r <= wanted), default=self.config.ranks[0])
        ratio = self.schedule.ratio(1.0, server_round=server_round, previous=previous)
        return Assignment(ratio, self.largest_fitting(allowed, device, previous), 1.0)


class PerSecond(FedSpine):
    """S-UCB with the relative decrease of the loss per second as reward, divided by the round's best.

    The configured reward terms are journaled as before. Late and failed devices still get 0, and disconnected ones no
    reward. Arms are still pairs (u, r), with the ranks of `ranks` in fleet.toml.
    """

    name = "per_second"

    def reward(self, outcomes: Sequence[RoundOutcome]) -> dict[str, RewardTerms | None]:
        terms = super().reward(outcomes)
        seconds = {o.device_id: o.completion_time_s for o in outcomes if o.status == "ok"}
        rates = {i: one.loss / seconds[i] for i, one in terms.items() if one and i in seconds}
        best = max(rates.values(), default=0.0) or 1.0
        return {i: replace(one, total=rates[i] / best) if one and i in rates else one for i, one in terms.items()}
