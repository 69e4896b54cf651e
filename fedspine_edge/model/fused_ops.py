"""Let a decoder's RMS norms and SiLU gates run as the package's ops: one pass over memory each, and less to keep.

transformers computes both in several operators, each of which reads and writes all tokens, and autograd keeps
silu(gate) and float32 copies of 16-bit tokens for the backward pass. docs/decisions/0029.
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
    """Override the forward of norms and feed-forward networks in place, where the family has them as LLaMA does."""
    if architecture.rms_norms:
        for child in module.modules():
            if hasattr(child, "variance_epsilon"):
                child.forward = partial(_normalised, child)
    if architecture.feed_forward and module.config.hidden_act == "silu":
        for layer in range(int(module.config.num_hidden_layers)):
            ffn = module.get_submodule(f"{architecture.layer_path(layer)}.{architecture.feed_forward}")
            ffn.forward = partial(_fed_forward, ffn, architecture)


def disable_fused_ops(module: nn.Module) -> None:
    """The inverse of `enable_fused_ops`, in place."""
    for child in module.modules():
        override = child.__dict__.get("forward")
        if isinstance(override, partial) and override.func in (_normalised, _fed_forward):
            del child.forward


def _normalised(norm: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:  # transformers rounds it to float32 inside, and what is compared must round alike
        result: Tensor = type(norm).forward(norm, x)
        return result
    return ops.rms_norm(x, norm.weight, norm.variance_epsilon)


def _fed_forward(ffn: Any, architecture: Architecture, x: Tensor) -> Tensor:
    gate, up, down = (
        ffn.get_submodule(architecture.linears[part].rpartition(".")[2]) for part in ("gate", "up", "down")
    )
    result: Tensor = down(ops.swiglu(gate(x), up(x)))
    return result
