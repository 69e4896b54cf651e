"""The definition of every op in plain torch: what the native kernels are compared with, and the fallback.

Same signatures as `fedspine_edge.kernels.ops`. Any device and floating dtype, double precision included; everything
here decomposes under tracing and export.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Metric = Literal["abs", "square", "signed"]
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor]  # weight, bias, lora_A, lora_B


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep_out: Tensor | None = None,
    keep_in: Tensor | None = None,
) -> Tensor:
    """`x Wᵀ + bias + scaling (x Aᵀ) Bᵀ`: (..., in_features) → (..., out_features).

    With keep_out the rows of lora_B, with keep_in the columns of lora_A are selected first.
    """
    lora_B = lora_B if keep_out is None else lora_B[keep_out.long()]
    lora_A = lora_A if keep_in is None else lora_A[:, keep_in.long()]
    low_rank = functional.linear(functional.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return functional.linear(x, weight, bias) + scaling * low_rank


def lora_qkv(x: Tensor, q: Weights, k: Weights, v: Weights, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three `lora_linear` of one input; each of q, k, v is (weight, bias, lora_A, lora_B)."""
    return lora_linear(x, *q, scaling), lora_linear(x, *k, scaling), lora_linear(x, *v, scaling)


def lora_gate_up(x: Tensor, gate: Weights, up: Weights, scaling: float) -> tuple[Tensor, Tensor]:
    """Two `lora_linear` of one input."""
    return lora_linear(x, *gate, scaling), lora_linear(x, *up, scaling)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight x / sqrt(mean(x²) + epsilon)` over the last dimension, as transformers' LlamaRMSNorm rounds it."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) up`."""
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
    """Group sums of LoRA-guided importance, (num_groups,) float32. Source: docs/algorithms.md, "Importance".

    Materialises three (out, in) temporaries. Half-precision inputs are computed in float32, double in double.
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
    """`t[index]`, contiguous."""
    return t.index_select(0, index.long()).contiguous()


def gather_cols(t: Tensor, index: Tensor) -> Tensor:
    """`t[:, index]`, contiguous."""
    return t.index_select(1, index.long()).contiguous()
