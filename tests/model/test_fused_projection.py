"""Projections of one input are computed together, with equal results and never with an outdated one."""

import copy

import pytest
import tiny_models as tiny
import torch

from fedspine_edge.model.lora import FusedProjection


def separated(model):
    """Return a copy of the model without fused projections."""
    copied_model = copy.deepcopy(model)
    for module in copied_model.module.modules():
        if hasattr(module, "fused_projection"):
            module.fused_projection = None
    return copied_model


def gradients(model, inputs):
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    model(**inputs).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.trainable_parameters().items() if p.grad is not None}


@pytest.fixture(params=tiny.KINDS)
def model(request):
    return tiny.prunable(request.param)


def groups(model):
    found = {
        id(m.fused_projection): m.fused_projection
        for m in model.module.modules()
        if getattr(m, "fused_projection", None)
    }
    return list(found.values())


def test_projection_equals_separate_linears(model):
    inputs = tiny.batch(model)
    copied_model = separated(model)
    torch.testing.assert_close(model(**inputs).logits, copied_model(**inputs).logits, rtol=1e-4, atol=1e-5)
    values, expected_values = gradients(model, inputs), gradients(copied_model, inputs)
    assert values.keys() == expected_values.keys()
    for name, value in values.items():
        torch.testing.assert_close(
            value, expected_values[name], rtol=1e-3, atol=1e-4 * float(expected_values[name].abs().max())
        )


def test_every_layer_is_fused_and_leaves_nothing_pending(model):
    per_layer = int(model.architecture.shared_attention_input) + int(model.spec.gated_ffn)
    expected = per_layer * model.spec.num_layers
    model(**tiny.batch(model))
    assert len(groups(model)) == expected
    assert all(group._pending is None for group in groups(model))


def test_pruned_model_keeps_its_fused_projections(model):
    inputs = tiny.batch(model)
    model.compact(tiny.random_layout(model, 2))
    torch.testing.assert_close(model(**inputs).logits, separated(model)(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert all(group._pending is None for group in groups(model))


def test_projection_recomputes_after_a_write():
    model = tiny.prunable("bert")
    q, k, v = (model.linear(f"layers.0.{part}") for part in "qkv")
    x = torch.randn(2, 5, q.weight.shape[1])
    before = k(x).detach()
    q(x)
    with torch.no_grad():
        k.lora_B.add_(1.0)  # an optimizer's step
    assert not torch.equal(k(x), before)
    q(x)
    x.mul_(2.0)
    torch.testing.assert_close(v(x), separated(model).linear("layers.0.v")(x))
    q(x)
    k.lora_B = torch.nn.Parameter(torch.zeros_like(k.lora_B))  # what compact does
    torch.testing.assert_close(k(x), torch.nn.functional.linear(x, k.weight, k.bias))


def test_result_without_graph_is_not_used_in_training():
    model = tiny.prunable("bert")
    q, k = model.linear("layers.0.q"), model.linear("layers.0.k")
    x = torch.randn(5, q.weight.shape[1])
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad
    q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert k(x).dtype == torch.bfloat16


def test_projection_of_an_inference_tensor_is_not_shared():
    model = tiny.prunable("bert")
    q, k = model.linear("layers.0.q"), model.linear("layers.0.k")
    with torch.inference_mode():
        x = torch.randn(5, q.weight.shape[1])
        q(x)
        x.zero_()
        torch.testing.assert_close(k(x), torch.nn.functional.linear(x, k.weight, k.bias))


def test_copy_with_a_pending_result_uses_its_own_adapters():
    model = tiny.prunable("bert")
    q = model.linear("layers.0.q")
    x = torch.randn(5, q.weight.shape[1])
    q(x)  # leaves results of k and v, which belong to a graph
    copied_model = copy.deepcopy(model)
    copied = copied_model.linear("layers.0.q")
    assert isinstance(copied.fused_projection, FusedProjection)
    assert copied.fused_projection is not q.fused_projection
    assert copied.fused_projection.linears[0] is copied
    assert copied_model.linear("layers.0.v").fused_projection is copied.fused_projection


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_foreign_gradient_checkpointing_computes_every_token(use_reentrant):
    model = tiny.prunable("llama")
    model.module.train()
    inputs = tiny.batch(model)
    plain = gradients(model, inputs)
    model.module.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.module.enable_input_require_grads()
    recomputed = gradients(model, inputs)
    assert plain.keys() == recomputed.keys()
    for name, value in recomputed.items():
        torch.testing.assert_close(value, plain[name])
    assert all(group._pending is None for group in groups(model))


def test_threads_on_one_model_get_correct_results():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny.prunable("llama")
    model.module.eval()
    inputs = [tiny.batch(model, seed=i) for i in range(4)]
    copied_model = separated(model)
    expected = [copied_model(**one).logits.detach() for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for y, truth in zip(pool.map(lambda one: model(**one).logits.detach(), inputs), expected):
                torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)
