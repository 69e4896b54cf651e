"""lora_qkv and lora_gate_up: adapted linears that read the same input, as one op.

Against one `lora_linear` each, x is read once for all low-rank projections, dX is summed in place instead of by
autograd in temporaries, and one node of the graph stands for two or three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.kernels import reference
from fedspine_edge.kernels.checks import decompose, fail
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

# Below this two linears of their own are faster than one op for both, by up to 2 % (docs/kernels.md); three never are.
_CPU_PAIR_MIN_TOKENS = 64


class Projection(NamedTuple):
    """One linear of several that share their input; shapes as in `lora_linear`. Ranks may differ."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor


def lora_qkv(x: Tensor, q: Projection, k: Projection, v: Projection, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """`lora_linear` of x with q, k and v: three results (..., out_features) of their own widths.

    Dtypes, autocast, frozen weights and errors are as in `lora_linear`. The three agree in dtype and device.
    """
    query, key, value = shared_input(("lora_qkv, q", "lora_qkv, k", "lora_qkv, v"), x, (q, k, v), scaling)
    return query, key, value


def lora_gate_up(x: Tensor, gate: Projection, up: Projection, scaling: float) -> tuple[Tensor, Tensor]:
    """`lora_linear` of x with gate and up, as `lora_qkv`."""
    first, second = shared_input(("lora_gate_up, gate", "lora_gate_up, up"), x, (gate, up), scaling)
    return first, second


def shared_input(
    names: Sequence[str], x: Tensor, projections: Sequence[Projection], scaling: float
) -> Sequence[Tensor]:
    """One result per projection; `names` are what errors call them."""
    ready = [prepare(name, x, *projection) for name, projection in zip(names, projections)]
    for name, (other, *_) in zip(names, ready):
        if other.dtype != ready[0][0].dtype:
            fail(name, f"its weight is {other.dtype}, that of {names[0]} is {ready[0][0].dtype}; they must agree.")
    x = ready[0][0]
    if decompose() or not all(is_frozen(weight, bias) for _, weight, bias, _, _ in ready):
        return [reference.lora_linear(x, dense(weight), bias, a, b, scaling) for _, weight, bias, a, b in ready]
    _, weights, maybe, lora_As, lora_Bs = (list(column) for column in zip(*ready))
    biases = [] if not any(b is not None for b in maybe) else [_bias_of(w, b) for w, b in zip(weights, maybe)]
    if torch.compiler.is_compiling():
        matrices = [dense(weight) for weight in weights]
        outputs: list[Tensor] = torch.ops.fedspine.lora_shared_input(x, matrices, biases, lora_As, lora_Bs, scaling)
        return outputs[:-1]
    if x.device.type == "cpu" and len(weights) < 3 and x.numel() < _CPU_PAIR_MIN_TOKENS * x.shape[-1]:
        return [eager_lora_linear(x, *one, scaling) for one in zip(weights, maybe, lora_As, lora_Bs)]
    flat: tuple[Tensor, ...] = _EagerSharedInput.apply(x, scaling, len(weights), *weights, *lora_As, *lora_Bs, *biases)
    return flat[:-1]


def _bias_of(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    """A bias for every projection where at least one has one: torch.library knows no lists with None in them."""
    return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device) if bias is None else bias


def _forward(
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    biases: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    scaling: float,
) -> list[Tensor]:
    """The results, then h = x [A_1; A_2; ...]ᵀ, which backward needs. `biases` is empty or complete."""
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


def _fake_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    scaling: float,
) -> list[Tensor]:
    outputs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return [*outputs, x.new_empty((x.shape[:-1].numel(), sum(lora_A.shape[0] for lora_A in lora_As)))]


def _backward_op(
    grads: list[Tensor],
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    low: Tensor,
    scaling: float,
    needs_x: bool,
) -> list[Tensor]:
    """[dX, every dA, every dB]; dX is empty unless `needs_x`. Formulas as in lora_linear's backward."""
    flat = x.reshape(-1, x.shape[-1])
    flat_grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    grad_low = torch.cat([project(grad, lora_B, scaling) for grad, lora_B in zip(flat_grads, lora_Bs)], dim=1)
    grad_x = x.new_empty(0)
    if needs_x:
        grad_x = flat_grads[0] @ dense(weights[0])
        for grad, weight in zip(flat_grads[1:], weights[1:]):
            grad_x.addmm_(grad, dense(weight))
        grad_x = expand_(grad_x, grad_low, torch.cat(lora_As), 1.0).view(x.shape)
    # Each gradient owns its memory: a view would keep the stack alive with the smallest of them.
    grad_As = [part.clone() for part in gradient(grad_low, flat, 1.0).split([a.shape[0] for a in lora_As])]
    parts = zip(_split(low, lora_Bs), flat_grads)
    return [grad_x, *grad_As, *(gradient_transposed(low_part, grad, scaling) for low_part, grad in parts)]


def _fake_backward_op(
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


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, lora_As, lora_Bs, ctx.scaling = inputs
    ctx.count, ctx.biases = len(weights), len(biases)
    ctx.save_for_backward(x, output[-1], *weights, *lora_As, *lora_Bs)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, low, *rest = ctx.saved_tensors
    n = ctx.count
    needs_x: bool = ctx.needs_input_grad[0]
    grad_x, *others = torch.ops.fedspine.lora_shared_input_backward(
        list(grads[:n]), x, rest[:n], rest[n : 2 * n], rest[2 * n :], low, ctx.scaling, needs_x
    )
    return grad_x if needs_x else None, [None] * n, [None] * ctx.biases, others[:n], others[n:], None


class _EagerSharedInput(torch.autograd.Function):  # type: ignore[misc]
    """The same forward and backward without the dispatcher in between, on flattened lists.

    What backward keeps of a quantised weight is its codes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, n: int, *tensors: Any) -> tuple[Tensor, ...]:
        weights, lora_As, lora_Bs, biases = (list(tensors[i : i + n]) for i in range(0, 4 * n, n))
        output = _forward(x, weights, biases, lora_As, lora_Bs, scaling)
        ctx.quantised = [weight if isinstance(weight, QuantizedWeight) else None for weight in weights]
        plain = [None if kept else weight for kept, weight in zip(ctx.quantised, weights)]
        _save_for_backward(ctx, (x, plain, biases, lora_As, lora_Bs, scaling), output)
        ctx.mark_non_differentiable(output[-1])
        return tuple(output)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, *rest = ctx.saved_tensors
        n = ctx.count
        needs_x: bool = ctx.needs_input_grad[0]
        weights = [kept or weight for kept, weight in zip(ctx.quantised, rest)]
        grad_x, *others = _backward_op(
            list(grads[:n]), x, weights, rest[n : 2 * n], rest[2 * n :], low, ctx.scaling, needs_x
        )
        return grad_x if needs_x else None, None, None, *[None] * n, *others, *[None] * ctx.biases


# Registration: what torch.compile sees. The signatures are given because annotations of lists are not all understood.

_LISTS = "Tensor[] weights, Tensor[] biases, Tensor[] lora_As, Tensor[] lora_Bs"
_registered = torch.library.custom_op(
    "fedspine::lora_shared_input", _forward, mutates_args=(), schema=f"(Tensor x, {_LISTS}, float scaling) -> Tensor[]"
)
_registered.register_fake(_fake_forward)
_registered.register_autograd(_backward, setup_context=_save_for_backward)
torch.library.custom_op(
    "fedspine::lora_shared_input_backward",
    _backward_op,
    mutates_args=(),
    schema="(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor low, "
    "float scaling, bool needs_x) -> Tensor[]",
).register_fake(_fake_backward_op)
