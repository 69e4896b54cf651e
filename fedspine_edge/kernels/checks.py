"""Validation of the arguments of the ops.

A condition is tested before its message is formatted, because these checks run in every call of a training step.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import native
from fedspine_edge.kernels.quantized import QuantizedWeight


def fail(op: str, message: str) -> NoReturn:
    """Raise a `KernelError` whose message begins with the name of the op."""
    raise KernelError(f"{op}: {message}")


def require(condition: bool, op: str, message: str) -> None:
    """Raise a `KernelError` unless `condition` holds.

    The message is formatted in any case. Ops that run in every training step test first and then call `fail`.
    """
    if not condition:
        fail(op, message)


def check_matrix(op: str, name: str, t: Tensor, rows: int | None, cols: int | None, device: torch.device) -> None:
    """Raise a `KernelError` unless `t` is a floating-point matrix on `device`. A size of None matches any size."""
    if t.dim() != 2:
        fail(op, f"{name} must be a matrix, but it has shape {tuple(t.shape)}.")
    expected = (t.shape[0] if rows is None else rows, t.shape[1] if cols is None else cols)
    if t.shape != expected:
        fail(op, f"{name} must have shape {tuple(expected)}, but it has {tuple(t.shape)}.")
    if t.device != device:
        fail(op, f"{name} is on {t.device}, but the weight is on {device}.")
    if not t.is_floating_point():
        fail(op, f"{name} must be floating point, but it is {t.dtype}.")


def check_adapter(op: str, weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise a `KernelError` unless lora_A and lora_B are an adapter of the weight."""
    device = weight.device
    if not isinstance(weight, QuantizedWeight):
        check_matrix(op, "weight", weight, None, None, device)
    check_matrix(op, "lora_A", lora_A, None, weight.shape[1], device)
    rank = lora_A.shape[0]
    if not 1 <= rank <= native.MAX_RANK:
        fail(op, f"lora_A has rank {rank}. The rank must be between 1 and {native.MAX_RANK}.")
    check_matrix(op, "lora_B", lora_B, weight.shape[0], rank, device)


def must_decompose() -> bool:
    """Return whether a graph of standard operators is being recorded (ONNX export, torch.export or torch.jit)."""
    return bool(torch.jit.is_tracing() or _is_exporting())


if hasattr(torch.compiler, "is_exporting"):
    _is_exporting = torch.compiler.is_exporting
else:  # torch < 2.7: torch.export(strict=False) sets this flag, and torch.compile does not change it

    def _is_exporting() -> bool:
        return bool(getattr(torch.compiler, "_is_compiling_flag", False))
