"""S-UCB as docs/concepts/s-ucb.md describes it."""

import json
import math
import random
import time
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.bandit.sucb import PRIOR_WEIGHT, SUCB, Arm

RANKS = (4, 8, 16, 32)


def pull(bandit, reward, rounds, device_id="d"):
    arms = []
    for _ in range(rounds):
        arm = bandit.decide(device_id)
        bandit.update(device_id, arm, reward(arm))
        arms.append(arm)
    return arms


def boxes(bandit, device_id="d"):
    return [(leaf["u"], leaf["ranks"]) for leaf in bandit.explain(device_id)["leaves"]]


# -- the tree ------------------------------------------------------------------------------------------------------


@given(
    rewards=st.lists(st.floats(0, 1), max_size=60),
    ranks=st.lists(st.integers(1, 256), min_size=1, max_size=7, unique=True).map(sorted),
    min_leaf_width=st.sampled_from([0.05, 0.1, 0.25, 0.5]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_leaves_partition_the_arms(rewards, ranks, min_leaf_width, seed):
    bandit = SUCB(ranks, min_leaf_width=min_leaf_width, seed=seed)
    for reward in rewards:
        arm = bandit.decide("d")
        bandit.update("d", arm, reward)
    area = math.fsum((hi - lo) * len(cells) for (lo, hi), cells in boxes(bandit))
    assert area == pytest.approx(len(ranks))
    for u in (0.0, 0.05, 0.25, 0.5, 0.625, 0.999, 1.0):
        for r in ranks:
            holders = [1 for (lo, hi), cells in boxes(bandit) if r in cells and (lo <= u < hi or u == hi == 1.0)]
            assert len(holders) == 1
    assert bandit.explain("d")["pulls"] == len(rewards)


def test_second_pull_splits_the_leaf_in_the_middle():
    bandit = SUCB(RANKS)
    bandit.update("d", Arm(0.1, 4), 0.4)
    assert boxes(bandit) == [([0.0, 1.0], [4, 8, 16, 32])]
    bandit.update("d", Arm(0.2, 4), 0.8)
    assert boxes(bandit) == [([0.0, 0.5], [4, 8, 16, 32]), ([0.5, 1.0], [4, 8, 16, 32])]


def test_splits_follow_the_longest_normalized_side():
    bandit = SUCB(RANKS)
    for u in (0.1, 0.2, 0.3):
        bandit.update("d", Arm(u, 4), 0.5)
    # After the cut of u the left half is 0.5 × 1.0: the ranks are the longer side.
    assert boxes(bandit) == [([0.0, 0.5], [4, 8]), ([0.0, 0.5], [16, 32]), ([0.5, 1.0], [4, 8, 16, 32])]


def test_single_rank_is_split_along_u_only():
    bandit = SUCB((8,), min_leaf_width=0.25)
    for i in range(40):
        bandit.update("d", Arm((i % 20) / 20, 8), 0.5)
    assert [u for u, _ in boxes(bandit)] == [[0.0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1.0]]


def test_half_without_pulls_inherits_the_mean():
    bandit = SUCB(RANKS, discount=0.5)
    bandit.update("d", Arm(0.1, 4), 1.0)
    bandit.update("d", Arm(0.2, 4), 0.1)
    pulled, empty = bandit.explain("d")["leaves"]
    mean = (0.5 * 1.0 + 0.1) / 1.5
    assert pulled["weight"] == pytest.approx(1.5)
    assert pulled["mean"] == pytest.approx(mean)
    assert (empty["pulls"], empty["weight"], empty["mean"]) == (0, PRIOR_WEIGHT, pytest.approx(mean))


def test_lazy_discounting_equals_explicit_sums():
    discount, exploration = 0.9, 0.3
    bandit = SUCB(RANKS, discount=discount, exploration=exploration, min_leaf_width=0.5)
    rng = random.Random(0)
    # Both halves of every cut hold a pull, so that no inherited prior enters the sums.
    arms = [Arm(0.1, 4), Arm(0.9, 32), Arm(0.2, 32), Arm(0.8, 4)]
    arms += [Arm(rng.random(), rng.choice(RANKS)) for _ in range(30)]
    history = [(arm, rng.random(), now) for now, arm in enumerate(arms, start=1)]
    for arm, reward, now in history:
        bandit.update("d", arm, reward, now=now)
    leaves = bandit.explain("d")["leaves"]
    assert len(leaves) == 4
    counts = []
    for leaf in leaves:
        lo, hi = leaf["u"]
        inside = [(x, discount ** (34 - s)) for a, x, s in history if lo <= a.u < hi and a.r in leaf["ranks"]]
        counts.append(sum(w for _, w in inside))
        assert leaf["pulls"] == len(inside)
        assert leaf["weight"] == pytest.approx(counts[-1])
        assert leaf["mean"] == pytest.approx(sum(x * w for x, w in inside) / counts[-1])
    for leaf, count in zip(leaves, counts):
        bound = leaf["mean"] + exploration * math.sqrt(2 * math.log(sum(counts)) / count)
        assert leaf["bound"] == pytest.approx(bound)


def test_only_an_unpulled_root_has_no_bound():
    bandit = SUCB(RANKS, discount=0.01)
    assert bandit.explain("d")["leaves"][0]["bound"] is None
    bandit.update("d", Arm(0.1, 4), 0.5, now=1)
    bandit.update("d", Arm(0.9, 4), 0.5, now=1000)  # the first pull's weight underflows to 0
    assert all(math.isfinite(leaf["bound"]) for leaf in bandit.explain("d")["leaves"])
    assert bandit.decide("d").r in RANKS


def test_state_stays_bounded():
    bandit = SUCB(RANKS, seed=3)
    rng = random.Random(3)
    pull(bandit, lambda arm: rng.random(), 500)
    size = len(json.dumps(bandit.to_dict()))
    pull(bandit, lambda arm: rng.random(), 500)
    assert len(boxes(bandit)) <= 16
    assert len(json.dumps(bandit.to_dict())) < size + 200


# -- the mask ------------------------------------------------------------------------------------------------------


@given(
    allowed=st.dictionaries(
        st.sampled_from(RANKS),
        st.tuples(st.floats(0, 0.8), st.floats(0.1, 0.2)).map(lambda x: (x[0], x[0] + x[1])),
        min_size=1,
    ),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_infeasible_arms_are_never_selected(allowed, seed):
    bandit = SUCB(RANKS, seed=seed)
    for _ in range(15):
        arm = bandit.decide("d", feasible=allowed)
        assert arm.r in allowed
        assert allowed[arm.r][0] <= arm.u <= allowed[arm.r][1]
        bandit.update("d", arm, 0.5)


def test_no_feasible_arm_raises_value_error():
    with pytest.raises(ValueError, match="no arm is feasible for 'd'"):
        SUCB(RANKS).decide("d", feasible={})


def test_draws_are_uniform_in_the_leaf():
    bandit = SUCB(RANKS)
    arms = [bandit.decide(f"d{i}") for i in range(2000)]
    assert {r: pytest.approx(500, abs=100) for r in RANKS} == {r: sum(a.r == r for a in arms) for r in RANKS}
    assert fmean(a.u for a in arms) == pytest.approx(0.5, abs=0.03)


# -- learning ------------------------------------------------------------------------------------------------------


def noisy_peak(seed):
    """(reward with noise, its mean): the best arm lies at a random u and rank."""
    rng = random.Random(seed)
    best_u, best_cell = rng.random(), rng.randrange(len(RANKS))

    def mean(arm):
        return 0.9 - 0.6 * abs(arm.u - best_u) - 0.1 * abs(RANKS.index(arm.r) - best_cell)

    return lambda arm: min(1.0, max(0.0, mean(arm) + rng.gauss(0, 0.05))), mean


def test_constant_best_arm_is_found():
    bandit = SUCB(RANKS, seed=1)
    arms = pull(bandit, lambda arm: 0.9 if arm.u >= 0.5 and arm.r >= 16 else 0.2, 80)
    hits = [arm.u >= 0.5 and arm.r >= 16 for arm in arms[40:]]
    assert fmean(hits) > 0.6  # chance is 0.25
    leaves = bandit.explain("d")["leaves"]
    best = max(leaves, key=lambda leaf: leaf["pulls"])
    assert best["u"][0] >= 0.5
    assert min(best["ranks"]) >= 16


def test_regret_after_40_pulls_is_below_uniform_selection():
    mine, uniform = [], []
    for seed in range(20):
        reward, mean = noisy_peak(seed)
        mine.append(0.9 - fmean(mean(arm) for arm in pull(SUCB(RANKS, seed=seed), reward, 40)))
        rng = random.Random(1000 + seed)
        uniform.append(0.9 - fmean(mean(Arm(rng.random(), rng.choice(RANKS))) for _ in range(40)))
    assert fmean(mine) < 0.8 * fmean(uniform)


def test_discounted_tree_follows_drift():
    def share_right_after_the_turn(discount):
        shares = []
        for seed in range(8):
            bandit = SUCB(RANKS, seed=seed, discount=discount)
            pull(bandit, lambda arm: 0.9 if arm.u < 0.5 else 0.1, 200)
            after = pull(bandit, lambda arm: 0.1 if arm.u < 0.5 else 0.9, 60)
            shares.append(fmean(arm.u >= 0.5 for arm in after))
        return fmean(shares)

    assert share_right_after_the_turn(0.95) > 0.6
    assert share_right_after_the_turn(1.0) < 0.35


def test_new_device_starts_from_its_class():
    def hits(prior):
        count = 0
        for seed in range(20):
            bandit = SUCB(RANKS, seed=seed, prior=prior)
            for now in range(1, 13):
                for name in ("a", "b"):
                    arm = bandit.decide(name, device_class="NX", now=now)
                    bandit.update(name, arm, 0.9 if arm.u >= 0.5 else 0.1, now=now)
            count += bandit.decide("late", device_class="NX", now=13).u >= 0.5
            assert bandit.decide("stranger", device_class="TX2", now=13).r in RANKS
            assert bandit.explain("stranger")["leaves"][0]["bound"] is None
        return count

    assert hits("class") == 20
    assert hits("none") < 18


def test_class_prior_counts_no_pulls():
    bandit = SUCB(RANKS, prior="class")
    for now in range(1, 6):
        arm = bandit.decide("a", device_class="NX", now=now)
        bandit.update("a", arm, 0.5, now=now)
    bandit.decide("b", device_class="NX", now=6)
    explained = bandit.explain("b")
    assert explained["pulls"] == 0
    assert len(explained["leaves"]) > 1
    assert all(leaf["weight"] <= PRIOR_WEIGHT for leaf in explained["leaves"])


# -- repeatability -------------------------------------------------------------------------------------------------


@given(before=st.integers(0, 25), seed=st.integers(0, 99), prior=st.sampled_from(["none", "class"]))
@settings(max_examples=40, deadline=None)
def test_restored_bandit_makes_the_same_decisions(before, seed, prior):
    def step(bandit, now):
        arms = [bandit.decide(name, device_class="c", now=now) for name in ("a", "b")]
        for name, arm in zip(("a", "b"), arms):
            bandit.update(name, arm, arm.u / (1 + arm.r / 32), now=now)
        return arms

    original = SUCB(RANKS, seed=seed, prior=prior)
    for now in range(1, before + 1):
        step(original, now)
    restored = SUCB.from_dict(json.loads(json.dumps(original.to_dict())))
    assert restored.to_dict() == original.to_dict()
    for now in range(before + 1, before + 11):
        assert step(restored, now) == step(original, now)


def test_decisions_do_not_depend_on_the_order_of_devices():
    ids = [f"d{i}" for i in range(10)]

    def run(order):
        bandit = SUCB(RANKS, seed=7, prior="class")
        chosen = {}
        for now in range(1, 8):
            chosen = {name: bandit.decide(name, device_class=name[-1] * 2, now=now) for name in order}
            for name in order:
                bandit.update(name, chosen[name], chosen[name].u, now=now)
        return chosen

    assert run(ids) == run(ids[::-1])


def test_repeated_decision_gives_the_same_arm():
    bandit = SUCB(RANKS)
    assert bandit.decide("d", now=3) == bandit.decide("d", now=3)
    assert bandit.decide("d", now=3) != bandit.decide("d", now=4)
    assert SUCB(RANKS, seed=1).decide("d", now=3) != bandit.decide("d", now=3)


def test_explain_gives_the_reason_of_the_decision():
    bandit = SUCB(RANKS, seed=2)
    pull(bandit, lambda arm: 0.9 if arm.r == 4 else 0.1, 20)
    arm = bandit.decide("d", feasible={4: (0.0, 1.0), 8: (0.0, 1.0)})
    explained = bandit.explain("d")
    assert (explained["last"]["u"], explained["last"]["r"]) == arm
    assert "largest bound" in explained["last"]["why"]
    assert "leaves were not feasible" in explained["last"]["why"]
    for leaf in explained["leaves"]:
        assert leaf["open"] == bool({4, 8} & set(leaf["ranks"]))
    json.dumps(explained)


def test_decisions_for_10_000_devices_take_seconds():
    bandit = SUCB(RANKS, seed=1)
    tree = SUCB(RANKS, seed=1)
    pull(tree, lambda arm: arm.u, 60)
    grown = tree.to_dict()["trees"]["d"]
    bandit = SUCB.from_dict({**bandit.to_dict(), "trees": {f"d{i}": grown for i in range(10_000)}})
    start = time.perf_counter()
    for i in range(10_000):
        bandit.decide(f"d{i}")
    assert time.perf_counter() - start < 5.0  # measured: 0.3 s on one core


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": []}, "ranks is"),
        ({"ranks": [8, 4]}, "ascending"),
        ({"ranks": [4], "discount": 0.0}, "discount is 0.0"),
        ({"ranks": [4], "discount": 1.1}, "discount is 1.1"),
        ({"ranks": [4], "exploration": -1.0}, "exploration -1.0"),
        ({"ranks": [4], "min_leaf_width": 0.0}, "min_leaf_width 0.0"),
    ],
)
def test_invalid_settings_raise_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        SUCB(**arguments)


@pytest.mark.parametrize("reward", [-0.1, 1.1, math.nan, math.inf])
def test_reward_outside_0_to_1_changes_nothing(reward):
    bandit = SUCB(RANKS)
    bandit.update("d", Arm(0.5, 8), 0.5)
    before = bandit.to_dict()
    with pytest.raises(ValueError, match=r"within 0\.\.1"):
        bandit.update("d", Arm(0.5, 8), reward)
    assert bandit.to_dict() == before


def test_unknown_arm_or_old_round_raises_value_error():
    bandit = SUCB(RANKS)
    bandit.update("d", Arm(0.5, 8), 0.5, now=4)
    with pytest.raises(ValueError, match="not in the arm space"):
        bandit.update("d", Arm(0.5, 9), 0.5)
    with pytest.raises(ValueError, match="round 3 came after one of round 4"):
        bandit.update("d", Arm(0.5, 8), 0.5, now=3)
