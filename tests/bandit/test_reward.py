"""Rewards of a round."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspine_edge.bandit.reward import DEFAULT_WEIGHTS, TERMS, RoundOutcome, rewards


def ok(device_id, **values):
    return RoundOutcome(device_id, **{"completion_time_s": 10.0, "loss_before": 1.0, "loss_after": 0.9, **values})


outcomes = st.lists(
    st.builds(
        RoundOutcome,
        device_id=st.uuids().map(str),
        status=st.sampled_from(["ok", "ok", "ok", "late", "out_of_memory", "failed", "refused", "lost"]),
        completion_time_s=st.floats(0, 1e6),
        loss_before=st.one_of(st.none(), st.floats(0, 100)),
        loss_after=st.one_of(st.none(), st.floats(0, 100), st.just(math.nan), st.just(math.inf)),
        lora_importance=st.one_of(st.none(), st.floats(0, 1e9), st.just(math.nan)),
        pruning_ratio=st.floats(0, 1),
        previous_ratio=st.floats(0, 1),
        target=st.floats(0, 1),
    ),
    max_size=8,
    unique_by=lambda o: o.device_id,
)
weights = st.lists(st.floats(0.01, 1), min_size=4, max_size=4).map(lambda w: {n: x / sum(w) for n, x in zip(TERMS, w)})


@given(outcomes=outcomes, weights=weights, mode=st.sampled_from(["sum", "product"]))
def test_reward_terms_are_between_0_and_1(outcomes, weights, mode):
    result = rewards(outcomes, weights, mode=mode)
    assert set(result) == {o.device_id for o in outcomes}
    for terms in result.values():
        if terms is not None:
            assert all(0.0 <= getattr(terms, name) <= 1.0 for name in (*TERMS, "total"))


@given(outcomes=outcomes)
def test_rewards_do_not_depend_on_the_order(outcomes):
    forward, backward = rewards(outcomes), rewards(outcomes[::-1])
    for device_id, terms in forward.items():
        if terms is None:
            assert backward[device_id] is None
        else:
            assert terms.total == pytest.approx(backward[device_id].total)


@given(outcomes=outcomes, weights=weights)
def test_total_reward_is_the_weighted_sum(outcomes, weights):
    for terms in rewards(outcomes, weights).values():
        if terms is not None and not terms.reason:
            assert terms.total == pytest.approx(sum(weights[name] * getattr(terms, name) for name in TERMS))


def test_default_weights_sum_to_1():
    assert sum(DEFAULT_WEIGHTS.values()) == pytest.approx(1.0)


def test_loss_term_is_relative_to_the_best_device():
    result = rewards([ok("a", loss_after=0.6), ok("b", loss_after=0.8), ok("c", loss_after=1.5)])
    assert [result[i].loss for i in "abc"] == [pytest.approx(1.0), pytest.approx(0.5), 0.0]


def test_loss_term_does_not_amplify_tiny_changes():
    result = rewards([ok("a", loss_after=0.99), ok("b", loss_after=0.995)])
    assert [result[i].loss for i in "ab"] == [pytest.approx(0.2), pytest.approx(0.1)]


def test_time_term_is_closeness_to_the_mean_time():
    late = RoundOutcome("late", status="late", completion_time_s=600.0)
    result = rewards([ok("a", completion_time_s=10.0), ok("b", completion_time_s=30.0), late])
    assert result["a"].time == pytest.approx(1 - 10 / 20)
    assert result["b"].time == pytest.approx(1 - 10 / 30)


def test_lora_term_is_relative_to_the_largest():
    result = rewards([ok("a", lora_importance=2.0), ok("b", lora_importance=0.5), ok("c")])
    assert [result[i].lora for i in "abc"] == [1.0, 0.25, 0.0]


def test_prune_term_is_progress_toward_the_target():
    result = rewards(
        [
            ok("half", previous_ratio=0.1, pruning_ratio=0.3, target=0.5),
            ok("there", previous_ratio=0.5, pruning_ratio=0.5, target=0.5),
            ok("still", previous_ratio=0.1, pruning_ratio=0.1, target=0.5),
        ]
    )
    assert [result[i].prune for i in ("half", "there", "still")] == [pytest.approx(0.5), 1.0, 0.0]


@pytest.mark.parametrize(
    ("status", "given", "reason"),
    [
        ("late", "", "no report before the deadline"),
        ("out_of_memory", "", "ran out of memory"),
        ("failed", "loss is not finite", "loss is not finite"),
        ("refused", "", "the update was refused"),
    ],
)
def test_failed_device_gets_0_with_the_reason(status, given, reason):
    result = rewards([ok("a"), RoundOutcome("b", status=status, reason=given, loss_before=1.0, loss_after=0.1)])
    assert (result["b"].total, result["b"].reason) == (0.0, reason)
    assert result["a"].loss == 1.0  # what failed devices claim does not enter the round's maxima


def test_lost_device_gets_no_reward():
    assert rewards([RoundOutcome("a", status="lost")]) == {"a": None}


def test_product_reward_is_bounded():
    alone = rewards([ok("a", lora_importance=1.0)], mode="product")
    assert alone["a"].total == 1.0  # |T - Tbar| is 0 here
    pair = rewards([ok("a", lora_importance=1.0), ok("b", lora_importance=1.0, completion_time_s=30.0)], mode="product")
    assert pair["b"].total == pytest.approx(1 / 1.5)
