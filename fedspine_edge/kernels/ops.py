"""The public ops. They use the native kernels where these are built and faster, and plain torch elsewhere.

`importance_accumulate`, `lora_linear` and the ops with shared input are registered with torch.library (namespace
`fedspine`), so torch.compile treats each as one op with a schema, a fake implementation and a backward pass. While a
model is traced or exported, the reference implementation runs instead and decomposes into standard operators. The ops
validate their arguments once, and errors name the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import native, reference
from fedspine_edge.kernels.checks import check_adapter, check_matrix, require
from fedspine_edge.kernels.elementwise import rms_norm, swiglu
from fedspine_edge.kernels.lora_linear import lora_linear
from fedspine_edge.kernels.reference import Metric
from fedspine_edge.kernels.shared_input import Projection, lora_gate_up, lora_qkv

__all__ = [
    "Projection",
    "gather_cols",
    "gather_rows",
    "importance_accumulate",
    "lora_gate_up",
    "lora_linear",
    "lora_qkv",
    "rms_norm",
    "swiglu",
]

# --------------------------------------------------------------------------------------------- importance


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
    """Return the LoRA-guided importance of groups of rows or columns of W.

    The score of a group is the sum of `metric(Ghat * (W + scaling B A))` over its elements, where
    `Ghat = gB A + B gA - gB gA` estimates dL/dW from the gradients of the adapter. Neither Ghat nor another temporary
    of shape (out, in) is allocated. The op is deterministic: the same inputs give the same bits with any number of
    threads. Source: LoRAPrune, section 3.2; docs/concepts/pruning.md.

    Args:
        weight: Tensor of shape (out, in), with any strides.
        lora_A: Tensor of shape (r, in), with r between 1 and 256.
        lora_B: Tensor of shape (out, r).
        grad_A: Gradient of lora_A, without the loss scale of mixed-precision training.
        grad_B: Gradient of lora_B, likewise.
        scaling: lora_alpha / r.
        group_of_row: int32 tensor of shape (out,), the group of each row. Pass either this or `group_of_col`.
        group_of_col: int32 tensor of shape (in,), the group of each column.
        num_groups: Length of the result. The ids of groups are 0 to num_groups - 1. On CUDA any other id makes every
            score NaN, because an error would have to wait for the GPU.
        metric: "abs", "square" or "signed".

    Returns:
        float32 tensor of shape (num_groups,) on the device of the weight, accumulated in float32 or better. It is not
        differentiable.

    Raises:
        KernelError: An argument is invalid; the message names it.

    >>> weight, ones = torch.tensor([[10.0, 1.0], [3.0, 2.0]]), torch.ones(2, 1)
    >>> scores = importance_accumulate(
    ...     weight, ones.t(), ones, 2 * ones.t(), 3 * ones, 0.5, group_of_row=torch.tensor([0, 1]).int(), num_groups=2
    ... )
    >>> scores  # Ghat = 3 + 2 - 6 = -1, and W + 0.5 B A = W + 0.5
    tensor([12.,  6.])
    """
    op = "importance_accumulate"
    check_adapter(op, weight, lora_A, lora_B)
    check_matrix(op, "grad_A", grad_A, lora_A.shape[0], lora_A.shape[1], weight.device)
    check_matrix(op, "grad_B", grad_B, lora_B.shape[0], lora_B.shape[1], weight.device)
    require(metric in native.METRICS, op, f"metric is {metric!r}; it must be one of {', '.join(native.METRICS)}.")
    require(num_groups >= 1, op, f"num_groups is {num_groups}; it must be at least 1.")
    by_row = group_of_row is not None
    group = group_of_row if group_of_row is not None else group_of_col
    if group is None or (by_row and group_of_col is not None):
        raise KernelError(f"{op}: Pass exactly one of group_of_row and group_of_col.")
    name, length = ("group_of_row", weight.shape[0]) if by_row else ("group_of_col", weight.shape[1])
    require(
        tuple(group.shape) == (length,), op, f"{name} must have shape ({length},), but it has {tuple(group.shape)}."
    )
    require(group.dtype == torch.int32, op, f"{name} must be int32, but it is {group.dtype}.")
    require(group.device == weight.device, op, f"{name} is on {group.device}, but the weight is on {weight.device}.")
    with torch.no_grad():
        result: Tensor = torch.ops.fedspine.importance_accumulate(
            weight, lora_A, lora_B, grad_A, grad_B, scaling, group, by_row, num_groups, metric
        )
    return result


def _importance_accumulate(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: float,
    group: Tensor,
    by_row: bool,
    num_groups: int,
    metric: str,
) -> Tensor:
    factors = (lora_A, lora_B, grad_A, grad_B)
    if native.supports(weight) and all(t.dtype in native.DTYPES for t in factors):
        return native.importance_accumulate(weight, *factors, scaling, group, by_row, num_groups, metric)
    if weight.device.type == "cpu" and group.numel():
        low, high = int(group.min()), int(group.max())
        name, inside = "group_of_row" if by_row else "group_of_col", low >= 0 and high < num_groups
        outside = low if low < 0 else high
        require(inside, "importance_accumulate", f"{name} contains {outside}, outside 0..{num_groups - 1}.")
    rows, cols = (group, None) if by_row else (None, group)
    return reference.importance_accumulate(
        weight,
        *factors,
        scaling,
        group_of_row=rows,
        group_of_col=cols,
        num_groups=num_groups,
        metric=metric,  # type: ignore[arg-type]
    )


def _importance_accumulate_fake(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: float,
    group: Tensor,
    by_row: bool,
    num_groups: int,
    metric: str,
) -> Tensor:
    return weight.new_empty((num_groups,), dtype=torch.float32)


_importance_accumulate_op = torch.library.custom_op(
    "fedspine::importance_accumulate", _importance_accumulate, mutates_args=()
)
_importance_accumulate_op.register_fake(_importance_accumulate_fake)


# ------------------------------------------------------------------------------------------------- gather


def gather_rows(t: Tensor, index: Tensor) -> Tensor:
    """Return a contiguous copy of `t[index]`.

    The op waits for the GPU on CUDA to validate the indices, which is acceptable because pruning is rare.

    Args:
        t: Matrix or vector of any dtype.
        index: int32 or int64 vector. Rows may be repeated, in any order.

    Raises:
        KernelError: An argument or an index is invalid.

    >>> gather_rows(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 0]))
    tensor([[5, 6],
            [1, 2]])
    """
    return _gather("gather_rows", t, index, 0)


def gather_cols(t: Tensor, index: Tensor) -> Tensor:
    """Return a contiguous copy of `t[:, index]` for a matrix t; see `gather_rows`.

    >>> gather_cols(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([2, 0]))
    tensor([[3, 1],
            [6, 4]])
    """
    return _gather("gather_cols", t, index, 1)


def _gather(op: str, t: Tensor, index: Tensor, dim: int) -> Tensor:
    allowed = (1, 2) if dim == 0 else (2,)
    require(
        t.dim() in allowed, op, f"t must be a matrix{' or a vector' * (dim == 0)}, but it has shape {tuple(t.shape)}."
    )
    require(index.dim() == 1, op, f"index must be a vector, but it has shape {tuple(index.shape)}.")
    integral = index.dtype in (torch.int32, torch.int64)
    require(integral, op, f"index must be int32 or int64, but it is {index.dtype}.")
    require(index.device == t.device, op, f"index is on {index.device}, but t is on {t.device}.")
    if index.numel():
        low, high, limit = int(index.min()), int(index.max()), t.shape[dim]
        outside = low if low < 0 else high
        require(low >= 0 and high < limit, op, f"index contains {outside}, outside 0..{limit - 1}.")
    # For columns of 2-byte elements on a CPU the extension is three to five times as fast as torch. Otherwise torch was
    # as fast or faster, or nothing has been measured (CUDA): see csrc/cuda/gather.cu.
    if dim == 1 and t.element_size() == 2 and t.device.type == "cpu" and native.supports(t):
        return native.gather(t, index, by_row=False)
    return reference.gather_rows(t, index) if dim == 0 else reference.gather_cols(t, index)
