"""The compiled extension `fedspine_edge._C`: whether it is there, what it can do, and calls into it.

The extension is not linked against torch: this module turns tensors into pointers, sizes, strides and dtype codes,
names torch's thread count or current CUDA stream, allocates outputs and workspaces, and turns what the extension
throws into `KernelError`. `FEDSPINE_NATIVE=0` in the environment hides the extension.
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
"""Where CPU kernels that compete with torch's own were timed; elsewhere torch keeps the work."""


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("FEDSPINE_NATIVE", "1") == "0":
        return None, "FEDSPINE_NATIVE=0"
    try:
        return importlib.import_module("fedspine_edge._C"), ""
    except ImportError as error:
        return None, str(error)


def available() -> bool:
    """Whether the extension is built and loads."""
    return _load()[0] is not None


def cuda_available() -> bool:
    """Whether the extension was built with its CUDA kernels (not whether a GPU is there)."""
    extension = _load()[0]
    return extension is not None and bool(extension.cuda)


def build_info() -> dict[str, Any]:
    """What was built: version, compiler, CPU instruction set in use, CUDA architectures; or the reason it is absent."""
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
    """The instruction set of the CPU kernels: avx512, avx2, neon or baseline; empty without the extension."""
    extension = _load()[0]
    return str(extension.cpu_isa()) if extension is not None else ""


def runs(tensor: Tensor) -> bool:
    """Whether the extension has kernels for the device and dtype of `tensor`."""
    if tensor.dtype not in DTYPES or type(tensor) not in (Tensor, torch.nn.Parameter):  # no fake or wrapped tensors
        return False
    return available() if tensor.device.type == "cpu" else tensor.is_cuda and cuda_available() and _known_sm(tensor)


def _known_sm(tensor: Tensor) -> bool:
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor in build_info_architectures()


@lru_cache(maxsize=1)
def build_info_architectures() -> frozenset[int]:
    """SMs that the extension carries machine code for."""
    return frozenset(build_info().get("cuda_architectures", ()))


def tensor_cores(*tensors: Tensor) -> bool:
    """Whether the CUDA kernels on tensor cores may run: all tensors float16, or all bfloat16.

    Products of such values are exact in float32, where they are summed. Float32 would have to be rounded (TF32 keeps 10
    bits of 23) and mixtures be split into several products: both stay on the CUDA cores (docs/decisions/0013).
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
    of_one_dtype: Sequence[Tensor] = (),
    workspace: Callable[[ModuleType], int] | None = None,
) -> None:
    """Calls the CPU or CUDA entry of `name` with what that side needs at the end.

    That is the number of threads on a CPU. On CUDA it is whether tensor cores run (where `of_one_dtype` names the
    matrices that decide it), a workspace (where `workspace` tells its size), the device and the stream.
    """
    extension = _load()[0]
    assert extension is not None
    try:
        if tensor.device.type == "cpu":
            getattr(extension, f"{name}_cpu")(*args, torch.get_num_threads())
            return
        extra: list[Any] = [tensor_cores(*of_one_dtype)] if of_one_dtype else []
        space = None
        if workspace is not None:
            # Freed on return while the kernel may still run; torch's allocator only hands it out again on this stream.
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
    """Native `importance_accumulate`; arguments already checked by ops.py."""
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
        of_one_dtype=matrices,
        workspace=lambda extension: extension.importance_workspace_floats(rows, cols, lora_A.shape[0], by_row),
    )
    return scores


def expand_(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """`out (m, n) += alpha left (m, r) right (r, n)` in place. CUDA only."""
    matrices = (out, left, right)
    _call("lora_linear", "lowrank_expand", out, *map(_matrix, matrices), alpha, of_one_dtype=matrices)
    return out


def project(x: Tensor, small: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """`alpha x (m, k) small (k, r)` → (m, r)."""
    out = torch.empty(x.shape[0], small.shape[1], dtype=dtype, device=x.device)
    _reduction("lowrank_project", out, x, small, alpha, depth=x.shape[1])
    return out


def gradient_(out: Tensor, left: Tensor, x: Tensor, alpha: float) -> Tensor:
    """`out (r, n) = alpha leftᵀ (r, m) x (m, n)`, any strides. CUDA only."""
    _reduction("lowrank_gradient", out, left, x, alpha, depth=x.shape[0])
    return out


def _reduction(name: str, out: Tensor, first: Tensor, second: Tensor, alpha: float, depth: int) -> None:
    def workspace(extension: ModuleType) -> int:
        return int(extension.lowrank_workspace_floats(out.shape[0], out.shape[1], depth))

    operands = (first, second)
    matrices = map(_matrix, (out, first, second))
    _call("lora_linear", name, out, *matrices, alpha, of_one_dtype=operands, workspace=workspace)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of x (rows, n) and 1 / sqrt(mean(x²) + epsilon), (rows,). CPU only."""
    out, rstd = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    _call("rms_norm", "rms_norm", x, _matrix(out), rstd.data_ptr(), _matrix(x), _matrix(weight[None]), epsilon)
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x (rows, n). CPU only."""
    out = x.new_empty(x.shape)
    _call("rms_norm", "rms_norm_backward", x, *map(_matrix, (out, grad, x, weight[None])), rstd.data_ptr())
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up of two matrices. CPU only."""
    out = gate.new_empty(gate.shape)
    _call("swiglu", "swiglu", gate, *map(_matrix, (out, gate, up)))
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, matrices. CPU only."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _call("swiglu", "swiglu_backward", gate, *map(_matrix, (grad_gate, grad_up, grad, gate, up)))
    return grad_gate, grad_up


def gather(t: Tensor, index: Tensor, by_row: bool) -> Tensor:
    """Rows or columns of the matrix `t`; element sizes of 1, 2, 4 or 8 bytes."""
    shape = (index.numel(), t.shape[1]) if by_row else (t.shape[0], index.numel())
    out = torch.empty(shape, dtype=t.dtype, device=t.device)
    index = index.to(torch.int64).contiguous()
    op = "gather_rows" if by_row else "gather_cols"
    _call(op, "gather", t, _matrix(out), _matrix(t), index.data_ptr(), by_row, t.element_size())
    return out
