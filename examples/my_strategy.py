"""Strategies of your own: one that decides by itself, and S-UCB with another reward.

    PYTHONPATH=examples fedspine-edge server --config fleet.toml      # with strategy = "my_strategy:RankByClass"
    fedspine-edge experiment examples/experiment.toml                 # beside each other, on the same seeds

Nothing of fedspine_edge has to be changed. `choose` decides for one device at a time; bookkeeping, memory limits and
the journal are the base class's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedspine_edge.bandit.reward import Outcome, RewardTerms
from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies.base import BaseStrategy, Choice, DeviceInfo, envelope
from fedspine_edge.strategies.fedspine import FedSpine

RANKS = {"tx2": 4, "nx": 8, "agx": 16, "bench": 4, "rack": 16}


class RankByClass(BaseStrategy):
    """The rank that `RANKS` says, the middle one for a class that is not there; all prune on the fast schedule."""

    name = "rank_by_class"

    def __init__(self, config: FleetConfig) -> None:
        super().__init__(config)
        self.envelope = envelope(config)

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        wanted = RANKS.get(device.device_class, self.middle_rank())
        allowed = max((r for r in self.config.ranks if r <= wanted), default=self.config.ranks[0])
        ratio = self.envelope.ratio(1.0, server_round=server_round, previous=previous)
        return Choice(ratio, self.largest_fitting(allowed, device, previous), 1.0)


class PerSecond(FedSpine):
    """S-UCB that is rewarded for the relative fall of the loss per second, as a share of the round's best.

    The configured terms are journaled as before; late and failed devices keep their 0, and lost ones teach nothing.
    Arms are still (u, r): `ranks` in fleet.toml says which ranks there are.
    """

    name = "per_second"

    def reward(self, outcomes: Sequence[Outcome]) -> dict[str, RewardTerms | None]:
        terms = super().reward(outcomes)
        seconds = {o.device_id: o.completion_time_s for o in outcomes if o.status == "ok"}
        rates = {i: one.loss / seconds[i] for i, one in terms.items() if one and i in seconds}
        best = max(rates.values(), default=0.0) or 1.0
        return {i: replace(one, total=rates[i] / best) if one and i in rates else one for i, one in terms.items()}
