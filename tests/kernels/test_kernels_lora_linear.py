"""lora_linear: result and gradients against eager torch and float64; autocast, compile and export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, DTYPES, needs_extension
from torch import Tensor

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import native, ops, reference

NAMES = ("x", "lora_A", "lora_B")


def inputs(
    tokens: tuple[int, ...], in_features: int, out_features: int, rank: int, *, bias: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Return float64 arguments of lora_linear with the variances of a model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    return {
        "x": normal(*tokens, in_features, std=1.0),
        "weight": normal(out_features, in_features, std=in_features**-0.5),
        "bias": normal(out_features, std=0.1) if bias else None,
        "lora_A": normal(rank, in_features, std=in_features**-0.5),
        "lora_B": normal(out_features, rank, std=0.3),
        "scaling": 2.0,
    }


def cast(arguments: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Return copies in `dtype` on `device`; x and the adapter are leaves that require a gradient."""
    moved = {k: v.detach().to(device, dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    for name in NAMES:
        moved[name].requires_grad_()
    return moved


def run(function: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Return y, dX, dA and dB in float64, for the loss sum(y * cos(position))."""
    y = function(**arguments)
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().reshape(y.shape).to(y)
    (y * weights).sum().backward()
    return [y.detach().double(), *(arguments[name].grad.double() for name in NAMES)]


def assert_as_exact_as_eager(
    arguments: dict[str, Any], dtype: torch.dtype, device: str = "cpu", *, spare_ulp: float = 1.0
) -> None:
    """Assert that the largest error against float64 is at most twice that of eager torch plus `spare_ulp` ulps."""
    rounded = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    exact = run(reference.lora_linear, cast(rounded, torch.float64, device))
    eager = run(reference.lora_linear, cast(rounded, dtype, device))
    actual = run(ops.lora_linear, cast(rounded, dtype, device))
    for name, mine, other, truth in zip(("y", *NAMES), actual, eager, exact):
        if truth.numel():
            # A single result may cancel and eager torch be exact by chance. The ulp is then that of a term, about 1.
            ulp = truth.abs().max().clamp(min=1.0 if spare_ulp > 1 else 0.0) * torch.finfo(dtype).eps
            bound = 2 * (other - truth).abs().max() + spare_ulp * ulp
            assert (mine - truth).abs().max() <= bound, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(3, 48), (130,)], ids=str)  # the second uses the native projection
@pytest.mark.parametrize("rank", [1, 8, 31])
def test_lora_linear_error_is_at_most_twice_that_of_eager(
    device: str, dtype: torch.dtype, tokens: tuple[int, ...], rank: int
) -> None:
    assert_as_exact_as_eager(inputs(tokens, 97, 61, rank), dtype, device)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([(), (0,), (1,), (2, 0), (64,), (3, 29)]),
    in_features=st.sampled_from([1, 7, 32, 67, 600]),
    out_features=st.sampled_from([1, 5, 48, 53]),
    rank=st.sampled_from([1, 2, 7, 12, 13, 256]),
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_lora_linear_of_any_shape_is_exact(
    tokens: tuple[int, ...], in_features: int, out_features: int, rank: int, bias: bool, strided: bool
) -> None:
    arguments = inputs(tokens, in_features, out_features, rank, bias=bias)
    if strided:
        for name in ("x", "weight", "lora_A", "lora_B"):
            t = arguments[name]
            arguments[name] = torch.stack([t, t.new_full(t.shape, torch.nan)], dim=-1)[..., 0]
    # With few elements the largest error of eager torch may be 0 by chance: allow for a random walk over the sum.
    depth = max(in_features, out_features, rank)
    assert_as_exact_as_eager(arguments, torch.float32, spare_ulp=4 + 2 * depth**0.5)


def test_lora_linear_of_one_token_equals_hand_computed() -> None:
    y = ops.lora_linear(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([5.0]),
        torch.tensor([[1.0, -1.0]]),
        torch.tensor([[10.0]]),
        0.5,
    )
    assert y.tolist() == [[3 + 8 + 5 + 0.5 * 10 * (1 - 2)]]


def test_lora_linear_passes_gradcheck() -> None:
    a = cast(inputs((2, 3), 5, 4, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, lora_A, lora_B: ops.lora_linear(x, a["weight"], a["bias"], lora_A, lora_B, 1.5),
        [a[name] for name in NAMES],
    )


def test_lora_linear_registered_op_passes_opcheck() -> None:
    for bias in (True, False):
        a = cast(inputs((2, 3), 5, 4, 2, bias=bias), torch.float32)
        torch.library.opcheck(torch.ops.fedspine.lora_linear.default, tuple(a.values()))
    a = cast(inputs((3,), 5, 4, 2), torch.float64)
    registered = torch.ops.fedspine.lora_linear
    assert torch.autograd.gradcheck(
        lambda x, lora_A, lora_B: registered(x, a["weight"], a["bias"], lora_A, lora_B, 1.5)[0],
        [a[name] for name in NAMES],
    )


def test_lora_linear_with_frozen_input_trains_the_adapter() -> None:
    a = cast(inputs((70,), 16, 8, 4), torch.float32)
    a["x"] = a["x"].detach()
    ops.lora_linear(**a).sum().backward()
    assert a["lora_A"].grad is not None
    assert a["lora_B"].grad is not None
    assert a["weight"].grad is None


def test_lora_linear_with_trained_weight_returns_its_gradient() -> None:
    results = []
    for module in (ops, reference):
        a = cast(inputs((70,), 16, 8, 4), torch.float32)
        a["weight"].requires_grad_()
        a["bias"].requires_grad_()
        module.lora_linear(**a).square().sum().backward()
        results.append([a[name].grad for name in ("weight", "bias", *NAMES)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_lora_linear_repeated_gives_the_same_bits(device: str) -> None:
    arguments = inputs((130,), 640, 320, 8)
    first, second = (run(ops.lora_linear, cast(arguments, torch.float32, device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("device", DEVICES)
def test_lora_linear_under_autocast_keeps_float32_gradients(device: str) -> None:
    a = cast(inputs((70,), 32, 24, 4), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.lora_linear(**a)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, reference.lora_linear(**a).to(torch.bfloat16), rtol=0.02, atol=0.03)
    y.float().sum().backward()
    assert a["lora_A"].grad.dtype == a["lora_B"].grad.dtype == torch.float32


def test_lora_linear_with_float32_adapter_on_bfloat16() -> None:
    a = cast(inputs((70,), 32, 24, 4), torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        a[name] = a[name].detach().float().requires_grad_()
    y = ops.lora_linear(**a)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert a["lora_A"].grad.dtype == a["lora_B"].grad.dtype == torch.float32


class Layer(torch.nn.Module):
    """A linear layer with an adapter, followed by a non-linearity."""

    def __init__(self) -> None:
        super().__init__()
        a = inputs((), 16, 12, 4)
        for name in ("weight", "bias"):
            self.register_buffer(name, a[name].float())
        self.lora_A = torch.nn.Parameter(a["lora_A"].float())
        self.lora_B = torch.nn.Parameter(a["lora_B"].float())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(ops.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, 2.0))


def test_lora_linear_compiled_has_no_graph_breaks() -> None:
    layer, x = Layer(), torch.randn(2, 70, 16)
    expected = layer(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    for actual, eager in zip([p.grad for p in layer.parameters()], gradients):
        torch.testing.assert_close(actual, eager)


def test_lora_linear_exported_uses_standard_operators() -> None:
    layer, x = Layer().eval(), torch.randn(2, 5, 16)
    dynamic = {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=dynamic, strict=False)
    assert not [n for n in program.graph.nodes if "fedspine" in str(n.target)]
    other = torch.randn(2, 9, 16)
    torch.testing.assert_close(program.module()(other), layer(other))


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), [(1, 1, 1), (5, 700, 3), (67, 130, 16), (9, 33, 256)])
def test_native_project_agrees_with_float64(
    device: str, dtype: torch.dtype, tokens: int, width: int, rank: int
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator).to(device, dtype)
    small = torch.randn(rank, width, generator=generator).to(device, dtype)
    exact = 0.5 * x.double() @ small.double().t()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4}
    torch.testing.assert_close(native.project(x, small.t(), 0.5, dtype).double(), exact, **tolerance)
    columns = x.t().contiguous().t()  # strided input
    torch.testing.assert_close(native.project(columns, small.t(), 0.5, dtype).double(), exact, **tolerance)


BAD = {
    "x width": ({"x": torch.zeros(3, 7)}, r"x must have shape \(\.\.\., 8\), but it has \(3, 7\)"),
    "x scalar": ({"x": torch.zeros(())}, r"x must have shape"),
    "x dtype": ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "x is torch.float64, but the weight is torch.float32"),
    "weight": ({"weight": torch.zeros(6)}, "weight must be a matrix"),
    "bias": ({"bias": torch.zeros(5)}, r"bias must have shape \(6,\), but it has \(5,\)"),
    "lora_A, a number": ({"lora_A": torch.tensor(1.0)}, "lora_A must be a matrix"),
    "lora_A": ({"lora_A": torch.zeros(2, 9)}, r"lora_A must have shape \(2, 8\)"),
    "lora_B": ({"lora_B": torch.zeros(6, 3)}, r"lora_B must have shape \(6, 2\)"),
    "rank 0": (
        {"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)},
        "rank 0. The rank must be between 1 and 256",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_lora_linear_with_invalid_argument_names_it(change: dict[str, Any], message: str) -> None:
    good = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs((3,), 8, 6, 2).items()}
    with pytest.raises(KernelError, match=f"lora_linear: .*{message}"):
        ops.lora_linear(**{**good, **change})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_lora_linear_under_checkpointing_same_gradients(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = Layer()
    gradients = []
    for recompute in (False, True):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 70 * 16).reshape(70, 16).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if recompute else layer(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)
