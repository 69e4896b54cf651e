"""What ranks heads and channels, and how many of them a ratio leaves: the settings of pruning on one device."""

from __future__ import annotations

from dataclasses import dataclass

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout, smallest_counts, target_counts
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.importance import CRITERIA, METRICS, Criterion, ImportanceTracker, Metric
from fedspine_edge.pruning.selection import GroupScores, Scope, select_layout


@dataclass(frozen=True)
class PruningSettings:
    """Raises `ConfigError` for a name that is unknown.

    Args:
        criterion: "lora", "apt", "magnitude" or "random".
        metric: How "lora" sums a group's terms: "auto", "abs", "square", "signed" or "group", see `ImportanceTracker`.
        scope: "layer" gives every layer the same width, "global" lets widths differ.
        round_to: Kept channel counts are multiples of this.
        min_heads: KV heads that stay in every layer at any ratio.
        min_channels: Channels likewise, rounded up to `round_to`.
    """

    criterion: Criterion = "lora"
    metric: Metric = "auto"
    scope: Scope = "layer"
    round_to: int = 8
    min_heads: int = 1
    min_channels: int = 1

    def __post_init__(self) -> None:
        for name, known in (("criterion", CRITERIA), ("metric", METRICS), ("scope", ("layer", "global"))):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name} {value!r} is unknown.", remedy=f"Use one of {', '.join(known)}.")

    def tracker(self, model: PrunableModel, seed: int) -> ImportanceTracker:
        """What scores `model`. Raises `ConfigError` for minimums that the model does not have."""
        smallest_counts(model.spec, self.round_to, (self.min_heads, self.min_channels))
        return ImportanceTracker(model, self.criterion, self.metric, seed=seed, scope=self.scope)

    def layout(self, scores: GroupScores, layout: Layout, pruning_ratio: float, *, goal: float = 0.0) -> Layout:
        """What stays of `layout` at `pruning_ratio`, on the way to `goal` if that is more."""
        at_least = self.min_heads, self.min_channels
        if goal > pruning_ratio and self.scope == "layer":
            # rounding must not take channels here in place of a head that goes at the goal
            at_least = target_counts(layout.spec, goal, round_to=self.round_to, at_least=at_least)
        return select_layout(scores, layout, pruning_ratio, scope=self.scope, round_to=self.round_to, at_least=at_least)
