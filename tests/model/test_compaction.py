"""Compact models equal masked full models in outputs, gradients, training and generation."""

import numpy as np
import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.errors import LayoutError
from fedspine_edge.model.layout import Layout, module_names
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.pruning.selection import CRITERIA, select_layout

shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 3),
        "heads": st.sampled_from([2, 4, 6]),
        "head_dim": st.sampled_from([2, 4, 8]),
        "channels": st.integers(1, 40),
        "bias": st.booleans(),
        "tied": st.booleans(),
        "attention": st.sampled_from(["sdpa", "eager"]),
    }
)


def gradients(model, inputs):
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    output = model(**inputs)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.trainable_parameters().items()}


def gathered(model, layout, name, tensor):
    """What `layout` keeps of a full-coordinate adapter tensor."""
    if name.startswith("head."):
        return tensor
    linear, _, side = name.rpartition(".")
    return tensor[:, layout.cols(linear)] if side == "lora_A" else tensor[layout.rows(linear)]


def assert_close(actual, expected):
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("kind", tiny.KINDS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(shape=shapes, group=st.integers(0, 3), pair=st.booleans(), seed=st.integers(0, 1000))
def test_compact_equals_masked_for_logits_and_gradients(kind, shape, group, pair, seed):
    """Every family with every task, unequal widths per layer, MHA, GQA and MQA, biases, tied embeddings, two texts,
    both attentions.
    """
    divisors = [n for n in range(1, shape["heads"] + 1) if shape["heads"] % n == 0]
    shape = {**shape, "kv_heads": divisors[group % len(divisors)]}
    masked, compact = tiny.prunable(kind, seed=seed, **shape), tiny.prunable(kind, seed=seed, **shape)
    layout = tiny.random_layout(masked, seed)
    tiny.mask(masked, layout)
    compact.compact(layout)
    inputs = tiny.batch(masked, seed=seed, pair=pair)
    expected, expected_gradients = gradients(masked, inputs)
    logits, actual_gradients = gradients(compact, inputs)
    assert_close(logits, expected)
    assert list(actual_gradients) == list(expected_gradients)
    for name, gradient in actual_gradients.items():
        assert_close(gradient, gathered(compact, layout, name, expected_gradients[name]))


def test_mask_of_these_tests_changes_the_output():
    model = tiny.prunable("bert")
    inputs = tiny.batch(model)
    before = model(**inputs).logits.detach()
    tiny.mask(model, tiny.random_layout(model, 1))
    assert (model(**inputs).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_training_continues_as_in_the_masked_model(kind, fused):
    """Adam's moments follow the parameters: five steps, prune, five more give the same losses and weights."""
    masked, compact = tiny.prunable(kind), tiny.prunable(kind)
    layout = tiny.random_layout(masked, 5)
    optimizers = [torch.optim.AdamW(m.trainable_parameters().values(), 0.01, fused=fused) for m in (masked, compact)]
    history: list[list[float]] = [[], []]

    def train(first):
        for i, (model, optimizer) in enumerate(zip((masked, compact), optimizers)):
            for step in range(first, first + 5):
                loss = model(**tiny.batch(model, seed=step)).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.trainable_parameters().values(), 1.0)
                optimizer.step()
                history[i].append(loss)  # holding the graph, as a careless loop would

    train(0)
    tiny.mask(masked, layout)
    for parameter in masked.trainable_parameters().values():
        parameter.grad = None
    compact.compact(layout, optimizer=optimizers[1])
    train(5)
    assert [x.item() for x in history[1]] == pytest.approx([x.item() for x in history[0]], rel=2e-4)
    full = masked.trainable_parameters()
    for name, parameter in compact.trainable_parameters().items():
        assert_close(parameter.data, gathered(compact, layout, name, full[name].data))


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_has_the_parameters_of_the_model_after_compact(fused):
    model = tiny.prunable("llama")
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), fused=fused)
    gradients(model, tiny.batch(model))
    optimizer.step()
    model.compact(tiny.random_layout(model, 3), optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.trainable_parameters().values()]
    assert {id(p) for p in optimizer.state} == {id(p) for p in held}
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert parameter.grad.shape == parameter.shape
        assert state["step"] == 1
    restored = torch.optim.AdamW(model.trainable_parameters().values(), fused=fused)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.state[held[0]]["step"] == 1


@pytest.mark.parametrize("kind", tiny.FAMILIES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(prunes=st.integers(2, 4), seed=st.integers(0, 1000))
def test_several_compactions_equal_one(kind, prunes, seed):
    """Weights, adapters, gradients, Adam moments and importance, bit for bit; indices are the unpruned model's."""
    several, once, full = (tiny.prunable(kind, seed=seed) for _ in range(3))
    optimizers, trackers = [], []
    for model in (several, once):
        optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=0.01)
        tracker = ImportanceTracker(model)
        gradients(model, tiny.batch(model, seed=seed))
        tracker.update()
        optimizer.step()
        optimizers.append(optimizer)
        trackers.append(tracker)
    layout = several.layout
    for i in range(prunes):
        layout = tiny.random_layout(several, seed + i, within=layout)
        several.compact(layout, optimizer=optimizers[0], importance=trackers[0])
    once.compact(layout, optimizer=optimizers[1], importance=trackers[1])
    assert several.layout.to_dict() == once.layout.to_dict()
    for (name, a), (other, b) in zip(several.module.state_dict().items(), once.module.state_dict().items()):
        assert name == other
        assert torch.equal(a, b), name
    for name, value in trackers[0].state_dict().items():
        np.testing.assert_array_equal(value, trackers[1].state_dict()[name], err_msg=name)
    expected_values = once.trainable_parameters()
    for name, parameter in several.trainable_parameters().items():
        assert torch.equal(parameter.grad, expected_values[name].grad), name
        for key, value in optimizers[0].state[parameter].items():
            assert torch.equal(value, optimizers[1].state[expected_values[name]][key]), (name, key)
    for name in module_names(full.spec):
        kept = full.linear(name).weight[layout.rows(name)][:, layout.cols(name)]
        assert torch.equal(several.linear(name).weight, kept), name


SCORES = (
    {"importance_metric": "abs"},
    {"importance_metric": "square"},
    {"importance_metric": "signed"},
    {"criterion": "apt"},
)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_importance_continues_as_in_the_masked_model(kind):
    """What is kept has the averages it would have had. (Scope "layer" divides by the norm over what is kept.)"""
    masked, compact = tiny.prunable(kind), tiny.prunable(kind)
    layout = tiny.random_layout(masked, 4)
    trackers = [[ImportanceTracker(model, **score, scope="global") for score in SCORES] for model in (masked, compact)]
    optimizers = [torch.optim.SGD(m.trainable_parameters().values(), lr=0.01) for m in (masked, compact)]

    def train(first):
        for model, mine, optimizer in zip((masked, compact), trackers, optimizers):
            for step in range(first, first + 3):
                gradients(model, tiny.batch(model, seed=step))
                assert all(tracker.update() for tracker in mine)
                optimizer.step()

    train(0)
    tiny.mask(masked, layout)
    old = compact.layout
    compact.compact(layout, optimizer=optimizers[1], importance=trackers[1][0])
    for tracker in trackers[1][1:]:
        tracker.compact(old, layout)
    train(3)
    for before, after in zip(*trackers):
        expected, found = before.scores(), after.scores()
        for layer in range(masked.spec.num_layers):
            for kept, full, mine in (
                (layout.heads, expected.heads, found.heads),
                (layout.channels, expected.channels, found.channels),
            ):
                scale = np.abs(full[layer]).max()
                np.testing.assert_allclose(mine[layer], full[layer][kept[layer]], rtol=2e-3, atol=1e-4 * scale)


def test_scoring_and_pruning_draw_no_random_numbers():
    """Else the training after a prune would see other batches than without."""
    states = []
    for prune in (False, True):
        torch.manual_seed(3)
        np.random.seed(3)
        model = tiny.prunable("llama")
        if prune:
            for criterion in CRITERIA:
                tracker = ImportanceTracker(model, criterion, seed=1)
                gradients(model, tiny.batch(model))
                tracker.update()
                model.compact(select_layout(tracker.scores(), model.layout, 0.3), importance=tracker)
        states.append((torch.get_rng_state(), np.random.get_state()[1]))
    assert torch.equal(states[0][0], states[1][0])
    np.testing.assert_array_equal(states[0][1], states[1][1])


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_compact_sizes_follow_the_layout(kind):
    model = tiny.prunable(kind, bias=True)
    assert model.num_parameters() == model.spec.num_parameters
    layout = tiny.random_layout(model, 4)
    model.compact(layout)
    assert model.num_parameters() == model.spec.num_parameters - layout.removed_parameters


def test_compact_keeps_the_importance_of_kept_groups():
    model = tiny.prunable("llama")
    tracker = ImportanceTracker(model)
    gradients(model, tiny.batch(model))
    tracker.update()
    before, old = tracker.scores(), model.layout
    layout = tiny.random_layout(model, 6)
    model.compact(layout, importance=tracker)
    after = tracker.scores()
    for layer in range(model.spec.num_layers):
        np.testing.assert_array_equal(
            after.heads[layer], before.heads[layer][np.isin(old.heads[layer], layout.heads[layer])]
        )
        np.testing.assert_array_equal(after.channels[layer], before.channels[layer][layout.channels[layer]])
    gradients(model, tiny.batch(model))
    assert tracker.update()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind.endswith("_lm")])
def test_compact_language_model_generates_the_same_with_a_cache(kind, attention):
    model = tiny.prunable(kind, heads=6, kv_heads=3, layers=3, attention=attention)
    model.compact(tiny.random_layout(model, 2))
    ids = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.module.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
    plain = model.module.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert cached.tolist() == plain.tolist()
    assert cached.shape == (1, 12)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_merge_keeps_the_logits(kind):
    model = tiny.prunable(kind)
    model.compact(tiny.random_layout(model, 8))
    inputs = tiny.batch(model)
    merged = model.merge()
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_parameters())
    assert_close(merged(**inputs).logits, model(**inputs).logits.detach())
    with torch.no_grad():  # a copy: changing it leaves the model alone
        before = model(**inputs).logits
        for parameter in merged.parameters():
            parameter.zero_()
        assert torch.equal(model(**inputs).logits, before)


def test_merge_without_adapters_gives_the_base():
    model = tiny.PrunableModel.from_module(tiny.module("bert"), task="classification")
    inputs = tiny.batch(model)
    assert torch.equal(model.merge()(**inputs).logits, model(**inputs).logits)


def test_compact_without_adapters_equals_compact_with_them():
    bare = tiny.PrunableModel.from_module(tiny.module("llama"), task="classification")
    adapted = tiny.prunable("llama", live_b=False)
    layout = tiny.random_layout(bare, 9)
    bare.compact(layout)
    adapted.compact(layout)
    inputs = tiny.batch(bare)
    assert_close(adapted(**inputs).logits.detach(), bare(**inputs).logits.detach())


def test_compact_rejects_a_growing_layout_without_changes():
    model = tiny.prunable("bert")
    small = tiny.random_layout(model, 3)
    model.compact(small)
    shape = model.linear("layers.0.q").weight.shape
    with pytest.raises(LayoutError, match="removed earlier"):
        model.compact(Layout.full(model.spec))
    other = tiny.prunable("bert", channels=16)
    with pytest.raises(LayoutError, match="another model"):
        model.compact(other.layout)
    assert model.layout is small
    assert model.linear("layers.0.q").weight.shape == shape


def test_only_adapters_and_head_are_trainable():
    for kind in tiny.FAMILIES:
        model = tiny.prunable(kind)
        trained = {id(p) for p in model.trainable_parameters().values()}
        assert {id(p) for p in model.module.parameters() if p.requires_grad} == trained
        adapters = {f"{n}.{s}" for n in module_names(model.spec) for s in ("lora_A", "lora_B")}
        assert {n for n in model.trainable_parameters() if not n.startswith("head.")} == adapters
        model.module.train()
        inputs = tiny.batch(model)
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_gradient_checkpointing_keeps_gradients(kind):
    plain, saving = tiny.prunable(kind), tiny.prunable(kind)
    saving.set_gradient_checkpointing(True)
    saving.module.train()
    for layout in (plain.layout, tiny.random_layout(plain, 3)):
        for model in (plain, saving):
            model.compact(layout)
        logits, expected = gradients(plain, tiny.batch(plain))
        actual, found = gradients(saving, tiny.batch(saving))
        assert torch.equal(actual, logits)
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), name
