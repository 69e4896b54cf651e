"""A frozen linear with a low-rank adapter beside it: y = x·Wᵀ + b + scaling · (x·Aᵀ)·Bᵀ.

Dropout is 0 by design: training is a function of the batch alone, and masked and compact models stay
comparable step by step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.errors import ModelError
from fedspine_edge.kernels import ops
from fedspine_edge.kernels.quantized import Bits, QuantizedWeight
from fedspine_edge.model.pooled_token import current, read_token


class LoraLinear(nn.Module):  # type: ignore[misc]  # torch is not analysed
    """Wraps `base_layer`, whose weight (out, in) and bias are frozen. The adapter is float32, or as wide as the base.

    Args:
        base_layer: The linear to adapt.
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
        wide = torch.promote_types(like.dtype, torch.float32)
        self.lora_A = nn.Parameter(lora_A.to(device=like.device, dtype=wide))
        self.lora_B = nn.Parameter(lora_B.to(device=like.device, dtype=wide))
        self.scaling = scaling
        self.shares_input: FusedProjection | None = None
        """The linears beside this one that are called with the same tensor, if any."""
        self.reads_token = False
        """Whether a token that no classifier reads needs no result: o, gate and up of a last layer."""

    @property
    def weight(self) -> Tensor:
        """The frozen weight (out, in); made anew at every access where it is quantised."""
        return self.base_layer.weight

    @property
    def stored(self) -> Tensor | QuantizedWeight:
        """The frozen weight as it is kept."""
        return stored_weight(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,)."""
        return self.base_layer.bias

    @property
    def r(self) -> int:
        return int(self.lora_A.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        if self.shares_input is not None and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            return self.shares_input.forward(self, x)
        return self.alone(x)

    def alone(self, x: Tensor) -> Tensor:
        """As `forward`, whatever the linears beside this one do."""
        if self.reads_token:
            x = read_token(x)
        return ops.lora_linear(x, self.stored, self.bias, self.lora_A, self.lora_B, self.scaling)

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W + scaling · B·A, (out, in), summed in float32 or better and returned in `dtype`, by default W's."""
        wide = torch.promote_types(self.stored.dtype, torch.float32)
        with torch.no_grad():
            product = self.lora_B.to(wide) @ self.lora_A.to(wide)
            return (self.weight.to(wide) + self.scaling * product).to(dtype or self.stored.dtype)

    def merged(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain linear with the adapter folded in. Raises `ModelError` if the result is not finite."""
        weight = self.merged_weight(dtype)
        if not bool(torch.isfinite(weight).all()):
            raise ModelError("merging gave non-finite weights: the adapter diverged or overflows the base's dtype.")
        bias = None if self.bias is None else self.bias.detach().to(weight.dtype, copy=True)
        return plain_linear(weight, bias)


class QuantizedLinear(nn.Module):  # type: ignore[misc]
    """A frozen linear that keeps its weight in 8 or 4 bits and shows it dense to whoever asks.

    Args:
        weight: Already quantised.
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
    def of(cls, linear: nn.Linear, bits: Bits) -> QuantizedLinear:
        """`linear` with its weight quantised."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(QuantizedWeight.of(linear.weight, bits), bias)

    @property
    def stored(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.scales, self.group_of_col, self._dtype)

    @property
    def weight(self) -> Tensor:
        """(out, in), made anew at every access."""
        return self.stored.dense()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return nn.functional.linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Files hold what the codes stand for: any reader of the family's checkpoints understands that.
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


def stored_weight(linear: nn.Module) -> Tensor | QuantizedWeight:
    """The frozen weight of a plain or quantised linear, as it is kept."""
    return linear.stored if isinstance(linear, QuantizedLinear) else linear.weight


class FusedProjection:
    """q, k and v, or gate and up: whichever is called first computes all of them, the others take their result.

    transformers calls the linears one by one, each with the same tensor. A result is handed out once, and only to a
    call that would compute it anew from the same tensors: same input object, nothing written to input, weights or
    adapters since, same gradient mode, autocast dtype and read tokens. Any other call computes.

    Args:
        linears: Two (gate, up) or three (q, k, v) linears of one layer.
    """

    def __init__(self, *linears: LoraLinear) -> None:
        self.linears = linears
        self._pending: tuple[Tensor, list[Any], dict[int, Tensor]] | None = None
        for linear in linears:
            linear.shares_input = self

    def forward(self, linear: LoraLinear, x: Tensor) -> Tensor:
        """The result of one of `linears` for x (..., in)."""
        state = self._state(x)
        if state is None or any(other.scaling != linear.scaling for other in self.linears):
            return linear.alone(x)
        pending = self._pending  # read once: another thread may run the same model
        if pending is not None and pending[0] is x and _same(pending[1], state):
            result = pending[2].pop(id(linear), None)
            if not pending[2]:
                self._pending = None
            if result is not None:
                return result
        results = {id(other): y for other, y in zip(self.linears, self._compute(x, linear.scaling))}
        mine = results.pop(id(linear))
        self._pending = (x, state, results)
        return mine

    def _compute(self, x: Tensor, scaling: float) -> tuple[Tensor, ...]:
        if self.linears[0].reads_token:
            x = read_token(x)
        parts = [ops.Projection(one.stored, one.bias, one.lora_A, one.lora_B) for one in self.linears]
        if len(parts) == 3:
            return ops.lora_qkv(x, parts[0], parts[1], parts[2], scaling)
        return ops.lora_gate_up(x, parts[0], parts[1], scaling)

    def _state(self, x: Tensor) -> list[Any] | None:
        """What the results depend on besides x's identity: the tensors, how often each was written, the modes.

        None where writes are not counted: tensors of torch's inference mode.
        """
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        state: list[Any] = [torch.is_grad_enabled(), autocast, current()]
        for t in (x, *(t for one in self.linears for t in (_weight_of(one), one.bias, one.lora_A, one.lora_B))):
            if t is not None:
                if t.is_inference():
                    return None
                state += (t, t._version)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedProjection:
        # By hand, since a result that was never fetched is part of a graph and cannot be copied.
        twin = FusedProjection()
        memo[id(self)] = twin
        twin.linears = tuple(copy.deepcopy(linear, memo) for linear in self.linears)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"linears": self.linears, "_pending": None}


def _weight_of(linear: LoraLinear) -> Tensor:
    """A tensor that is replaced or written when the frozen weight is."""
    stored = linear.stored
    return stored.codes if isinstance(stored, QuantizedWeight) else stored


def _same(first: list[Any], second: list[Any]) -> bool:
    return all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(first, second))


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear around existing tensors, without initialising anything."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
