"""Reference implementations of all ops in plain torch.

They define what the ops compute. Tests compare the native kernels with them, and the ops fall back to them. They have
the signatures of `fedspine_edge.kernels.ops`, accept every device and floating-point dtype including float64, and
decompose into standard operators when a model is traced or exported.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Metric = Literal["abs", "square", "signed"]
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor]  # weight, bias, lora_A, lora_B


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Return `x Wᵀ + bias + scaling (x Aᵀ) Bᵀ`, with shape (..., out_features) for x (..., in_features)."""
    low_rank = functional.linear(functional.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return functional.linear(x, weight, bias) + scaling * low_rank


def lora_qkv(x: Tensor, q: Weights, k: Weights, v: Weights, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return `lora_linear` of x with each of q, k and v, which are (weight, bias, lora_A, lora_B)."""
    return lora_linear(x, *q, scaling), lora_linear(x, *k, scaling), lora_linear(x, *v, scaling)


def lora_gate_up(x: Tensor, gate: Weights, up: Weights, scaling: float) -> tuple[Tensor, Tensor]:
    """Return `lora_linear` of x with each of gate and up."""
    return lora_linear(x, *gate, scaling), lora_linear(x, *up, scaling)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return `weight x / sqrt(mean(x²) + epsilon)` over the last dimension, rounded like transformers' LlamaRMSNorm."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) up`."""
    return functional.silu(gate) * up


def importance_accumulate(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: float,
    *,
    group_of_row: Tensor | None = None,
    group_of_col: Tensor | None = None,
    num_groups: int,
    metric: Metric = "abs",
) -> Tensor:
    """Return the group sums of LoRA-guided importance, (num_groups,) float32. Source: docs/concepts/pruning.md.

    Allocates three temporaries of shape (out, in). Computes in float64 if the weight is float64, else in float32.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, b, grad_a, grad_b = (t.to(dtype) for t in (lora_A, lora_B, grad_A, grad_B))
        estimate = grad_b @ a + b @ grad_a - grad_b @ grad_a
        importance = estimate * (weight.to(dtype) + scaling * (b @ a))
        if metric == "abs":
            importance = importance.abs()
        elif metric == "square":
            importance = importance.square()
        if group_of_row is not None:
            sums, group = importance.sum(dim=1), group_of_row
        else:
            assert group_of_col is not None
            sums, group = importance.sum(dim=0), group_of_col
        return sums.new_zeros(num_groups).index_add_(0, group.long(), sums).float()


def gather_rows(t: Tensor, index: Tensor) -> Tensor:
    """Return a contiguous copy of `t[index]`."""
    return t.index_select(0, index.long()).contiguous()


def gather_cols(t: Tensor, index: Tensor) -> Tensor:
    """Return a contiguous copy of `t[:, index]`."""
    return t.index_select(1, index.long()).contiguous()
