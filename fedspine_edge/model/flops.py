"""Floating-point operations of a forward or backward pass, from the widths of a layout."""

from __future__ import annotations

from fedspine_edge.model.layout import Layout, module_names, prunable_parameters


def pass_flops(layout: Layout, r: int, batch: int, length: int, *, backward: bool, scored: bool = False) -> float:
    """Return the FLOPs of one pass over a padded batch (batch, length).

    Forward: 2 per kept weight and token, the attention products, and the adapters. Backward: as much as forward plus
    twice the adapters, because frozen weights have no gradients. Scoring: 4·r per weight, once per step, for the
    rank-2r product of every module's Ghat.
    """
    spec, tokens = layout.spec, batch * length
    weights = prunable_parameters(spec) - layout.removed_parameters
    query_width = spec.num_heads // spec.num_kv_heads * spec.head_dim
    attention = sum(4.0 * tokens * length * heads * query_width for heads, _ in layout.counts)
    factors = sum(layout.rows(name).size + layout.cols(name).size for name in module_names(spec)) * r
    forward = 2.0 * tokens * weights + attention
    adapters = 2.0 * tokens * factors
    total = forward + adapters
    if backward:
        total += forward + 2 * adapters
    if scored:
        total += 4.0 * r * weights
    return total


def output_flops(vocabulary: int, hidden_size: int, targets: int, *, backward: bool) -> float:
    """Return the FLOPs of a language model's logits, computed for `targets` predicted tokens, and of their gradient."""
    return 2.0 * targets * vocabulary * hidden_size * (2 if backward else 1)
