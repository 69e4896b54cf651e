"""rms_norm and swiglu against their reference implementations: eager, compiled, exported and under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, DTYPES, needs_extension
from torch import Tensor, nn

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import elementwise, ops, reference

EPSILON = 1e-5


@pytest.fixture(autouse=True)
def no_minimum_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ops treat small cases like large ones."""
    monkeypatch.setattr(elementwise, "_CPU_MIN_NORM", 0)
    monkeypatch.setattr(elementwise, "_CPU_MIN_GATE", 0)


def rms_norm(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = module.rms_norm(x, weight, EPSILON)
    return y


def swiglu(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    y: Tensor = module.swiglu(gate, up)
    return y


Op = Callable[[Any, Tensor, Tensor], Tensor]


def operands(op: Op, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return x and weight, or gate and up, in `dtype`."""
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    first = torch.randn(shape, generator=generator) * scale
    second = torch.randn(shape[-1:] if op is rms_norm else shape, generator=generator)
    return first.to(dtype), second.to(dtype)


def run(op: Op, module: Any, first: Tensor, second: Tensor) -> list[Tensor]:
    """Return result and gradients in float64, for a loss with a different weight for every element."""
    first = first.detach().requires_grad_()
    second = second.detach().requires_grad_(op is swiglu)  # the weight of a norm is frozen
    y = op(module, first, second)
    (y * torch.arange(y.numel(), dtype=torch.float64).cos().reshape(y.shape).to(y)).sum().backward()
    grads = [t.grad for t in (first, second) if t.requires_grad]
    return [t.detach().double().cpu() for t in (y, *grads)]


def assert_as_exact_as_eager(op: Op, first: Tensor, second: Tensor) -> None:
    """Assert that the largest error against float64 is at most twice that of eager torch plus an ulp."""
    exact = run(op, reference, first.double(), second.double())
    for mine, eager, truth in zip(run(op, ops, first, second), run(op, reference, first, second), exact):
        assert mine.shape == truth.shape
        if truth.numel():
            spare = truth.abs().max() * torch.finfo(first.dtype).eps
            assert (mine - truth).abs().max() <= 2 * (eager - truth).abs().max() + spare


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [rms_norm, swiglu])
def test_elementwise_error_is_at_most_twice_that_of_eager(op: Op, dtype: torch.dtype, device: str) -> None:
    for scale in (1.0, 30.0):
        first, second = operands(op, (3, 48, 577), dtype, scale)
        assert_as_exact_as_eager(op, first.to(device), second.to(device))


@settings(max_examples=60, deadline=None)
@given(
    op=st.sampled_from([rms_norm, swiglu]),
    tokens=st.sampled_from([(), (0,), (1,), (2, 0), (7,), (3, 29)]),
    width=st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33, 64, 601]),
    strided=st.booleans(),
)
def test_elementwise_of_any_shape_is_exact(op: Op, tokens: tuple[int, ...], width: int, strided: bool) -> None:
    first, second = operands(op, (*tokens, width), torch.float32)
    if strided:
        first = torch.stack([first, first.new_full(first.shape, torch.nan)], dim=-1)[..., 0]
    assert_as_exact_as_eager(op, first, second)


@pytest.mark.parametrize("op", [rms_norm, swiglu])
def test_elementwise_with_empty_last_dimension_returns_empty(op: Op) -> None:
    first, second = operands(op, (3, 0), torch.float32)
    assert op(ops, first, second).shape == (3, 0)


def test_rms_norm_per_head_with_transposed_gradient() -> None:
    """Qwen3 normalises each head of (rows, tokens, heads, head_dim), and the gradient arrives transposed."""
    x, weight = operands(rms_norm, (2, 5, 3, 64), torch.float32)
    y = ops.rms_norm(x.requires_grad_(), weight, EPSILON).transpose(1, 2)
    y.backward(torch.ones_like(y).cumsum(-1))
    mine, x.grad = x.grad, None
    y = reference.rms_norm(x, weight, EPSILON).transpose(1, 2)
    y.backward(torch.ones_like(y).cumsum(-1))
    torch.testing.assert_close(mine, x.grad, rtol=1e-5, atol=1e-5)


@needs_extension
def test_swiglu_of_extreme_gates_equals_torch() -> None:
    # -88 to -104 is excluded: silu is subnormal there, and whether torch flushes it to 0 depends on its build.
    values = [0.0, -0.0, 1e-30, 20.0, -20.0, 87.0, -87.0, 90.0, -150.0, 1e38, float("inf"), float("nan")]
    gate, up = torch.tensor(values).repeat(40), torch.full((40 * len(values),), 2.0)
    torch.testing.assert_close(ops.swiglu(gate, up), reference.swiglu(gate, up), equal_nan=True, rtol=1e-6, atol=1e-35)


@needs_extension
@pytest.mark.parametrize("op", [rms_norm, swiglu])
def test_elementwise_with_any_threads_gives_the_same_bits(op: Op) -> None:
    first, second = operands(op, (2001, 1003), torch.float32)  # enough work for several threads
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(op, ops, first, second))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(
    ("op", "dtype", "kept"),
    [
        (rms_norm, torch.float32, 4 * (96 * 64 + 64 + 96)),
        (rms_norm, torch.bfloat16, 2 * (96 * 64 + 64) + 4 * 96),
        (swiglu, torch.float32, 4 * 2 * 96 * 64),
    ],
)
def test_elementwise_saves_only_inputs_for_backward(op: Op, dtype: torch.dtype, kept: int) -> None:
    """A norm saves one more number per row. Autograd over plain operators also saves silu(gate) and x in float32."""

    def saved_bytes(module: Any) -> int:
        first, second = operands(op, (96, 64), dtype)
        found: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.update({t.data_ptr(): t.numel() * t.element_size()}) or t, lambda t: t
        ):
            op(module, first.requires_grad_(), second.requires_grad_(op is swiglu))
        return sum(found.values())

    assert saved_bytes(ops) == kept
    if op is swiglu or dtype == torch.bfloat16:
        assert saved_bytes(reference) > 1.4 * kept


def test_elementwise_passes_gradcheck() -> None:
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    up = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.rms_norm(x, weight, EPSILON), [x])
    assert torch.autograd.gradcheck(ops.swiglu, [x, up])


def test_rms_norm_with_trained_weight_returns_its_gradient() -> None:
    x, weight = operands(rms_norm, (5, 9), torch.float32)
    weight.requires_grad_()
    ops.rms_norm(x, weight, EPSILON).sum().backward()
    expected = (x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()).sum(0)
    torch.testing.assert_close(weight.grad, expected)


def test_rms_norm_with_float32_weight_returns_float32() -> None:
    x, weight = operands(rms_norm, (5, 9), torch.bfloat16)
    y = ops.rms_norm(x, weight.float(), EPSILON)
    assert y.dtype == torch.float32
    assert torch.equal(y, reference.rms_norm(x, weight.float(), EPSILON))


class Both(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(ops.rms_norm(x, self.weight, EPSILON), x)


def test_elementwise_compiled_agrees_with_eager() -> None:
    module, x = Both(), torch.randn(70, 16, requires_grad=True)
    y = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    y.sum().backward()
    mine, x.grad = x.grad, None
    module(x).sum().backward()
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close(mine, x.grad)


def test_elementwise_exported_uses_standard_operators() -> None:
    module, x = Both(), torch.randn(70, 16)
    program = torch.export.export(module, (x,), strict=False)
    assert all(str(n.target).startswith("aten.") for n in program.graph.nodes if n.op == "call_function")
    torch.testing.assert_close(program.module()(x), module(x))


def test_elementwise_under_autocast_keeps_dtypes() -> None:
    """As in transformers' modules, a norm of float32 stays float32 and a gate has the dtype of its linear layers."""
    x, weight = operands(rms_norm, (70, 16), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.rms_norm(x, weight, EPSILON).dtype == torch.float32
        assert ops.swiglu(x.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


def test_swiglu_of_few_elements_uses_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_CPU_MIN_GATE", 65)
    gate, up = operands(swiglu, (8, 8), torch.float32)
    assert ops.swiglu(gate.requires_grad_(), up).grad_fn.name() == "MulBackward0"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rms_norm(torch.zeros(3, 4), torch.zeros(5), 1e-6), r"rms_norm: weight must have shape \(4,\)"),
        (lambda: ops.rms_norm(torch.zeros(3, 4), torch.zeros(1, 4), 1e-6), r"rms_norm: weight must have shape \(4,\)"),
        (lambda: ops.rms_norm(torch.zeros(()), torch.zeros(4), 1e-6), "rms_norm: x must have at least one dimension"),
        (lambda: ops.rms_norm(torch.zeros(3, 4).long(), torch.zeros(4), 1e-6), "rms_norm: x must be floating point"),
        (lambda: ops.swiglu(torch.zeros(3), torch.zeros(4)), r"swiglu: gate is torch.float32 \(3,\)"),
        (lambda: ops.swiglu(torch.zeros(3), torch.zeros(3).half()), "swiglu: .* up is torch.float16"),
        (lambda: ops.swiglu(torch.zeros(3).int(), torch.zeros(3).int()), "swiglu: gate must be floating point"),
    ],
)
def test_elementwise_with_invalid_argument_raises(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call()
