"""importance_accumulate against hand-computed values, the reference implementation and float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, DTYPES, adapted, needs_extension

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import native, ops, reference

METRICS = ["abs", "square", "signed"]


def grouping(length: int, num_groups: int, by_row: bool, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Return groups in random order that use every id if there are enough elements."""
    group = torch.arange(length) % num_groups
    group = group[torch.randperm(length, generator=torch.Generator().manual_seed(seed))].to(torch.int32).to(device)
    return {"group_of_row" if by_row else "group_of_col": group, "num_groups": num_groups}


def assert_as_exact_as_eager(case: Any, options: dict[str, Any], *, spare_ulp: float = 2.0) -> None:
    """Assert that the error against float64 is at most twice that of eager torch plus `spare_ulp` ulps of the sum."""
    exact = reference.importance_accumulate(*case.double().tensors, case.scaling, **options).double()
    eager = reference.importance_accumulate(*case.tensors, case.scaling, **options).double()
    actual = ops.importance_accumulate(*case.tensors, case.scaling, **options).double()
    # "signed" sums may cancel, so the scale is the sum of magnitudes.
    metric = "square" if options.get("metric") == "square" else "abs"
    scale = reference.importance_accumulate(*case.double().tensors, case.scaling, **{**options, "metric": metric})
    bound = 2 * (eager - exact).abs().max() + 1.2e-7 * spare_ulp * scale.double()
    assert ((actual - exact).abs() <= bound).all()


def test_importance_of_one_element_equals_hand_computed() -> None:
    # Ghat = gB A + B gA - gB gA = [[3*1 + 2*5 - 3*5]] = [[-2]]; W + 0.5 * B A = 10 + 0.5 * 2 * 1 = 11; product -22.
    one = torch.ones(1, 1)
    tensors = (10 * one, one, 2 * one, 5 * one, 3 * one)
    group = torch.zeros(1, dtype=torch.int32)
    expected = {"abs": 22.0, "square": 484.0, "signed": -22.0}
    for metric in METRICS:
        for module in (ops, reference):
            score = module.importance_accumulate(*tensors, 0.5, group_of_row=group, num_groups=1, metric=metric)
            assert score.tolist() == [expected[metric]]


def test_importance_without_gradient_of_a_is_the_chain_rule() -> None:
    # If only B has a gradient, Ghat = gB A, the estimate of dL/dW by the chain rule through B.
    case = adapted(17, 40, 4)
    case.grad_A.zero_()
    importance = (case.grad_B @ case.lora_A) * (case.weight + 2.0 * case.lora_B @ case.lora_A)
    group = torch.arange(17, dtype=torch.int32)
    actual = ops.importance_accumulate(*case.tensors, 2.0, group_of_row=group, num_groups=17)
    torch.testing.assert_close(actual, importance.abs().sum(1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_importance_error_is_at_most_twice_that_of_eager(
    device: str, dtype: torch.dtype, metric: str, by_row: bool
) -> None:
    case = adapted(193, 307, 8, dtype=dtype, device=device)
    options = grouping(193 if by_row else 307, 13, by_row, device)
    assert_as_exact_as_eager(case, {**options, "metric": metric})


@pytest.mark.parametrize("device", DEVICES)
def test_importance_of_mixed_dtypes_is_exact(device: str) -> None:
    case = adapted(64, 96, 16, device=device)
    case.weight = case.weight.bfloat16()
    assert_as_exact_as_eager(case, grouping(96, 96, False, device))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 16, 31, 97, 128]),
    cols=st.sampled_from([1, 3, 8, 32, 33, 101, 160]),
    rank=st.sampled_from([1, 2, 3, 8, 17, 64, 256]),
    by_row=st.booleans(),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    strided=st.sampled_from(["none", "transposed", "every second", "offset"]),
)
def test_importance_of_any_shape_and_grouping_is_exact(
    rows: int, cols: int, rank: int, by_row: bool, share: float, dtype: torch.dtype, strided: str
) -> None:
    case = adapted(rows, cols, rank, dtype=dtype)
    for name in ("weight", "lora_A", "grad_B"):
        t = getattr(case, name)
        if strided == "transposed":
            t = t.t().contiguous().t()
        elif strided == "every second":
            wide = torch.full((t.shape[0], 2 * t.shape[1]), torch.nan, dtype=dtype)
            wide[:, ::2] = t
            t = wide[:, ::2]
        elif strided == "offset":
            wide = torch.full((t.shape[0] + 1, t.shape[1] + 3), torch.nan, dtype=dtype)
            wide[1:, 3:] = t
            t = wide[1:, 3:]
        setattr(case, name, t)
    length = rows if by_row else cols
    options = grouping(length, 1 + int(share * (length - 1)), by_row, seed=rows + cols)
    assert_as_exact_as_eager(case, options, spare_ulp=4)  # the sums of eager torch may all be exact by chance


def test_importance_of_empty_groups_is_zero() -> None:
    case = adapted(4, 300, 2)
    group = torch.tensor([5, 5, 2, 2], dtype=torch.int32)
    scores = ops.importance_accumulate(*case.tensors, 1.0, group_of_row=group, num_groups=7)
    assert (scores[[0, 1, 3, 4, 6]] == 0).all()
    assert (scores[[2, 5]] > 0).all()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_importance_of_empty_weight_is_zero(shape: tuple[int, int]) -> None:
    case = adapted(*shape, 2)
    group = torch.zeros(shape[0], dtype=torch.int32)
    assert ops.importance_accumulate(*case.tensors, 1.0, group_of_row=group, num_groups=3).tolist() == [0, 0, 0]


def test_importance_non_finite_gradient_affects_one_row() -> None:
    case = adapted(96, 35, 4)  # 35 columns need padding in every instruction set
    case.grad_B[10, 1] = torch.inf
    rows = torch.arange(96, dtype=torch.int32)
    finite = torch.isfinite(ops.importance_accumulate(*case.tensors, 1.0, group_of_row=rows, num_groups=96))
    assert not finite[10]
    assert finite.sum() == 95


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_importance_with_any_threads_gives_the_same_bits(device: str, by_row: bool) -> None:
    case = adapted(640, 768, 16, device=device)
    options = grouping(640 if by_row else 768, 64, by_row, device)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(ops.importance_accumulate(*case.tensors, 2.0, **options).cpu().numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1


def kernel_results() -> list[float]:
    """Return the results of the CPU kernels for odd shapes, to compare instruction sets."""
    values: list[float] = []
    for dtype in DTYPES:
        case = adapted(131, 213, 12, dtype=dtype)
        for by_row, length in ((True, 131), (False, 213)):
            group = torch.arange(length, dtype=torch.int32)
            values += native.importance_accumulate(*case.tensors, 2.0, group, by_row, length, "abs").tolist()
        values += native.project(case.weight, case.lora_A.t(), 1.5, torch.float32).flatten().tolist()
    return values


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_kernels_of_every_instruction_set_agree(isa: str) -> None:
    program = (
        f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_kernels_importance import native, kernel_results\n"
        "print(json.dumps([native.cpu_isa(), kernel_results()]))\n"
    )
    env = {**os.environ, "FEDSPINE_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    name, values = json.loads(done.stdout)
    if native.cpu_isa() in ("avx512", "avx2"):
        assert name == isa
    np.testing.assert_allclose(values, kernel_results(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_importance_under_autocast_is_unchanged(device: str) -> None:
    case = adapted(64, 64, 8, device=device)
    options = grouping(64, 8, True, device)
    plain = ops.importance_accumulate(*case.tensors, 2.0, **options)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(ops.importance_accumulate(*case.tensors, 2.0, **options), plain)
        torch.testing.assert_close(reference.importance_accumulate(*case.tensors, 2.0, **options), plain)


def test_importance_of_parameters_is_not_differentiable() -> None:
    case = adapted(32, 48, 4)
    a, b = (torch.nn.Parameter(t) for t in (case.lora_A, case.lora_B))
    options = grouping(32, 4, True)
    scores = ops.importance_accumulate(case.weight, a, b, case.grad_A, case.grad_B, 2.0, **options)
    assert not scores.requires_grad
    assert torch.equal(scores, ops.importance_accumulate(*case.tensors, 2.0, **options))


def test_importance_of_float64_equals_reference() -> None:
    case = adapted(24, 33, 5).double()
    options = grouping(24, 5, True)
    actual = ops.importance_accumulate(*case.tensors, 2.0, **options)
    assert torch.equal(actual, reference.importance_accumulate(*case.tensors, 2.0, **options))


def test_importance_passes_opcheck() -> None:
    case = adapted(24, 33, 5)
    group = torch.arange(24, dtype=torch.int32) // 8
    torch.library.opcheck(torch.ops.fedspine.importance_accumulate.default, (*case.tensors, 2.0, group, True, 3, "abs"))


ROWS = torch.zeros(6, dtype=torch.int32)
BAD = {
    "weight": ({"weight": torch.zeros(6)}, "weight must be a matrix"),
    "weight dtype": ({"weight": torch.zeros(6, 8, dtype=torch.int64)}, "weight must be floating point"),
    "lora_A": ({"lora_A": torch.zeros(2, 7)}, r"lora_A must have shape \(2, 8\), but it has \(2, 7\)"),
    "lora_B": ({"lora_B": torch.zeros(6, 3)}, r"lora_B must have shape \(6, 2\)"),
    "grad_A": ({"grad_A": torch.zeros(3, 8)}, r"grad_A must have shape \(2, 8\)"),
    "grad_B": ({"grad_B": torch.zeros(5, 2)}, r"grad_B must have shape \(6, 2\)"),
    "rank 0": ({"lora_A": torch.zeros(0, 8)}, "rank 0"),
    "rank 257": ({"lora_A": torch.zeros(257, 8)}, "rank 257. The rank must be between 1 and 256"),
    "no group": ({"group_of_row": None}, "Pass exactly one of group_of_row and group_of_col"),
    "two groups": ({"group_of_col": torch.zeros(8, dtype=torch.int32)}, "exactly one of"),
    "group length": ({"group_of_row": torch.zeros(5, dtype=torch.int32)}, r"group_of_row must have shape \(6,\)"),
    "group dtype": ({"group_of_row": torch.zeros(6, dtype=torch.int64)}, "group_of_row must be int32"),
    "group above": ({"group_of_row": ROWS + 3}, r"group_of_row.* 3, outside 0\.\.1"),
    "group below": ({"group_of_row": ROWS - 1}, r"group_of_row.* -1, outside 0\.\.1"),
    "num_groups": ({"num_groups": 0}, "num_groups is 0"),
    "metric": ({"metric": "cube"}, "metric is 'cube'; it must be one of abs, square, signed"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_importance_with_invalid_argument_names_it(change: dict[str, Any], message: str) -> None:
    case = adapted(6, 8, 2)
    arguments: dict[str, Any] = {
        **dict(zip(("weight", "lora_A", "lora_B", "grad_A", "grad_B"), case.tensors)),
        "scaling": 1.0,
        "group_of_row": ROWS,
        "num_groups": 2,
    }
    with pytest.raises(KernelError, match=f"importance_accumulate: .*{message}"):
        ops.importance_accumulate(**{**arguments, **change})


@pytest.mark.parametrize("device", DEVICES[1:])
def test_importance_with_group_outside_on_cuda_is_nan(device: str) -> None:
    case = adapted(6, 8, 2, device=device)
    group = torch.full((6,), 9, dtype=torch.int32, device=device)
    assert torch.isnan(ops.importance_accumulate(*case.tensors, 1.0, group_of_row=group, num_groups=2)).all()


def test_importance_without_extension_uses_reference() -> None:
    program = (
        "import torch; from fedspine_edge.kernels import native, ops\n"
        "assert not native.available() and native.build_info()['reason'] == 'FEDSPINE_NATIVE=0'\n"
        "one = torch.ones(1, 1); g = torch.zeros(1, dtype=torch.int32)\n"
        "print(ops.importance_accumulate(10*one, one, 2*one, 5*one, 3*one, 0.5, group_of_row=g, num_groups=1).item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "FEDSPINE_NATIVE": "0"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "22.0", done.stderr


@needs_extension
def test_build_info_describes_the_extension() -> None:
    info = native.build_info()
    assert info["available"] is True
    assert info["cpu_isa"] in ("avx512", "avx2", "baseline", "neon")
    assert info["cuda"] == bool(info["cuda_architectures"])
