"""Every rule against a dense float64 reference written with plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.aggregation import factored
from fedspine_edge.aggregation.factored import LowRankSum, decompose_dense, decompose_stack, initial_factors
from fedspine_edge.aggregation.rules import Aggregator, adapter_norm, average_tensors, clip_scales, combine_heads
from fedspine_edge.errors import ConfigError

SHAPES = {"layers.0.q": (24, 16), "layers.0.o": (16, 24)}
RULES = ["reconstruct", "zero_pad", "stack", "svd", "trimmed_mean", "median"]


class Device:
    """One device's update: rows of q and columns of o are kept by the same random choice."""

    def __init__(self, rng, device_id, *, r=4, weight=1.0, kept=None, shapes=None, dtype=np.float32):
        shapes = shapes or SHAPES
        self.device_id, self.weight, self.r = device_id, weight, r
        self.factors, self.rows, self.cols = {}, {}, {}
        for name, (out, inp) in shapes.items():
            rows, cols = np.arange(out), np.arange(inp)
            if kept is not None:
                rows, cols = (np.array(kept), cols) if name.endswith("q") else (rows, np.array(kept))
            A = rng.normal(size=(r, cols.size)).astype(dtype)
            B = rng.normal(size=(rows.size, r)).astype(dtype)
            self.factors[name], self.rows[name], self.cols[name] = (A, B), rows, cols

    def dense(self, name, shapes=SHAPES):
        """(out, in) B·A with NaN where the device holds nothing."""
        A, B = self.factors[name]
        full = np.full(shapes[name], np.nan)
        full[np.ix_(self.rows[name], self.cols[name])] = B.astype(np.float64) @ A.astype(np.float64)
        return full

    def update(self):
        return self.device_id, self.weight, self.factors, self.rows, self.cols


def random_fleet(seed, *, devices=5, r_max=8, pruned=True):
    rng = np.random.default_rng(seed)
    fleet = []
    for k in range(devices):
        kept = np.sort(rng.choice(24, size=rng.integers(1, 25), replace=False)) if pruned else None
        fleet.append(Device(rng, f"d{k}", r=int(rng.integers(1, r_max + 1)), weight=rng.uniform(1, 50), kept=kept))
    return fleet


def aggregate(fleet, rule="reconstruct", *, r_max=8, scaling=2.0, shapes=SHAPES, clip_norm=0.0, **settings_):
    aggregator = Aggregator(rule, shapes, r_max, scaling, 0, **settings_)
    norms, weights = [adapter_norm(device.factors) for device in fleet], [device.weight for device in fleet]
    for device, scale in zip(fleet, clip_scales(norms, weights, clip_norm)):
        aggregator.add(*device.update(), scale)
    return aggregator.finish()


def product(result, name, r=None):
    A, B = result.factors[name]
    return B[:, :r].astype(np.float64) @ A[:r].astype(np.float64)


def weighted_mean(fleet, name):
    """Per element over its holders; 0 where nobody of positive weight holds it."""
    out, inp = SHAPES[name]
    mean = np.zeros((out, inp))
    dense = [device.dense(name) for device in fleet]
    for i in range(out):
        for j in range(inp):
            held = [(d.weight, x[i, j]) for d, x in zip(fleet, dense) if not np.isnan(x[i, j]) and d.weight > 0]
            if held:
                mean[i, j] = sum(w * v for w, v in held) / sum(w for w, _ in held)
    return mean


def best_rank(matrix, r):
    U, S, Vt = np.linalg.svd(matrix)
    return (U[:, :r] * S[:r]) @ Vt[:r]


def assert_close(got, want, *, tolerance=1e-5):
    assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_reconstruct_is_the_best_approximation_of_the_mean(seed):
    fleet = random_fleet(seed)
    full = aggregate(fleet, r_max=16)
    for name in SHAPES:
        mean = weighted_mean(fleet, name)
        assert_close(product(full, name), mean)
        # Prefix property: the first r of the factors are the best rank-r adapter.
        for r in (1, 3, 8):
            assert_close(product(full, name, r), best_rank(mean, r))


def test_truncation_error_matches_the_explained_variance():
    fleet = random_fleet(3)
    result = aggregate(fleet, r_max=8)
    for name in SHAPES:
        mean = weighted_mean(fleet, name)
        for r in range(1, 9):
            lost = np.linalg.norm(mean - product(result, name, r)) ** 2 / np.linalg.norm(mean) ** 2
            assert result.explained_variance[name][r - 1] == pytest.approx(1 - lost, abs=1e-5)
        assert (np.diff(result.explained_variance[name]) >= 0).all()


def test_aggregate_of_one_device_is_its_adapter_balanced():
    device = Device(np.random.default_rng(0), "only", r=4, weight=7)
    result = aggregate([device])
    for name in SHAPES:
        assert_close(product(result, name), device.dense(name))
        A, B = result.factors[name]
        np.testing.assert_allclose(np.linalg.norm(A[:4], axis=1), np.linalg.norm(B[:, :4], axis=0), rtol=1e-5)
        np.testing.assert_allclose(result.explained_variance[name][3:], 1.0)
        assert A.dtype == B.dtype == np.float32


def test_scaling_does_not_change_the_factors():
    """dW = scaling · B · A for inputs and result, so the scaling does not affect the factors' product."""
    fleet = random_fleet(1)
    one, four = aggregate(fleet, scaling=1.0), aggregate(fleet, scaling=4.0)
    for name in SHAPES:
        assert_close(product(one, name), product(four, name))


def test_zero_pad_is_biased_and_reconstruct_is_not():
    rng = np.random.default_rng(5)
    low, high = Device(rng, "low", r=1), Device(rng, "high", r=8)
    mean = weighted_mean([low, high], "layers.0.q")
    exact = np.linalg.norm(product(aggregate([low, high], r_max=16), "layers.0.q") - mean)
    padded = np.linalg.norm(product(aggregate([low, high], "zero_pad", r_max=16), "layers.0.q") - mean)
    assert exact < 1e-4 < 0.1 * padded


def test_rows_without_holders_are_zero_and_others_do_not_mix():
    rng = np.random.default_rng(2)
    a = Device(rng, "a", kept=[0, 1, 2], weight=1)
    b = Device(rng, "b", kept=[10, 11], weight=1000)
    for rule in RULES[:1] + RULES[2:]:
        result = aggregate([a, b], rule, r_max=8)
        q, o = product(result, "layers.0.q"), product(result, "layers.0.o")
        held = [0, 1, 2, 10, 11]
        rest = np.setdiff1d(np.arange(24), held)
        assert np.abs(q[rest]).max() == 0
        assert np.abs(o[:, rest]).max() == 0
        if rule != "stack":
            assert_close(q[[0, 1, 2]], a.dense("layers.0.q")[[0, 1, 2]])
            assert_close(o[:, [10, 11]], b.dense("layers.0.o")[:, [10, 11]])


@pytest.mark.parametrize("rule", RULES)
def test_device_of_weight_zero_changes_nothing(rule):
    rng = np.random.default_rng(4)
    fleet = [Device(rng, "a", r=3), Device(rng, "b", r=2, kept=[1, 5, 9])]
    silent = Device(rng, "z", r=8, weight=0.0)
    without, with_ = aggregate(fleet, rule), aggregate([*fleet, silent], rule)
    for name in SHAPES:
        for x, y in zip(without.factors[name], with_.factors[name]):
            np.testing.assert_array_equal(x, y)
    assert with_.num_devices == 3


@pytest.mark.parametrize("rule", RULES)
def test_devices_of_weight_zero_alone_give_initial_factors(rule):
    result = aggregate([Device(np.random.default_rng(0), "z", weight=0.0)], rule)
    for name, (A, B) in initial_factors(SHAPES, 8, 0).items():
        np.testing.assert_array_equal(result.factors[name][0], A)
        np.testing.assert_array_equal(result.factors[name][1], B)
        np.testing.assert_array_equal(result.explained_variance[name], 1.0)


@pytest.mark.parametrize("rule", RULES)
def test_aggregate_is_bit_identical_in_the_same_order(rule):
    fleet = random_fleet(8, devices=6)
    first, again, other = aggregate(fleet, rule), aggregate(fleet, rule), aggregate(fleet[::-1], rule)
    for name in SHAPES:
        for i in (0, 1):
            assert first.factors[name][i].tobytes() == again.factors[name][i].tobytes()
        assert_close(product(other, name), product(first, name))


def test_stack_divides_by_all_devices_and_svd_weighs_equally():
    fleet = random_fleet(6)
    total = sum(d.weight for d in fleet)
    stacked, equal = aggregate(fleet, "stack", r_max=16), aggregate(fleet, "svd", r_max=16)
    for device in fleet:
        device.original, device.weight = device.weight, 1.0
    for name in SHAPES:
        want = sum(d.original * np.nan_to_num(d.dense(name)) for d in fleet) / total
        assert_close(product(stacked, name), want)
        assert_close(product(equal, name), weighted_mean(fleet, name))


def test_zero_pad_averages_a_and_b_separately():
    rng = np.random.default_rng(7)
    a, b = Device(rng, "a", r=2, weight=1), Device(rng, "b", r=4, weight=3)
    A, B = aggregate([a, b], "zero_pad").factors["layers.0.q"]
    (a_A, a_B), (b_A, b_B) = a.factors["layers.0.q"], b.factors["layers.0.q"]
    np.testing.assert_allclose(A[:2], 0.25 * a_A + 0.75 * b_A[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(A[2:4], 0.75 * b_A[2:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(B[:, :2], 0.25 * a_B + 0.75 * b_B[:, :2], rtol=1e-5, atol=1e-6)
    assert np.abs(B[:, 4:]).max() == 0
    assert np.linalg.norm(A[4:], axis=1).min() > 0


def robust_reference(fleet, name, middle):
    dense = [device.dense(name) for device in fleet]
    out, inp = SHAPES[name]
    return np.array(
        [[middle([x[i, j] for x in dense if not np.isnan(x[i, j])]) for j in range(inp)] for i in range(out)]
    )


def trimmed(values):
    cut = max(int(0.2 * len(values)), 1 if len(values) >= 3 else 0)
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept) if kept else 0.0


@pytest.mark.parametrize("block", [37, 10**6])
@pytest.mark.parametrize(
    ("rule", "middle"), [("median", lambda v: np.median(v) if v else 0.0), ("trimmed_mean", trimmed)]
)
def test_robust_rules_match_the_reference_per_element(rule, middle, block, monkeypatch):
    monkeypatch.setattr("fedspine_edge.aggregation.rules.BLOCK_ELEMENTS", block)
    fleet = random_fleet(9, devices=7)
    result = aggregate(fleet, rule, r_max=16)
    for name in SHAPES:
        assert_close(product(result, name), robust_reference(fleet, name, middle))


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_robust_rules_withstand_one_false_update(rule):
    rng = np.random.default_rng(1)
    honest = Device(rng, "a")
    fleet = [honest]
    for k in range(4):
        copy = Device(rng, f"b{k}")
        copy.factors = honest.factors
        fleet.append(copy)
    liar = Device(rng, "liar", weight=1e6)
    liar.factors = {name: (A, 1e4 * B) for name, (A, B) in liar.factors.items()}
    for name in SHAPES:
        assert_close(product(aggregate([*fleet, liar], rule), name), honest.dense(name))


def test_clip_norm_limits_updates_to_a_multiple_of_the_median():
    rng = np.random.default_rng(3)
    fleet = [Device(rng, f"d{k}") for k in range(4)]
    loud = Device(rng, "loud")
    loud.factors = {name: (A, 100 * B) for name, (A, B) in loud.factors.items()}

    def norm(device):
        return np.sqrt(sum(np.linalg.norm(device.dense(name)) ** 2 for name in SHAPES))

    limit = 1.5 * np.median([norm(d) for d in [*fleet, loud]])
    result = aggregate([*fleet, loud], r_max=24, clip_norm=1.5)
    assert result.clipped == {"loud": pytest.approx(limit / norm(loud), rel=1e-6)}
    quiet = loud
    quiet.factors = {name: (A, B * (limit / norm(quiet))) for name, (A, B) in quiet.factors.items()}
    for name in SHAPES:
        assert_close(product(result, name), weighted_mean([*fleet, quiet], name))
    assert aggregate(fleet, clip_norm=1000.0).clipped == {}


@pytest.mark.parametrize("rule", RULES)
def test_empty_components_can_learn(rule):
    """Every component has a nonzero row of A or column of B, so at least one of its gradients is not zero."""
    device = Device(np.random.default_rng(0), "d", r=2)
    result = aggregate([device], rule)
    for name in SHAPES:
        A, B = result.factors[name]
        assert (np.linalg.norm(A, axis=1) > 0).all()
        assert np.abs(B[:, 2:]).max() == 0
        assert np.abs(A[2:]).max() <= 1 / np.sqrt(SHAPES[name][1])
        assert_close(product(result, name), device.dense(name))


def test_initial_factors_are_seeded_per_module():
    first = initial_factors(SHAPES, 8, 3)
    alone = initial_factors({"layers.0.o": SHAPES["layers.0.o"]}, 8, 3)
    np.testing.assert_array_equal(first["layers.0.o"][0], alone["layers.0.o"][0])
    np.testing.assert_array_equal(initial_factors(SHAPES, 4, 3)["layers.0.q"][0], first["layers.0.q"][0][:4])
    assert not np.array_equal(initial_factors(SHAPES, 8, 4)["layers.0.q"][0], first["layers.0.q"][0])
    A, B = first["layers.0.q"]
    assert A.shape == (8, 16)
    assert B.shape == (24, 8)
    assert np.abs(B).max() == 0
    assert 0.2 < np.abs(A).max() <= 0.25


def test_mixed_ranks_up_to_64_are_exact():
    shapes = {"layers.0.q": (80, 72)}
    rng = np.random.default_rng(0)
    fleet = [Device(rng, f"d{r}", r=r, weight=r, shapes=shapes, kept=np.arange(0, 80, 2)) for r in (1, 4, 64, 16, 64)]
    result = aggregate(fleet, shapes=shapes, r_max=64)
    mean = sum(d.weight * np.nan_to_num(d.dense("layers.0.q", shapes)) for d in fleet) / sum(d.weight for d in fleet)
    assert_close(product(result, "layers.0.q"), best_rank(mean, 64))


def test_stack_becomes_dense_at_the_smaller_side():
    rng = np.random.default_rng(0)
    total = LowRankSum((30, 20))
    want = np.zeros((30, 20))
    for k in range(12):
        A, B = rng.normal(size=(3, 20)), rng.normal(size=(30, 3))
        total.add(2.0, A, B, np.arange(30), np.arange(20))
        want += B @ A / 12
        assert (total._dense is not None) == (k >= 6)
    parts = total.decompose()
    assert_close((parts.U * parts.S) @ parts.Vt, want, tolerance=1e-12)


def test_bounded_stack_keeps_the_leading_components():
    rng = np.random.default_rng(0)
    total = LowRankSum((60, 50), max_stack_rank=20)
    shared_A, shared_B = rng.normal(size=(4, 50)), rng.normal(size=(60, 4))
    want = np.zeros((60, 50))
    for _ in range(15):
        A = np.concatenate([shared_A, 0.05 * rng.normal(size=(2, 50))])
        B = np.concatenate([shared_B, rng.normal(size=(60, 2))], axis=1)
        total.add(1.0, A, B, np.arange(60), np.arange(50))
        want += B @ A / 15
    assert total._dense is None
    assert sum(x.shape[1] for x in total._left) < 20
    parts = total.decompose()
    got = (parts.U[:, :4] * parts.S[:4]) @ parts.Vt[:4]
    assert np.linalg.norm(got - best_rank(want, 4)) < 0.01 * np.linalg.norm(want)


def test_both_decompositions_agree_including_signs():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(30, 5)), rng.normal(size=(5, 20))
    stack, dense = decompose_stack(left, right), decompose_dense(left @ right)
    np.testing.assert_allclose(stack.S, dense.S[:5], rtol=1e-10)
    np.testing.assert_allclose(stack.U, dense.U[:, :5], atol=1e-10)
    np.testing.assert_allclose(stack.Vt, dense.Vt[:5], atol=1e-10)
    assert (stack.Vt[np.arange(5), np.abs(stack.Vt).argmax(axis=1)] > 0).all()
    assert stack.total == pytest.approx(dense.total)


def test_product_norm_and_prefix_explained_variance():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(5, 9)), rng.normal(size=(7, 5))
    assert factored.product_norm(A, B) == pytest.approx(np.linalg.norm(B @ A))
    explained = factored.prefix_explained_variance(A, B)
    for r in range(1, 6):
        lost = np.linalg.norm(B @ A - B[:, :r] @ A[:r]) ** 2 / np.linalg.norm(B @ A) ** 2
        assert explained[r - 1] == pytest.approx(1 - lost)


def test_float16_updates_are_summed_in_float64():
    rng = np.random.default_rng(0)
    fleet = [Device(rng, f"d{k}", dtype=np.float16, weight=60_000.0) for k in range(3)]
    for clip in (0.0, 0.5):
        result = aggregate(fleet, r_max=16, clip_norm=clip)
        scale = {d.device_id: result.clipped.get(d.device_id, 1.0) for d in fleet}
        want = sum(scale[d.device_id] * d.dense("layers.0.q") for d in fleet) / 3
        assert_close(product(result, "layers.0.q"), want, tolerance=1e-6)


def test_absent_module_counts_as_not_kept():
    rng = np.random.default_rng(0)
    whole, part = Device(rng, "a"), Device(rng, "b", weight=5)
    del part.factors["layers.0.q"]
    for rule in RULES:
        result = aggregate([whole, part], rule)
        share = 1 / 6 if rule == "stack" else 1.0
        assert_close(product(result, "layers.0.q"), share * whole.dense("layers.0.q"))


def test_aggregator_rejects_impossible_settings():
    for rule, r_max, scaling, options in (
        ("mean", 8, 2.0, {}),
        ("svd", 0, 2.0, {}),
        ("svd", 8, 0.0, {}),
        ("svd", 8, 2.0, {"trim": 0.5}),
    ):
        with pytest.raises(ConfigError):
            Aggregator(rule, SHAPES, r_max, scaling, 0, **options)


def test_aggregator_without_updates_raises_value_error():
    with pytest.raises(ValueError, match="nothing"):
        Aggregator("reconstruct", SHAPES, 8, 2.0, 0).finish()


def test_head_is_averaged_by_examples():
    heads = [(1.0, {"head.w": np.array([1.0, 2.0], np.float32)}), (3.0, {"head.w": np.array([5.0, 2.0], np.float32)})]
    np.testing.assert_allclose(average_tensors(heads)["head.w"], [4.0, 2.0])
    assert average_tensors(heads)["head.w"].dtype == np.float32


def test_head_without_any_weight_raises_value_error():
    with pytest.raises(ValueError, match="weights sum to zero"):
        average_tensors([(0.0, {"head.w": np.zeros(2)}), (0.0, {"head.w": np.zeros(2)})])


def make_heads(*values):
    return [{"head.w": np.full((2, 3), value, np.float32)} for value in values]


@pytest.mark.parametrize("rule", ["reconstruct", "zero_pad", "stack", "svd", "median", "trimmed_mean"])
@pytest.mark.parametrize("sent", [0.0, None])
@pytest.mark.parametrize("false", [1e3, -1e3, 1e30])
def test_head_of_one_device_cannot_dominate(rule, sent, false):
    heads = make_heads(1.0, 1.1, 0.9, 1.0, false)
    reference = {} if sent is None else make_heads(sent)[0]
    found = combine_heads(heads, [1.0] * 5, rule=rule, reference=reference, clip=3.0)
    assert np.abs(found["head.w"] - 1.0).max() < 0.81  # a fifth of the weight at three times the distance


def test_heads_within_the_limit_are_averaged_unchanged():
    heads, weights = make_heads(1.0, 1.5, 2.0), [1.0, 2.0, 3.0]
    found = combine_heads(heads, weights, rule="reconstruct", reference=make_heads(0.0)[0], clip=3.0)
    np.testing.assert_array_equal(found["head.w"], average_tensors(zip(weights, heads))["head.w"])


def test_devices_without_a_head_give_no_head():
    assert combine_heads([{}, {}], [1.0, 1.0], rule="median", reference={}, clip=3.0) == {}
