"""Importance scores follow their documented formula and find the groups that matter."""

import numpy as np
import pytest
import tiny_models as tiny
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fedspine_edge.errors import CheckpointError, ModelError
from fedspine_edge.kernels import ops
from fedspine_edge.model.families import SUPPORTED
from fedspine_edge.model.layout import module_names, split_name
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.pruning.selection import order_from_scores, select_layout


def backward(model, seed=0):
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    model(**tiny.batch(model, seed=seed)).loss.backward()


def plant(model, layer, head, channels):
    """Silence every group of one layer but one head and a few channels."""
    spec = model.spec
    width = spec.num_heads // spec.num_kv_heads * spec.head_dim
    keep = {
        "o": np.arange(head * width, (head + 1) * width),
        "down": np.asarray(channels),
    }
    with torch.no_grad():
        for part, kept in keep.items():
            linear = model.linear(f"layers.{layer}.{part}")
            gone = np.setdiff1d(np.arange(linear.weight.shape[1]), kept)
            linear.base_layer.weight[:, gone] = 0
            linear.lora_A[:, gone] = 0


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("metric", ["abs", "square", "group", "apt"])
@pytest.mark.parametrize(
    ("kind", "kv_heads"),
    [(kind, 2 if SUPPORTED[tiny.task_of(kind)[0]].free_head_dim else 4) for kind in tiny.FAMILIES]
    + [("llama", 4), ("llama_lm", 1), ("bert_tokens", 4)],
)
def test_criterion_keeps_the_one_group_that_matters(kind, kv_heads, metric, scope):
    """With GQA the survivor is the right KV group."""
    model = tiny.prunable(kind, kv_heads=kv_heads, live_b=False)
    head, channels = kv_heads - 1, [1, 5, 9, 13, 17, 18, 19, 23]
    for layer in range(model.spec.num_layers):
        plant(model, layer, head, channels)
    criterion = {"criterion": "apt"} if metric == "apt" else {"importance_metric": metric}
    tracker = ImportanceTracker(model, **criterion, scope=scope)
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-3)
    for seed in range(3):
        backward(model, seed)
        assert tracker.update()
        optimizer.step()
    order = order_from_scores(tracker.scores(), model.layout)
    layout = select_layout(tracker.scores(), model.layout, 0.6, scope=scope)
    for layer in range(model.spec.num_layers):
        assert order.heads[layer][0] == head
        assert sorted(order.channels[layer][:8]) == channels
        assert head in layout.heads[layer]
        assert set(channels) <= set(layout.channels[layer])
    assert layout.pruning_ratio > 0.3


@pytest.mark.parametrize("kind", tiny.KINDS)
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(group=st.integers(0, 3), head=st.integers(0, 5), seed=st.integers(0, 99))
def test_pruning_unused_groups_keeps_the_logits(kind, group, head, seed):
    """All others are silent: had a wrong KV group, query head or channel been kept, the logits would tell.

    Adapters start at B = 0: a live B gives silent rows a share through the gradient of A, which all rows share.
    """
    kv_heads = (6, 3, 2, 1)[group] if SUPPORTED[tiny.task_of(kind)[0]].free_head_dim else 6
    model = tiny.prunable(kind, heads=6, kv_heads=kv_heads, bias=True, seed=seed, live_b=False)
    rng = np.random.default_rng(seed)
    for layer in range(model.spec.num_layers):
        plant(model, layer, (head + layer) % kv_heads, rng.permutation(24)[:8])
    tracker = ImportanceTracker(model)
    backward(model, seed)
    tracker.update()
    before = model(**tiny.batch(model)).logits.detach()
    model.compact(select_layout(tracker.scores(), model.layout, 0.95))
    assert model.layout.counts == [(1, 8)] * model.spec.num_layers
    after = model(**tiny.batch(model)).logits.detach()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-5 * max(1.0, float(before.abs().max())))


@pytest.mark.parametrize("metric", ["group", "abs", "square", "signed"])
def test_scores_follow_the_formula_by_hand(metric):
    """One iteration, written out densely: Ghat * (W + s B A) summed by group, L2 by module, summed by kind."""
    element = {"abs": np.abs, "square": np.square}.get(metric, lambda x: x)
    model = tiny.prunable("llama", kv_heads=2)
    backward(model)
    tracker = ImportanceTracker(model, importance_metric=metric)
    tracker.update()
    spec = model.spec
    heads = [np.zeros(spec.num_kv_heads) for _ in range(spec.num_layers)]
    channels = [np.zeros(spec.intermediate_size) for _ in range(spec.num_layers)]
    for name in module_names(spec):
        layer, part = split_name(name)
        x = model.linear(name)
        A, B, gA, gB, W = (
            t.detach().double().numpy() for t in (x.lora_A, x.lora_B, x.lora_A.grad, x.lora_B.grad, x.weight)
        )
        importance = element((gB @ A + B @ gA - gB @ gA) * (W + 0.5 * B @ A))
        per_unit = importance.sum(0 if part in ("o", "down") else 1)
        target = channels if part in ("up", "gate", "down") else heads
        groups = per_unit.reshape(len(target[layer]), -1).sum(1)
        groups = np.abs(groups) if metric == "group" else groups
        target[layer] += groups / np.linalg.norm(groups)
    scores = tracker.scores()
    for layer in range(spec.num_layers):
        np.testing.assert_allclose(scores.heads[layer], heads[layer], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(scores.channels[layer], channels[layer], rtol=1e-4, atol=1e-6)


def test_random_adapter_terms_cancel_within_a_group():
    """A fresh adapter (B = 0) shows dL/dW through A'A alone. In a sum over columns of W of one group that noise
    cancels, in a sum of absolute values it counts: only the first finds the group whose removal would cost most.
    """
    generator = torch.Generator().manual_seed(0)
    out, width, groups, r = 64, 8, 16, 8
    weight = torch.randn(out, width * groups, generator=generator)
    gradient = torch.randn(out, width * groups, generator=generator)
    of_five = slice(5 * width, 6 * width)
    gradient[:, of_five] = weight[:, of_five]  # of equal size, but all of its terms have one sign
    lora_A = torch.randn(r, width * groups, generator=generator) / r**0.5
    group = torch.arange(groups, dtype=torch.int32).repeat_interleave(width)

    def scores(metric):
        adapter = (lora_A, torch.zeros(out, r), torch.zeros_like(lora_A), gradient @ lora_A.T)
        return ops.importance_accumulate(weight, *adapter, 1.0, group_of_col=group, num_groups=groups, metric=metric)

    summed, absolute = scores("signed").abs(), scores("abs")
    assert summed.argmax() == 5
    assert summed[5] > 1.5 * summed.sort().values[-2]
    assert absolute.max() < 1.5 * absolute.median()


def test_scores_are_smoothed_and_corrected_for_their_start():
    model = tiny.prunable("bert")
    single, many = ImportanceTracker(model), ImportanceTracker(model)
    backward(model)
    single.update()
    for _ in range(20):
        many.update()
    np.testing.assert_allclose(many.scores().heads[0], single.scores().heads[0], rtol=1e-5)
    assert many.lora_importance() == pytest.approx(single.lora_importance(), rel=1e-5)
    first = single.scores().heads[0]
    backward(model, seed=5)
    single.update()
    other = ImportanceTracker(model)
    other.update()
    expected = (0.09 * first + 0.1 * other.scores().heads[0]) / (1 - 0.81)
    np.testing.assert_allclose(single.scores().heads[0], expected, rtol=1e-4)


def test_lora_importance_is_the_mean_of_b_times_its_gradient():
    model = tiny.prunable("bert")
    backward(model)
    tracker = ImportanceTracker(model)
    assert tracker.lora_importance() == 0.0
    tracker.update()
    linears = [model.linear(name) for name in module_names(model.spec)]
    expected = sum((x.lora_B * x.lora_B.grad).abs().mean().item() for x in linears)
    assert tracker.lora_importance() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tracker_skips_and_counts_a_non_finite_step(bad):
    model = tiny.prunable("bert")
    tracker = ImportanceTracker(model)
    backward(model)
    tracker.update()
    before = tracker.scores()
    model.linear("layers.1.v").lora_A.grad[0, 0] = bad
    assert tracker.update() is False
    assert (tracker.skipped, tracker.steps) == (1, 1)
    np.testing.assert_array_equal(tracker.scores().heads[1], before.heads[1])


def test_update_without_gradients_raises():
    with pytest.raises(ModelError, match=r"after loss\.backward"):
        ImportanceTracker(tiny.prunable("bert")).update()
    with pytest.raises(ModelError, match="no training step was scored"):
        ImportanceTracker(tiny.prunable("bert")).scores()


def test_magnitude_ranks_by_weight_without_a_step():
    model = tiny.prunable("bert", live_b=False)
    with torch.no_grad():
        for part in ("q", "k", "v"):
            model.linear(f"layers.0.{part}").base_layer.weight[8:16] *= 10
    scores = ImportanceTracker(model, criterion="magnitude").scores()
    assert scores.heads[0].argmax() == 1


def test_random_is_seeded_and_keeps_its_order_after_compact():
    model = tiny.prunable("bert")
    tracker = ImportanceTracker(model, criterion="random", seed=4)
    before = tracker.scores()
    same = ImportanceTracker(tiny.prunable("bert"), criterion="random", seed=4).scores()
    other = ImportanceTracker(model, criterion="random", seed=5).scores()
    np.testing.assert_array_equal(before.channels[1], same.channels[1])
    assert (before.channels[1] != other.channels[1]).any()
    layout = tiny.random_layout(model, 1)
    model.compact(layout, importance=tracker)
    np.testing.assert_array_equal(tracker.scores().channels[1], before.channels[1][layout.channels[1]])


def test_tracker_state_round_trips_and_rejects_others():
    model = tiny.prunable("llama")
    tracker = ImportanceTracker(model)
    backward(model)
    tracker.update()
    restored = ImportanceTracker(model)
    restored.load_state_dict(tracker.state_dict())
    for a, b in ((tracker, restored), (restored, tracker)):
        assert a.update()
        assert b.update()
    np.testing.assert_array_equal(restored.scores().heads[0], tracker.scores().heads[0])
    assert restored.lora_importance() == tracker.lora_importance()
    state = tracker.state_dict()
    model.compact(tiny.random_layout(model, 1))
    fresh = ImportanceTracker(model)
    with pytest.raises(CheckpointError, match="the layout needs finite values"):
        fresh.load_state_dict(state)
    with pytest.raises(CheckpointError, match="missing or unknown entries"):
        fresh.load_state_dict({"steps": np.array(1)})
    assert fresh.steps == 0
