"""What a prune would remove, and why, before anything is removed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Indices, Layout
from fedspine_edge.model.pruning import GroupScores, Scores


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan. Indices are those of the unpruned model; scores are aligned with them, higher = keep."""

    heads_removed: Indices
    head_scores: Scores
    channels_removed: Indices
    channel_scores: Scores
    heads_kept: int
    channels_kept: int


@dataclass(frozen=True)
class PruningPlan:
    """A layout to prune to, with its reasons. `EdgeTuner.apply` carries it out; `print(plan)` explains it.

    Args:
        before: The layout of the model that was planned for.
        after: What it would keep.
        scores: Of the groups that `before` keeps.
        flops_before: Of one forward pass, at the length of the tuner's longest text.
        flops_after: Of the same pass on the pruned model.
    """

    before: Layout
    after: Layout
    scores: GroupScores
    flops_before: float
    flops_after: float

    @property
    def pruning_ratio(self) -> float:
        """Share of prunable parameters gone afterwards, counted from the unpruned model."""
        return self.after.pruning_ratio

    @property
    def parameters_saved(self) -> int:
        """Parameters that this plan removes."""
        return self.after.removed_parameters - self.before.removed_parameters

    @property
    def flops_saved(self) -> float:
        """Share of a forward pass's floating-point operations that this plan removes."""
        return 1.0 - self.flops_after / self.flops_before

    @property
    def layers(self) -> list[LayerPlan]:
        """What goes from each layer, with the scores that say so."""
        found = []
        for i, (heads, channels) in enumerate(self.after.counts):
            gone_heads = ~np.isin(self.before.heads[i], self.after.heads[i])
            gone_channels = ~np.isin(self.before.channels[i], self.after.channels[i])
            found.append(
                LayerPlan(
                    self.before.heads[i][gone_heads],
                    self.scores.heads[i][gone_heads],
                    self.before.channels[i][gone_channels],
                    self.scores.channels[i][gone_channels],
                    heads,
                    channels,
                )
            )
        return found

    def predicted_latency_ms(self, base_latency_ms: float) -> float:
        """Latency after the plan, from the measured latency of the model as it is now.

        It assumes that time goes with operations. Embeddings, norms, the head and launches do not shrink, so short
        texts and small models gain less: a lower bound, to be measured before it is relied on. Raises `ConfigError`.
        """
        if not base_latency_ms > 0:
            raise ConfigError(f"base_latency_ms is {base_latency_ms}; it must be a measured time above 0.")
        return base_latency_ms * self.flops_after / self.flops_before

    def __str__(self) -> str:
        lines = [
            f"pruning ratio {self.before.pruning_ratio:.3f} -> {self.after.pruning_ratio:.3f}: "
            f"{self.parameters_saved:,} parameters and {self.flops_saved:.1%} of the operations of a forward pass go",
            "layer  heads removed (kept)  channels removed (kept)  share of the layer's score removed",
        ]
        for i, layer in enumerate(self.layers):
            heads = ", ".join(map(str, layer.heads_removed.tolist())) or "none"
            total = float(self.scores.heads[i].sum() + self.scores.channels[i].sum())
            gone = float(layer.head_scores.sum() + layer.channel_scores.sum())
            share = f"{gone / total:.1%}" if total > 0 else "-"
            lines.append(
                f"{i:5}  {heads} ({layer.heads_kept})  {layer.channels_removed.size} ({layer.channels_kept})  {share}"
            )
        return "\n".join(lines)
