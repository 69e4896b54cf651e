"""The package's ops: native on CPU and CUDA where the extension is built and wins, plain torch otherwise.

Registered with torch.library (namespace `fedspine`), so that eager mode, autograd and torch.compile see one op with
a schema, a fake implementation and a backward. While a model is traced or exported the plain-torch twin runs instead
and decomposes into standard operators. Arguments are checked here, once, and errors name the argument.
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
    """Sum over each group's elements of `metric(Ghat * (W + scaling B A))`, the LoRA-guided importance of W.

    `Ghat = gB A + B gA - gB gA` estimates dL/dW from the adapter's gradients alone; neither it nor any other
    (out, in) temporary is formed. Deterministic: same inputs, same bits, whatever the number of threads.
    Source: LoRAPrune, section 3.2; docs/algorithms.md.

    Args:
        weight: (out, in), any strides.
        lora_A, grad_A: (r, in), r in 1..256. lora_B, grad_B: (out, r). Gradients without the AMP loss scale.
        scaling: lora_alpha / r.
        group_of_row: (out,) int32, the group of each row; or
        group_of_col: (in,) int32, the group of each column. Exactly one of the two.
        num_groups: Length of the result; ids must lie in 0..num_groups - 1. On CUDA an id outside makes every score
            NaN, since an error would have to wait for the GPU.
        metric: "abs", "square" or "signed".

    Returns:
        (num_groups,) float32 on the weight's device, accumulated in float32 or better. Not differentiable.

    Raises:
        KernelError: An argument does not fit; the message names it.
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
        raise KernelError(f"{op}: pass exactly one of group_of_row and group_of_col.")
    name, length = ("group_of_row", weight.shape[0]) if by_row else ("group_of_col", weight.shape[1])
    require(tuple(group.shape) == (length,), op, f"{name} must have shape ({length},), it has {tuple(group.shape)}.")
    require(group.dtype == torch.int32, op, f"{name} must be int32, it is {group.dtype}.")
    require(group.device == weight.device, op, f"{name} is on {group.device}, the weight is on {weight.device}.")
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
    if native.runs(weight) and all(t.dtype in native.DTYPES for t in factors):
        return native.importance_accumulate(weight, *factors, scaling, group, by_row, num_groups, metric)
    if weight.device.type == "cpu" and group.numel():
        low, high = int(group.min()), int(group.max())
        bad = low if low < 0 else high
        name = "group_of_row" if by_row else "group_of_col"
        inside = low >= 0 and high < num_groups
        require(inside, "importance_accumulate", f"{name} holds {bad}, outside 0..{num_groups - 1}.")
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


def _fake_importance_accumulate(
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


# ------------------------------------------------------------------------------------------------- gather


def gather_rows(t: Tensor, index: Tensor) -> Tensor:
    """`t[index]` as a contiguous copy: rows of a vector or matrix, in the order of `index`.

    Raises `KernelError` for an index outside (on CUDA that check waits for the GPU; compaction is rare).
    """
    return _gather("gather_rows", t, index, 0)


def gather_cols(t: Tensor, index: Tensor) -> Tensor:
    """`t[:, index]` as a contiguous copy of a matrix; see `gather_rows`."""
    return _gather("gather_cols", t, index, 1)


def _gather(op: str, t: Tensor, index: Tensor, dim: int) -> Tensor:
    allowed = (1, 2) if dim == 0 else (2,)
    require(t.dim() in allowed, op, f"t has shape {tuple(t.shape)}; it must be a matrix{' or vector' * (dim == 0)}.")
    require(index.dim() == 1, op, f"index must be a vector, it has shape {tuple(index.shape)}.")
    integral = index.dtype in (torch.int32, torch.int64)
    require(integral, op, f"index must be int32 or int64, it is {index.dtype}.")
    require(index.device == t.device, op, f"index is on {index.device}, t is on {t.device}.")
    if index.numel():
        low, high, limit = int(index.min()), int(index.max()), t.shape[dim]
        bad = low if low < 0 else high
        require(low >= 0 and high < limit, op, f"index holds {bad}, outside 0..{limit - 1}.")
    # Columns of 2-byte elements: five times faster than torch on a CPU. Everything else is torch's, as fast or faster.
    if dim == 1 and t.element_size() == 2 and t.device.type == "cpu" and native.runs(t):
        return native.gather(t, index, by_row=False)
    return reference.gather_rows(t, index) if dim == 0 else reference.gather_cols(t, index)


# ------------------------------------------------------------------------------------------- registration

torch.library.custom_op("fedspine::importance_accumulate", _importance_accumulate, mutates_args=()).register_fake(
    _fake_importance_accumulate
)
