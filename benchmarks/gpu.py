"""Benchmarks for a GPU: kernel time, share of the memory bandwidth, small batches and CUDA graphs.

`benchmarks/kernels.py` times the calls of a program, in which the launch hides a kernel of 10 microseconds. Here the
calls of a candidate are captured into one CUDA graph and replayed (`how: graph`), or timed as calls (`how: calls`). The
weights of a graph exceed every cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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


def run(*, seconds: float, quick: bool = False, torch_device: str = "cuda") -> list[dict[str, Any]]:
    """Every case, about `seconds` in all. On "cpu" nothing is captured: for testing this file."""
    layers = list(LAYERS.items())[: 1 if quick else None]
    small = SMALL_TOKENS[: 1 if quick else None]
    # Built one at a time: together their weights would not fit into a small board's memory.
    builders = [
        partial(importance_case, name, *shape, 16, by_row, *dtypes, torch_device)
        for name, shape in list(IMPORTANCE.items())[: 1 if quick else None]
        for by_row in (True, False)
        for dtypes in ((torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2)
    ]
    builders += [
        partial(layer_case, name, *shape, 16, tokens, False, torch_device)
        for name, shape in layers
        for tokens in TOKENS
    ]
    builders += [
        partial(layer_case, *layers[0][:1], *layers[0][1], 16, tokens, graph, torch_device)
        for tokens in small
        for graph in (False, True)
    ]
    copy_gb_s = copy_bandwidth(torch_device)
    rows = []
    for build in builders:
        what, candidates, calls = build()
        measured = measure(candidates, "fedspine", torch_device, seconds / len(builders))
        row = {**what, **per_call(measured, calls)}
        if "weight_bytes" in row:
            gb_s = row["weight_bytes"] / row["median_ms"]["fedspine"] / 1e6
            row |= {"weight_gb_s": round(gb_s, 1), "share_of_copy_bandwidth": round(gb_s / copy_gb_s, 3)}
        rows.append(row)
    return rows


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
