"""Update validation: an honest update passes, and every malformed one is rejected with its reason."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from fleet_fakes import SPEC, make_config, make_tensors

from fedspine_edge.errors import UpdateRejected
from fedspine_edge.model.layout import Layout, Order, channel_parameters, head_parameters, target_counts
from fedspine_edge.protocol.chunks import BlobStore, ref_of
from fedspine_edge.protocol.codec import pack
from fedspine_edge.protocol.messages import Report, RoundPlan
from fedspine_edge.server.update_validation import (
    ValidationRules,
    load_accepted_update,
    max_update_bytes,
    ratio_tolerance,
    validate_update,
)

ORDER = Order(
    tuple(np.random.default_rng(i).permutation(4) for i in range(2)),
    tuple(np.random.default_rng(i).permutation(32) for i in range(2)),
)
FULL = Layout.full(SPEC)
KEPT = Layout.prefix(SPEC, ORDER, [target_counts(SPEC, 0.5, round_to=4)] * 2)
HEAD = (("head.out.weight", (2, 8)),)


def honest(dtype=np.float32):
    return make_tensors(KEPT, FULL, 4, None, "gate", dtype=dtype)


def make_plan(**changes):
    options = {"server_round": 2, "pruning_ratio": 0.5, "r": 4, "round_to": 4, **changes}
    return RoundPlan(run_id="r", device_id="d0", **options)


def make_report(**changes):
    options = {"num_examples": 10, "pruning_ratio": 0.5, "r": 4, **changes}
    return Report(run_id="r", device_id="d0", server_round=2, plan_sha256="0" * 64, status="ok", **options)


def check(tensors, *, plan=None, report=None, previous=FULL, order=ORDER, head_shapes=HEAD, **config):
    rules = ValidationRules(SPEC, make_config("unused", **config), order, head_shapes)
    return validate_update(tensors, report or make_report(), plan or make_plan(), previous=previous, rules=rules)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_valid_update_is_accepted(dtype):
    tensors = honest(dtype)
    update = check(tensors)
    assert update.layout.to_dict() == KEPT.to_dict()
    A, B = update.factors["layers.1.down"]
    assert (A.shape, B.shape) == ((4, KEPT.channels[1].size), (8, 4))
    assert update.scores["heads"].layers[0][0].tolist() == [0, 1, 2, 3]
    assert update.head_shapes == HEAD


def test_update_without_scores_or_known_head_is_accepted():
    tensors = {name: value for name, value in honest().items() if not name.startswith("score")}
    assert check(tensors, head_shapes=None).scores == {}


@pytest.mark.parametrize("with_scores", [True, False])
def test_accepted_update_is_loaded_as_it_was_validated(tmp_path, with_scores):
    tensors = {name: value for name, value in honest().items() if with_scores or not name.startswith("score")}
    validated, store, data = check(tensors), BlobStore(tmp_path), pack(tensors)
    store.put(data)
    loaded = load_accepted_update(store, make_report(update=ref_of(data)), SPEC)
    assert loaded.layout.to_dict() == validated.layout.to_dict()
    assert (loaded.device_id, loaded.num_examples, loaded.head_shapes) == ("d0", 10, validated.head_shapes)
    for name, pair in validated.factors.items():
        assert all(np.array_equal(one, other) for one, other in zip(loaded.factors[name], pair, strict=True))
    assert loaded.scores.keys() == validated.scores.keys()
    for kind, scores in validated.scores.items():
        assert scores.weight == loaded.scores[kind].weight
        for one, other in zip(scores.layers, loaded.scores[kind].layers, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def change(name, value):
    return lambda tensors: tensors.update({name: value(tensors.get(name))})


def zeros(*shape):
    return lambda _: np.zeros(shape, np.float32)


def drop(name):
    return lambda tensors: tensors.pop(name)


def nan(tensor):
    tensor = tensor.copy()
    tensor.flat[-1] = np.nan
    return tensor


def infinite(tensor):
    tensor = tensor.copy()
    tensor.flat[0] = np.inf
    return tensor


A = "layers.0.q.lora_A"
HEADS, CHANNELS = "keep.0.heads", "keep.1.channels"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(change("diary", zeros(3)), "not on the allow-list", id="name"),
        pytest.param(change("order.0.heads", lambda _: np.arange(4, dtype=np.int32)), "allow-list", id="server's name"),
        pytest.param(change(A, lambda t: t.astype(np.float64)), "is float64", id="dtype"),
        pytest.param(change(A, lambda t: t.astype(np.int32)), "is int32", id="integers for weights"),
        pytest.param(change(HEADS, lambda t: t.astype(np.float32)), "is float32; expected int32", id="index dtype"),
        pytest.param(drop(A), f"{A} is missing", id="missing A"),
        pytest.param(drop("layers.1.o.lora_B"), "layers.1.o.lora_B is missing", id="missing B"),
        pytest.param(change("layers.7.q.lora_A", zeros(4, 8)), "unknown: layers.7.q", id="layer"),
        pytest.param(change("layers.0.gate.lora_A", zeros(4, 8)), "layers.0.gate", id="gate"),
        pytest.param(change(A, lambda t: t[:2]), r"is \(2, 8\); the kept indices make it \(4, 8\)", id="rank"),
        pytest.param(change("layers.0.up.lora_B", lambda t: t[:-1]), "the kept indices make it", id="rows"),
        pytest.param(change("layers.1.down.lora_A", lambda t: t[:, 1:]), "the kept indices make it", id="columns"),
        pytest.param(change(A, lambda t: t[0]), "the kept indices make it", id="dimensions"),
        pytest.param(change(A, nan), f"{A} contains NaN", id="NaN"),
        pytest.param(change("layers.1.v.lora_B", infinite), "contains NaN or infinity", id="infinity"),
        pytest.param(change(A, lambda t: t * 1e6), "above validation.max_norm", id="norm"),
        pytest.param(drop(HEADS), "keep.0.heads is missing", id="no indices"),
        pytest.param(change("keep.5.heads", lambda _: np.arange(2, dtype=np.int32)), "does not have", id="extra layer"),
        pytest.param(change(HEADS, lambda t: t[::-1].copy()), "must be sorted", id="unsorted"),
        pytest.param(change(HEADS, lambda t: np.repeat(t[:1], 2)), "must be sorted, unique", id="repeated"),
        pytest.param(change(HEADS, lambda t: t + 4), r"within 0\.\.3", id="out of range"),
        pytest.param(change(HEADS, lambda t: t - 4), r"within 0\.\.3", id="negative"),
        pytest.param(change(HEADS, lambda t: t[:0]), "non-empty", id="nothing kept"),
        pytest.param(change(HEADS, lambda t: t[None]), "vector", id="matrix of indices"),
        pytest.param(change("head.out.weight", nan), "head.out.weight contains NaN", id="head NaN"),
        pytest.param(change("head.out.weight", lambda t: t * 1e30), "head.out.weight: its L2 norm", id="head norm"),
        pytest.param(change("head.out.weight", lambda t: t[:1]), r"fleet's is \(2, 8\)", id="head shape"),
        pytest.param(change("head.more", zeros(2)), "differs from the fleet's", id="head name"),
        pytest.param(drop("head.out.weight"), "differs from the fleet's", id="no head"),
        pytest.param(drop("scores.0.heads"), "scores missing", id="scores missing"),
        pytest.param(change("scores.0.heads", lambda t: t[:2]), "scores for", id="scores shape"),
        pytest.param(change("scores.1.channels", nan), "scores contain NaN", id="scores NaN"),
        pytest.param(change("scored.0.heads", lambda t: t * 0), "scored groups repeat", id="scored twice"),
        pytest.param(change("scored.0.heads", lambda t: t + 9), "were removed earlier", id="scored out of range"),
    ],
)  # fmt: skip
def test_malformed_tensor_is_rejected(spoil, reason):
    tensors = honest()
    spoil(tensors)
    with pytest.raises(UpdateRejected, match=reason):
        check(tensors)


def layout_tensors(layout):
    return make_tensors(layout, FULL, 4, None, "gate")


def test_layout_with_removed_groups_is_rejected():
    earlier = Layout.prefix(SPEC, ORDER, [(1, 8)] * 2)
    with pytest.raises(UpdateRejected, match="had removed earlier"):
        check(honest(), previous=earlier)


@pytest.mark.parametrize("counts", [(4, 32), (3, 28), (1, 4)])
def test_layout_far_from_the_planned_ratio_is_rejected(counts):
    with pytest.raises(UpdateRejected, match=r"the plan leaves 0\.\d+ \(tolerance"):
        check(layout_tensors(Layout.prefix(SPEC, ORDER, [counts] * 2)))


def test_layout_one_group_from_the_planned_ratio_is_accepted():
    heads, channels = KEPT.counts[0]
    for counts in ((heads, channels + 4), (heads, channels - 4), (heads + 1, channels), (heads - 1, channels)):
        check(layout_tensors(Layout.prefix(SPEC, ORDER, [counts] * 2)))
    per_layer = 4 * head_parameters(SPEC) + 32 * channel_parameters(SPEC)
    share = (head_parameters(SPEC) + 4 * channel_parameters(SPEC)) / per_layer
    assert ratio_tolerance(SPEC, 4) == pytest.approx(share)


def test_consensus_layout_that_is_no_prefix_is_rejected():
    other = Order(ORDER.heads, tuple(np.roll(c, 1) for c in ORDER.channels))
    with pytest.raises(UpdateRejected, match="layer 0 channels: not a prefix of the fleet's order"):
        check(layout_tensors(Layout.prefix(SPEC, other, KEPT.counts)))


def test_local_layout_with_any_groups_is_accepted():
    other = Order(ORDER.heads, tuple(np.roll(c, 1) for c in ORDER.channels))
    tensors = layout_tensors(Layout.prefix(SPEC, other, KEPT.counts))
    assert check(tensors, plan=make_plan(layout="local"), order=None).layout.counts == KEPT.counts


def test_pruned_layout_before_the_first_order_is_rejected():
    check(layout_tensors(FULL), order=None)
    with pytest.raises(UpdateRejected, match=r"the plan leaves 0\.0000"):
        check(honest(), order=None)


def test_report_that_contradicts_its_plan_is_rejected():
    with pytest.raises(UpdateRejected, match="rank is 2 instead of the plan's 4"):
        check(honest(), report=make_report(r=2))
    with pytest.raises(UpdateRejected, match="no examples"):
        check(honest(), report=make_report(num_examples=0))


def test_size_limit_admits_the_largest_valid_update():
    full = pack(make_tensors(FULL, FULL, 4, None, "gate"))
    assert len(full) < max_update_bytes(SPEC, make_plan(), 2) < len(full) + 2 * 1024 * 1024
    larger = msgspec.structs.replace(SPEC, intermediate_size=64)
    assert max_update_bytes(larger, make_plan(), 2) > max_update_bytes(SPEC, make_plan(), 2)
