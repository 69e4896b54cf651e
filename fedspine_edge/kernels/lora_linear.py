"""lora_linear: a frozen linear with its adapter as one op; see `fedspine_edge.kernels.ops` for what is public."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.kernels import native, reference
from fedspine_edge.kernels.checks import check_adapter, decompose, fail
from fedspine_edge.kernels.quantized import QuantizedWeight, dense


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep_out: Tensor | None = None,
    keep_in: Tensor | None = None,
) -> Tensor:
    """`x Wᵀ + bias + scaling (x Aᵀ) Bᵀ` with W frozen: gradients flow to x, lora_A and lora_B.

    The base product is torch's BLAS; the low-rank half adds to it in place, so no (tokens, out) temporary beyond the
    result exists. Adapters of another dtype than x (float32 adapters on a bfloat16 model) are cast to x's, and get
    their gradients in their own. Under autocast everything is cast to the autocast dtype, as `F.linear` does.

    Args:
        x: (..., in_features), any strides, 0 tokens allowed.
        weight: (out_features, in_features). bias: (out_features,) or None. If one of the two wants a gradient, plain
            torch runs instead. A quantised weight is made dense for each product and dropped again.
        lora_A: (r, in_features), r in 1..256. lora_B: (out_features, r).
        scaling: lora_alpha / r.
        keep_out: (out_features,) int32 or int64. lora_B is then (full_out, r), the adapter of the unpruned model, and
            row i of W goes with its row keep_out[i]. Its gradient has the full shape, zero in the other rows.
        keep_in: (in_features,), likewise for the columns of lora_A (r, full_in). Both select anew in every call:
            for training on one layout, gather the adapter once instead (docs/decisions/0011).

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        KernelError: An argument does not fit; the message names it.
    """
    op = "lora_linear"
    if keep_out is not None:
        lora_B = _kept(op, "keep_out", keep_out, "lora_B", lora_B, 0)
    if keep_in is not None:
        lora_A = _kept(op, "keep_in", keep_in, "lora_A", lora_A, 1)
    x, weight, bias, lora_A, lora_B = prepare(op, x, weight, bias, lora_A, lora_B)
    if not is_frozen(weight, bias) or decompose():
        return reference.lora_linear(x, dense(weight), bias, lora_A, lora_B, scaling)
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.fedspine.lora_linear(x, dense(weight), bias, lora_A, lora_B, scaling)[0]
        return y
    return eager_lora_linear(x, weight, bias, lora_A, lora_B, scaling)


def eager_lora_linear(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """`lora_linear` of what `prepare` returned, with everything frozen that must be.

    The registered op costs 0.14 ms more per forward and backward, 2 % of a step of a small model on a CPU.
    """
    y: Tensor = _EagerLoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling)[0]
    return y


def prepare(
    op: str, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
) -> tuple[Tensor, Tensor | QuantizedWeight, Tensor | None, Tensor, Tensor]:
    """The arguments, checked and in one dtype. Raises `KernelError`, which names the argument that does not fit."""
    check_adapter(op, weight, lora_A, lora_B)
    out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        fail(op, f"x must have shape (..., {in_features}), it has {tuple(x.shape)}.")
    if x.device != weight.device:
        fail(op, f"x is on {x.device}, the weight is on {weight.device}.")
    if bias is not None:
        if bias.shape != (out_features,):
            fail(op, f"bias must have shape ({out_features},), it has {tuple(bias.shape)}.")
        if bias.device != weight.device:
            fail(op, f"bias is on {bias.device}, the weight is on {weight.device}.")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight.astype(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)
    if x.dtype != weight.dtype:
        fail(op, f"x is {x.dtype}, the weight is {weight.dtype}; they must agree.")
    if bias is not None and bias.dtype != weight.dtype:
        fail(op, f"bias is {bias.dtype}, the weight is {weight.dtype}.")
    return x, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype)


def _kept(op: str, name: str, index: Tensor, of: str, t: Tensor, dim: int) -> Tensor:
    """The kept rows or columns of the full model's adapter, differentiable."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        fail(op, f"{name} must be a vector of int32 or int64, it is {index.dtype} of shape {tuple(index.shape)}.")
    if t.dim() != 2 or t.device != index.device:
        fail(op, f"{of} must be a matrix on {index.device} like {name}, it is {tuple(t.shape)} on {t.device}.")
    # On CUDA torch's own check stops the process's CUDA context; asking here would wait for the GPU in every call.
    if index.device.type == "cpu" and index.numel() and not (torch.compiler.is_compiling() or decompose()):
        low, high, limit = int(index.min()), int(index.max()), t.shape[dim]
        if low < 0 or high >= limit:
            fail(op, f"{name} holds {low if low < 0 else high}, outside 0..{limit - 1} of {of}.")
    return t.index_select(dim, index)


def is_frozen(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> bool:
    """Whether neither weight nor bias wants a gradient: the ops have none for them."""
    wants = weight.requires_grad or (bias is not None and bias.requires_grad)
    return not wants or not torch.is_grad_enabled()


# The low-rank products, each by whichever is the faster.

# On a CPU the extension's only win is the projection to a few ranks; beyond these limits torch's GEMM is faster, and in
# bfloat16 always (MKL and oneDNN on a Zen 4 core: docs/kernels.md). Not measured on aarch64, so torch keeps it there.
_CPU_MAX_RANK = 12
_CPU_MIN_TOKENS = 64


def project(x: Tensor, small: Tensor, alpha: float) -> Tensor:
    """`alpha x (tokens, k) small (k, r)` → (tokens, r)."""
    if _all_native(x):
        return native.project(x, small, alpha, x.dtype)
    rank = small.shape[1]
    fits = x.device.type == "cpu" and rank <= _CPU_MAX_RANK and x.shape[0] >= _CPU_MIN_TOKENS
    if fits and x.dtype != torch.bfloat16 and native.cpu_isa() in native.MEASURED_ISAS and native.runs(x):
        return native.project(x, small, alpha, x.dtype)
    return _scaled_product(x, small, alpha)


def expand_(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """`out (tokens, n) += alpha left (tokens, r) right (r, n)`."""
    return native.expand_(out, left, right, alpha) if _all_native(out) else out.addmm_(left, right, alpha=alpha)


def gradient(left: Tensor, x: Tensor, alpha: float) -> Tensor:
    """`alpha leftᵀ (r, tokens) x (tokens, n)` → (r, n). MKL is four times slower at its transpose, xᵀ left."""
    if _all_native(x):
        out = torch.empty(left.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
        return native.gradient_(out, left, x, alpha)
    return _scaled_product(left.t(), x, alpha)


def gradient_transposed(left: Tensor, x: Tensor, alpha: float) -> Tensor:
    """`alpha xᵀ (n, tokens) left (tokens, r)` → (n, r), contiguous as lora_B is."""
    if _all_native(x):
        out = torch.empty(x.shape[1], left.shape[1], dtype=x.dtype, device=x.device)
        native.gradient_(out.t(), left, x, alpha)
        return out
    return _scaled_product(x.t(), left, alpha) if x.is_cuda else gradient(left, x, alpha).t().contiguous()


def _scaled_product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if alpha == 1.0:
        return a @ b
    # On a GPU each operator is a launch, of which a small batch has as many as it has work; on a CPU `mul_` is cheaper.
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=alpha) if a.is_cuda else (a @ b).mul_(alpha)


def _all_native(x: Tensor) -> bool:
    """Whether the CUDA kernels of the low-rank half run: only on request, until they have been measured on a GPU."""
    return x.is_cuda and os.environ.get("FEDSPINE_LORA_LINEAR") == "native" and native.runs(x)


def _lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    y = functional.linear(flat, weight, bias)
    low = project(flat, lora_A.t(), 1.0)
    expand_(y, low, lora_B.t(), scaling)
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
    grad_low = project(grad, lora_B, scaling)
    if needs_x:
        grad_x = expand_(grad_x, grad_low, lora_A, 1.0).view(x.shape)
    return grad_x, gradient(grad_low, flat, 1.0), gradient_transposed(low, grad, scaling)


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
    """The same forward and backward without the dispatcher in between.

    What backward keeps of a quantised weight is its codes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        y, low = _lora_linear(x, dense(weight), bias, lora_A, lora_B, scaling)
        ctx.quantised, ctx.scaling = weight if isinstance(weight, QuantizedWeight) else None, scaling
        ctx.save_for_backward(x, None if ctx.quantised else weight, lora_A, lora_B, low)
        ctx.mark_non_differentiable(low)
        return y, low

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, low = ctx.saved_tensors
        needs_x: bool = ctx.needs_input_grad[0]
        if ctx.quantised and needs_x:
            weight = ctx.quantised.dense()
        grad_x, grad_A, grad_B = _lora_linear_backward(grad, x, weight, lora_A, lora_B, low, ctx.scaling, needs_x)
        return grad_x if needs_x else None, None, None, grad_A, grad_B, None


# Registration: what torch.compile sees.

torch.library.custom_op("fedspine::lora_linear_backward", _lora_linear_backward, mutates_args=()).register_fake(
    _fake_lora_linear_backward
)
_registered = torch.library.custom_op("fedspine::lora_linear", _lora_linear, mutates_args=())
_registered.register_fake(_fake_lora_linear)
_registered.register_autograd(_backward, setup_context=_save_for_backward)
