"""The CUDA kernels on a CPU: their own source, emulated (cuda_on_cpu), against float64 and eager torch.

What this cannot show: a GPU's speed, its registers, its compiler. What it shows: indices, strides, edges, fragments,
barriers, the order of sums. Every case runs under several orders of threads and must give the same bits.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import HERE, EmulatedCuda, compile_units
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, Adapted, adapted
from test_kernels_importance import METRICS, assert_as_exact_as_eager, grouping
from test_kernels_lora_linear import assert_as_exact_as_eager as assert_layer_as_exact_as_eager
from test_kernels_lora_linear import inputs
from torch import Tensor

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import lowrank, native, ops, reference

HALVES = [torch.float16, torch.bfloat16]
# Ascending, descending, shuffled order of threads and blocks; cp.async early or late.
ORDERS = [(0, False), (1, True), (5, True), (6, False)]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCuda:
    return EmulatedCuda(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Native CUDA ops run emulated, on CPU tensors."""
    if "emulation" not in request.fixturenames:
        yield
        return
    emulation: EmulatedCuda = request.getfixturevalue("emulation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_call", emulation.call)
        patch.setattr(native, "runs", lambda tensor: tensor.dtype in native.DTYPES)
        patch.setattr(lowrank, "_all_native", lambda x: x.dtype in native.DTYPES)
        emulation.order(0, False)
        yield


def same_bits_in_every_order(emulation: EmulatedCuda, function: Callable[[], Tensor]) -> Tensor:
    """The result, which no order of threads, blocks or asynchronous copies may change."""
    results = []
    for seed, late in ORDERS:
        emulation.order(seed, late)
        results.append(function())
    emulation.order(0, False)
    for other in results[1:]:
        assert torch.equal(results[0].view(torch.uint8), other.view(torch.uint8))
    return results[0]


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in other storage, surrounded by NaN."""
    if how == "transposed":
        return t.t().contiguous().t()
    if how == "every second":
        wide = torch.full((t.shape[0], 2 * t.shape[1]), torch.nan, dtype=t.dtype)
        wide[:, ::2] = t
        return wide[:, ::2]
    if how == "offset":
        wide = torch.full((t.shape[0] + 1, t.shape[1] + 3), torch.nan, dtype=t.dtype)
        wide[1:, 3:] = t
        return wide[1:, 3:]
    return t


# (rows, cols, rank): one element, primes, whole tiles, several blocks of several tiles, few and many steps over ranks.
SHAPES = [(1, 1, 1), (3, 67, 2), (64, 128, 16), (131, 40, 17), (72, 136, 33), (33, 5, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_importance(emulation: EmulatedCuda, dtype: torch.dtype, shape: tuple[int, int, int], by_row: bool) -> None:
    case = adapted(*shape, dtype=dtype)
    length = shape[0] if by_row else shape[1]
    options = {**grouping(length, (length + 2) // 3, by_row), "metric": METRICS[sum(shape) % 3]}
    same_bits_in_every_order(emulation, lambda: ops.importance_accumulate(*case.tensors, 2.0, **options))
    assert_as_exact_as_eager(case, options)


@pytest.mark.parametrize("how", ["transposed", "every second", "offset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_importance_of_strided_input(emulation: EmulatedCuda, how: str, dtype: torch.dtype) -> None:
    for by_row in (True, False):
        case = adapted(70, 72, 24, dtype=dtype)
        case = Adapted(*(strided(t, how) for t in case.tensors), scaling=case.scaling)
        assert_as_exact_as_eager(case, grouping(70 if by_row else 72, 9, by_row))


@pytest.mark.parametrize("aligned", ["weight", "factors"])
def test_importance_where_only_a_part_is_aligned(emulation: EmulatedCuda, aligned: str) -> None:
    case = adapted(80, 72, 8, dtype=torch.bfloat16)
    if aligned == "weight":
        case = Adapted(case.weight, *(strided(t, "offset") for t in case.tensors[1:]), scaling=2.0)
    else:
        case.weight = strided(case.weight, "transposed")
    assert_as_exact_as_eager(case, grouping(80, 8, True))


@pytest.mark.parametrize("weight", HALVES, ids=str)
def test_importance_with_a_float32_adapter_runs_on_cuda_cores(emulation: EmulatedCuda, weight: torch.dtype) -> None:
    case = adapted(70, 90, 16)
    case.weight = case.weight.to(weight)
    assert not native.tensor_cores(*case.tensors)
    assert_as_exact_as_eager(case, grouping(90, 30, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_non_finite_gradients_stay_in_their_row(emulation: EmulatedCuda, dtype: torch.dtype, by_row: bool) -> None:
    case = adapted(70, 35, 4, dtype=dtype) if by_row else adapted(35, 70, 4, dtype=dtype)
    (case.grad_B if by_row else case.grad_A.t())[10, 1] = torch.inf
    group = torch.arange(70, dtype=torch.int32)
    options = {"group_of_row" if by_row else "group_of_col": group, "num_groups": 70}
    finite = torch.isfinite(ops.importance_accumulate(*case.tensors, 1.0, **options))
    assert not finite[10]
    assert finite.sum() == 69


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups(emulation: EmulatedCuda, dtype: torch.dtype) -> None:
    case = adapted(200, 24, 3, dtype=dtype)

    def scores(group: Tensor, num_groups: int) -> Tensor:
        return ops.importance_accumulate(*case.tensors, 1.0, group_of_row=group, num_groups=num_groups)

    ascending = torch.arange(200, dtype=torch.int32) // 50  # found by bisection
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    by_group = scores(ascending, 6)
    assert (by_group[:4] > 0).all()
    assert by_group[4:].tolist() == [0, 0]  # groups without elements
    permuted = Adapted(case.weight[shuffled], case.lora_A, case.lora_B[shuffled], case.grad_A, case.grad_B[shuffled])
    other = ops.importance_accumulate(*permuted.tensors, 1.0, group_of_row=ascending[shuffled], num_groups=6)
    torch.testing.assert_close(other, by_group, rtol=1e-6, atol=0)
    for outside in (4, -1):
        ascending[-1] = outside
        assert torch.isnan(scores(ascending, 4)).all()


def test_empty_weight_scores_zero(emulation: EmulatedCuda) -> None:
    case = adapted(0, 8, 2, dtype=torch.bfloat16)
    group = torch.zeros(0, dtype=torch.int32)
    assert ops.importance_accumulate(*case.tensors, 1.0, group_of_row=group, num_groups=3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_larger_matrices_take_several_tiles_per_block(emulation: EmulatedCuda, by_row: bool) -> None:
    shape = (5, 64 * 129) if by_row else (64 * 129, 5)  # 129 tiles: two for each of 64 blocks, one for the last
    case = adapted(*shape, 20, dtype=torch.bfloat16)
    assert_as_exact_as_eager(case, grouping(5, 3, by_row))


def test_formats_round_as_torch_does(emulation: EmulatedCuda) -> None:
    every_half = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    between = torch.nextafter(every_half.float(), torch.full((65536,), torch.inf))
    values = torch.cat([every_half.float()[::5], between[::7], torch.tensor([0.0, 65519.0, 65520.0, 1e-8, 1e30])])
    finite = values[torch.isfinite(values)][:, None]
    for dtype in HALVES:
        ours = native.project(finite, torch.ones(1, 1), 1.0, dtype)
        assert torch.equal(ours, (finite + 0.0).to(dtype))  # 0 + -0 is 0
        assert torch.equal(native.project(ours, torch.ones(1, 1), 1.0, torch.float32), ours.float())


# (tokens, width, rank), as in h = x Aᵀ: one element, primes, whole tiles, several slices of the inner dimension.
PRODUCTS = [(1, 1, 1), (7, 67, 3), (70, 136, 8), (64, 64, 16), (5, 1100, 17), (530, 24, 40), (9, 33, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), PRODUCTS)
def test_low_rank_products(emulation: EmulatedCuda, dtype: torch.dtype, tokens: int, width: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, left, small = normal(tokens, width), normal(tokens, rank), normal(rank, width)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 5e-4}
    for factor in (small.t(), small.t().contiguous()):  # the inner dimension contiguous, and the other one
        out = same_bits_in_every_order(emulation, lambda factor=factor: native.project(x, factor, 0.5, dtype))
        torch.testing.assert_close(out.double(), 0.5 * x.double() @ small.double().t(), **tolerance)
    for factor in (small, small.t().contiguous().t()):
        grown = x.double() + 0.5 * left.double() @ small.double()
        out = same_bits_in_every_order(emulation, lambda factor=factor: native.expand_(x.clone(), left, factor, 0.5))
        torch.testing.assert_close(out.double(), grown, **tolerance)
    out = same_bits_in_every_order(emulation, lambda: native.gradient(left, x, 0.5, dtype))
    torch.testing.assert_close(out.double(), 0.5 * left.double().t() @ x.double(), **tolerance)


@pytest.mark.parametrize("how", ["transposed", "every second", "offset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_rank_products_of_strided_input(emulation: EmulatedCuda, how: str, dtype: torch.dtype) -> None:
    x, left, small = (torch.randn(shape).to(dtype) for shape in ((67, 72), (67, 20), (20, 72)))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 5e-4}
    xs, lefts, smalls = (strided(t, how) for t in (x, left, small))
    exact = 0.5 * x.double() @ small.double().t()
    torch.testing.assert_close(native.project(xs, smalls.t(), 0.5, dtype).double(), exact, **tolerance)
    exact = 0.5 * left.double().t() @ x.double()
    torch.testing.assert_close(native.gradient(lefts, xs, 0.5, dtype).double(), exact, **tolerance)
    exact = x.double() + 0.5 * left.double() @ small.double()
    torch.testing.assert_close(native.expand_(xs, lefts, smalls, 0.5).double(), exact, **tolerance)


def test_expand_writes_nothing_but_its_matrix(emulation: EmulatedCuda) -> None:
    for width in (72, 67):  # in pieces of 16 bytes, element by element
        wide = torch.full((70, 96), torch.nan, dtype=torch.bfloat16)
        wide[3:68, 8 : 8 + width] = 0
        out = wide[3:68, 8 : 8 + width]
        native.expand_(out, torch.ones(65, 8, dtype=torch.bfloat16), torch.ones(8, width, dtype=torch.bfloat16), 1.0)
        assert (out == 8).all()
        assert torch.isnan(wide).sum() == wide.numel() - out.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [((), 1), ((0,), 3), ((1,), 8), ((3, 29), 31)])
def test_lora_linear(emulation: EmulatedCuda, dtype: torch.dtype, tokens: tuple[int, ...], rank: int) -> None:
    # A single eager result may be exact by luck: room for half a rounding of h, which both forms round.
    assert_layer_as_exact_as_eager(inputs(tokens, 97, 56, rank), dtype, spare_ulp=4.0)


def test_lora_qkv(emulation: EmulatedCuda) -> None:
    """Stacked A, h in slices: operands whose rows begin anywhere."""
    q, k, v = ({**inputs((50,), 64, width, rank)} for width, rank in ((64, 8), (32, 3), (24, 5)))
    x = q["x"].bfloat16().requires_grad_()
    parts = [[part[n].bfloat16() for n in ("weight", "bias", "lora_A", "lora_B")] for part in (q, k, v)]
    for part in parts:
        part[2].requires_grad_()
        part[3].requires_grad_()
    ours = ops.lora_qkv(x, *(ops.Projection(*part) for part in parts), 2.0)
    theirs = reference.lora_qkv(x, *(tuple(part) for part in parts), 2.0)  # type: ignore[arg-type]
    leaves = [x, *(part[i] for part in parts for i in (2, 3))]
    for mine, expected in zip(ours, theirs):
        torch.testing.assert_close(mine, expected, rtol=0.02, atol=0.03)
    grads = [torch.autograd.grad([y.float().square().sum() for y in ys], leaves) for ys in (ours, theirs)]
    for mine, expected in zip(*grads):
        torch.testing.assert_close(mine, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_gather(emulation: EmulatedCuda, dtype: torch.dtype, by_row: bool) -> None:
    t = (torch.arange(57 * 83).reshape(57, 83) % 251).to(dtype)
    index = torch.tensor([3, 3, 0, 56, 11])
    for source in (t, t.t().contiguous().t()):
        expected = source[index] if by_row else source[:, index]
        assert torch.equal(native.gather(source, index, by_row), expected)
    assert native.gather(t, index[:0], by_row).numel() == 0


def test_tensor_cores_refuse_what_they_cannot_do(emulation: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "tensor_cores", lambda *tensors: True)
    case = adapted(8, 8, 2)
    group = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(KernelError, match="importance_accumulate: tensor cores need one 16-bit dtype for all five"):
        native.importance_accumulate(*case.tensors, 1.0, group, True, 1, "abs")
    with pytest.raises(KernelError, match="lora_linear: tensor cores need one 16-bit dtype"):
        native.project(case.weight.bfloat16(), case.lora_A.t(), 1.0, torch.bfloat16)


def test_a_launch_that_does_not_fit_is_an_error(emulation: EmulatedCuda) -> None:
    out = torch.zeros(1, 1, dtype=torch.bfloat16).expand(1, 64 * 65536)  # a grid has 65535 blocks in y
    with pytest.raises(KernelError, match="lora_linear: the matrix needs more blocks than a grid holds"):
        native.expand_(out, out[:, :1], out, 1.0)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_importance_of_anything(emulation: EmulatedCuda, data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
    case = adapted(rows, cols, data.draw(st.sampled_from([1, 7, 8, 16, 31, 32, 48, 256])), dtype=data.draw(dtypes))
    hows = st.sampled_from(["none", "none", "transposed", "every second", "offset"])
    case = Adapted(*(strided(t, data.draw(hows)) for t in case.tensors), scaling=case.scaling)
    by_row = data.draw(st.booleans())
    options = grouping(rows if by_row else cols, data.draw(st.integers(1, rows if by_row else cols)), by_row)
    options["metric"] = data.draw(st.sampled_from(METRICS))
    same_bits_in_every_order(emulation, lambda: ops.importance_accumulate(*case.tensors, 2.0, **options))
    assert_as_exact_as_eager(case, options)


dtypes = st.sampled_from(DTYPES)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 63, 64, 65, 129, 515]),
    in_features=st.integers(1, 140),
    out_features=st.integers(1, 140),
    rank=st.sampled_from([1, 4, 8, 15, 16, 17, 64, 100, 256]),
    dtype=dtypes,
)
def test_lora_linear_of_anything(
    emulation: EmulatedCuda, tokens: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype
) -> None:
    spare = 4 + max(tokens, in_features, out_features, rank) ** 0.5
    assert_layer_as_exact_as_eager(inputs((tokens,), in_features, out_features, rank), dtype, spare_ulp=spare)


# The emulation itself: faults that it must find, and what it prints where there is none.

WHOLE = " ".join(str(i) for i in range(64))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    sources: list[tuple[Path, Any]] = [(HERE / f"{name}.cpp", []) for name in ("emulator", "ptx")]
    objects = compile_units([*sources, (HERE.parent / "cuda_on_cpu_faults.cpp", [])], folder, ["-O0"])
    subprocess.run(["g++", *objects, "-o", folder / "faults"], check=True)
    return folder / "faults"


def run_fault(program: Path, fault: str, order: tuple[int, bool]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, fault, str(order[0]), str(int(order[1]))], capture_output=True, text=True)


def test_correct_kernels_give_the_same_in_every_order(faults: Path) -> None:
    for order in ORDERS:
        assert run_fault(faults, "copy", order).stdout.strip() == WHOLE
        assert run_fault(faults, "exchange", order).stdout.split() == WHOLE.split()[::-1]


@pytest.mark.parametrize("fault", ["race", "unwaited"])
def test_a_missing_barrier_or_wait_shows_in_some_order(faults: Path, fault: str) -> None:
    assert len({run_fault(faults, fault, order).stdout for order in ORDERS}) > 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_barrier", "thread 63 ended while thread 0 still waits"),
        ("divergent_warp", "thread 63 ended while thread 0 still waits"),
        ("misaligned", "cp.async from an address that is no multiple of 16"),
    ],
)
def test_misuse_stops_the_program(faults: Path, fault: str, message: str) -> None:
    result = run_fault(faults, fault, (0, False))
    assert result.returncode != 0
    assert message in result.stderr
