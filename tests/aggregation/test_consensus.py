"""The consensus order, in which groups that a device has removed keep their position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.aggregation.consensus import DeviceScores, average_scores, kept_by_all, update_order


def make_scores(values, *, weight=1.0, index=None):
    values = np.array(values, dtype=np.float32)
    return DeviceScores(weight, ((np.arange(values.size) if index is None else np.array(index), values),))


def order_of(*scores, previous=None, kept=(), size=4):
    scores = average_scores(scores, [size])
    return update_order(previous, scores, kept_by_all(kept, [size]))[0].tolist()


def test_first_round_ranks_everything():
    assert order_of(make_scores([0.1, 0.9, 0.5, 0.2])) == [1, 2, 3, 0]


def test_ties_go_to_the_lower_index():
    assert order_of(make_scores([1, 2, 1, 2])) == [1, 3, 0, 2]


def test_scores_are_weighted_and_independent_of_gradient_size():
    loud, quiet = make_scores([1000, 0, 0, 0], weight=1), make_scores([0, 0.001, 0, 0], weight=3)
    scores = average_scores([loud, quiet], [4])[0]
    np.testing.assert_allclose(scores, [0.5, 1.5, 0, 0])


def test_device_with_few_groups_has_no_more_influence():
    full = make_scores([1, 1, 1, 1])
    half = make_scores([1, 1], index=[0, 2])
    np.testing.assert_allclose(average_scores([full, half], [4])[0], [1, 1, 1, 1])


def test_weightless_and_all_zero_scores_do_not_count():
    scores = [make_scores([4, 3, 2, 1]), make_scores([0, 0, 0, 0], weight=100), make_scores([1, 2, 3, 4], weight=0)]
    assert order_of(*scores) == [0, 1, 2, 3]
    assert np.isnan(average_scores([make_scores([0, 0, 0, 0])], [4])[0]).all()


def test_groups_without_a_score_follow_in_their_order():
    partly = make_scores([1, 2], index=[0, 3])
    assert order_of(partly, previous=[np.array([2, 1, 0, 3])]) == [3, 0, 2, 1]


def test_groups_removed_by_a_device_keep_their_position():
    previous = [np.array([3, 1, 0, 2])]
    best_last = make_scores([1, 2, 100, 0])
    assert order_of(best_last, previous=previous, kept=[[np.array([1, 3])]]) == [1, 3, 0, 2]
    assert order_of(best_last, previous=previous, kept=[[np.arange(4)], [np.array([0, 1, 3])]]) == [1, 0, 3, 2]


def test_layers_are_independent():
    two = DeviceScores(1.0, ((np.arange(2), np.array([1.0, 2.0])), (np.arange(3), np.array([3.0, 1.0, 2.0]))))
    orders = update_order(None, average_scores([two], [2, 3]), kept_by_all([], [2, 3]))
    assert [o.tolist() for o in orders] == [[1, 0], [0, 2, 1]]
    assert all(o.dtype == np.int64 for o in orders)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))
def test_layouts_nest_over_rounds_for_any_scores(seed, devices, rounds):
    """Devices keep ever shorter prefixes of a changing order; each new layout lies within the last one."""
    rng = np.random.default_rng(seed)
    size = 12
    kept = [np.arange(size) for _ in range(devices)]
    order = None
    for _ in range(rounds):
        scores = [
            DeviceScores(float(rng.integers(0, 5)), ((index, rng.random(index.size).astype(np.float32)),))
            for index in kept
        ]
        order = update_order(order, average_scores(scores, [size]), kept_by_all([[k] for k in kept], [size]))
        assert sorted(order[0].tolist()) == list(range(size))
        for d in range(devices):
            count = rng.integers(1, kept[d].size + 1)
            layout = np.sort(order[0][:count])
            assert np.isin(layout, kept[d]).all()
            kept[d] = layout
        by_size = sorted(kept, key=len)
        assert all(np.isin(small, large).all() for small, large in itertools.pairwise(by_size))


@given(st.permutations(range(5)), st.integers(0, 10**6))
def test_order_of_devices_changes_scores_only_by_rounding(permutation, seed):
    rng = np.random.default_rng(seed)
    scores = [make_scores(rng.random(6), weight=rng.integers(1, 9)) for _ in range(5)]
    first = average_scores(scores, [6])[0]
    other = average_scores([scores[i] for i in permutation], [6])[0]
    np.testing.assert_allclose(first, other, rtol=1e-12)


def test_incomplete_previous_order_raises_value_error():
    with pytest.raises(ValueError, match="permutation"):
        order_of(make_scores([1, 2, 3, 4]), previous=[np.array([0, 1, 1, 2])])
