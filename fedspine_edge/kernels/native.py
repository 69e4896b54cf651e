"""Calls into the compiled extension `fedspine_edge._C`, and what it was built for.

The extension is not linked against torch. This module passes tensors as pointers with sizes, strides and dtype codes,
passes torch's number of threads or current CUDA stream, allocates outputs and workspaces, and converts exceptions of
the extension to `KernelError`. The ops have validated all arguments. With `FEDSPINE_NATIVE=0` in the environment the
extension is not used.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedspine_edge.errors import KernelError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
METRICS = {"abs": 0, "square": 1, "signed": 2}
MAX_RANK = 256
MEASURED_ISAS = ("avx2", "avx512")
"""Instruction sets on which the CPU kernels were measured against torch. On others torch is used."""
_INTERFACE = 2  # kInterface of csrc/bindings.cpp


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("FEDSPINE_NATIVE", "1") == "0":
        return None, "FEDSPINE_NATIVE=0"
    try:
        extension = importlib.import_module("fedspine_edge._C")
    except ImportError as error:
        return None, str(error)
    if getattr(extension, "interface", None) != _INTERFACE:
        return None, "fedspine_edge._C was built from another version of the sources. Install the package again."
    return extension, ""


def available() -> bool:
    """Return whether the extension is built and can be loaded."""
    return _load()[0] is not None


def cuda_available() -> bool:
    """Return whether the extension was built with its CUDA kernels. A GPU need not be present."""
    extension = _load()[0]
    return extension is not None and bool(extension.cuda)


def build_info() -> dict[str, Any]:
    """Return version, compiler, CPU instruction set and CUDA architectures, or the reason why there is no extension."""
    extension, reason = _load()
    if extension is None:
        return {"available": False, "reason": reason}
    return {
        "available": True,
        "version": extension.version,
        "compiler": extension.compiler,
        "cpu_isa": extension.cpu_isa(),
        "cuda": bool(extension.cuda),
        "cuda_architectures": [int(sm) for sm in extension.cuda_architectures.split(",") if sm],
        "cuda_runtime": extension.cuda_runtime_version() if extension.cuda else None,
    }


@lru_cache(maxsize=1)
def cpu_isa() -> str:
    """Return the instruction set of the CPU kernels: avx512, avx2, neon or baseline; empty without the extension."""
    extension = _load()[0]
    return str(extension.cpu_isa()) if extension is not None else ""


def supports(tensor: Tensor) -> bool:
    """Return whether the extension has kernels for the device and dtype of `tensor`."""
    if tensor.dtype not in DTYPES or type(tensor) not in (Tensor, torch.nn.Parameter):  # no fake or wrapped tensors
        return False
    return (
        available() if tensor.device.type == "cpu" else tensor.is_cuda and cuda_available() and _supports_gpu_of(tensor)
    )


def _supports_gpu_of(tensor: Tensor) -> bool:
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor in build_info_architectures()


@lru_cache(maxsize=1)
def build_info_architectures() -> frozenset[int]:
    """Return the SMs that the extension contains machine code for."""
    return frozenset(build_info().get("cuda_architectures", ()))


def tensor_cores(*tensors: Tensor) -> bool:
    """Return whether the tensor cores can be used: all tensors are float16, or all are bfloat16.

    Products of such values are exact in float32, the type of the sums. Float32 operands would have to be rounded (TF32
    keeps 10 of 23 bits of the mantissa) and mixtures split into several products, so the CUDA cores compute both
    (docs/decisions/0013).
    """
    dtype = tensors[0].dtype
    return dtype in (torch.float16, torch.bfloat16) and all(t.dtype == dtype for t in tensors)


def _matrix(t: Tensor) -> tuple[int, int, int, int, int, int]:
    return (t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), t.stride(1), DTYPES.get(t.dtype, -1))


def _call(
    op: str,
    name: str,
    tensor: Tensor,
    *args: Any,
    tensor_core_operands: Sequence[Tensor] = (),
    workspace: Callable[[ModuleType], int] | None = None,
) -> None:
    """Call `{name}_cpu` or `{name}_cuda`, depending on the device of `tensor`, and convert its exceptions.

    Args:
        op: Name of the op, for error messages.
        name: Name of the function without its suffix.
        tensor: Tensor on the device that computes.
        args: Arguments that both functions share. The CPU function also receives the number of threads, the CUDA
            function what the two arguments below select, the device and the stream.
        tensor_core_operands: Matrices whose dtypes decide whether tensor cores are used, if the op has such a version.
        workspace: Function that returns the size of the workspace in floats, if the op needs one.
    """
    extension = _load()[0]
    assert extension is not None
    try:
        if tensor.device.type == "cpu":
            getattr(extension, f"{name}_cpu")(*args, torch.get_num_threads())
            return
        extra: list[Any] = [tensor_cores(*tensor_core_operands)] if tensor_core_operands else []
        space = None
        if workspace is not None:
            # It is freed on return, possibly before the kernel ends. torch's allocator reuses it on this stream only.
            space = torch.empty(workspace(extension), dtype=torch.float32, device=tensor.device)
            extra.append(space.data_ptr())
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        getattr(extension, f"{name}_cuda")(*args, *extra, tensor.device.index, stream)
    except (RuntimeError, ValueError) as error:
        raise KernelError(f"{op}: {str(error).removeprefix(op + ': ')}") from error


def importance_accumulate(
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
    """Return the group sums of importance; see `ops.importance_accumulate`."""
    scores = torch.empty(num_groups, dtype=torch.float32, device=weight.device)
    group = group.contiguous()
    rows, cols = weight.shape
    matrices = (weight, lora_A, lora_B, grad_A, grad_B)
    _call(
        "importance_accumulate",
        "importance_accumulate",
        weight,
        *(_matrix(t) for t in matrices),
        scaling,
        group.data_ptr(),
        by_row,
        num_groups,
        METRICS[metric],
        scores.data_ptr(),
        tensor_core_operands=matrices,
        workspace=lambda extension: extension.importance_accumulate_workspace_floats(
            rows, cols, lora_A.shape[0], by_row
        ),
    )
    return scores


def expand_(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Add `alpha left right` to out (m, n) in place, for left (m, r) and right (r, n). CUDA only."""
    matrices = (out, left, right)
    _call("lora_linear", "lora_linear_expand", out, *map(_matrix, matrices), alpha, tensor_core_operands=matrices)
    return out


def project(x: Tensor, small: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """Return `alpha x small`, (m, r), for x (m, k) and small (k, r)."""
    out = torch.empty(x.shape[0], small.shape[1], dtype=dtype, device=x.device)
    _reduce("lora_linear_project", out, x, small, alpha, depth=x.shape[1])
    return out


def gradient_(out: Tensor, left: Tensor, x: Tensor, alpha: float) -> Tensor:
    """Compute `alpha leftᵀ x` into out (r, n), for left (m, r) and x (m, n) with any strides. CUDA only."""
    _reduce("lora_linear_gradient", out, left, x, alpha, depth=x.shape[0])
    return out


def _reduce(name: str, out: Tensor, first: Tensor, second: Tensor, alpha: float, depth: int) -> None:
    def workspace(extension: ModuleType) -> int:
        return int(extension.lora_linear_workspace_floats(out.shape[0], out.shape[1], depth))

    operands = (first, second)
    matrices = map(_matrix, (out, first, second))
    _call("lora_linear", name, out, *matrices, alpha, tensor_core_operands=operands, workspace=workspace)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x (rows, n) and 1 / sqrt(mean(x²) + epsilon), (rows,). CPU only."""
    out, rstd = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    _call("rms_norm", "rms_norm", x, _matrix(out), rstd.data_ptr(), _matrix(x), _matrix(weight[None]), epsilon)
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of x (rows, n). CPU only."""
    out = x.new_empty(x.shape)
    _call("rms_norm", "rms_norm_backward", x, *map(_matrix, (out, grad, x, weight[None])), rstd.data_ptr())
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) up for two matrices. CPU only."""
    out = gate.new_empty(gate.shape)
    _call("swiglu", "swiglu", gate, *map(_matrix, (out, gate, up)))
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the matrices gate and up. CPU only."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _call("swiglu", "swiglu_backward", gate, *map(_matrix, (grad_gate, grad_up, grad, gate, up)))
    return grad_gate, grad_up


def gather(t: Tensor, index: Tensor, by_row: bool) -> Tensor:
    """Return a copy of rows or columns of the matrix `t`, whose elements have 1, 2, 4 or 8 bytes."""
    shape = (index.numel(), t.shape[1]) if by_row else (t.shape[0], index.numel())
    out = torch.empty(shape, dtype=t.dtype, device=t.device)
    index = index.to(torch.int64).contiguous()
    op = "gather_rows" if by_row else "gather_cols"
    _call(op, "gather", t, _matrix(out), _matrix(t), index.data_ptr(), by_row, t.element_size())
    return out
