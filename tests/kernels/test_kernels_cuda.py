"""The CUDA kernels against float64, eager torch and the naive kernels, on a GPU and in the emulation on a CPU.

The emulation (cuda_on_cpu) shows nothing about speed, registers or nvcc. It verifies indices, strides, edges,
fragments, barriers and the order of sums: every case runs with several orders of threads and must give the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive_cuda
import pytest
import torch
from emulated_cuda import ORDERS, EmulatedCuda
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, DTYPES, Adapted, adapted
from test_kernels_importance import METRICS, assert_as_exact_as_eager, grouping
from test_kernels_lora_linear import NAMES, cast, inputs
from test_kernels_lora_linear import assert_as_exact_as_eager as assert_layer_as_exact_as_eager
from torch import Tensor

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import lora_linear, native, ops, reference

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu_smoke

HALVES = [torch.float16, torch.bfloat16]


class Gpu:
    """Counterpart of `EmulatedCuda` for a GPU, whose order of threads cannot be set."""

    device = "cuda"

    def order(self, seed: int, late_async: bool) -> None:
        torch.cuda.synchronize()


@pytest.fixture(scope="module", params=["emulated", *DEVICES[1:]])
def cuda(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedCuda | Gpu]:
    """Make the native ops use the CUDA kernels for tensors on `cuda.device`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "emulated":
            patch.setenv("FEDSPINE_LORA_LINEAR", "native")
            yield Gpu()
            return
        emulation = EmulatedCuda(tmp_path_factory.mktemp("emulated"))
        patch.setattr(native, "_call", emulation.call)
        patch.setattr(native, "supports", lambda tensor: tensor.dtype in native.DTYPES)
        patch.setattr(lora_linear, "_uses_cuda_kernels", lambda x: x.dtype in native.DTYPES)
        yield emulation


Cuda = EmulatedCuda | Gpu


def same_bits_in_every_order(cuda: Cuda, function: Callable[[], Tensor]) -> Tensor:
    """Return the result after comparing it in every order of threads, blocks and asynchronous copies."""
    results = []
    for seed, late in ORDERS:
        cuda.order(seed, late)
        results.append(function().contiguous())
    cuda.order(0, False)
    for other in results[1:]:
        assert torch.equal(results[0].view(torch.uint8), other.view(torch.uint8))  # bits: NaN is NaN
    return results[0]


def strided(t: Tensor, how: str) -> Tensor:
    """Return the same values with other strides, surrounded by NaN."""
    if how == "transposed":
        return t.t().contiguous().t()
    if how == "every second":
        wide = t.new_full((t.shape[0], 2 * t.shape[1]), torch.nan)
        wide[:, ::2] = t
        return wide[:, ::2]
    if how == "offset":
        wide = t.new_full((t.shape[0] + 1, t.shape[1] + 3), torch.nan)
        wide[1:, 3:] = t
        return wide[1:, 3:]
    return t


# (rows, cols, rank): one element, primes, whole tiles, several blocks and tiles, few and many steps over ranks.
SHAPES = [(1, 1, 1), (3, 67, 2), (64, 128, 16), (131, 40, 17), (72, 136, 33), (33, 5, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_importance_error_is_at_most_twice_that_of_eager_torch(
    cuda: Cuda, dtype: torch.dtype, shape: tuple[int, int, int], by_row: bool
) -> None:
    case = adapted(*shape, dtype=dtype, device=cuda.device)
    length = shape[0] if by_row else shape[1]
    options = {**grouping(length, (length + 2) // 3, by_row, cuda.device), "metric": METRICS[sum(shape) % 3]}
    same_bits_in_every_order(cuda, lambda: ops.importance_accumulate(*case.tensors, 2.0, **options))
    # Tensor cores truncate sums that eager torch rounds, and the error of eager torch depends on its BLAS.
    assert_as_exact_as_eager(case, options, spare_ulp=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_importance_agrees_with_naive_kernel(cuda: Cuda, dtype: torch.dtype, metric: str, by_row: bool) -> None:
    case = adapted(71, 40, 17, dtype=dtype, device=cuda.device)
    length, num_groups = (71, 9) if by_row else (40, 9)
    group = (torch.arange(length, dtype=torch.int32) % num_groups).to(cuda.device)
    options = (2.0, group, by_row, num_groups, metric)
    naive = naive_cuda.importance_accumulate(case.tensors, *options)
    side = {"group_of_row" if by_row else "group_of_col": group, "num_groups": num_groups, "metric": metric}
    exact = reference.importance_accumulate(*case.double().tensors, 2.0, **side)
    torch.testing.assert_close(naive, exact, rtol=1e-6, atol=0)
    fast = native.importance_accumulate(*case.tensors, *options)
    magnitude = naive_cuda.importance_accumulate(case.tensors, *options[:-1], "abs" if metric == "signed" else metric)
    assert ((fast - naive).abs() <= 2e-5 * magnitude).all()


@pytest.mark.parametrize("how", ["transposed", "every second", "offset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_importance_of_strided_input_is_exact(cuda: Cuda, how: str, dtype: torch.dtype) -> None:
    for by_row in (True, False):
        case = adapted(70, 72, 24, dtype=dtype, device=cuda.device)
        case = Adapted(*(strided(t, how) for t in case.tensors), scaling=case.scaling)
        assert_as_exact_as_eager(case, grouping(70 if by_row else 72, 9, by_row, cuda.device))


@pytest.mark.parametrize("aligned", ["weight", "factors"])
def test_importance_of_partly_aligned_input_is_exact(cuda: Cuda, aligned: str) -> None:
    case = adapted(80, 72, 8, dtype=torch.bfloat16, device=cuda.device)
    if aligned == "weight":
        case = Adapted(case.weight, *(strided(t, "offset") for t in case.tensors[1:]), scaling=2.0)
    else:
        case.weight = strided(case.weight, "transposed")
    assert_as_exact_as_eager(case, grouping(80, 8, True, cuda.device))


@pytest.mark.parametrize("weight", HALVES, ids=str)
def test_importance_of_mixed_dtypes_uses_cuda_cores(cuda: Cuda, weight: torch.dtype) -> None:
    case = adapted(70, 90, 16, device=cuda.device)
    case.weight = case.weight.to(weight)
    assert not native.tensor_cores(*case.tensors)
    assert_as_exact_as_eager(case, grouping(90, 30, False, cuda.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_importance_non_finite_gradient_affects_one_row(cuda: Cuda, dtype: torch.dtype, by_row: bool) -> None:
    rows, cols = (70, 35) if by_row else (35, 70)
    case = adapted(rows, cols, 4, dtype=dtype, device=cuda.device)
    (case.grad_B if by_row else case.grad_A.t())[10, 1] = torch.inf
    group = torch.arange(70, dtype=torch.int32, device=cuda.device)
    options = {"group_of_row" if by_row else "group_of_col": group, "num_groups": 70}
    finite = torch.isfinite(ops.importance_accumulate(*case.tensors, 1.0, **options))
    assert not finite[10]
    assert finite.sum() == 69


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_importance_groups_in_any_order_give_the_same_scores(cuda: Cuda, dtype: torch.dtype) -> None:
    case = adapted(200, 24, 3, dtype=dtype, device=cuda.device)

    def scores(group: Tensor, num_groups: int) -> Tensor:
        return ops.importance_accumulate(*case.tensors, 1.0, group_of_row=group, num_groups=num_groups)

    ascending = torch.arange(200, dtype=torch.int32, device=cuda.device) // 50  # found by a search
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(cuda.device)
    by_group = scores(ascending, 6)
    assert (by_group[:4] > 0).all()
    assert by_group[4:].tolist() == [0, 0]  # empty groups
    permuted = Adapted(case.weight[shuffled], case.lora_A, case.lora_B[shuffled], case.grad_A, case.grad_B[shuffled])
    other = ops.importance_accumulate(*permuted.tensors, 1.0, group_of_row=ascending[shuffled], num_groups=6)
    torch.testing.assert_close(other, by_group, rtol=1e-6, atol=0)
    for outside in (4, -1):
        ascending[-1] = outside
        assert torch.isnan(scores(ascending, 4)).all()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 1000, 1025])
def test_importance_ascending_groups_of_any_size_are_found(cuda: Cuda, length: int) -> None:
    case = adapted(length, 1, 1, device=cuda.device)
    for num_groups in (1, 3, length):
        drawn = torch.randint(0, num_groups, (length,), generator=torch.Generator().manual_seed(length))
        group = drawn.sort().values.int().to(cuda.device)
        options = {"group_of_row": group, "num_groups": num_groups}
        actual = ops.importance_accumulate(*case.tensors, 1.0, **options)
        exact = reference.importance_accumulate(*case.double().tensors, 1.0, **options)
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=0)


def test_importance_of_empty_weight_is_zero(cuda: Cuda) -> None:
    case = adapted(0, 8, 2, dtype=torch.bfloat16, device=cuda.device)
    group = torch.zeros(0, dtype=torch.int32, device=cuda.device)
    assert ops.importance_accumulate(*case.tensors, 1.0, group_of_row=group, num_groups=3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_importance_with_several_tiles_per_block_is_exact(cuda: Cuda, by_row: bool) -> None:
    shape = (5, 64 * 129) if by_row else (64 * 129, 5)  # 129 tiles: two for each of 64 blocks, one for the last
    case = adapted(*shape, 20, dtype=torch.bfloat16, device=cuda.device)
    assert_as_exact_as_eager(case, grouping(5, 3, by_row, cuda.device))


def test_conversion_to_16_bit_rounds_like_torch(cuda: Cuda) -> None:
    every_half = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    between = torch.nextafter(every_half.float(), torch.full((65536,), torch.inf))
    values = torch.cat([every_half.float()[::5], between[::7], torch.tensor([0.0, 65519.0, 65520.0, 1e-8, 1e30])])
    finite = values[torch.isfinite(values)][:, None].to(cuda.device)
    for dtype in HALVES:
        actual = native.project(finite, torch.ones(1, 1, device=cuda.device), 1.0, dtype)
        assert torch.equal(actual, (finite + 0.0).to(dtype))  # 0 + -0 is 0
        assert torch.equal(
            native.project(actual, torch.ones(1, 1, device=cuda.device), 1.0, torch.float32), actual.float()
        )


# (tokens, width, rank), as in h = x Aᵀ: one element, primes, whole tiles, several slices of the inner dimension.
PRODUCTS = [(1, 1, 1), (7, 67, 3), (70, 136, 8), (64, 64, 16), (5, 1100, 17), (530, 24, 40), (9, 33, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), PRODUCTS)
def test_low_rank_products_agree_with_float64(
    cuda: Cuda, dtype: torch.dtype, tokens: int, width: int, rank: int
) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(cuda.device, dtype)

    x, left, small = normal(tokens, width), normal(tokens, rank), normal(rank, width)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 5e-4}
    for factor in (small.t(), small.t().contiguous()):  # the inner dimension contiguous, and the other one
        out = same_bits_in_every_order(cuda, lambda factor=factor: native.project(x, factor, 0.5, dtype))
        torch.testing.assert_close(out.double(), 0.5 * x.double() @ small.double().t(), **tolerance)
    for factor in (small, small.t().contiguous().t()):
        grown = x.double() + 0.5 * left.double() @ small.double()
        out = same_bits_in_every_order(cuda, lambda factor=factor: native.expand_(x.clone(), left, factor, 0.5))
        torch.testing.assert_close(out.double(), grown, **tolerance)
    for function in (lora_linear.gradient, lambda *of: lora_linear.gradient_transposed(*of).t()):
        out = same_bits_in_every_order(cuda, lambda function=function: function(left, x, 0.5))
        torch.testing.assert_close(out.double(), 0.5 * left.double().t() @ x.double(), **tolerance)


@pytest.mark.parametrize("how", ["transposed", "every second", "offset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_rank_products_of_strided_input_agree_with_float64(cuda: Cuda, how: str, dtype: torch.dtype) -> None:
    x, left, small = (torch.randn(shape).to(cuda.device, dtype) for shape in ((67, 72), (67, 20), (20, 72)))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 5e-4}
    xs, lefts, smalls = (strided(t, how) for t in (x, left, small))
    exact = 0.5 * x.double() @ small.double().t()
    torch.testing.assert_close(native.project(xs, smalls.t(), 0.5, dtype).double(), exact, **tolerance)
    exact = 0.5 * left.double().t() @ x.double()
    torch.testing.assert_close(lora_linear.gradient(lefts, xs, 0.5).double(), exact, **tolerance)
    exact = x.double() + 0.5 * left.double() @ small.double()
    torch.testing.assert_close(native.expand_(xs, lefts, smalls, 0.5).double(), exact, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_products_agree_with_naive_kernel(cuda: Cuda, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    shapes = ((67, 72), (67, 20), (20, 72))
    x, left, small = (torch.randn(shape, generator=generator).to(cuda.device, dtype) for shape in shapes)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 5e-4}
    naive = naive_cuda.product(x, small.t(), 0.5)
    torch.testing.assert_close(naive.double(), 0.5 * x.double() @ small.double().t(), **tolerance)
    torch.testing.assert_close(native.project(x, small.t(), 0.5, dtype), naive, **tolerance)
    naive = naive_cuda.product(left.t(), x, 0.5)
    torch.testing.assert_close(lora_linear.gradient(left, x, 0.5), naive, **tolerance)
    naive = naive_cuda.product(left, small, 0.5, out=x.clone())
    torch.testing.assert_close(native.expand_(x.clone(), left, small, 0.5), naive, **tolerance)


def test_expand_writes_only_its_output(cuda: Cuda) -> None:
    for width in (72, 67):  # 72 is written 16 bytes at a time, 67 element by element
        wide = torch.full((70, 96), torch.nan, dtype=torch.bfloat16, device=cuda.device)
        wide[3:68, 8 : 8 + width] = 0
        out = wide[3:68, 8 : 8 + width]
        native.expand_(out, out.new_ones(65, 8), out.new_ones(8, width), 1.0)
        assert (out == 8).all()
        assert torch.isnan(wide).sum() == wide.numel() - out.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [((), 1), ((0,), 3), ((1,), 8), ((3, 29), 31)])
def test_lora_linear_error_is_at_most_twice_that_of_eager_torch(
    cuda: Cuda, dtype: torch.dtype, tokens: tuple[int, ...], rank: int
) -> None:
    # A single eager result may be exact by chance. Both forms round h, so half a rounding of h is allowed.
    assert_layer_as_exact_as_eager(inputs(tokens, 97, 56, rank), dtype, cuda.device, spare_ulp=4.0)


def test_lora_qkv_agrees_with_reference(cuda: Cuda) -> None:
    """The rows of stacked A and of slices of h begin at any address."""
    q, k, v = ({**inputs((50,), 64, width, rank)} for width, rank in ((64, 8), (32, 3), (24, 5)))
    x = q["x"].to(cuda.device, torch.bfloat16).requires_grad_()
    names = ("weight", "bias", "lora_A", "lora_B")
    parts = [[part[name].to(cuda.device, torch.bfloat16) for name in names] for part in (q, k, v)]
    for part in parts:
        part[2].requires_grad_()
        part[3].requires_grad_()
    actual = ops.lora_qkv(x, *(ops.Projection(*part) for part in parts), 2.0)
    expected = reference.lora_qkv(x, *(tuple(part) for part in parts), 2.0)  # type: ignore[arg-type]
    leaves = [x, *(part[i] for part in parts for i in (2, 3))]
    for mine, other in zip(actual, expected):
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.03)
    grads = [torch.autograd.grad([y.float().square().sum() for y in ys], leaves) for ys in (actual, expected)]
    for mine, other in zip(*grads):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_gather_equals_indexing(cuda: Cuda, dtype: torch.dtype, by_row: bool) -> None:
    t = (torch.arange(57 * 83).reshape(57, 83) % 251).to(cuda.device, dtype)
    index = torch.tensor([3, 3, 0, 56, 11], device=cuda.device)
    for source in (t, t.t().contiguous().t()):
        expected = source[index] if by_row else source[:, index]
        assert torch.equal(native.gather(source, index, by_row), expected)
        assert torch.equal(naive_cuda.gather(source, index, by_row), expected)
    assert native.gather(t, index[:0], by_row).numel() == 0


def test_gpu_smoke_passes_for_every_kernel(cuda: Cuda) -> None:
    rows: list[dict[str, Any]] = []
    passed = gpu_smoke.run(cuda.device, smallest=True, report=lambda found: rows.append(dict(found[-1])))
    assert passed, [row for row in rows if not row["passed"] and len(row) > 4]
    kernels = {row["kernel"] for row in rows}
    assert {"importance_accumulate strided", "lora_linear gradient", "lora_linear naive", "gather"} <= kernels


def test_gpu_smoke_reports_wrong_results_and_errors(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Tensor:
        raise KernelError("launch failed")

    monkeypatch.setattr(gpu_smoke.native, "project", lambda x, small, alpha, dtype: x @ small)
    monkeypatch.setattr(gpu_smoke.native, "gather", fail)
    last: list[dict[str, Any]] = []

    def report(rows: list[dict[str, Any]]) -> None:
        last[:] = rows

    assert not gpu_smoke.run(cuda.device, smallest=True, report=report)
    failed = [row for row in last if not row["passed"]]
    assert {row["kernel"] for row in failed} == {"lora_linear project", "gather"}
    assert "KernelError: launch failed" in {row.get("message") for row in failed}


def test_tensor_cores_reject_mixed_dtypes(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "tensor_cores", lambda *tensors: True)
    case = adapted(8, 8, 2, device=cuda.device)
    group = torch.zeros(8, dtype=torch.int32, device=cuda.device)
    with pytest.raises(KernelError, match="importance_accumulate: tensor cores need one 16-bit dtype for all five"):
        native.importance_accumulate(*case.tensors, 1.0, group, True, 1, "abs")
    with pytest.raises(KernelError, match="lora_linear: tensor cores need one 16-bit dtype"):
        native.project(case.weight.bfloat16(), case.lora_A.t(), 1.0, torch.bfloat16)


def test_launch_with_too_many_blocks_raises(cuda: Cuda) -> None:
    out = torch.zeros(1, 1, dtype=torch.bfloat16, device=cuda.device).expand(1, 64 * 65536)  # 65535 blocks in y
    with pytest.raises(KernelError, match="lora_linear: the matrix needs more blocks than a grid holds"):
        native.expand_(out, out[:, :1], out, 1.0)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_importance_of_random_input_is_exact(cuda: Cuda, data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
    rank = data.draw(st.sampled_from([1, 7, 8, 16, 31, 32, 48, 256]))
    case = adapted(rows, cols, rank, dtype=data.draw(dtypes), device=cuda.device)
    hows = st.sampled_from(["none", "none", "transposed", "every second", "offset"])
    case = Adapted(*(strided(t, data.draw(hows)) for t in case.tensors), scaling=case.scaling)
    by_row = data.draw(st.booleans())
    length = rows if by_row else cols
    options = grouping(length, data.draw(st.integers(1, length)), by_row, cuda.device)
    options["metric"] = data.draw(st.sampled_from(METRICS))
    same_bits_in_every_order(cuda, lambda: ops.importance_accumulate(*case.tensors, 2.0, **options))
    # If the products of a few elements cancel, eager torch may be exact by chance: allow for a random walk.
    assert_as_exact_as_eager(case, options, spare_ulp=4 + 2 * rank**0.5)


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
def test_lora_linear_of_random_input_is_exact(
    cuda: Cuda, tokens: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype
) -> None:
    spare = 4 + max(tokens, in_features, out_features, rank) ** 0.5
    arguments = inputs((tokens,), in_features, out_features, rank)
    assert_layer_as_exact_as_eager(arguments, dtype, cuda.device, spare_ulp=spare)


@pytest.mark.parametrize("cuda", DEVICES[1:], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_importance_of_large_matrix_is_exact(cuda: Cuda, dtype: torch.dtype, by_row: bool) -> None:
    case = adapted(4096, 3080, 16, dtype=dtype, device=cuda.device)
    options = grouping(4096 if by_row else 3080, 32, by_row, cuda.device)
    same_bits_in_every_order(cuda, lambda: ops.importance_accumulate(*case.tensors, 2.0, **options))
    assert_as_exact_as_eager(case, options)


@pytest.mark.parametrize("cuda", DEVICES[1:], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_of_large_layer_is_exact(cuda: Cuda, dtype: torch.dtype) -> None:
    assert_layer_as_exact_as_eager(inputs((2, 1000), 1544, 2048, 16), dtype, cuda.device)


@pytest.mark.parametrize("cuda", DEVICES[1:], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_captured_into_cuda_graph_replay_exactly(cuda: Cuda, dtype: torch.dtype) -> None:
    """Scores, forward and backward pass replay with new values in the same memory."""
    case = adapted(256, 320, 8, dtype=dtype, device=cuda.device)
    options = grouping(256, 16, True, cuda.device)
    arguments = cast(inputs((600,), 320, 256, 8), dtype, cuda.device)
    leaves = [arguments[name] for name in NAMES]

    def step() -> list[Tensor]:
        y = ops.lora_linear(**arguments)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        return [ops.importance_accumulate(*case.tensors, 2.0, **options), y, *gradients]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        case.grad_B.mul_(2)
        arguments["x"].mul_(0.5)
    graph.replay()
    for replayed, direct in zip(captured, step()):
        assert torch.equal(replayed, direct)


@pytest.mark.parametrize("cuda", DEVICES[1:], indirect=True)
def test_importance_runs_on_the_current_stream(cuda: Cuda) -> None:
    """The kernels are ordered with torch's work on another stream."""
    case = adapted(1024, 1024, 16, dtype=torch.bfloat16, device=cuda.device)
    options = grouping(1024, 16, True, cuda.device)
    expected = ops.importance_accumulate(*case.tensors, 2.0, **options)
    weight = torch.zeros_like(case.weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        weight.copy_(case.weight)
        scores = ops.importance_accumulate(weight, *case.tensors[1:], 2.0, **options)
    stream.synchronize()
    assert torch.equal(scores, expected)
