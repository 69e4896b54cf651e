"""Linears with a low-rank adapter on a frozen base: y = x·Wᵀ + b + scaling · (x·Aᵀ)·Bᵀ.

There is no LoRA dropout, on purpose: training is a function of the batch alone, and masked and compact models can be
compared step by step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.errors import ModelError
from fedspine_edge.kernels import ops
from fedspine_edge.kernels.quantized import Bits, QuantizedWeight
from fedspine_edge.model.pooled_token import current_pooled_token, select_pooled_token


class LoraLinear(nn.Module):  # type: ignore[misc]  # torch is not analysed
    """A linear whose weight (out, in) and bias are frozen, with a trainable adapter in float32 (or float64).

    Args:
        base_layer: Linear to adapt.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: lora_alpha / r.
    """

    def __init__(self, base_layer: nn.Linear | QuantizedLinear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        like = stored_weight(base_layer)
        out_features, in_features = like.shape
        r = lora_A.shape[0]
        if tuple(lora_A.shape) != (r, in_features) or tuple(lora_B.shape) != (out_features, r):
            raise ModelError(
                f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a weight of shape "
                f"{(out_features, in_features)}."
            )
        self.base_layer = base_layer
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.lora_A = nn.Parameter(lora_A.to(device=like.device, dtype=dtype))
        self.lora_B = nn.Parameter(lora_B.to(device=like.device, dtype=dtype))
        self.scaling = scaling
        self.fused_projection: FusedProjection | None = None
        """The group of linears that are called with the same tensor as this one, if any."""
        self.pooled_only = False
        """Whether only a classifier's pooled token needs a result: true for o, gate and up of the last layer."""

    @property
    def weight(self) -> Tensor:
        """The frozen weight (out, in). A quantized weight is dequantized at every access."""
        return self.base_layer.weight

    @property
    def stored(self) -> Tensor | QuantizedWeight:
        """The frozen weight as it is stored, quantized or not."""
        return stored_weight(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,)."""
        return self.base_layer.bias

    @property
    def r(self) -> int:
        """Rank of the adapter."""
        return int(self.lora_A.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        if self.fused_projection is not None and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            return self.fused_projection.forward(self, x)
        return self.compute_single(x)

    def compute_single(self, x: Tensor) -> Tensor:
        """Compute this linear only, without the others of its `fused_projection`. x (..., in) → (..., out)."""
        if self.pooled_only:
            x = select_pooled_token(x)
        return ops.lora_linear(x, self.stored, self.bias, self.lora_A, self.lora_B, self.scaling)

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W + scaling · B·A (out, in), summed in at least float32.

        Args:
            dtype: Data type of the result (default: that of W).
        """
        sum_dtype = torch.promote_types(self.stored.dtype, torch.float32)
        with torch.no_grad():
            product = self.lora_B.to(sum_dtype) @ self.lora_A.to(sum_dtype)
            return (self.weight.to(sum_dtype) + self.scaling * product).to(dtype or self.stored.dtype)

    def merge(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a plain linear with the adapter merged into the weight.

        Raises `ModelError` if the merged weight is not finite.
        """
        weight = self.merged_weight(dtype)
        if not bool(torch.isfinite(weight).all()):
            raise ModelError("merging gave non-finite weights: the adapter diverged or overflows the base's dtype.")
        bias = None if self.bias is None else self.bias.detach().to(weight.dtype, copy=True)
        return plain_linear(weight, bias)


class QuantizedLinear(nn.Module):  # type: ignore[misc]
    """A frozen linear that stores its weight in 8 or 4 bits and dequantizes it on access.

    Args:
        weight: Quantized weight.
        bias: (out,) in the dtype of the activations, or None.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("group_of_col", weight.group_of_col)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._dtype = weight.dtype

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: Bits) -> QuantizedLinear:
        """Return `linear` with its weight quantized."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(QuantizedWeight.of(linear.weight, bits), bias)

    @property
    def stored(self) -> QuantizedWeight:
        """The quantized weight."""
        return QuantizedWeight(self.codes, self.scales, self.group_of_col, self._dtype)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), dequantized at every access."""
        return self.stored.dense()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return nn.functional.linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Files hold the dequantized weight, which every reader of the family's checkpoints understands.
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


def stored_weight(linear: nn.Module) -> Tensor | QuantizedWeight:
    """Return the frozen weight of a plain or quantized linear as it is stored."""
    return linear.stored if isinstance(linear, QuantizedLinear) else linear.weight


class FusedProjection:
    """Group of linears with one input (q, k and v, or gate and up) that are computed by one op.

    transformers calls the linears one after another, each with the same tensor. The linear that is called first
    computes all results, and each of the others takes its own. A result is used once, and only by a call that would
    compute the same value: the input is the same object, nothing was written to the input, the weights or the adapters
    since, and
        the gradient mode, autocast dtype and pooled tokens are the same. Any other call computes its result itself.
        Identity and `Tensor._version` (the number of writes) decide this, because comparing values would cost as much
        as computing them. See docs/decisions/0012.

    Args:
        linears: Two (gate, up) or three (q, k, v) linears of one layer.
    """

    def __init__(self, *linears: LoraLinear) -> None:
        self.linears = linears
        self._pending: tuple[Tensor, list[Any], dict[int, Tensor]] | None = None
        for linear in linears:
            linear.fused_projection = self

    def forward(self, linear: LoraLinear, x: Tensor) -> Tensor:
        """Return the result of one of `linears` for x (..., in)."""
        state = self._state(x)
        if state is None or any(other.scaling != linear.scaling for other in self.linears):
            return linear.compute_single(x)
        pending = self._pending  # read once: another thread may run the same model
        if pending is not None and pending[0] is x and _same(pending[1], state):
            result = pending[2].pop(id(linear), None)
            if not pending[2]:
                self._pending = None
            if result is not None:
                return result
        results = {id(other): y for other, y in zip(self.linears, self._compute_all(x, linear.scaling))}
        result = results.pop(id(linear))
        self._pending = (x, state, results)
        return result

    def _compute_all(self, x: Tensor, scaling: float) -> tuple[Tensor, ...]:
        if self.linears[0].pooled_only:
            x = select_pooled_token(x)
        parts = [ops.Projection(one.stored, one.bias, one.lora_A, one.lora_B) for one in self.linears]
        if len(parts) == 3:
            return ops.lora_qkv(x, parts[0], parts[1], parts[2], scaling)
        return ops.lora_gate_up(x, parts[0], parts[1], scaling)

    def _state(self, x: Tensor) -> list[Any] | None:
        """Return what the results depend on besides the identity of x: tensors, their versions, and modes.

        None for tensors of torch's inference mode, which do not count writes.
        """
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        state: list[Any] = [torch.is_grad_enabled(), autocast, current_pooled_token()]
        for t in (x, *(t for one in self.linears for t in (_versioned_weight(one), one.bias, one.lora_A, one.lora_B))):
            if t is not None:
                if t.is_inference():
                    return None
                state += (t, t._version)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedProjection:
        # A pending result is part of an autograd graph and cannot be copied.
        copied = FusedProjection()
        memo[id(self)] = copied
        copied.linears = tuple(copy.deepcopy(linear, memo) for linear in self.linears)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"linears": self.linears, "_pending": None}


def _versioned_weight(linear: LoraLinear) -> Tensor:
    """Return a tensor that is replaced or written whenever the frozen weight is."""
    stored = linear.stored
    return stored.codes if isinstance(stored, QuantizedWeight) else stored


def _same(first: list[Any], second: list[Any]) -> bool:
    return all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(first, second))


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen nn.Linear around existing tensors, without initializing any."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
