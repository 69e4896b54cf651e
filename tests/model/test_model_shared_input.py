"""q, k and v (or gate and up) computed together: the same numbers, and never a stale one."""

import copy

import pytest
import tiny_models as tiny
import torch

from fedspine_edge.model.lora import FusedProjection


def alone(model):
    """The same model with every linear on its own."""
    twin = copy.deepcopy(model)
    for module in twin.module.modules():
        if hasattr(module, "fused_projection"):
            module.fused_projection = None
    return twin


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


def test_outputs_and_gradients_equal_linears_on_their_own(model):
    inputs = tiny.batch(model)
    twin = alone(model)
    torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits, rtol=1e-4, atol=1e-5)
    ours, theirs = gradients(model, inputs), gradients(twin, inputs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4 * float(theirs[name].abs().max()))


def test_every_layer_shares_and_nothing_is_left_behind(model):
    per_layer = int(model.architecture.shared_attention_input) + int(model.spec.gated_ffn)
    expected = per_layer * model.spec.num_layers
    model(**tiny.batch(model))
    assert len(groups(model)) == expected
    assert all(group._pending is None for group in groups(model))


def test_a_pruned_model_still_shares(model):
    inputs = tiny.batch(model)
    model.compact(tiny.random_layout(model, 2))
    torch.testing.assert_close(model(**inputs).logits, alone(model)(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert all(group._pending is None for group in groups(model))


def test_a_write_between_two_calls_is_seen():
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
    torch.testing.assert_close(v(x), alone(model).linear("layers.0.v")(x))
    q(x)
    k.lora_B = torch.nn.Parameter(torch.zeros_like(k.lora_B))  # what compact does
    torch.testing.assert_close(k(x), torch.nn.functional.linear(x, k.weight, k.bias))


def test_a_result_without_graph_is_not_handed_to_training():
    model = tiny.prunable("bert")
    q, k = model.linear("layers.0.q"), model.linear("layers.0.k")
    x = torch.randn(5, q.weight.shape[1])
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad
    q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert k(x).dtype == torch.bfloat16


def test_a_tensor_that_is_written_in_inference_mode():
    model = tiny.prunable("bert")
    q, k = model.linear("layers.0.q"), model.linear("layers.0.k")
    with torch.inference_mode():
        x = torch.randn(5, q.weight.shape[1])
        q(x)
        x.zero_()
        torch.testing.assert_close(k(x), torch.nn.functional.linear(x, k.weight, k.bias))


def test_a_copy_computes_with_its_own_adapters_even_with_a_result_pending():
    model = tiny.prunable("bert")
    q = model.linear("layers.0.q")
    x = torch.randn(5, q.weight.shape[1])
    q(x)  # leaves results of k and v, which belong to a graph
    twin = copy.deepcopy(model)
    copied = twin.linear("layers.0.q")
    assert isinstance(copied.fused_projection, FusedProjection)
    assert copied.fused_projection is not q.fused_projection
    assert copied.fused_projection.linears[0] is copied
    assert twin.linear("layers.0.v").fused_projection is copied.fused_projection


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
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


def test_threads_on_one_model_get_right_results():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny.prunable("llama")
    model.module.eval()
    inputs = [tiny.batch(model, seed=i) for i in range(4)]
    twin = alone(model)
    expected = [twin(**one).logits.detach() for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for y, truth in zip(pool.map(lambda one: model(**one).logits.detach(), inputs), expected):
                torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)
