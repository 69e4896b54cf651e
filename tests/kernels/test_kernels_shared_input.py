"""lora_qkv and lora_gate_up against their reference implementations: eager, compiled, exported, under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, DTYPES
from torch import Tensor

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import ops, reference
from fedspine_edge.kernels.ops import Projection

SCALING = 2.0


def projection(in_features: int, out_features: int, rank: int, *, bias: bool = True, seed: int = 0) -> Projection:
    """Return a float64 projection with the variances of a model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    return Projection(
        normal(out_features, in_features, std=in_features**-0.5),
        normal(out_features, std=0.1) if bias else None,
        normal(rank, in_features, std=in_features**-0.5),
        normal(out_features, rank, std=0.3),
    )


def cast(p: Projection, dtype: torch.dtype, device: str = "cpu") -> Projection:
    """Return a copy whose adapter requires gradients."""
    weight, bias, lora_A, lora_B = (None if t is None else t.detach().to(device, dtype) for t in p)
    return Projection(weight, bias, lora_A.requires_grad_(), lora_B.requires_grad_())


def run(module: Any, x: Tensor, projections: list[Projection], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return outputs, dX and every dA and dB in float64, for a loss with a different weight for every element."""
    x = x.detach().to(device, dtype).requires_grad_()
    moved = [cast(p, dtype, device) for p in projections]
    outputs = {2: module.lora_gate_up, 3: module.lora_qkv}[len(moved)](x, *moved, SCALING)
    weights = [torch.arange(y.numel(), dtype=torch.float64).cos().reshape(y.shape).to(y) for y in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights)).backward()
    gradients = [t.grad for p in moved for t in (p.lora_A, p.lora_B)]
    return [t.detach().double().cpu() for t in (*outputs, x.grad, *gradients)]


def assert_as_exact_as_eager(
    x: Tensor, projections: list[Projection], dtype: torch.dtype, device: str = "cpu", *, spare_ulp: float = 1.0
) -> None:
    """Assert that the largest error against float64 is at most twice that of eager torch plus `spare_ulp` ulps."""
    rounded = [Projection(*(None if t is None else t.to(dtype).double() for t in p)) for p in projections]
    x = x.to(dtype).double()
    exact = run(reference, x, rounded, torch.float64)
    for mine, other, truth in zip(
        run(ops, x, rounded, dtype, device), run(reference, x, rounded, dtype, device), exact
    ):
        if truth.numel():
            # A single result may cancel and eager torch be exact by chance. The ulp is then that of a term, about 1.
            ulp = truth.abs().max().clamp(min=1.0 if spare_ulp > 1 else 0.0) * torch.finfo(dtype).eps
            bound = 2 * (other - truth).abs().max() + spare_ulp * ulp
            assert (mine - truth).abs().max() <= bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_input_error_is_at_most_twice_that_of_eager(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 48, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    heads = [projection(97, out, 8, seed=out) for out in (61, 20, 21)]  # grouped-query attention: k and v are narrower
    assert_as_exact_as_eager(x, heads, dtype, device)
    assert_as_exact_as_eager(x, heads[:2], dtype, device)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([(), (0,), (1,), (2, 0), (64,), (3, 29)]),
    in_features=st.sampled_from([1, 7, 32, 67, 600]),
    widths=st.lists(st.sampled_from([1, 5, 48, 53]), min_size=2, max_size=3),
    ranks=st.tuples(*[st.sampled_from([1, 2, 7, 12, 13, 256])] * 3),
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_shared_input_of_any_shape_is_exact(
    tokens: tuple[int, ...], in_features: int, widths: list[int], ranks: tuple[int, ...], bias: bool, strided: bool
) -> None:
    x = torch.randn(*tokens, in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [projection(in_features, w, r, bias=bias, seed=i) for i, (w, r) in enumerate(zip(widths, ranks))]
    if strided:
        x = torch.stack([x, x.new_full(x.shape, torch.nan)], dim=-1)[..., 0]
    depth = max(in_features, *widths, *ranks)
    assert_as_exact_as_eager(x, parts, torch.float32, spare_ulp=4 + depth**0.5)


def test_lora_qkv_agrees_with_three_lora_linear() -> None:
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0))
    parts = [cast(projection(32, 24, 4, seed=i), torch.float32) for i in range(3)]
    for y, part in zip(ops.lora_qkv(x, *parts, SCALING), parts):
        torch.testing.assert_close(y, ops.lora_linear(x, *part, SCALING))


def test_shared_input_with_one_bias_is_exact() -> None:
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_as_exact_as_eager(x, [projection(32, 24, 4), projection(32, 24, 4, bias=False, seed=1)], torch.float32)


def test_shared_input_passes_gradcheck() -> None:
    parts = [cast(projection(5, out, 2, seed=out), torch.float64) for out in (4, 3)]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(t for p in parts for t in (p.lora_A, p.lora_B))]

    def eager(x: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor) -> tuple[Tensor, ...]:
        first, second = parts
        return ops.lora_gate_up(x, first._replace(lora_A=a0, lora_B=b0), second._replace(lora_A=a1, lora_B=b1), 1.5)

    def registered(x: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor) -> tuple[Tensor, ...]:
        weights, biases = [p.weight for p in parts], [p.bias for p in parts]
        return tuple(torch.ops.fedspine.lora_shared_input(x, weights, biases, [a0, a1], [b0, b1], 1.5)[:2])

    assert torch.autograd.gradcheck(eager, leaves)
    assert torch.autograd.gradcheck(registered, leaves)


@pytest.mark.parametrize("bias", [True, False])
def test_shared_input_registered_op_passes_opcheck(bias: bool) -> None:
    parts = [cast(projection(5, out, 2, seed=out, bias=bias), torch.float32) for out in (4, 3, 3)]
    x = torch.randn(2, 3, 5, requires_grad=True)
    columns = [[t for t in column if t is not None] for column in zip(*parts)]
    torch.library.opcheck(torch.ops.fedspine.lora_shared_input.default, (x, *columns, 1.5))


def test_lora_qkv_with_unused_outputs_trains_the_used_one() -> None:
    parts = [cast(projection(16, 8, 4, seed=i), torch.float32) for i in range(3)]
    query, _, _ = ops.lora_qkv(torch.randn(70, 16), *parts, SCALING)
    query.sum().backward()
    assert parts[0].lora_B.grad.abs().sum() > 0
    assert parts[1].lora_B.grad is None or not parts[1].lora_B.grad.any()


def test_shared_input_with_trained_weight_returns_gradient() -> None:
    results = []
    for module in (ops, reference):
        parts = [cast(projection(16, 8, 4, seed=i), torch.float32) for i in range(2)]
        parts[1].weight.requires_grad_()
        first, second = module.lora_gate_up(torch.ones(70, 16), *parts, SCALING)
        (first.square().sum() + second.square().sum()).backward()
        results.append([parts[1].weight.grad, parts[0].lora_A.grad, parts[1].lora_B.grad])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


class Gated(torch.nn.Module):
    """The gate and up projections of a decoder with the non-linearity between them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [projection(16, 12, 4, seed=i) for i in range(2)]
        self.adapters = torch.nn.ParameterList([t.float() for p in self.parts for t in (p.lora_A, p.lora_B)])
        for i, part in enumerate(self.parts):
            self.register_buffer(f"weight{i}", part.weight.float())
        del self.parts

    def forward(self, x: Tensor) -> Tensor:
        a0, b0, a1, b1 = (self.adapters[i] for i in range(4))
        gate, up = ops.lora_gate_up(
            x, Projection(self.weight0, None, a0, b0), Projection(self.weight1, None, a1, b1), 2
        )
        return torch.nn.functional.silu(gate) * up


def test_shared_input_compiled_has_no_graph_breaks() -> None:
    layer, x = Gated(), torch.randn(2, 70, 16)
    expected = layer(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    for actual, eager in zip([p.grad for p in layer.parameters()], gradients):
        # On aarch64 BLAS computes the compiled graph differently: sums of 140 terms differ in the last place.
        torch.testing.assert_close(actual, eager, rtol=0, atol=1e-6 * eager.abs().max().item())


def test_shared_input_exported_uses_standard_operators() -> None:
    layer, x = Gated().eval(), torch.randn(2, 5, 16)
    program = torch.export.export(layer, (x,), strict=False)
    assert not [n for n in program.graph.nodes if "fedspine" in str(n.target)]
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("device", DEVICES)
def test_shared_input_under_autocast_float32_gradients(device: str) -> None:
    parts = [cast(projection(32, 24, 4, seed=i), torch.float32, device) for i in range(2)]
    x = torch.randn(70, 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs, expected = (module.lora_gate_up(x, *parts, SCALING) for module in (ops, reference))
    for y, other in zip(outputs, expected):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, other.to(torch.bfloat16), rtol=0.02, atol=0.05)
    sum(y.float().sum() for y in outputs).backward()
    assert all(t.grad.dtype == torch.float32 for p in parts for t in (p.lora_A, p.lora_B))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_shared_input_under_checkpointing_same_gradients(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = Gated()
    gradients = []
    for recompute in (False, True):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 70 * 16).reshape(70, 16).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if recompute else layer(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


def test_shared_input_with_invalid_argument_names_it() -> None:
    good = [cast(projection(8, 6, 2, seed=i), torch.float32) for i in range(3)]
    x = torch.zeros(3, 8)
    bad = good[1]._replace(lora_B=torch.zeros(6, 3))
    with pytest.raises(KernelError, match=r"lora_qkv, k: lora_B must have shape \(6, 2\), but it has \(6, 3\)"):
        ops.lora_qkv(x, good[0], bad, good[2], SCALING)
    with pytest.raises(KernelError, match=r"lora_gate_up, gate: x must have shape \(\.\.\., 8\), but it has \(3, 7\)"):
        ops.lora_gate_up(torch.zeros(3, 7), good[0], good[1], SCALING)
    double = cast(projection(8, 6, 2), torch.float64)
    with pytest.raises(KernelError, match=r"lora_gate_up, up: x is torch.float32, but the weight is torch.float64"):
        ops.lora_gate_up(x, good[0], double, SCALING)
