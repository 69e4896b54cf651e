"""Derives the prunable shape of a loaded model and checks its modules against it."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedspine_edge.errors import ModelError
from fedspine_edge.model.families import architecture_of
from fedspine_edge.model.fused_projections import split_fused
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.spec import ModelSpec


def model_spec(module: nn.Module, base_sha256: str) -> ModelSpec:
    """Return the prunable shape of an *unpruned* task model without adapters, after splitting its fused linears.

    Raises `UnknownArchitecture`, or `ModelError` if the modules are not those of the family table.
    """
    architecture_of(module.config).check_config(module.config)
    split_fused(module, architecture_of(module.config))
    spec = spec_of_config(module.config, sum(p.numel() for p in module.parameters()), base_sha256)
    check_shapes(module, Layout.full(spec))
    return spec


def spec_of_config(config: Any, num_parameters: int, base_sha256: str = "0" * 64) -> ModelSpec:
    """Return the prunable shape that a transformers config states. Raises `UnknownArchitecture`."""
    architecture = architecture_of(config)
    attention_bias, ffn_bias = architecture.has_biases(config)
    num_heads = int(config.num_attention_heads)
    return ModelSpec(
        family=architecture.family,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, architecture.kv_heads)),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        intermediate_size=int(getattr(config, architecture.channels) or 4 * config.hidden_size),
        gated_ffn=architecture.gated_ffn,
        attention_bias=attention_bias,
        ffn_bias=ffn_bias,
        num_parameters=num_parameters,
        base_sha256=base_sha256,
    )


def check_shapes(module: nn.Module, layout: Layout) -> None:
    """Raise `ModelError` unless every prunable linear has the shape and bias that `layout` implies."""
    architecture = architecture_of(layout.spec.family)
    biases = {part: i for i, group in enumerate((("q", "k", "v", "o"), ("up", "gate", "down"))) for part in group}
    expected_bias = (layout.spec.attention_bias, layout.spec.ffn_bias)
    for layer in range(layout.spec.num_layers):
        for part in architecture.linears:
            name = f"layers.{layer}.{part}"
            path = architecture.path(name)
            try:
                linear = module.get_submodule(path)
            except AttributeError:
                raise ModelError(f"the {architecture.family} model has no module {path!r} for {name}.") from None
            linear = getattr(linear, "base_layer", linear)
            shape = (layout.rows(name).size, layout.cols(name).size)
            if tuple(linear.weight.shape) != shape:
                raise ModelError(f"{name} ({path}) has shape {tuple(linear.weight.shape)}; its layout implies {shape}.")
            if (linear.bias is not None) != (expected_bias[biases[part]] and part not in architecture.unbiased):
                raise ModelError(
                    f"{name} ({path}) has {'a' if linear.bias is not None else 'no'} bias, unlike the family entry."
                )
