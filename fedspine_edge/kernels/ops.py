"""The package's ops: native on CPU and CUDA where the extension is built and wins, plain torch otherwise.

Registered with torch.library (namespace `fedspine`), so that eager mode, autograd and torch.compile see one op with
a schema, a fake implementation and a backward. While a model is traced or exported the plain-torch twin runs instead
and decomposes into standard operators. Arguments are checked here, once, and errors name the argument.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import native, reference
from fedspine_edge.kernels.reference import Metric

__all__ = ["gather_cols", "gather_rows", "importance_accumulate", "lora_linear"]


def _require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise KernelError(f"{op}: {message}")


def _check_matrix(op: str, name: str, t: Tensor, rows: int | None, cols: int | None, device: torch.device) -> None:
    """Raises `KernelError` unless `t` is a matrix of the given size on `device`; None is any size."""
    _require(t.dim() == 2, op, f"{name} must be a matrix, it has shape {tuple(t.shape)}.")
    wanted = (t.shape[0] if rows is None else rows, t.shape[1] if cols is None else cols)
    _require(tuple(t.shape) == wanted, op, f"{name} must have shape {wanted}, it has {tuple(t.shape)}.")
    _require(t.device == device, op, f"{name} is on {t.device}, the weight is on {device}.")
    _require(t.is_floating_point(), op, f"{name} must be floating point, it is {t.dtype}.")


def _check_adapter(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    _check_matrix(op, "weight", weight, None, None, weight.device)
    rank = lora_A.shape[0]
    _require(1 <= rank <= native.MAX_RANK, op, f"lora_A has rank {rank}; 1 to {native.MAX_RANK} are supported.")
    _check_matrix(op, "lora_A", lora_A, None, weight.shape[1], weight.device)
    _check_matrix(op, "lora_B", lora_B, weight.shape[0], rank, weight.device)


def _decompose() -> bool:
    """Whether someone is recording a graph that must hold standard operators only (ONNX, torch.export, jit)."""
    exporting = getattr(torch.compiler, "is_exporting", None)
    return torch.jit.is_tracing() or (exporting is not None and exporting())


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
    _check_adapter(op, weight, lora_A, lora_B)
    _check_matrix(op, "grad_A", grad_A, lora_A.shape[0], lora_A.shape[1], weight.device)
    _check_matrix(op, "grad_B", grad_B, lora_B.shape[0], lora_B.shape[1], weight.device)
    _require(metric in native.METRICS, op, f"metric is {metric!r}; it must be one of {', '.join(native.METRICS)}.")
    _require(num_groups >= 1, op, f"num_groups is {num_groups}; it must be at least 1.")
    by_row = group_of_row is not None
    group = group_of_row if group_of_row is not None else group_of_col
    if group is None or (by_row and group_of_col is not None):
        raise KernelError(f"{op}: pass exactly one of group_of_row and group_of_col.")
    name, length = ("group_of_row", weight.shape[0]) if by_row else ("group_of_col", weight.shape[1])
    _require(tuple(group.shape) == (length,), op, f"{name} must have shape ({length},), it has {tuple(group.shape)}.")
    _require(group.dtype == torch.int32, op, f"{name} must be int32, it is {group.dtype}.")
    _require(group.device == weight.device, op, f"{name} is on {group.device}, the weight is on {weight.device}.")
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
        _require(inside, "importance_accumulate", f"{name} holds {bad}, outside 0..{num_groups - 1}.")
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


# -------------------------------------------------------------------------------------------- lora_linear


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """`x Wᵀ + bias + scaling (x Aᵀ) Bᵀ` with W frozen: gradients flow to x, lora_A and lora_B.

    The base product is torch's BLAS; the low-rank half adds to it in place, so no (tokens, out) temporary beyond the
    result exists. Adapters of another dtype than x (float32 adapters on a bfloat16 model) are cast to x's, and get
    their gradients in their own. Under autocast everything is cast to the autocast dtype, as `F.linear` does.

    Args:
        x: (..., in_features), any strides, 0 tokens allowed.
        weight: (out_features, in_features). bias: (out_features,) or None. If one of the two wants a gradient, plain
            torch runs instead.
        lora_A: (r, in_features), r in 1..256. lora_B: (out_features, r).
        scaling: lora_alpha / r.

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        KernelError: An argument does not fit; the message names it.
    """
    op = "lora_linear"
    _check_adapter(op, weight, lora_A, lora_B)
    out_features, in_features = weight.shape
    fits = x.dim() >= 1 and x.shape[-1] == in_features
    _require(fits, op, f"x must have shape (..., {in_features}), it has {tuple(x.shape)}.")
    _require(x.device == weight.device, op, f"x is on {x.device}, the weight is on {weight.device}.")
    if bias is not None:
        shape = tuple(bias.shape)
        _require(shape == (out_features,), op, f"bias must have shape ({out_features},), it has {shape}.")
        _require(bias.device == weight.device, op, f"bias is on {bias.device}, the weight is on {weight.device}.")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _require(x.dtype == weight.dtype, op, f"x is {x.dtype}, the weight is {weight.dtype}; they must agree.")
    if bias is not None:
        _require(bias.dtype == weight.dtype, op, f"bias is {bias.dtype}, the weight is {weight.dtype}.")
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad)) or not torch.is_grad_enabled()
    if not frozen or _decompose():
        return reference.lora_linear(x, weight, bias, lora_A, lora_B, scaling)
    y: Tensor
    if torch.compiler.is_compiling():
        y, _ = torch.ops.fedspine.lora_linear(x, weight, bias, lora_A, lora_B, scaling)
    else:
        # The registered op costs 0.14 ms more per forward and backward, 2 % of a step of a small model on a CPU.
        y, _ = _EagerLoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling)
    return y


# On a CPU the extension's only win is the projection to a few ranks; beyond these limits torch's GEMM is faster, and in
# bfloat16 always (MKL and oneDNN on a Zen 4 core: docs/kernels.md). Not measured on aarch64, so torch keeps it there.
_CPU_MAX_RANK = 12
_CPU_MIN_TOKENS = 64
_CPU_ISAS = ("avx2", "avx512")


def _project(x: Tensor, small: Tensor, alpha: float) -> Tensor:
    """`alpha x (tokens, k) small (k, r)` by whichever is the faster."""
    rank = small.shape[1]
    fits = x.device.type == "cpu" and rank <= _CPU_MAX_RANK and x.shape[0] >= _CPU_MIN_TOKENS
    if fits and x.dtype != torch.bfloat16 and native.cpu_isa() in _CPU_ISAS and native.runs(x):
        return native.project(x, small, alpha, x.dtype)
    return (x @ small).mul_(alpha) if alpha != 1.0 else x @ small


def _all_native(x: Tensor) -> bool:
    """Whether the CUDA kernels of the low-rank half run: only on request, until they have been measured on a GPU."""
    return x.is_cuda and os.environ.get("FEDSPINE_LORA_LINEAR") == "native" and native.runs(x)


def _lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    y = functional.linear(flat, weight, bias)
    if _all_native(flat):
        low = native.project(flat, lora_A.t(), 1.0, flat.dtype)
        native.expand_(y, low, lora_B.t(), scaling)
    else:
        low = _project(flat, lora_A.t(), 1.0)
        y.addmm_(low, lora_B.t(), alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0]), low


def _fake_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((y.numel() // weight.shape[0] if weight.shape[0] else 0, lora_A.shape[0]))


def _lora_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, low: Tensor, scaling: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dA, dB); dX is empty unless `needs_x`. With dh = s dY B: dA = dhᵀ x, dB = s dYᵀ h, dX = dY W + dh A."""
    flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_x = grad @ weight if needs_x else grad.new_empty(0)
    if _all_native(grad):
        grad_low = native.project(grad, lora_B, scaling, grad.dtype)
        grad_A = native.gradient(grad_low, flat, 1.0, lora_A.dtype)
        grad_B = native.gradient(low, grad, scaling, lora_B.dtype)
        if needs_x:
            native.expand_(grad_x, grad_low, lora_A, 1.0)
    else:
        grad_low = _project(grad, lora_B, scaling)
        grad_A = grad_low.t() @ flat
        grad_B = (low.t() @ grad).mul_(scaling)  # as hᵀ dY: MKL is four times faster than with dYᵀ h
        if needs_x:
            grad_x.addmm_(grad_low, lora_A)
    grad_B = grad_B.t().contiguous()
    return grad_x.view(x.shape) if needs_x else grad_x, grad_A, grad_B


def _fake_lora_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, low: Tensor, scaling: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape) if needs_x else x.new_empty(0)
    return grad_x, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, ctx.scaling = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, low = ctx.saved_tensors
    needs_x: bool = ctx.needs_input_grad[0]
    grad_x, grad_A, grad_B = torch.ops.fedspine.lora_linear_backward(
        grad, x, weight, lora_A, lora_B, low, ctx.scaling, needs_x
    )
    return grad_x if needs_x else None, None, None, grad_A, grad_B, None


class _EagerLoraLinear(torch.autograd.Function):  # type: ignore[misc]
    """The same forward and backward without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        output = _lora_linear(x, weight, bias, lora_A, lora_B, scaling)
        _save_for_backward(ctx, (x, weight, bias, lora_A, lora_B, scaling), output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, low = ctx.saved_tensors
        needs_x: bool = ctx.needs_input_grad[0]
        grad_x, grad_A, grad_B = _lora_linear_backward(grad, x, weight, lora_A, lora_B, low, ctx.scaling, needs_x)
        return grad_x if needs_x else None, None, None, grad_A, grad_B, None


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
    _require(t.dim() in allowed, op, f"t has shape {tuple(t.shape)}; it must be a matrix{' or vector' * (dim == 0)}.")
    _require(index.dim() == 1, op, f"index must be a vector, it has shape {tuple(index.shape)}.")
    integral = index.dtype in (torch.int32, torch.int64)
    _require(integral, op, f"index must be int32 or int64, it is {index.dtype}.")
    _require(index.device == t.device, op, f"index is on {index.device}, t is on {t.device}.")
    if index.numel():
        low, high, limit = int(index.min()), int(index.max()), t.shape[dim]
        bad = low if low < 0 else high
        _require(low >= 0 and high < limit, op, f"index holds {bad}, outside 0..{limit - 1}.")
    # Columns of 2-byte elements: five times faster than torch on a CPU. Everything else is torch's, as fast or faster.
    if dim == 1 and t.element_size() == 2 and t.device.type == "cpu" and native.runs(t):
        return native.gather(t, index, by_row=False)
    return reference.gather_rows(t, index) if dim == 0 else reference.gather_cols(t, index)


# ------------------------------------------------------------------------------------------- registration

torch.library.custom_op("fedspine::importance_accumulate", _importance_accumulate, mutates_args=()).register_fake(
    _fake_importance_accumulate
)
torch.library.custom_op("fedspine::lora_linear_backward", _lora_linear_backward, mutates_args=()).register_fake(
    _fake_lora_linear_backward
)
_registered = torch.library.custom_op("fedspine::lora_linear", _lora_linear, mutates_args=())
_registered.register_fake(_fake_lora_linear)
_registered.register_autograd(_backward, setup_context=_save_for_backward)
