"""What every op checks of its arguments before anything runs.

Conditions are tested before their message is formatted: the checks are part of every call of a training step.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import native
from fedspine_edge.kernels.quantized import QuantizedWeight


def fail(op: str, message: str) -> NoReturn:
    raise KernelError(f"{op}: {message}")


def require(condition: bool, op: str, message: str) -> None:
    """For ops that are called rarely; others test first and then `fail`."""
    if not condition:
        fail(op, message)


def check_matrix(op: str, name: str, t: Tensor, rows: int | None, cols: int | None, device: torch.device) -> None:
    """Raises `KernelError` unless `t` is a matrix of the given size on `device`; None is any size."""
    if t.dim() != 2:
        fail(op, f"{name} must be a matrix, it has shape {tuple(t.shape)}.")
    wanted = (t.shape[0] if rows is None else rows, t.shape[1] if cols is None else cols)
    if t.shape != wanted:
        fail(op, f"{name} must have shape {tuple(wanted)}, it has {tuple(t.shape)}.")
    if t.device != device:
        fail(op, f"{name} is on {t.device}, the weight is on {device}.")
    if not t.is_floating_point():
        fail(op, f"{name} must be floating point, it is {t.dtype}.")


def check_adapter(op: str, weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor) -> None:
    device = weight.device
    if not isinstance(weight, QuantizedWeight):
        check_matrix(op, "weight", weight, None, None, device)
    check_matrix(op, "lora_A", lora_A, None, weight.shape[1], device)
    rank = lora_A.shape[0]
    if not 1 <= rank <= native.MAX_RANK:
        fail(op, f"lora_A has rank {rank}; 1 to {native.MAX_RANK} are supported.")
    check_matrix(op, "lora_B", lora_B, weight.shape[0], rank, device)


def decompose() -> bool:
    """Whether someone is recording a graph that must hold standard operators only (ONNX, torch.export, jit)."""
    return bool(torch.jit.is_tracing() or _exporting())


if hasattr(torch.compiler, "is_exporting"):
    _exporting = torch.compiler.is_exporting
else:  # torch < 2.7: its torch.export(strict=False) sets this flag, which torch.compile leaves alone

    def _exporting() -> bool:
        return bool(getattr(torch.compiler, "_is_compiling_flag", False))
