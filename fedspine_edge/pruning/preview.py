"""`PruningPreview`, a description of what pruning would remove, before anything is removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Indices, Layout
from fedspine_edge.pruning.latency import ModelLatency
from fedspine_edge.pruning.selection import GroupScores, Scores


@dataclass(frozen=True)
class LayerPreview:
    """One layer of a preview. Indices are those of the unpruned model, with aligned scores (higher = keep)."""

    heads_removed: Indices
    head_scores: Scores
    channels_removed: Indices
    channel_scores: Scores
    heads_kept: int
    channels_kept: int


@dataclass(frozen=True)
class PruningPreview:
    """A layout to prune to, with its reasons. `EdgeTuner.prune` accepts it, and `print` explains it.

    Args:
        before: Present layout of the model.
        after: Layout after pruning.
        scores: Scores of the groups that `before` keeps.
        flops_before: FLOPs of one forward pass at the tuner's maximum length.
        flops_after: FLOPs of the same pass on the pruned model.
        asked: Requested ratio. `pruning_ratio` differs from it because of rounding and minimum widths.
        latency: Present latency of the model, if it was measured.
    """

    before: Layout
    after: Layout
    scores: GroupScores
    flops_before: float
    flops_after: float
    asked: float
    latency: ModelLatency | None = None

    @property
    def pruning_ratio(self) -> float:
        """Share of the prunable parameters of the unpruned model that is gone afterwards."""
        return self.after.pruning_ratio

    @property
    def parameters_saved(self) -> int:
        """Parameters that are removed."""
        return self.after.removed_parameters - self.before.removed_parameters

    @property
    def flops_saved(self) -> float:
        """Share of a forward pass's floating-point operations that this plan removes."""
        return 1.0 - self.flops_after / self.flops_before

    @property
    def layers(self) -> list[LayerPreview]:
        """Groups that are removed from each layer, with their scores."""
        found = []
        for i, (heads, channels) in enumerate(self.after.counts):
            gone_heads = ~np.isin(self.before.heads[i], self.after.heads[i])
            gone_channels = ~np.isin(self.before.channels[i], self.after.channels[i])
            found.append(
                LayerPreview(
                    self.before.heads[i][gone_heads],
                    self.scores.heads[i][gone_heads],
                    self.before.channels[i][gone_channels],
                    self.scores.channels[i][gone_channels],
                    heads,
                    channels,
                )
            )
        return found

    def predicted_latency_ms(self, base_latency_ms: float | None = None) -> float:
        """Return the latency to expect after pruning. Measure it before you rely on it.

        Args:
            base_latency_ms: Present latency, for instance measured on another machine. All of it is taken to be
                proportional to operations. Without it, the result of `EdgeTuner.measure_latency` before this preview is
                used, of which only the part in the layers shrinks.

        Raises `ConfigError` for a time that is not above 0, and if no latency was measured.
        """
        share = self.flops_after / self.flops_before
        if base_latency_ms is None:
            if self.latency is None:
                raise ConfigError(
                    "the prediction needs a measured latency, and there is none.",
                    remedy="Call tuner.measure_latency() before tuner.preview(...), or pass base_latency_ms.",
                )
            return self.latency.predict_ms(share)
        if not base_latency_ms > 0:
            raise ConfigError(f"base_latency_ms is {base_latency_ms}; it must be a measured time above 0.")
        return base_latency_ms * share

    def to_dict(self) -> dict[str, Any]:
        """Return every index and score as plain numbers, for JSON."""
        return {
            "pruning_ratio": {"now": self.before.pruning_ratio, "asked": self.asked, "after": self.pruning_ratio},
            "parameters_saved": self.parameters_saved,
            "flops": {"now": self.flops_before, "after": self.flops_after},
            "latency_ms": None
            if self.latency is None
            else {
                "measured": self.latency.total_ms,
                "predicted": self.predicted_latency_ms(),
                "conditions": self.latency.conditions,
            },
            "layers": [
                {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in vars(layer).items()}
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"pruning ratio {self.before.pruning_ratio:.3f} -> {self.after.pruning_ratio:.3f} (asked {self.asked:g}): "
            f"removes {self.parameters_saved:,} parameters and {self.flops_saved:.1%} of the layers' operations",
        ]
        if self.latency is not None:
            lines.append(
                f"latency {self.latency.total_ms:.1f} ms -> {self.predicted_latency_ms():.1f} ms predicted "
                f"({self.latency.conditions})"
            )
        lines.append("layer  heads removed (kept)  channels removed (kept)  share of the layer's score removed")
        for i, layer in enumerate(self.layers):
            heads = ", ".join(map(str, layer.heads_removed.tolist())) or "none"
            total = float(self.scores.heads[i].sum() + self.scores.channels[i].sum())
            gone = float(layer.head_scores.sum() + layer.channel_scores.sum())
            share = f"{gone / total:.1%}" if total > 0 else "-"
            lines.append(
                f"{i:5}  {heads} ({layer.heads_kept})  {layer.channels_removed.size} ({layer.channels_kept})  {share}"
            )
        return "\n".join(lines)
