"""lora_linear: forward and gradients against plain torch and float64; eager, autocast, compile and export."""

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
    """Float64 arguments of lora_linear with the variances that a model gives them."""
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
    """Copies in `dtype` on `device`, x and the adapter as leaves that want a gradient."""
    moved = {k: v.detach().to(device, dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    for name in NAMES:
        moved[name].requires_grad_()
    return moved


def run(function: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """y, dx, dA, dB for the loss sum(y * cos(position)), in float64."""
    y = function(**arguments)
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().reshape(y.shape).to(y)
    (y * weights).sum().backward()
    return [y.detach().double(), *(arguments[name].grad.double() for name in NAMES)]


def assert_as_exact_as_eager(
    arguments: dict[str, Any], dtype: torch.dtype, device: str = "cpu", *, spare_ulp: float = 1.0
) -> None:
    """Every output's largest error against float64 is at most twice eager torch's, with an ulp to spare."""
    rounded = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    exact = run(reference.lora_linear, cast(rounded, torch.float64, device))
    eager = run(reference.lora_linear, cast(rounded, dtype, device))
    ours = run(ops.lora_linear, cast(rounded, dtype, device))
    for name, mine, theirs, truth in zip(("y", *NAMES), ours, eager, exact):
        if truth.numel():
            # A single result may cancel, and eager be right by luck: an ulp is then that of a term, about 1.
            ulp = truth.abs().max().clamp(min=1.0 if spare_ulp > 1 else 0.0) * torch.finfo(dtype).eps
            bound = 2 * (theirs - truth).abs().max() + spare_ulp * ulp
            assert (mine - truth).abs().max() <= bound, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(3, 48), (130,)], ids=str)  # the second takes the native projection
@pytest.mark.parametrize("rank", [1, 8, 31])
def test_error_is_at_most_twice_eager(device: str, dtype: torch.dtype, tokens: tuple[int, ...], rank: int) -> None:
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
def test_any_shape(
    tokens: tuple[int, ...], in_features: int, out_features: int, rank: int, bias: bool, strided: bool
) -> None:
    arguments = inputs(tokens, in_features, out_features, rank, bias=bias)
    if strided:
        for name in ("x", "weight", "lora_A", "lora_B"):
            t = arguments[name]
            arguments[name] = torch.stack([t, t.new_full(t.shape, torch.nan)], dim=-1)[..., 0]
    # Among a handful of elements eager's largest error may be 0 by luck: leave room for a random walk over the sum.
    depth = max(in_features, out_features, rank)
    assert_as_exact_as_eager(arguments, torch.float32, spare_ulp=4 + 2 * depth**0.5)


def test_hand_computed() -> None:
    y = ops.lora_linear(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([5.0]),
        torch.tensor([[1.0, -1.0]]),
        torch.tensor([[10.0]]),
        0.5,
    )
    assert y.tolist() == [[3 + 8 + 5 + 0.5 * 10 * (1 - 2)]]


def test_gradcheck_in_double() -> None:
    a = cast(inputs((2, 3), 5, 4, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, lora_A, lora_B: ops.lora_linear(x, a["weight"], a["bias"], lora_A, lora_B, 1.5),
        [a[name] for name in NAMES],
    )


def test_registered_op_passes_opcheck_and_gradcheck() -> None:
    for bias in (True, False):
        a = cast(inputs((2, 3), 5, 4, 2, bias=bias), torch.float32)
        torch.library.opcheck(torch.ops.fedspine.lora_linear.default, tuple(a.values()))
    a = cast(inputs((3,), 5, 4, 2), torch.float64)
    registered = torch.ops.fedspine.lora_linear
    assert torch.autograd.gradcheck(
        lambda x, lora_A, lora_B: registered(x, a["weight"], a["bias"], lora_A, lora_B, 1.5)[0],
        [a[name] for name in NAMES],
    )


def test_only_the_adapter_gets_gradients_from_frozen_input() -> None:
    a = cast(inputs((70,), 16, 8, 4), torch.float32)
    a["x"] = a["x"].detach()
    ops.lora_linear(**a).sum().backward()
    assert a["lora_A"].grad is not None
    assert a["lora_B"].grad is not None
    assert a["weight"].grad is None


def test_unfrozen_weight_and_bias_get_their_gradients() -> None:
    results = []
    for module in (ops, reference):
        a = cast(inputs((70,), 16, 8, 4), torch.float32)
        a["weight"].requires_grad_()
        a["bias"].requires_grad_()
        module.lora_linear(**a).square().sum().backward()
        results.append([a[name].grad for name in ("weight", "bias", *NAMES)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_twice(device: str) -> None:
    arguments = inputs((130,), 640, 320, 8)
    first, second = (run(ops.lora_linear, cast(arguments, torch.float32, device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_computes_in_its_dtype_and_keeps_master_gradients(device: str) -> None:
    a = cast(inputs((70,), 32, 24, 4), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.lora_linear(**a)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, reference.lora_linear(**a).to(torch.bfloat16), rtol=0.02, atol=0.03)
    y.float().sum().backward()
    assert a["lora_A"].grad.dtype == a["lora_B"].grad.dtype == torch.float32


def test_float32_adapters_on_a_bfloat16_model() -> None:
    a = cast(inputs((70,), 32, 24, 4), torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        a[name] = a[name].detach().float().requires_grad_()
    y = ops.lora_linear(**a)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert a["lora_A"].grad.dtype == a["lora_B"].grad.dtype == torch.float32


class Layer(torch.nn.Module):
    """One adapted linear with a non-linearity, as a model has it."""

    def __init__(self) -> None:
        super().__init__()
        a = inputs((), 16, 12, 4)
        for name in ("weight", "bias"):
            self.register_buffer(name, a[name].float())
        self.lora_A = torch.nn.Parameter(a["lora_A"].float())
        self.lora_B = torch.nn.Parameter(a["lora_B"].float())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(ops.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, 2.0))


def test_torch_compile_sees_one_op_without_graph_breaks() -> None:
    layer, x = Layer(), torch.randn(2, 70, 16)
    expected = layer(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    for ours, eager in zip([p.grad for p in layer.parameters()], gradients):
        torch.testing.assert_close(ours, eager)


def test_export_decomposes_into_standard_operators() -> None:
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
def test_projection(device: str, dtype: torch.dtype, tokens: int, width: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator).to(device, dtype)
    small = torch.randn(rank, width, generator=generator).to(device, dtype)
    exact = 0.5 * x.double() @ small.double().t()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4}
    torch.testing.assert_close(native.project(x, small.t(), 0.5, dtype).double(), exact, **tolerance)
    columns = x.t().contiguous().t()  # strided input
    torch.testing.assert_close(native.project(columns, small.t(), 0.5, dtype).double(), exact, **tolerance)


BAD = {
    "x width": ({"x": torch.zeros(3, 7)}, r"x must have shape \(\.\.\., 8\), it has \(3, 7\)"),
    "x scalar": ({"x": torch.zeros(())}, r"x must have shape"),
    "x dtype": ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "x is torch.float64, the weight is torch.float32"),
    "weight": ({"weight": torch.zeros(6)}, "weight must be a matrix"),
    "bias": ({"bias": torch.zeros(5)}, r"bias must have shape \(6,\), it has \(5,\)"),
    "lora_A, a number": ({"lora_A": torch.tensor(1.0)}, "lora_A must be a matrix"),
    "lora_A": ({"lora_A": torch.zeros(2, 9)}, r"lora_A must have shape \(2, 8\)"),
    "lora_B": ({"lora_B": torch.zeros(6, 3)}, r"lora_B must have shape \(6, 2\)"),
    "rank 0": ({"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)}, "rank 0; 1 to 256"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    good = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs((3,), 8, 6, 2).items()}
    with pytest.raises(KernelError, match=f"lora_linear: .*{message}"):
        ops.lora_linear(**{**good, **change})


@settings(max_examples=30, deadline=None)
@given(data=st.data(), full_out=st.integers(1, 40), full_in=st.integers(1, 40), int32=st.booleans())
def test_kept_rows_and_columns_of_the_full_adapter(
    data: st.DataObject, full_out: int, full_in: int, int32: bool
) -> None:
    """Compact W with the full model's adapter equals the compacted adapter, and masked-full equals compact."""

    def kept(size: int) -> Tensor:
        chosen = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
        return torch.tensor(sorted(chosen), dtype=torch.int32 if int32 else torch.int64)

    keep_out, keep_in = kept(full_out), kept(full_in)
    full = cast(inputs((5,), full_in, full_out, 3), torch.float64)
    rows, cols = keep_out.long(), keep_in.long()
    x = full["x"].detach()[:, cols].requires_grad_()
    weight, bias = full["weight"][rows][:, cols], full["bias"][rows]
    y = ops.lora_linear(x, weight, bias, full["lora_A"], full["lora_B"], 2.0, keep_out, keep_in)
    masked_x = torch.zeros(5, full_in, dtype=torch.float64).index_copy(1, cols, x.detach())
    masked = reference.lora_linear(masked_x, *(full[k] for k in ("weight", "bias", "lora_A", "lora_B")), 2.0)
    torch.testing.assert_close(y, masked[:, rows])
    ours = torch.autograd.grad(y.square().sum(), [full["lora_A"], full["lora_B"]])
    theirs = torch.autograd.grad(masked[:, rows].square().sum(), [full["lora_A"], full["lora_B"]])
    for mine, expected in zip(ours, theirs):
        torch.testing.assert_close(mine, expected)
    twin = reference.lora_linear(x, weight, bias, full["lora_A"], full["lora_B"], 2.0, keep_out, keep_in)
    torch.testing.assert_close(y, twin)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"keep_out": torch.tensor([0, 6])}, r"keep_out holds 6, outside 0\.\.5 of lora_B"),
        ({"keep_in": torch.tensor([-1])}, r"keep_in holds -1, outside 0\.\.7 of lora_A"),
        ({"keep_in": torch.tensor([0.0])}, "keep_in must be a vector of int32 or int64"),
        ({"keep_out": torch.tensor([0, 1])}, r"lora_B must have shape \(6, 2\), it has \(2, 2\)"),
    ],
)
def test_bad_kept_indices_are_named(keep: dict[str, Tensor], message: str) -> None:
    good = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs((3,), 8, 6, 2).items()}
    with pytest.raises(KernelError, match=f"lora_linear: {message}"):
        ops.lora_linear(**good, **keep)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
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
