"""Criterion "apt": activation times gradient at the inputs of o and down."""

import numpy as np
import pytest
import tiny_models as tiny

from fedspine_edge.errors import ModelError
from fedspine_edge.model.layout import module_names
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.pruning.selection import order_from_scores


def iterate(model, tracker, seed=0, scored=True):
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    tracker.begin(scored)
    model(**tiny.batch(model, seed=seed)).loss.backward()
    return tracker.update() if scored else None


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_apt_scores_are_activation_times_gradient_by_group(kind):
    """Against inputs and gradients that are recorded by other means."""
    model = tiny.prunable(kind)
    seen = {}

    def record(name):
        def hook(module, inputs):
            inputs[0].retain_grad()
            seen[name] = inputs[0]

        return hook

    for name in module_names(model.spec):
        if name.endswith((".o", ".down")):
            model.linear(name).register_forward_pre_hook(record(name))
    tracker = ImportanceTracker(model, criterion="apt")
    assert iterate(model, tracker)
    scores = tracker.scores()
    for layer in range(model.spec.num_layers):
        for part, actual in (("o", scores.heads[layer]), ("down", scores.channels[layer])):
            x = seen[f"layers.{layer}.{part}"]
            product = (x.detach() * x.grad).abs().double().numpy()
            groups = product.reshape(-1, product.shape[-1]).sum(0).reshape(actual.size, -1).sum(1)
            np.testing.assert_allclose(actual, groups / np.linalg.norm(groups), rtol=1e-4)


def test_apt_scores_an_unused_head_zero():
    model = tiny.prunable("llama", live_b=False)
    model.linear("layers.0.o").base_layer.weight.data[:, :16] = 0
    tracker = ImportanceTracker(model, criterion="apt")
    model.linear("layers.0.o").lora_A.data[:, :16] = 0
    iterate(model, tracker)
    assert tracker.scores().heads[0][0] == 0
    assert order_from_scores(tracker.scores(), model.layout).heads[0].tolist() == [1, 0]


def test_apt_counts_scored_iterations_and_follows_compact():
    model, other = tiny.prunable("bert"), tiny.prunable("bert")
    tracker, plain = ImportanceTracker(model, criterion="apt"), ImportanceTracker(other, criterion="apt")
    assert not tracker.ready
    iterate(model, tracker, seed=3, scored=False)
    iterate(model, tracker, seed=4)
    iterate(other, plain, seed=4)
    assert tracker.ready
    np.testing.assert_array_equal(tracker.scores().channels[1], plain.scores().channels[1])
    layout = tiny.random_layout(model, 2)
    before = tracker.scores().channels[1][layout.channels[1]]
    model.compact(layout, importance=tracker)
    np.testing.assert_array_equal(tracker.scores().channels[1], before)
    assert iterate(model, tracker, seed=5)


def test_apt_without_begin_raises_and_leaves_no_hooks():
    model = tiny.prunable("bert")
    tracker = ImportanceTracker(model, criterion="apt")
    model.load_adapter(model.adapter_state())
    model(**tiny.batch(model)).loss.backward()
    with pytest.raises(ModelError, match="no gradient reached"):
        tracker.update()
    tracker.begin(True)
    linear = model.linear("layers.0.o")
    assert len(linear._forward_pre_hooks) == 1
    del tracker
    assert len(linear._forward_pre_hooks) == 0
