"""Norms and gates of decoders run as ops of the package with equal results, and merged models have none of them."""

import copy

import pytest
import tiny_models as tiny
import torch
from torch import nn

from fedspine_edge.kernels import elementwise, ops
from fedspine_edge.model import fused_ops
from fedspine_edge.model.fused_ops import disable_fused_ops

DECODERS = [kind for kind in tiny.KINDS if kind.startswith(("llama", "mistral", "qwen"))]


def overridden(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if "forward" in vars(child)]


def step(model, inputs):
    """Logits and every gradient."""
    output = model(**inputs)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.trainable_parameters().items()}
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    return {"logits": output.logits.detach(), **grads}


@pytest.mark.parametrize("kind", DECODERS)
def test_fused_ops_equal_transformers_modules(kind, monkeypatch):
    monkeypatch.setattr(elementwise, "_CPU_MIN_NORM", 0)
    monkeypatch.setattr(elementwise, "_CPU_MIN_GATE", 0)
    model = tiny.prunable(kind)
    assert overridden(model.module)
    inputs = tiny.batch(model)
    mine = step(model, inputs)
    disable_fused_ops(model.module)
    assert not overridden(model.module)
    for name, expected_values in step(model, inputs).items():
        torch.testing.assert_close(mine[name], expected_values, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_fused_ops_replace_every_norm_and_gate(monkeypatch):
    """Two norms a layer, qwen3 two more, one at the end; one gate a layer."""
    calls = {"rms_norm": 0, "swiglu": 0}

    def counting(name):
        original = getattr(ops, name)

        def counted(*args):
            calls[name] += 1
            return original(*args)

        return counted

    for name in calls:
        monkeypatch.setattr(fused_ops.ops, name, counting(name))
    for kind, norms in (("llama_lm", 2 * 2 + 1), ("qwen3_lm", 2 * 4 + 1)):
        model = tiny.prunable(kind)
        calls.update(rms_norm=0, swiglu=0)
        model(**tiny.batch(model))
        assert calls == {"rms_norm": norms, "swiglu": 2}


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2_lm"])
def test_fused_ops_leave_other_families_unchanged(kind):
    assert not overridden(tiny.prunable(kind).module)


def test_fused_ops_skip_a_gate_other_than_silu():
    model = tiny.prunable("llama_lm")
    disable_fused_ops(model.module)
    model.module.config.hidden_act = "gelu"
    fused_ops.enable_fused_ops(model.module, model.architecture)
    names = overridden(model.module)
    assert names
    assert all("norm" in name for name in names)


def test_merged_models_and_copies_of_fused_ops():
    model = tiny.prunable("llama_lm")
    assert not overridden(model.merge())
    copied_model = copy.deepcopy(model.module)
    with torch.no_grad():
        copied_model.model.norm.weight.zero_()  # a copy whose override still meant the original would not notice
        assert not copied_model(**tiny.batch(model)).logits.any()
        assert model(**tiny.batch(model)).logits.any()
