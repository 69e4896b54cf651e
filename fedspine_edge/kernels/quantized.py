"""A frozen weight in 8 or 4 bits, made for pruning: whatever is cut away, the values that stay are the same bits.

Symmetric codes with one float32 scale for each row (8 bits) or for each 64 columns of a row (4 bits). Every column
remembers the group its scale came from, so columns can go without anything being quantised again. Source of the
4-bit values: QLoRA (arXiv 2305.14314), appendix E.
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
"""Columns that share a scale at 4 bits, before any pruning: half a bit of scale for each weight."""


class QuantizedWeight:
    """An (out, in) matrix as codes, scales and the group of each column.

    Args:
        codes: int8 (out, in) at 8 bits; uint8 (out, ceil(in / 2)) at 4, the even column in the low half.
        scales: (out, groups) float32.
        group_of_col: (in,) int16.
        dtype: What `dense` gives.

    It answers `shape`, `dtype`, `device` and `requires_grad` as the dense matrix would.
    """

    requires_grad = False

    def __init__(self, codes: Tensor, scales: Tensor, group_of_col: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scales, self.group_of_col, self.dtype = codes, scales, group_of_col, dtype

    @classmethod
    def of(cls, weight: Tensor, bits: Bits) -> QuantizedWeight:
        """Quantise a matrix, which should be in the dtype that `dense` is to give. Raises `KernelError`."""
        if weight.dim() != 2 or not weight.is_floating_point():
            raise KernelError(f"only a floating-point matrix can be quantised, not {weight.dtype} {weight.dim()}-D.")
        rows, cols = weight.shape
        wide = weight.detach().float()
        if bits == 8:
            scales = _positive(wide.abs().amax(1, keepdim=True) / 127)
            codes = (wide / scales).round_().to(torch.int8)
            return cls(codes, scales, torch.zeros(cols, dtype=torch.int16, device=weight.device), weight.dtype)
        group = torch.arange(cols, device=weight.device) // GROUP_COLUMNS
        groups = int(group[-1]) + 1 if cols else 0
        scales = wide.new_zeros(rows, groups)
        scales = _positive(scales.scatter_reduce_(1, group.expand(rows, cols), wide.abs(), "amax"))
        values = _normal_floats(weight.device)
        middles = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(wide / scales.index_select(1, group), middles).to(torch.uint8)
        return cls(_packed(codes), scales, group.to(torch.int16), weight.dtype)

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
        """The same codes, to be made dense in another dtype."""
        return QuantizedWeight(self.codes, self.scales, self.group_of_col, dtype)

    def dense(self) -> Tensor:
        """The matrix (out, in), computed in float32 and rounded once."""
        if self.bits == 8:
            return self.codes.float().mul_(self.scales).to(self.dtype)
        codes = _unpacked(self.codes, self.shape[1])
        values = _normal_floats(self.device).index_select(0, codes.flatten().int()).view(codes.shape)
        return values.mul_(self.scales.index_select(1, self.group_of_col.int())).to(self.dtype)

    def take(self, rows: Tensor | None, cols: Tensor | None) -> QuantizedWeight:
        """Some rows and columns (index vectors; None is all): `take(r, c).dense()` is `dense()[r][:, c]`, exactly."""
        codes, scales, group = self.codes, self.scales, self.group_of_col
        if rows is not None:
            codes, scales = codes.index_select(0, rows), scales.index_select(0, rows)
        if cols is not None:
            if self.bits == 8:
                codes = codes.index_select(1, cols)
            else:
                codes = _packed(_unpacked(codes, self.shape[1]).index_select(1, cols))
            kept, group = group.index_select(0, cols).unique(return_inverse=True)
            scales, group = scales.index_select(1, kept.long()), group.to(torch.int16)
        return QuantizedWeight(codes.contiguous(), scales.contiguous(), group, self.dtype)


def dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """The matrix itself."""
    return weight.dense() if isinstance(weight, QuantizedWeight) else weight


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))  # a row of zeros has zero codes


def _packed(codes: Tensor) -> Tensor:
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def _unpacked(packed: Tensor, cols: int) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :cols]


def _normal_floats(device: torch.device) -> Tensor:
    return torch.tensor(_quantiles(), dtype=torch.float32, device=device)


@lru_cache(maxsize=1)
def _quantiles() -> tuple[float, ...]:
    """16 values in [-1, 1] at equal shares of a normal distribution, zero among them, eight of them positive."""
    outermost = 0.9677083

    def half(count: int) -> list[float]:
        steps: Any = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1].tolist()
        return [NormalDist().inv_cdf(share) for share in steps]

    positive, negative = half(8), half(7)
    largest = max(positive)
    return tuple(sorted([0.0, *(v / largest for v in positive), *(-v / largest for v in negative)]))
