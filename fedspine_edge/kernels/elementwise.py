"""The ops rms_norm and swiglu: the norm and the gate of a decoder.

Both save only their inputs for the backward pass, the norm also one number per row, and recompute the rest. Autograd
over plain operators also saves silu(gate) and, for 16-bit inputs, a float32 copy. The native kernels run on the CPU
only; on CUDA the ops are torch operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.kernels import native, reference
from fedspine_edge.kernels.checks import fail, must_decompose

# The numbers of elements from which the ops were measured to be faster than autograd over plain operators
# (docs/results/kernels.md). What the backward pass saves does not matter below them.
_CPU_MIN_NORM, _CPU_MIN_GATE = 1 << 15, 1 << 17


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return `weight x / sqrt(mean(x²) + epsilon)` over the last dimension, computed in float32 or better.

    Args:
        x: Tensor of shape (..., n), with any strides.
        weight: Tensor of shape (n,). If it requires a gradient, the reference implementation runs.
        epsilon: Constant that is added to the mean of the squares.

    Returns:
        Tensor of shape (..., n) in the dtype that x and weight promote to.

    Raises:
        KernelError: The weight does not match x.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), epsilon=0.0)
    tensor([[0.8485, 2.2627]])
    """
    if x.dim() < 1:
        fail("rms_norm", "x must have at least one dimension, but it is a scalar.")
    if not x.is_floating_point():
        fail("rms_norm", f"x must be floating point, but it is {x.dtype}.")
    if weight.shape != x.shape[-1:]:
        fail("rms_norm", f"weight must have shape ({x.shape[-1]},), but it has {tuple(weight.shape)}.")
    if x.device != weight.device:
        fail("rms_norm", f"x is on {x.device}, but the weight is on {weight.device}.")
    trained = weight.requires_grad and torch.is_grad_enabled()
    small = _is_small(x, _CPU_MIN_NORM)
    if trained or x.dtype != weight.dtype or small or torch.compiler.is_compiling() or must_decompose():
        return reference.rms_norm(x, weight, epsilon)
    if x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm"):  # torch >= 2.9 has fused kernels for a GPU
        return functional.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)  # autocast may return float32
    y: Tensor = _RmsNorm.apply(x, weight, epsilon)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) up`, element by element.

    Args:
        gate: Tensor of any shape and strides.
        up: Tensor of the same shape, dtype and device.

    Raises:
        KernelError: The two tensors differ in shape, dtype or device.

    >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        fail(
            "swiglu",
            f"gate is {gate.dtype} {tuple(gate.shape)} on {gate.device}, but up is {up.dtype} {tuple(up.shape)} on "
            f"{up.device}. They must have the same dtype, shape and device.",
        )
    if not gate.is_floating_point():
        fail("swiglu", f"gate must be floating point, but it is {gate.dtype}.")
    if _is_small(gate, _CPU_MIN_GATE) or torch.compiler.is_compiling() or must_decompose():
        return reference.swiglu(gate, up)
    y: Tensor = _Swiglu.apply(gate, up)
    return y


def _is_small(t: Tensor, limit: int) -> bool:
    return bool(t.numel() == 0 or (t.device.type == "cpu" and t.numel() < limit))


def _uses_native(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and native.cpu_isa() in native.MEASURED_ISAS and native.supports(x)


def _as_rows(t: Tensor) -> Tensor:
    """Return (..., n) as a matrix whose rows are contiguous."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _widen(t: Tensor) -> Tensor:
    """Return t in float64 if it is float64, else in float32."""
    return t if t.dtype == torch.float64 else t.float()


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if _uses_native(x):
            y, rstd = native.rms_norm(_as_rows(x), weight.contiguous(), epsilon)
            y = y.view(x.shape)
        else:
            wide = _widen(x)
            rstd = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt_()
            y = weight * (wide * rstd).to(x.dtype)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        if _uses_native(x):
            grad_x = native.rms_norm_backward(_as_rows(grad), _as_rows(x), weight.contiguous(), rstd)
            return grad_x.view(x.shape), None, None
        scaled = _widen(grad * weight)
        normed = _widen(x) * rstd
        slope = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed.mul_(slope)).mul_(rstd).to(x.dtype), None, None


class _Swiglu(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if _uses_native(gate):
            return native.swiglu(_as_rows(gate), _as_rows(up)).view(gate.shape)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if _uses_native(gate):
            grad_gate, grad_up = native.swiglu_backward(_as_rows(grad), _as_rows(gate), _as_rows(up))
            return grad_gate.view(gate.shape), grad_up.view(up.shape)
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)
