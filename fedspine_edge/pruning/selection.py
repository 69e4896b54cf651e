"""Selection of the groups to keep from their importance scores, and the settings of pruning. Uses numpy only.

Source: docs/concepts/pruning.md, "Groups"; arXiv 2501.02438, section on structured pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedspine_edge.errors import ConfigError, LayoutError
from fedspine_edge.model.layout import (
    Indices,
    Layout,
    Order,
    channel_parameters,
    check_ratio,
    head_parameters,
    prunable_parameters,
    smallest_counts,
    target_counts,
)
from fedspine_edge.model.spec import ModelSpec

Scope = Literal["layer", "global"]
Criterion = Literal["lora", "apt", "magnitude", "random"]
ImportanceMetric = Literal["auto", "abs", "square", "signed", "group"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GroupScores:
    """Importance (higher = keep) of the groups that a layout keeps, by layer and in the order of the layout."""

    heads: list[Scores]
    channels: list[Scores]

    def check(self, layout: Layout) -> None:
        """Raise `LayoutError` unless the scores are finite and aligned with `layout`."""
        for kind, scores, kept in (("heads", self.heads, layout.heads), ("channels", self.channels, layout.channels)):
            if len(scores) != len(kept):
                raise LayoutError(f"the scores of {kind} cover {len(scores)} layers; the layout has {len(kept)}.")
            for layer, (score, index) in enumerate(zip(scores, kept)):
                if score.shape != index.shape:
                    raise LayoutError(f"layer {layer}, {kind}: {score.shape} scores for {index.size} kept groups.")
                if not np.isfinite(score).all():
                    raise LayoutError(f"layer {layer}, {kind}: the scores are not finite.")


@dataclass(frozen=True)
class PruningSettings:
    """Settings of how groups are scored and how many of them a pruning ratio keeps.

    Args:
        criterion: "lora", "apt", "magnitude" or "random"; see `fedspine_edge.ImportanceTracker`.
        importance_metric: How criterion "lora" sums the terms of a group: "auto", "abs", "square", "signed" or "group".
        scope: "layer" gives every layer the same widths; "global" lets groups compete over all layers.
        round_to: Divisor of the kept channel counts.
        min_heads: KV heads that stay in every layer at any ratio.
        min_channels: Channels that stay in every layer at any ratio, rounded up to a multiple of `round_to`.

    Raises `ConfigError` for an unknown name.
    """

    criterion: Criterion = "lora"
    importance_metric: ImportanceMetric = "auto"
    scope: Scope = "layer"
    round_to: int = 8
    min_heads: int = 1
    min_channels: int = 1

    def __post_init__(self) -> None:
        known: dict[str, Any] = {"criterion": Criterion, "importance_metric": ImportanceMetric, "scope": Scope}
        for name, values in known.items():
            if (value := getattr(self, name)) not in get_args(values):
                raise ConfigError(f"{name} {value!r} is unknown.", remedy=f"Use one of {', '.join(get_args(values))}.")

    @property
    def at_least(self) -> tuple[int, int]:
        """(heads, channels) that stay in every layer."""
        return self.min_heads, self.min_channels

    def check_minimums(self, spec: ModelSpec) -> None:
        """Raise `ConfigError` for minimum widths that a model of `spec` does not have."""
        smallest_counts(spec, self.round_to, self.at_least)

    def select_layout(
        self, scores: GroupScores, layout: Layout, pruning_ratio: float, *, final_ratio: float = 0.0
    ) -> Layout:
        """Return the layout that keeps the best groups of `layout` at `pruning_ratio`.

        Args:
            scores: Scores of the groups that `layout` keeps.
            layout: Present layout.
            pruning_ratio: Share of prunable parameters removed afterwards.
            final_ratio: Ratio of the last stage, if pruning proceeds in stages.
        """
        at_least = self.at_least
        if final_ratio > pruning_ratio and self.scope == "layer":
            # Rounding must not remove channels now in place of a head that is removed by the last stage.
            at_least = target_counts(layout.spec, final_ratio, round_to=self.round_to, at_least=at_least)
        return select_layout(scores, layout, pruning_ratio, scope=self.scope, round_to=self.round_to, at_least=at_least)


def select_layout(
    scores: GroupScores,
    layout: Layout,
    pruning_ratio: float,
    *,
    scope: Scope = "layer",
    round_to: int = 8,
    at_least: tuple[int, int] = (1, 1),
) -> Layout:
    """Return the layout that keeps the groups with the highest scores at `pruning_ratio`; it is within `layout`.

    Args:
        scores: Scores of the groups that `layout` keeps. Ties keep the lower index.
        layout: Present layout.
        pruning_ratio: Share of prunable parameters removed afterwards.
        scope: "layer" keeps the same counts in every layer; "global" ranks scores per parameter over all layers.
        round_to: Divisor of the kept channel counts.
        at_least: (heads, channels) that stay in every layer, as far as they are still present.

    Raises `LayoutError` or `ConfigError`.
    """
    scores.check(layout)
    check_ratio(pruning_ratio)
    spec = layout.spec
    order = order_from_scores(scores, layout)
    if scope == "layer":
        counts = [
            target_counts(spec, pruning_ratio, round_to=round_to, at_most=kept, at_least=at_least)
            for kept in layout.counts
        ]
    else:
        counts = _global_counts(scores, layout, pruning_ratio, round_to, at_least)
    return Layout.prefix(spec, order, counts)


def order_from_scores(scores: GroupScores, layout: Layout) -> Order:
    """Return all groups of the unpruned model, best first.

    Groups that `layout` keeps are ranked by score, and ties by index. Groups that it has lost follow by index.
    """
    scores.check(layout)
    spec = layout.spec

    def ranked(kept: tuple[Indices, ...], values: list[Scores], size: int) -> tuple[Indices, ...]:
        orders = []
        for index, value in zip(kept, values):
            lost = np.setdiff1d(np.arange(size), index)
            orders.append(np.concatenate([index[np.argsort(-value, kind="stable")], lost]).astype(np.int64))
        return tuple(orders)

    return Order(
        heads=ranked(layout.heads, scores.heads, spec.num_kv_heads),
        channels=ranked(layout.channels, scores.channels, spec.intermediate_size),
    )


def _global_counts(
    scores: GroupScores, layout: Layout, pruning_ratio: float, round_to: int, at_least: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the kept counts of each layer when groups compete over all layers by score per parameter.

    Channels compete in blocks of `round_to` by the mean score of the block. No rounding is needed afterwards, and the
    ratio is met within one group or block. At least one head and one block stay in every layer.
    """
    spec = layout.spec
    fewest_heads, fewest_channels = smallest_counts(spec, round_to, at_least)
    per_head, per_channel = head_parameters(spec), channel_parameters(spec)
    counts = [list(pair) for pair in layout.counts]
    blocks: list[tuple[float, int, int, int]] = []  # (score per parameter, kind, layer, groups in the block)
    for layer in range(spec.num_layers):
        heads = np.sort(scores.heads[layer])[::-1][fewest_heads:]
        blocks += [(float(score) / per_head, 0, layer, 1) for score in heads]
        channels = np.sort(scores.channels[layer])[::-1]
        for start in range(fewest_channels, channels.size, round_to):
            block = channels[start : start + round_to]
            blocks.append((float(block.mean()) / per_channel, 1, layer, block.size))
    excess = pruning_ratio * prunable_parameters(spec) - layout.removed_parameters
    for _, kind, layer, size in sorted(blocks):
        cost = size * (per_channel if kind else per_head)
        if excess >= cost / 2:  # otherwise a smaller block further on may still fit
            counts[layer][kind] -= size
            excess -= cost
    return [(heads, channels) for heads, channels in counts]
