"""A frozen linear with a low-rank adapter beside it: y = x·Wᵀ + b + scaling · (x·Aᵀ)·Bᵀ.

Dropout is 0 by design: training is a function of the batch alone, and masked and compact models stay
comparable step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedspine_edge.errors import ModelError
from fedspine_edge.kernels import ops


class LoraLinear(nn.Module):  # type: ignore[misc]  # torch is not analysed
    """Wraps `base_layer`, whose weight (out, in) and bias are frozen.

    Args:
        base_layer: The linear to adapt.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: lora_alpha / r.
    """

    def __init__(self, base_layer: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        out_features, in_features = base_layer.weight.shape
        r = lora_A.shape[0]
        if tuple(lora_A.shape) != (r, in_features) or tuple(lora_B.shape) != (out_features, r):
            raise ModelError(
                f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a weight of shape "
                f"{(out_features, in_features)}."
            )
        self.base_layer = base_layer
        like = base_layer.weight
        self.lora_A = nn.Parameter(lora_A.to(device=like.device, dtype=like.dtype))
        self.lora_B = nn.Parameter(lora_B.to(device=like.device, dtype=like.dtype))
        self.scaling = scaling

    @property
    def weight(self) -> Tensor:
        """The frozen weight (out, in)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,)."""
        return self.base_layer.bias

    @property
    def r(self) -> int:
        return int(self.lora_A.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return ops.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)

    def merged_weight(self) -> Tensor:
        """W + scaling · B·A, (out, in), summed in float32 or better and returned in W's dtype."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad():
            product = self.lora_B.to(wide) @ self.lora_A.to(wide)
            return (self.weight.to(wide) + self.scaling * product).to(self.weight.dtype)

    def merged(self) -> nn.Linear:
        """A plain linear with the adapter folded in. Raises `ModelError` if the result is not finite."""
        weight = self.merged_weight()
        if not bool(torch.isfinite(weight).all()):
            raise ModelError("merging gave non-finite weights: the adapter diverged or overflows the base's dtype.")
        bias = None if self.bias is None else self.bias.detach().clone()
        return plain_linear(weight, bias)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear around existing tensors, without initialising anything."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
