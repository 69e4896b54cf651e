"""Frozen weights with 8 or 4 bits per element that can be pruned without changing the remaining values.

A weight is stored as symmetric codes with one float32 scale per row (8 bits) or per 64 columns of a row (4 bits). Every
column keeps the number of the group that its scale belongs to, so columns can be removed without quantizing the others
again. Source of the 4-bit values: QLoRA (arXiv 2305.14314), appendix E.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from fedspine_edge.errors import KernelError

Bits = Literal[4, 8]
GROUP_COLUMNS = 64
"""Columns per scale at 4 bits, before any pruning. The scales take half a bit per element."""


class QuantizedWeight:
    """An (out, in) matrix, stored as codes, scales and the group of each column.

    `shape`, `dtype`, `device` and `requires_grad` are those of the dense matrix.

    Args:
        codes: int8 tensor of shape (out, in) at 8 bits; uint8 tensor of shape (out, ceil(in / 2)) at 4 bits, with the
            even columns in the low half of each byte.
        scales: float32 tensor of shape (out, groups).
        group_of_col: int16 tensor of shape (in,).
        dtype: Dtype of the dense matrix.

    >>> weight = QuantizedWeight.of(torch.tensor([[1.0, -0.5], [0.25, 0.0]]), bits=8)
    >>> weight.codes
    tensor([[127, -64],
            [127,   0]], dtype=torch.int8)
    >>> weight.take(torch.tensor([0]), None).dense()
    tensor([[ 1.0000, -0.5039]])
    """

    requires_grad = False

    def __init__(self, codes: Tensor, scales: Tensor, group_of_col: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scales, self.group_of_col, self.dtype = codes, scales, group_of_col, dtype

    @classmethod
    def of(cls, weight: Tensor, bits: Bits) -> QuantizedWeight:
        """Quantize a floating-point matrix; `dense` returns its dtype. Raises `KernelError` for anything else."""
        if weight.dim() != 2 or not weight.is_floating_point():
            raise KernelError(
                f"Only a floating-point matrix can be quantized, but the weight is {weight.dtype} of shape "
                f"{tuple(weight.shape)}."
            )
        rows, cols = weight.shape
        wide = weight.detach().float()
        if bits == 8:
            scales = _replace_zeros(wide.abs().amax(1, keepdim=True) / 127)
            codes = (wide / scales).round_().to(torch.int8)
            return cls(codes, scales, torch.zeros(cols, dtype=torch.int16, device=weight.device), weight.dtype)
        group = torch.arange(cols, device=weight.device) // GROUP_COLUMNS
        groups = int(group[-1]) + 1 if cols else 0
        scales = wide.new_zeros(rows, groups)
        scales = _replace_zeros(scales.scatter_reduce_(1, group.expand(rows, cols), wide.abs(), "amax"))
        values = _normal_floats(weight.device)
        middles = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(wide / scales.index_select(1, group), middles).to(torch.uint8)
        return cls(_pack(codes), scales, group.to(torch.int16), weight.dtype)

    @property
    def bits(self) -> Bits:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], self.group_of_col.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def astype(self, dtype: torch.dtype) -> QuantizedWeight:
        """Return the same codes with another dtype of the dense matrix."""
        return QuantizedWeight(self.codes, self.scales, self.group_of_col, dtype)

    def dense(self) -> Tensor:
        """Return the matrix (out, in), computed in float32 and rounded once."""
        if self.bits == 8:
            return self.codes.float().mul_(self.scales).to(self.dtype)
        codes = _unpack(self.codes, self.shape[1])
        values = _normal_floats(self.device).index_select(0, codes.flatten().int()).view(codes.shape)
        return values.mul_(self.scales.index_select(1, self.group_of_col.int())).to(self.dtype)

    def take(self, rows: Tensor | None, cols: Tensor | None) -> QuantizedWeight:
        """Return some rows and columns; None selects all. `take(r, c).dense()` equals `dense()[r][:, c]` exactly."""
        codes, scales, group = self.codes, self.scales, self.group_of_col
        if rows is not None:
            codes, scales = codes.index_select(0, rows), scales.index_select(0, rows)
        if cols is not None:
            if self.bits == 8:
                codes = codes.index_select(1, cols)
            else:
                codes = _pack(_unpack(codes, self.shape[1]).index_select(1, cols))
            kept, group = group.index_select(0, cols).unique(return_inverse=True)
            scales, group = scales.index_select(1, kept.long()), group.to(torch.int16)
        return QuantizedWeight(codes.contiguous(), scales.contiguous(), group, self.dtype)


def dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """Return the weight as a dense matrix."""
    return weight.dense() if isinstance(weight, QuantizedWeight) else weight


def _replace_zeros(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))  # the codes of a row of zeros are zero


def _pack(codes: Tensor) -> Tensor:
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def _unpack(packed: Tensor, cols: int) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :cols]


def _normal_floats(device: torch.device) -> Tensor:
    return torch.tensor(_quantiles(), dtype=torch.float32, device=device)


@lru_cache(maxsize=1)
def _quantiles() -> tuple[float, ...]:
    """Return the 16 quantiles of a normal distribution scaled to [-1, 1]: seven negative, zero and eight positive."""
    outermost = 0.9677083

    def quantiles(count: int) -> list[float]:
        steps: Any = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1].tolist()
        return [NormalDist().inv_cdf(share) for share in steps]

    positive, negative = quantiles(8), quantiles(7)
    largest = max(positive)
    return tuple(sorted([0.0, *(v / largest for v in positive), *(-v / largest for v in negative)]))
