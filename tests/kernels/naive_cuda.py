"""Calls of the naive CUDA kernels (csrc/cuda/naive), the second oracle of the kernel tests beside float64 torch.

They run wherever the fast CUDA kernels run: on a GPU, or in the emulation once `native._call` is replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedspine_edge.kernels import native


def importance_accumulate(
    matrices: tuple[Tensor, ...], scaling: float, group: Tensor, by_row: bool, num_groups: int, metric: str
) -> Tensor:
    """Return the group sums for matrices (weight, lora_A, lora_B, grad_A, grad_B)."""
    op, weight = "importance_accumulate", matrices[0]
    scores = torch.empty(num_groups, dtype=torch.float32, device=weight.device)
    operands = [native._matrix(t) for t in matrices]
    options = (scaling, group.data_ptr(), by_row, num_groups, native.METRICS[metric], scores.data_ptr())
    native._call(op, f"{op}_naive", weight, *operands, *options)
    return scores


def product(left: Tensor, right: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """Return `alpha left right`, or add it to `out` in place."""
    accumulate = out is not None
    result = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
    operands = [native._matrix(t) for t in (result, left, right)]
    native._call("lora_linear", "lora_linear_product_naive", left, *operands, alpha, accumulate)
    return result


def gather(t: Tensor, index: Tensor, by_row: bool) -> Tensor:
    """Return a copy of rows or columns of the matrix `t`."""
    shape = (index.numel(), t.shape[1]) if by_row else (t.shape[0], index.numel())
    out = torch.empty(shape, dtype=t.dtype, device=t.device)
    operands = [native._matrix(m) for m in (out, t)]
    native._call("gather", "gather_naive", t, *operands, index.data_ptr(), by_row, t.element_size())
    return out
