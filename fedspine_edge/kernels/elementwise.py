"""rms_norm and swiglu: a decoder's norm and gate, which plain autograd computes in many passes over memory.

Both keep their inputs alone for the backward pass, a norm also a number per row, and compute the rest again. Autograd
over plain operators keeps silu(gate) as well, and of 16-bit tokens a float32 copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.kernels import native, reference
from fedspine_edge.kernels.checks import decompose, fail

# Where the extension's loops were measured and won (docs/kernels.md); elsewhere torch's operators compute the same from
# the same inputs. Of few elements autograd over plain operators is the fastest and what it keeps does not matter.
_CPU_MIN_NORM, _CPU_MIN_GATE = 1 << 15, 1 << 17


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight x / sqrt(mean(x²) + epsilon)` over the last dimension, in float32 or better inside.

    Args:
        x: (..., n), any strides.
        weight: (n,). If it wants a gradient, plain torch runs instead.
        epsilon: Added to the mean of the squares.

    Returns:
        (..., n) in the dtype that x and weight promote to.

    Raises:
        KernelError: weight does not fit x.
    """
    if x.dim() < 1:
        fail("rms_norm", "x must have a last dimension to normalise, it is a single number.")
    if not x.is_floating_point():
        fail("rms_norm", f"x must be floating point, it is {x.dtype}.")
    if weight.shape != x.shape[-1:]:
        fail("rms_norm", f"weight must have shape ({x.shape[-1]},), it has {tuple(weight.shape)}.")
    if x.device != weight.device:
        fail("rms_norm", f"x is on {x.device}, the weight is on {weight.device}.")
    trained = weight.requires_grad and torch.is_grad_enabled()
    if trained or x.dtype != weight.dtype or _small(x, _CPU_MIN_NORM) or torch.compiler.is_compiling() or decompose():
        return reference.rms_norm(x, weight, epsilon)
    if x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm"):  # torch has kernels of its own for a GPU since 2.9
        return functional.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)  # which autocast may run in float32
    y: Tensor = _RmsNorm.apply(x, weight, epsilon)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) up`, elementwise.

    Args:
        gate: Any shape and strides.
        up: As gate, of its dtype and device.

    Raises:
        KernelError: The two differ in shape, dtype or device.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        fail(
            "swiglu",
            f"gate is {gate.dtype} {tuple(gate.shape)} on {gate.device}, up is {up.dtype} {tuple(up.shape)} on "
            f"{up.device}; they must agree.",
        )
    if not gate.is_floating_point():
        fail("swiglu", f"gate must be floating point, it is {gate.dtype}.")
    if _small(gate, _CPU_MIN_GATE) or torch.compiler.is_compiling() or decompose():
        return reference.swiglu(gate, up)
    y: Tensor = _Swiglu.apply(gate, up)
    return y


def _small(t: Tensor, limit: int) -> bool:
    return bool(t.numel() == 0 or (t.device.type == "cpu" and t.numel() < limit))


def _native(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and native.cpu_isa() in native.MEASURED_ISAS and native.runs(x)


def _rows(t: Tensor) -> Tensor:
    """(..., n) as a matrix whose rows have their elements next to one another."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if _native(x):
            y, rstd = native.rms_norm(_rows(x), weight.contiguous(), epsilon)
            y = y.view(x.shape)
        else:
            wide = _wide(x)
            rstd = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt_()
            y = weight * (wide * rstd).to(x.dtype)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        if _native(x):
            return native.rms_norm_backward(_rows(grad), _rows(x), weight.contiguous(), rstd).view(x.shape), None, None
        scaled = _wide(grad * weight)
        normed = _wide(x) * rstd
        slope = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed.mul_(slope)).mul_(rstd).to(x.dtype), None, None


class _Swiglu(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if _native(gate):
            return native.swiglu(_rows(gate), _rows(up)).view(gate.shape)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if _native(gate):
            grad_gate, grad_up = native.swiglu_backward(_rows(grad), _rows(gate), _rows(up))
            return grad_gate.view(gate.shape), grad_up.view(up.shape)
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
