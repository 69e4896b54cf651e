"""The op lora_linear: a frozen linear layer with its LoRA adapter."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.kernels import native, reference
from fedspine_edge.kernels.checks import check_adapter, fail, must_decompose
from fedspine_edge.kernels.quantized import QuantizedWeight, dense


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """Return `x Wᵀ + bias + scaling (x Aᵀ) Bᵀ` with a frozen W. Gradients flow to x, lora_A and lora_B.

    The base product is torch's GEMM. The low-rank product is added to it in place, so the result is the only
    temporary of shape (tokens, out). Adapters of another dtype than x (float32 adapters on a bfloat16 model) are cast
    to the dtype of x and receive their gradients in their own dtype. Under autocast all arguments are cast to the
    autocast dtype, as in `F.linear`.

    Args:
        x: Tensor of shape (..., in_features), with any strides and any number of tokens.
        weight: Tensor or quantized weight of shape (out_features, in_features). A quantized weight is dequantized for
            each product. If weight or bias requires a gradient, the reference implementation runs.
        bias: Tensor of shape (out_features,), or None.
        lora_A: Tensor of shape (r, in_features), with r between 1 and 256.
        lora_B: Tensor of shape (out_features, r).
        scaling: lora_alpha / r.

    Returns:
        Tensor of shape (..., out_features) in the dtype of x.

    Raises:
        KernelError: An argument is invalid; the message names it.

    >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    >>> lora_A, lora_B = torch.tensor([[1.0, -1.0]]), torch.tensor([[10.0]])
    >>> lora_linear(x, weight, None, lora_A, lora_B, scaling=0.5)
    tensor([[6.]])
    """
    x, weight, bias, lora_A, lora_B = prepare("lora_linear", x, weight, bias, lora_A, lora_B)
    if not is_frozen(weight, bias) or must_decompose():
        return reference.lora_linear(x, dense(weight), bias, lora_A, lora_B, scaling)
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.fedspine.lora_linear(x, dense(weight), bias, lora_A, lora_B, scaling)[0]
        return y
    return eager_lora_linear(x, weight, bias, lora_A, lora_B, scaling)


def eager_lora_linear(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Return `lora_linear` for arguments that `prepare` has returned, with a frozen weight and bias.

    It bypasses the dispatcher: the registered op takes 0.14 ms more per forward and backward pass, 2 % of a step of a
    small model on a CPU.
    """
    y: Tensor = _EagerLoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling)[0]
    return y


def prepare(
    op: str, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
) -> tuple[Tensor, Tensor | QuantizedWeight, Tensor | None, Tensor, Tensor]:
    """Validate the arguments and return them in one dtype. Raises a `KernelError` that names the invalid argument."""
    check_adapter(op, weight, lora_A, lora_B)
    out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        fail(op, f"x must have shape (..., {in_features}), but it has {tuple(x.shape)}.")
    if x.device != weight.device:
        fail(op, f"x is on {x.device}, but the weight is on {weight.device}.")
    if bias is not None:
        if bias.shape != (out_features,):
            fail(op, f"bias must have shape ({out_features},), but it has {tuple(bias.shape)}.")
        if bias.device != weight.device:
            fail(op, f"bias is on {bias.device}, but the weight is on {weight.device}.")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight.astype(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)
    if x.dtype != weight.dtype:
        fail(op, f"x is {x.dtype}, but the weight is {weight.dtype}. They must have the same dtype.")
    if bias is not None and bias.dtype != weight.dtype:
        fail(op, f"bias is {bias.dtype}, but the weight is {weight.dtype}. They must have the same dtype.")
    return x, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype)


def is_frozen(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> bool:
    """Return whether neither weight nor bias needs a gradient, which the ops do not compute."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return not trained or not torch.is_grad_enabled()


# ------------------------------------------------------------------------------------ the low-rank products

# On a CPU the extension is faster only for projections to a few ranks of at least this many tokens. Beyond these
# limits, and in bfloat16 always, torch's GEMM is faster (docs/decisions/0010). aarch64 was not measured and uses torch.
_CPU_MAX_RANK = 12
_CPU_MIN_TOKENS = 64


def project(x: Tensor, small: Tensor, alpha: float) -> Tensor:
    """Return `alpha x small`, (tokens, r), for x (tokens, k) and small (k, r)."""
    if _uses_cuda_kernels(x):
        return native.project(x, small, alpha, x.dtype)
    rank = small.shape[1]
    fits = x.device.type == "cpu" and rank <= _CPU_MAX_RANK and x.shape[0] >= _CPU_MIN_TOKENS
    if fits and x.dtype != torch.bfloat16 and native.cpu_isa() in native.MEASURED_ISAS and native.supports(x):
        return native.project(x, small, alpha, x.dtype)
    return _scaled_product(x, small, alpha)


def expand_(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Add `alpha left right` to out (tokens, n) in place, for left (tokens, r) and right (r, n)."""
    return native.expand_(out, left, right, alpha) if _uses_cuda_kernels(out) else out.addmm_(left, right, alpha=alpha)


def gradient(left: Tensor, x: Tensor, alpha: float) -> Tensor:
    """Return `alpha leftᵀ x`, (r, n), for left (tokens, r) and x (tokens, n).

    MKL takes four times as long for the transpose, xᵀ left.
    """
    if _uses_cuda_kernels(x):
        out = torch.empty(left.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
        return native.gradient_(out, left, x, alpha)
    return _scaled_product(left.t(), x, alpha)


def gradient_transposed(left: Tensor, x: Tensor, alpha: float) -> Tensor:
    """Return `alpha xᵀ left`, (n, r) and contiguous like lora_B, for left (tokens, r) and x (tokens, n)."""
    if _uses_cuda_kernels(x):
        out = torch.empty(x.shape[1], left.shape[1], dtype=x.dtype, device=x.device)
        native.gradient_(out.t(), left, x, alpha)
        return out
    return _scaled_product(x.t(), left, alpha) if x.is_cuda else gradient(left, x, alpha).t().contiguous()


def _scaled_product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if alpha == 1.0:
        return a @ b
    # On a GPU addmm_ saves a launch, which matters for small batches. On a CPU mul_ is cheaper.
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=alpha) if a.is_cuda else (a @ b).mul_(alpha)


def _uses_cuda_kernels(x: Tensor) -> bool:
    """Return whether the CUDA kernels compute the low-rank products: on request only, until a GPU has measured them."""
    return x.is_cuda and os.environ.get("FEDSPINE_LORA_LINEAR") == "native" and native.supports(x)


# ---------------------------------------------------------------------- fedspine::lora_linear and its backward


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the result and h = x Aᵀ, which the backward pass needs."""
    flat = x.reshape(-1, x.shape[-1])
    y = functional.linear(flat, weight, bias)
    low = project(flat, lora_A.t(), 1.0)
    expand_(y, low, lora_B.t(), scaling)
    return y.view(*x.shape[:-1], weight.shape[0]), low


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((y.numel() // weight.shape[0] if weight.shape[0] else 0, lora_A.shape[0]))


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, low: Tensor, scaling: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dX, dA, dB); dX is empty unless `needs_x`.

    With dh = s dY B: dA = dhᵀ x, dB = s dYᵀ h, dX = dY W + dh A.
    """
    flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_x = grad @ weight if needs_x else grad.new_empty(0)
    grad_low = project(grad, lora_B, scaling)
    if needs_x:
        grad_x = expand_(grad_x, grad_low, lora_A, 1.0).view(x.shape)
    return grad_x, gradient(grad_low, flat, 1.0), gradient_transposed(low, grad, scaling)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, low: Tensor, scaling: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape) if needs_x else x.new_empty(0)
    return grad_x, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, ctx.scaling = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, low = ctx.saved_tensors
    needs_x: bool = ctx.needs_input_grad[0]
    grad_x, grad_A, grad_B = torch.ops.fedspine.lora_linear_backward(
        grad, x, weight, lora_A, lora_B, low, ctx.scaling, needs_x
    )
    return grad_x if needs_x else None, None, None, grad_A, grad_B, None


_backward_op = torch.library.custom_op("fedspine::lora_linear_backward", _backward, mutates_args=())
_backward_op.register_fake(_backward_fake)
_forward_op = torch.library.custom_op("fedspine::lora_linear", _forward, mutates_args=())
_forward_op.register_fake(_forward_fake)
_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


class _EagerLoraLinear(torch.autograd.Function):  # type: ignore[misc]
    """The same forward and backward pass without the dispatcher.

    Of a quantized weight, only the codes are saved for the backward pass.
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
        y, low = _forward(x, dense(weight), bias, lora_A, lora_B, scaling)
        ctx.quantized, ctx.scaling = weight if isinstance(weight, QuantizedWeight) else None, scaling
        ctx.save_for_backward(x, None if ctx.quantized else weight, lora_A, lora_B, low)
        ctx.mark_non_differentiable(low)
        return y, low

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, low = ctx.saved_tensors
        needs_x: bool = ctx.needs_input_grad[0]
        if ctx.quantized and needs_x:
            weight = ctx.quantized.dense()
        grad_x, grad_A, grad_B = _backward(grad, x, weight, lora_A, lora_B, low, ctx.scaling, needs_x)
        return grad_x if needs_x else None, None, None, grad_A, grad_B, None
