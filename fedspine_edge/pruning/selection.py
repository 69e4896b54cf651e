"""From scores to kept indices. numpy only.

Source: docs/algorithms.md, "Groups"; arXiv 2501.02438, section on structured pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedspine_edge.errors import LayoutError
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

Scope = Literal["layer", "global"]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GroupScores:
    """Importance (higher = keep) of the groups a layout keeps, per layer and in the layout's order."""

    heads: list[Scores]
    channels: list[Scores]

    def check(self, layout: Layout) -> None:
        """Raises `LayoutError` unless the scores are finite and aligned with `layout`."""
        for kind, scores, kept in (("heads", self.heads, layout.heads), ("channels", self.channels, layout.channels)):
            if len(scores) != len(kept):
                raise LayoutError(f"{kind} scores cover {len(scores)} layers, the layout {len(kept)}.")
            for layer, (score, index) in enumerate(zip(scores, kept)):
                if score.shape != index.shape:
                    raise LayoutError(f"layer {layer} {kind}: {score.shape} scores for {index.size} kept groups.")
                if not np.isfinite(score).all():
                    raise LayoutError(f"layer {layer} {kind}: scores are not finite.")


def select_layout(
    scores: GroupScores,
    layout: Layout,
    pruning_ratio: float,
    *,
    scope: Scope = "layer",
    round_to: int = 8,
    at_least: tuple[int, int] = (1, 1),
) -> Layout:
    """The layout at `pruning_ratio` that keeps what `scores` rank highest; always within `layout`.

    With scope "layer" every layer keeps the same counts; with "global" the parameter-normalised scores are
    ranked over all layers. Ties keep the lower index. `at_least` (heads, channels) stay in every layer, as far as
    they are still there. Raises `LayoutError` or `ConfigError`.
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


def order_from_scores(scores: GroupScores, layout: Layout, previous: Order | None = None) -> Order:
    """All groups of the full model, best first.

    What `layout` keeps is ranked by score (ties: lower index first). What it has lost follows in the order
    that `previous` gave it, so that a tail, once decided, keeps its place; without `previous`, by index.
    """
    scores.check(layout)
    spec = layout.spec

    def ranked(kept: tuple[Indices, ...], values: list[Scores], old: tuple[Indices, ...] | None, size: int) -> Any:
        result = []
        for layer, (index, value) in enumerate(zip(kept, values)):
            tail = np.arange(size) if old is None else old[layer]
            lost = tail[~np.isin(tail, index)]
            result.append(np.concatenate([index[np.argsort(-value, kind="stable")], lost]).astype(np.int64))
        return tuple(result)

    return Order(
        heads=ranked(layout.heads, scores.heads, previous.heads if previous else None, spec.num_kv_heads),
        channels=ranked(
            layout.channels, scores.channels, previous.channels if previous else None, spec.intermediate_size
        ),
    )


def _global_counts(
    scores: GroupScores, layout: Layout, pruning_ratio: float, round_to: int, at_least: tuple[int, int]
) -> list[tuple[int, int]]:
    """Kept counts per layer when groups compete over all layers by score per parameter.

    Channels compete in blocks of `round_to` (by the block's mean), so that rounding costs nothing afterwards
    and the ratio is met within one group or block. At least one head and one block stay in every layer.
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
        if excess >= cost / 2:  # else a smaller block further on may still fit
            counts[layer][kind] -= size
            excess -= cost
    return [(heads, channels) for heads, channels in counts]
