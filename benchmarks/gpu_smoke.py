"""Launches every CUDA kernel once and compares its result with float64; one row of JSON per case.

python -m benchmarks.gpu_smoke --out FILE [--smallest]

Needs torch and the built extension, but not pytest. `--smallest` uses shapes that compute-sanitizer can run in seconds.
The file is written after each case, so that a crash leaves the name of the case that crashed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspine_edge.kernels import native, reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))

import naive_cuda

Case = tuple[str, torch.dtype, tuple[int, ...], Callable[[], float]]
"""Kernel, dtype, shape, and a function that returns the error as a multiple of the allowed one."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST = ((40, 72, 8),)
SHAPES = ((40, 72, 8), (131, 77, 17), (1024, 1536, 16))


def cases(torch_device: str, *, smallest: bool = False) -> Iterator[Case]:
    """Yield every kernel for every dtype; (rows, cols, rank) of the shapes are odd, aligned and large."""
    for shape in SMALLEST if smallest else SHAPES:
        for dtype in DTYPES:
            for by_row in (True, False):
                name = f"importance_accumulate by {'rows' if by_row else 'columns'}"
                yield name, dtype, shape, partial(importance_error, shape, dtype, by_row, False, torch_device)
            yield (
                "importance_accumulate strided",
                dtype,
                shape,
                partial(importance_error, shape, dtype, True, True, torch_device),
            )
            for product in ("project", "expand", "gradient"):
                yield (
                    f"lora_linear {product}",
                    dtype,
                    shape,
                    partial(product_error, product, shape, dtype, torch_device),
                )
    small = SMALLEST[0]
    for dtype in DTYPES:
        yield "importance_accumulate naive", dtype, small, partial(naive_importance_error, small, dtype, torch_device)
        yield "lora_linear naive", dtype, small, partial(product_error, "naive", small, dtype, torch_device)
    for storage in (torch.uint8, torch.bfloat16, torch.float32, torch.int64):
        for by_row in (True, False):
            yield "gather", storage, small, partial(gather_error, small, storage, by_row, torch_device)


def run(torch_device: str, *, smallest: bool = False, report: Callable[[list[dict[str, Any]]], None]) -> bool:
    """Run all cases and call `report` with the rows so far before and after each. Returns whether all passed."""
    rows: list[dict[str, Any]] = []
    for kernel, dtype, shape, error_of in cases(torch_device, smallest=smallest):
        row: dict[str, Any] = {"kernel": kernel, "dtype": str(dtype), "shape": list(shape), "passed": False}
        rows.append(row)
        report(rows)
        try:
            error = error_of()
            row |= {"error_over_bound": round(error, 4), "passed": error <= 1.0}
        except Exception as error:  # any failure is a result of this case; the next one still runs
            row["message"] = f"{type(error).__name__}: {error}"
        report(rows)
    return all(row["passed"] for row in rows)


def normal(shape: tuple[int, ...], dtype: torch.dtype, torch_device: str, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(torch_device, dtype)


def importance_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, by_row: bool, torch_device: str
) -> tuple[list[Tensor], Tensor, int]:
    """Return (weight, lora_A, lora_B, grad_A, grad_B), the group of each row or column, and the number of groups."""
    rows, cols, rank = shape
    shapes = ((rows, cols), (rank, cols), (rows, rank), (rank, cols), (rows, rank))
    tensors = [normal(one, dtype, torch_device, seed, 0.05) for seed, one in enumerate(shapes)]
    length = rows if by_row else cols
    group = (torch.arange(length, dtype=torch.int32) // 8).to(torch_device)
    return tensors, group, (length + 7) // 8


def importance_error(
    shape: tuple[int, ...], dtype: torch.dtype, by_row: bool, strided: bool, torch_device: str
) -> float:
    """Return the error against float64 over twice that of eager torch plus 4 ulps, and check that bits repeat."""
    tensors, group, num_groups = importance_inputs(shape, dtype, by_row, torch_device)
    if strided:
        tensors = [t.t().contiguous().t() for t in tensors]
    side: dict[str, Any] = {"group_of_row" if by_row else "group_of_col": group, "num_groups": num_groups}
    exact = reference.importance_accumulate(*(t.double() for t in tensors), 2.0, **side).double()
    eager = reference.importance_accumulate(*tensors, 2.0, **side).double()
    scores = [native.importance_accumulate(*tensors, 2.0, group, by_row, num_groups, "abs") for _ in range(2)]
    if not torch.equal(scores[0], scores[1]):
        raise AssertionError("two runs gave different bits")
    bound = 2 * (eager - exact).abs().max() + 4 * 1.2e-7 * exact
    return float(((scores[0].double() - exact).abs() / bound).max())


def naive_importance_error(shape: tuple[int, ...], dtype: torch.dtype, torch_device: str) -> float:
    """Return the relative error of the naive kernel over 1e-6."""
    tensors, group, num_groups = importance_inputs(shape, dtype, True, torch_device)
    doubles = [t.double() for t in tensors]
    exact = reference.importance_accumulate(*doubles, 2.0, group_of_row=group, num_groups=num_groups).double()
    scores = naive_cuda.importance_accumulate(tuple(tensors), 2.0, group, True, num_groups, "abs")
    return float(((scores.double() - exact).abs() / (1e-6 * exact)).max())


def product_error(product: str, shape: tuple[int, ...], dtype: torch.dtype, torch_device: str) -> float:
    """Return the error of a low-rank product against float64, over two ulps and an absolute part for cancellation."""
    tokens, width, rank = shape
    x, left, small = (
        normal(one, dtype, torch_device, seed)
        for seed, one in enumerate(((tokens, width), (tokens, rank), (rank, width)))
    )
    if product in ("project", "naive"):
        exact, depth = 0.5 * x.double() @ small.double().t(), width
        naive = product == "naive"
        result = naive_cuda.product(x, small.t(), 0.5) if naive else native.project(x, small.t(), 0.5, dtype)
    elif product == "expand":
        exact, depth = x.double() + 0.5 * left.double() @ small.double(), rank
        result = native.expand_(x.clone(), left, small, 0.5)
    else:
        exact, depth = 0.5 * left.double().t() @ x.double(), tokens
        out = torch.empty(rank, width, dtype=dtype, device=torch_device)
        result = native.gradient_(out, left, x, 0.5)
    bound = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * depth**0.5 + 2e-6 * depth
    return float(((result.double() - exact).abs() / bound).max())


def gather_error(shape: tuple[int, ...], storage: torch.dtype, by_row: bool, torch_device: str) -> float:
    """Return 0 if both kernels copy exactly, else 2."""
    rows, cols, _ = shape
    t = (torch.arange(rows * cols).reshape(rows, cols) % 251).to(torch_device, storage)
    index = torch.tensor([3, 3, 0, 31, 11], device=torch_device)
    expected = t[index] if by_row else t[:, index]
    results = (native.gather(t, index, by_row), naive_cuda.gather(t, index, by_row))
    return 0.0 if all(torch.equal(result, expected) for result in results) else 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--smallest", action="store_true", help="only the smallest shapes, for compute-sanitizer")
    args = parser.parse_args()
    if not native.cuda_available() or not torch.cuda.is_available():
        print("gpu_smoke: needs a GPU and an extension that was built with CUDA", file=sys.stderr)
        return 2

    def report(rows: list[dict[str, Any]]) -> None:
        args.out.write_text(json.dumps({"results": rows}, indent=1) + "\n")
        last = rows[-1]
        if last["passed"] or "message" in last or "error_over_bound" in last:
            print(json.dumps(last), flush=True)

    return 0 if run("cuda", smallest=args.smallest, report=report) else 1


if __name__ == "__main__":
    sys.exit(main())
