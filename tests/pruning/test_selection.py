"""Selection of layouts from scores: ratios, nested orders and ties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.errors import ConfigError, LayoutError
from fedspine_edge.model.layout import Layout, channel_parameters, head_parameters, keep_positions, prunable_parameters
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.pruning.selection import GroupScores, order_from_scores, select_layout


def spec(layers=3, heads=6, kv_heads=3, head_dim=4, channels=64, hidden=24, gated=True, bias=False):
    numbers = {"num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    bare = ModelSpec(
        family="llama",
        hidden_size=hidden,
        intermediate_size=channels,
        gated_ffn=gated,
        attention_bias=bias,
        ffn_bias=bias,
        num_parameters=10**6,
        base_sha256="0" * 64,
        **numbers,
    )
    assert prunable_parameters(bare) < bare.num_parameters
    return bare


def random_scores(layout, seed):
    rng = np.random.default_rng(seed)
    return GroupScores(
        [rng.random(h.size).astype(np.float32) for h in layout.heads],
        [rng.random(c.size).astype(np.float32) for c in layout.channels],
    )


shapes = st.builds(
    lambda layers, kv, rep, dim, channels, gated, bias: spec(layers, kv * rep, kv, dim, channels, 24, gated, bias),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 80),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    model=shapes,
    ratio=st.floats(0, 0.95),
    step=st.floats(0, 0.95),
    scope=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 99),
)
def test_select_layout_shrinks_and_meets_the_ratio(model, ratio, step, scope, seed):
    layout = select_layout(random_scores(Layout.full(model), seed), Layout.full(model), ratio, scope=scope)
    again = select_layout(random_scores(layout, seed + 1), layout, max(ratio, step), scope=scope)
    assert again.is_within(layout)
    block = max(head_parameters(model), 8 * channel_parameters(model))
    per_layer = 1 if scope == "global" else model.num_layers
    slack = block * per_layer / prunable_parameters(model)
    smallest = model.num_layers * (head_parameters(model) + min(8, model.intermediate_size) * channel_parameters(model))
    reachable = 1 - smallest / prunable_parameters(model)
    assert layout.pruning_ratio >= min(ratio, reachable) - slack
    assert layout.pruning_ratio <= ratio + slack
    for _, channels in layout.counts:
        assert channels == model.intermediate_size or channels % 8 == 0


def test_layer_scope_keeps_the_best_and_the_lower_index_of_ties():
    model = spec(layers=2)
    scores = GroupScores(
        [np.array([1, 3, 2], np.float32), np.array([5, 5, 5], np.float32)],
        [np.arange(64, dtype=np.float32), np.zeros(64, np.float32)],
    )
    layout = select_layout(scores, Layout.full(model), 0.5)
    heads, channels = layout.counts[0]
    assert layout.heads[0].tolist() == sorted([1, 2, 0][:heads])
    assert layout.heads[1].tolist() == list(range(heads))
    assert layout.channels[0].tolist() == list(range(64 - channels, 64))
    assert layout.channels[1].tolist() == list(range(channels))


def test_global_scope_takes_from_the_layer_that_matters_least():
    model = spec(layers=3)
    full = Layout.full(model)
    scores = random_scores(full, 0)
    scores.heads[1] *= 1e-3
    scores.channels[1] *= 1e-3
    layout = select_layout(scores, full, 0.25, scope="global")
    assert layout.counts[1] == (1, 16)
    assert layout.counts[0] == layout.counts[2] == (3, 64)


def test_order_ranks_kept_groups_and_appends_removed_ones_by_index():
    model = spec(layers=1, kv_heads=3, heads=3)
    full = Layout.full(model)
    first = order_from_scores(random_scores(full, 1), full)
    layout = Layout.prefix(model, first, [(2, 40)])
    second = order_from_scores(random_scores(layout, 2), layout)
    np.testing.assert_array_equal(second.channels[0][40:], np.sort(first.channels[0][40:]))
    np.testing.assert_array_equal(np.sort(second.channels[0]), np.arange(64))
    assert set(second.heads[0][:2]) == set(first.heads[0][:2])


def test_select_layout_rejects_impossible_requests():
    full = Layout.full(spec())
    scores = random_scores(full, 0)
    with pytest.raises(ConfigError, match=r"`pruning_ratio` is 1\.2"):
        select_layout(scores, full, 1.2)
    scores.heads[1][0] = np.nan
    with pytest.raises(LayoutError, match="layer 1, heads: the scores are not finite"):
        select_layout(scores, full, 0.5)
    short = GroupScores(scores.heads, [c[:-1] for c in scores.channels])
    scores.heads[1][0] = 0
    with pytest.raises(LayoutError, match=r"63,. scores for 64 kept"):
        select_layout(short, full, 0.5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(model=shapes, seed=st.integers(0, 99))
def test_rows_and_columns_agree_with_groups_and_positions(model, seed):
    """The index arithmetic of a layout: rows, columns, groups and positions tell one story."""
    rng = np.random.default_rng(seed)
    full = Layout.full(model)

    def pick(kept):
        return tuple(np.sort(rng.choice(k, rng.integers(1, k.size + 1), replace=False)) for k in kept)

    layout = Layout(model, pick(full.heads), pick(full.channels))
    for part in ("q", "k", "v", "o", "up", "down", *(["gate"] if model.gated_ffn else [])):
        name = f"layers.0.{part}"
        kept = layout.cols(name) if part in ("o", "down") else layout.rows(name)
        everything = full.cols(name) if part in ("o", "down") else full.rows(name)
        np.testing.assert_array_equal(everything[keep_positions(everything, kept)], kept)
        np.testing.assert_array_equal(full.group_of(name)[kept], layout.group_of(name))
        groups = layout.channels[0] if part in ("up", "gate", "down") else layout.heads[0]
        np.testing.assert_array_equal(groups[layout.group_of(name, by_position=True)], layout.group_of(name))
    assert Layout.from_dict(model, layout.to_dict()).to_dict() == layout.to_dict()
