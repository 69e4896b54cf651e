"""The ops lora_qkv and lora_gate_up: linear layers with adapters that share their input.

Compared with one `lora_linear` per layer, x is read once for all low-rank projections, dX is accumulated in place
instead of in temporaries of autograd, and the graph has one node instead of two or three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.kernels import reference
from fedspine_edge.kernels.checks import fail, must_decompose
from fedspine_edge.kernels.lora_linear import (
    eager_lora_linear,
    expand_,
    gradient,
    gradient_transposed,
    is_frozen,
    prepare,
    project,
)
from fedspine_edge.kernels.quantized import QuantizedWeight, dense

# The number of tokens below which two separate ops are up to 2 % faster than one for both (docs/results/kernels.md).
# Three separate ops never are.
_CPU_PAIR_MIN_TOKENS = 64


class Projection(NamedTuple):
    """One of several linear layers that share their input, with the shapes of `lora_linear`. Ranks may differ."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor


def lora_qkv(x: Tensor, q: Projection, k: Projection, v: Projection, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return `lora_linear` of x with q, k and v: three tensors of shape (..., out_features of the projection).

    Dtypes, autocast, frozen weights and errors are as in `lora_linear`. The three projections must have the same dtype
    and device.

    >>> x, one = torch.tensor([[1.0, 2.0]]), torch.ones(1, 1)
    >>> q, k, v = (Projection(torch.full((1, 2), w), None, torch.ones(1, 2), one) for w in (1.0, 2.0, 3.0))
    >>> lora_qkv(x, q, k, v, scaling=0.5)
    (tensor([[4.5000]]), tensor([[7.5000]]), tensor([[10.5000]]))
    """
    query, key, value = shared_input(("lora_qkv, q", "lora_qkv, k", "lora_qkv, v"), x, (q, k, v), scaling)
    return query, key, value


def lora_gate_up(x: Tensor, gate: Projection, up: Projection, scaling: float) -> tuple[Tensor, Tensor]:
    """Return `lora_linear` of x with gate and up; see `lora_qkv`.

    >>> x, one = torch.tensor([[1.0, 2.0]]), torch.ones(1, 1)
    >>> gate, up = (Projection(torch.full((1, 2), w), None, torch.ones(1, 2), one) for w in (1.0, 2.0))
    >>> lora_gate_up(x, gate, up, scaling=0.5)
    (tensor([[4.5000]]), tensor([[7.5000]]))
    """
    first, second = shared_input(("lora_gate_up, gate", "lora_gate_up, up"), x, (gate, up), scaling)
    return first, second


def shared_input(
    names: Sequence[str], x: Tensor, projections: Sequence[Projection], scaling: float
) -> Sequence[Tensor]:
    """Return one result per projection. `names` are the names of the projections in error messages."""
    prepared = [prepare(name, x, *projection) for name, projection in zip(names, projections)]
    for name, (other, *_) in zip(names, prepared):
        if other.dtype != prepared[0][0].dtype:
            fail(name, f"the weight is {other.dtype}, but that of {names[0]} is {prepared[0][0].dtype}.")
    x = prepared[0][0]
    if must_decompose() or not all(is_frozen(weight, bias) for _, weight, bias, _, _ in prepared):
        return [reference.lora_linear(x, dense(weight), bias, a, b, scaling) for _, weight, bias, a, b in prepared]
    _, weights, optional_biases, lora_As, lora_Bs = (list(column) for column in zip(*prepared))
    biases = (
        []
        if not any(b is not None for b in optional_biases)
        else [_bias_of(w, b) for w, b in zip(weights, optional_biases)]
    )
    if torch.compiler.is_compiling():
        matrices = [dense(weight) for weight in weights]
        outputs: list[Tensor] = torch.ops.fedspine.lora_shared_input(x, matrices, biases, lora_As, lora_Bs, scaling)
        return outputs[:-1]
    if x.device.type == "cpu" and len(weights) < 3 and x.numel() < _CPU_PAIR_MIN_TOKENS * x.shape[-1]:
        return [eager_lora_linear(x, *one, scaling) for one in zip(weights, optional_biases, lora_As, lora_Bs)]
    flat: tuple[Tensor, ...] = _EagerSharedInput.apply(x, scaling, len(weights), *weights, *lora_As, *lora_Bs, *biases)
    return flat[:-1]


def _bias_of(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Return the bias or zeros: schemas of torch.library have no lists that contain None."""
    return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device) if bias is None else bias


# ------------------------------------------------------------ fedspine::lora_shared_input and its backward


def _forward(
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    biases: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    scaling: float,
) -> list[Tensor]:
    """Return the results and h = x [A_1; A_2; ...]ᵀ, which the backward pass needs. `biases` is empty or complete."""
    flat = x.reshape(-1, x.shape[-1])
    low = project(flat, torch.cat(lora_As).t(), 1.0)
    outputs = []
    for weight, bias, lora_B, low_part in zip(weights, biases or [None] * len(weights), lora_Bs, _split(low, lora_Bs)):
        y = expand_(functional.linear(flat, dense(weight), bias), low_part, lora_B.t(), scaling)
        outputs.append(y.view(*x.shape[:-1], weight.shape[0]))
    return [*outputs, low]


def _split(low: Tensor, lora_Bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = low.split([lora_B.shape[1] for lora_B in lora_Bs], dim=1)
    return parts


def _forward_fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    scaling: float,
) -> list[Tensor]:
    outputs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return [*outputs, x.new_empty((x.shape[:-1].numel(), sum(lora_A.shape[0] for lora_A in lora_As)))]


def _backward(
    grads: list[Tensor],
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    low: Tensor,
    scaling: float,
    needs_x: bool,
) -> list[Tensor]:
    """Return [dX, every dA, every dB]; dX is empty unless `needs_x`. The formulas are those of lora_linear."""
    flat = x.reshape(-1, x.shape[-1])
    flat_grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    grad_low = torch.cat([project(grad, lora_B, scaling) for grad, lora_B in zip(flat_grads, lora_Bs)], dim=1)
    grad_x = x.new_empty(0)
    if needs_x:
        grad_x = flat_grads[0] @ dense(weights[0])
        for grad, weight in zip(flat_grads[1:], weights[1:]):
            grad_x.addmm_(grad, dense(weight))
        grad_x = expand_(grad_x, grad_low, torch.cat(lora_As), 1.0).view(x.shape)
    # Each gradient owns its memory, because a view would keep the memory of all of them alive.
    grad_As = [part.clone() for part in gradient(grad_low, flat, 1.0).split([a.shape[0] for a in lora_As])]
    parts = zip(_split(low, lora_Bs), flat_grads)
    return [grad_x, *grad_As, *(gradient_transposed(low_part, grad, scaling) for low_part, grad in parts)]


def _backward_fake(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    low: Tensor,
    scaling: float,
    needs_x: bool,
) -> list[Tensor]:
    grad_x = x.new_empty(x.shape) if needs_x else x.new_empty(0)
    return [grad_x, *(t.new_empty(t.shape) for t in (*lora_As, *lora_Bs))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, lora_As, lora_Bs, ctx.scaling = inputs
    ctx.count, ctx.biases = len(weights), len(biases)
    ctx.save_for_backward(x, output[-1], *weights, *lora_As, *lora_Bs)


def _autograd_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, low, *rest = ctx.saved_tensors
    n = ctx.count
    needs_x: bool = ctx.needs_input_grad[0]
    grad_x, *others = torch.ops.fedspine.lora_shared_input_backward(
        list(grads[:n]), x, rest[:n], rest[n : 2 * n], rest[2 * n :], low, ctx.scaling, needs_x
    )
    return grad_x if needs_x else None, [None] * n, [None] * ctx.biases, others[:n], others[n:], None


# The schemas are explicit because torch.library does not infer them from every list annotation.
_LISTS = "Tensor[] weights, Tensor[] biases, Tensor[] lora_As, Tensor[] lora_Bs"
_forward_op = torch.library.custom_op(
    "fedspine::lora_shared_input", _forward, mutates_args=(), schema=f"(Tensor x, {_LISTS}, float scaling) -> Tensor[]"
)
_forward_op.register_fake(_forward_fake)
_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward_op = torch.library.custom_op(
    "fedspine::lora_shared_input_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor low, "
    "float scaling, bool needs_x) -> Tensor[]",
)
_backward_op.register_fake(_backward_fake)


class _EagerSharedInput(torch.autograd.Function):  # type: ignore[misc]
    """The same forward and backward pass without the dispatcher, on flattened lists.

    Of a quantized weight, only the codes are saved for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, n: int, *tensors: Any) -> tuple[Tensor, ...]:
        weights, lora_As, lora_Bs, biases = (list(tensors[i : i + n]) for i in range(0, 4 * n, n))
        output = _forward(x, weights, biases, lora_As, lora_Bs, scaling)
        ctx.quantized = [weight if isinstance(weight, QuantizedWeight) else None for weight in weights]
        plain = [None if kept else weight for kept, weight in zip(ctx.quantized, weights)]
        _setup_context(ctx, (x, plain, biases, lora_As, lora_Bs, scaling), output)
        ctx.mark_non_differentiable(output[-1])
        return tuple(output)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, *rest = ctx.saved_tensors
        n = ctx.count
        needs_x: bool = ctx.needs_input_grad[0]
        weights = [kept or weight for kept, weight in zip(ctx.quantized, rest)]
        grad_x, *others = _backward(
            list(grads[:n]), x, weights, rest[n : 2 * n], rest[2 * n :], low, ctx.scaling, needs_x
        )
        return grad_x if needs_x else None, None, None, *[None] * n, *others, *[None] * ctx.biases
