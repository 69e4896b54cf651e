"""Test cases and markers that the kernel tests share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedspine_edge.kernels import native

needs_extension = pytest.mark.skipif(not native.available(), reason="fedspine_edge._C is not built")


def gpu_reason() -> str:
    """Return why the CUDA kernels cannot run on this machine, or an empty string if they can."""
    if not native.cuda_available():
        return "the extension was built without CUDA"
    return "" if torch.cuda.is_available() else "no NVIDIA GPU"


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(gpu_reason()), reason=gpu_reason())]),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Adapted:
    """A weight with an adapter and the adapter's gradients."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: float = 2.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.lora_A, self.lora_B, self.grad_A, self.grad_B

    def double(self) -> Adapted:
        return Adapted(*(t.double() for t in self.tensors), scaling=self.scaling)


def adapted(rows: int, cols: int, rank: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Adapted:
    """Return random values of the magnitudes of training; the seed depends on the shape."""
    generator = torch.Generator().manual_seed(rows * 7919 + cols * 31 + rank)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype).to(device)

    return Adapted(
        weight=normal(rows, cols, std=0.05),
        lora_A=normal(rank, cols, std=0.1),
        lora_B=normal(rows, rank, std=0.02),
        grad_A=normal(rank, cols, std=0.01),
        grad_B=normal(rows, rank, std=0.01),
    )
