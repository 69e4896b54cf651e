"""Benchmarks for a GPU: kernel time, share of the memory bandwidth, small batches and CUDA graphs.

`benchmarks/kernels.py` times the calls of a program, in which the launch hides a kernel of 10 microseconds. Here the
calls of a candidate are captured into one CUDA graph and replayed (`how: graph`), or timed as calls (`how: calls`). The
weights of a graph exceed every cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels import Candidates, Eager, Fedspine, measure, peft_layer
from fedspine_edge.kernels import native, ops, reference

LARGER_THAN_CACHES = 256 << 20  # bytes; the L2 of H200 holds 50 MB
IMPORTANCE = {"4096x4096": (4096, 4096), "RoBERTa up 3072x768": (3072, 768), "MiniLM up 1536x384": (1536, 384)}
LAYERS = {"4096x4096": (4096, 4096), "LLaMA up 11008x4096": (11008, 4096)}
TOKENS = (2048, 4096)
SMALL_TOKENS = (1, 8, 32, 128)
Case = tuple[dict[str, Any], Candidates, int]  # description, candidates, calls per run


def run(
    *,
    seconds: float,
    quick: bool = False,
    torch_device: str = "cuda",
    report: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Measure every case, those that decide a target first.

    Args:
        seconds: Time for measurements in total; building the inputs and capturing the graphs comes on top.
        quick: Whether to measure only a few cases.
        torch_device: "cuda", or "cpu" to test this file; nothing is captured there.
        report: Called with the rows so far after each case, so that an interrupted run keeps what it measured.
    """
    copy_gb_s = copy_bandwidth(torch_device)
    rows: list[dict[str, Any]] = []
    builders = ordered_cases(torch_device, quick=quick)
    for build in builders:
        # The cases are built one at a time, because together their weights exceed the memory of a small board.
        what, candidates, calls = build()
        measured = measure(candidates, "fedspine", torch_device, seconds / len(builders))
        row = {**what, **per_call(measured, calls)}
        if "weight_bytes" in row:
            gb_s = row["weight_bytes"] / row["median_ms"]["fedspine"] / 1e6
            row |= {"weight_gb_s": round(gb_s, 1), "share_of_copy_bandwidth": round(gb_s / copy_gb_s, 3)}
        rows.append(row)
        report(rows)
    return rows


def ordered_cases(torch_device: str, *, quick: bool = False) -> list[Callable[[], Case]]:
    """Return functions that build the cases: one of each kind first, then the others."""
    layers = list(LAYERS.items())[: 1 if quick else None]
    matrices = list(IMPORTANCE.items())[: 1 if quick else None]
    small = SMALL_TOKENS[: 1 if quick else None]
    bf16, fp32 = torch.bfloat16, torch.float32

    def layer(name: str, tokens: int, graph: bool) -> Callable[[], Case]:
        return partial(layer_case, name, *LAYERS[name], 16, tokens, graph, torch_device)

    def importance(name: str, by_row: bool, dtype: torch.dtype, adapter: torch.dtype) -> Callable[[], Case]:
        return partial(importance_case, name, *IMPORTANCE[name], 16, by_row, dtype, adapter, torch_device)

    first, largest = layers[0][0], matrices[0][0]
    cases = [layer(first, TOKENS[0], False)]
    cases += [importance(largest, by_row, bf16, bf16) for by_row in (True, False)]
    cases += [layer(first, tokens, True) for tokens in small]
    cases += [layer(first, tokens, False) for tokens in (*TOKENS[1:], *small)]
    cases += [layer(name, tokens, False) for name, _ in layers[1:] for tokens in TOKENS]
    cases += [importance(largest, by_row, *kinds) for by_row in (True, False) for kinds in ((bf16, fp32), (fp32, fp32))]
    cases += [importance(name, by_row, bf16, bf16) for name, _ in matrices[1:] for by_row in (True, False)]
    return cases


def per_call(measured: dict[str, Any], calls: int) -> dict[str, Any]:
    return {**measured, "median_ms": {name: round(ms / calls, 5) for name, ms in measured["median_ms"].items()}}


def copy_bandwidth(torch_device: str) -> float:
    """Return the GB/s of a large copy, counting reads and writes: the bandwidth that the GPU reaches in practice."""
    source = torch.empty(LARGER_THAN_CACHES, dtype=torch.uint8, device=torch_device)
    target = torch.empty_like(source)
    measured = measure({"copy": lambda: target.copy_(source)}, "copy", torch_device, 0.5)
    return 2 * LARGER_THAN_CACHES / measured["median_ms"]["copy"] / 1e6


def captured(function: Callable[[], Any], torch_device: str) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of `function`. Capture requires that it has run on a side stream before."""
    if torch_device == "cpu":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay(keep: Any = results) -> None:  # keep the results alive: the graph writes to their memory
        graph.replay()

    return replay


@contextmanager
def cuda_cores_only() -> Iterator[None]:
    with mock.patch.object(native, "tensor_cores", return_value=False):
        yield


@contextmanager
def low_rank_kernels() -> Iterator[None]:
    with mock.patch.dict(os.environ, FEDSPINE_LORA_LINEAR="native"):
        yield


def importance_case(
    name: str,
    rows: int,
    cols: int,
    rank: int,
    by_row: bool,
    dtype: torch.dtype,
    adapter: torch.dtype,
    torch_device: str,
) -> Case:
    """Return a case with one group per 8 rows or columns. If tensor cores are used, the CUDA cores are a candidate."""
    length = rows if by_row else cols
    group = (torch.arange(length, dtype=torch.int32) // 8).to(torch_device)
    options: dict[str, Any] = {"group_of_row" if by_row else "group_of_col": group, "num_groups": (length + 7) // 8}
    size = rows * cols * dtype.itemsize
    count = max(2, LARGER_THAN_CACHES // size)
    weights = [torch.randn(rows, cols, device=torch_device, dtype=dtype) for _ in range(count)]
    shapes = ((rank, cols), (rows, rank), (rank, cols), (rows, rank))
    factors = [torch.randn(shape, device=torch_device, dtype=adapter) for shape in shapes]

    def fedspine() -> list[Tensor]:
        return [ops.importance_accumulate(weight, *factors, 2.0, **options) for weight in weights]

    def eager() -> list[Tensor]:
        return [reference.importance_accumulate(weight, *factors, 2.0, **options) for weight in weights]

    candidates: Candidates = {
        "fedspine": captured(fedspine, torch_device),
        "eager torch": captured(eager, torch_device),
    }
    if native.tensor_cores(*weights, *factors):
        with cuda_cores_only():
            candidates["CUDA cores"] = captured(fedspine, torch_device)
    what = {"op": "importance_accumulate on the GPU", "case": name, "groups": "rows" if by_row else "columns"}
    what |= {"r": rank, "dtype": str(dtype), "adapter_dtype": str(adapter), "how": "graph", "weight_bytes": size}
    return what, candidates, count


def layer_case(name: str, rows: int, cols: int, rank: int, tokens: int, graph: bool, torch_device: str) -> Case:
    """Return the case of one lora_linear in bfloat16, forward and backward. The low-rank kernels are a candidate."""
    dtype = torch.bfloat16
    torch.manual_seed(0)
    base, copy = (torch.nn.Linear(cols, rows, bias=False).to(torch_device, dtype) for _ in range(2))
    copy.load_state_dict(base.state_dict())
    base.requires_grad_(False)
    copy.requires_grad_(False)
    lora_A, lora_B = (torch.randn(shape).mul(0.05).to(torch_device, dtype) for shape in ((rank, cols), (rows, rank)))
    x = torch.randn(tokens, cols, device=torch_device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, rows, device=torch_device, dtype=dtype)

    def step(layer: torch.nn.Module, kernels: bool = False) -> Callable[[], Any]:
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def once() -> Any:
            with low_rank_kernels() if kernels else nullcontext():
                return torch.autograd.grad(layer(x), leaves, grad)

        return captured(once, torch_device) if graph else once

    layer = Fedspine(base, lora_A, lora_B, 2.0)
    candidates: Candidates = {
        "fedspine": step(layer),
        "low-rank kernels": step(layer, kernels=True),
        "eager": step(Eager(base, lora_A, lora_B, 2.0)),
        "base GEMMs alone": step(base),
    }
    peft = peft_layer(copy, lora_A, lora_B, 2 * rank)
    if peft is not None:
        candidates["peft"] = step(peft)
    what = {"op": "lora_linear on the GPU", "case": name, "tokens": tokens, "r": rank, "dtype": str(dtype)}
    return {**what, "how": "graph" if graph else "calls"}, candidates, 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for measurements in total (default: 60)")
    args = parser.parse_args()

    def report(rows: list[dict[str, Any]]) -> None:
        print(json.dumps(rows[-1]), flush=True)
        args.out.write_text(json.dumps({"results": rows}, indent=1) + "\n")

    run(seconds=args.seconds, report=report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
