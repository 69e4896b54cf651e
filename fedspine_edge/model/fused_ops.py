"""Fused ops for the RMS norms and SiLU gates of decoders, which read memory once and keep less for the backward pass.

transformers computes both with several operators. Each of them reads and writes all tokens, and autograd keeps
silu(gate) and float32 copies of 16-bit tokens for the backward pass. See docs/decisions/0029.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedspine_edge.kernels import ops

if TYPE_CHECKING:
    from fedspine_edge.model.architecture import Architecture


def enable_fused_ops(module: nn.Module, architecture: Architecture) -> None:
    """Override the forward of LLaMA-like norms and feed-forward networks in place."""
    if architecture.rms_norms:
        for child in module.modules():
            if hasattr(child, "variance_epsilon"):
                child.forward = partial(_rms_norm, child)
    if architecture.feed_forward and module.config.hidden_act == "silu":
        for layer in range(int(module.config.num_hidden_layers)):
            ffn = module.get_submodule(f"{architecture.layer_path(layer)}.{architecture.feed_forward}")
            ffn.forward = partial(_swiglu_feed_forward, ffn, architecture)


def disable_fused_ops(module: nn.Module) -> None:
    """Undo `enable_fused_ops` in place."""
    for child in module.modules():
        override = child.__dict__.get("forward")
        if isinstance(override, partial) and override.func in (_rms_norm, _swiglu_feed_forward):
            del child.forward


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # transformers rounds to float32 inside; comparisons in float64 must do the same
        result: Tensor = type(norm).forward(norm, x)
        return result
    return ops.rms_norm(x, norm.weight, norm.variance_epsilon)


def _swiglu_feed_forward(ffn: Any, architecture: Architecture, x: Tensor) -> Tensor:
    gate, up, down = (
        ffn.get_submodule(architecture.linears[part].rpartition(".")[2]) for part in ("gate", "up", "down")
    )
    result: Tensor = down(ops.swiglu(gate(x), up(x)))
    return result
