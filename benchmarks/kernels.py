"""Benchmarks of the ops against PEFT and eager torch.

Each case interleaves the runs of its candidates and compares medians, so a machine that slows down slows all of them.
Ratios are candidate / fedspine: above 1, fedspine is faster. The data is random; nothing is downloaded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.kernels import native, ops, reference

# (out, in) of MiniLM, of RoBERTa-base, of decoders with 1 to 8 B parameters, and of a pruned layer.
SHAPES = {
    "MiniLM q 384x384": (384, 384),
    "MiniLM up 1536x384": (1536, 384),
    "MiniLM down 384x1536": (384, 1536),
    "MiniLM up at 0.5 776x384": (776, 384),
    "RoBERTa up 3072x768": (3072, 768),
    "2048x2048": (2048, 2048),
    "4096x4096": (4096, 4096),
}
# in_features and the out_features of projections that share it: BERT, half pruned, and grouped-query attention.
SHARED = {
    "MiniLM qkv 384 -> 3 x 384": (384, (384, 384, 384)),
    "MiniLM qkv at 0.5 384 -> 3 x 192": (384, (192, 192, 192)),
    "SmolLM2 qkv 576 -> 576, 192, 192": (576, (576, 192, 192)),
    "SmolLM2 gate, up 576 -> 2 x 1536": (576, (1536, 1536)),
}
# hidden_size and intermediate_size, for rms_norm and swiglu.
DECODERS = {
    "SmolLM2 576, 1536": (576, 1536),
    "SmolLM2 at 0.5 576, 768": (576, 768),
    "LLaMA 3.2 1B 2048, 8192": (2048, 8192),
}
Candidates = dict[str, Callable[[], Any]]


def run(torch_device: str, *, seconds: float, quick: bool = False) -> list[dict[str, Any]]:
    """Measure every case on `torch_device` ("cpu" or "cuda"), for about `seconds` in total."""
    cases: list[tuple[dict[str, Any], Candidates, str]] = []
    shapes = dict(list(SHAPES.items())[:2]) if quick else SHAPES
    dtypes = [torch.float32] if torch_device == "cpu" else [torch.float32, torch.bfloat16]
    for name, (rows, cols) in shapes.items():
        for dtype in dtypes:
            cases += importance_cases(name, rows, cols, 16, dtype, torch_device)
            if torch_device == "cpu" and rows * cols > 2048 * 2048:
                continue  # takes seconds per step on a CPU, almost all of them in GEMMs
            cases.append(lora_case(name, rows, cols, 8, 8 * 48, dtype, dtype, torch_device))
            if dtype == torch.bfloat16:
                cases.append(lora_case(name, rows, cols, 8, 8 * 48, dtype, torch.float32, torch_device))
    for name, (cols, widths) in SHARED.items() if not quick else list(SHARED.items())[:1]:
        for tokens, rank in ((8 * 48, 8), (8 * 48, 16), (48, 8)):
            cases.append(shared_case(name, cols, widths, rank, tokens, dtypes[-1], torch_device))
    for name, (hidden, channels) in DECODERS.items() if not quick else list(DECODERS.items())[:1]:
        cases += elementwise_cases(name, hidden, channels, 8 * 48, dtypes[-1], torch_device)
    cases += gather_cases(torch_device)
    return [
        {**what, **measure(candidates, baseline, torch_device, seconds / len(cases))}
        for what, candidates, baseline in cases
    ]


def measure(candidates: Candidates, baseline: str, torch_device: str, seconds: float) -> dict[str, Any]:
    """Return the median milliseconds of each candidate and its ratio to `baseline`, from interleaved runs."""
    for run_once in candidates.values():
        run_once()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[baseline]) < 5:
        for name, run_once in candidates.items():
            times[name].append(timed(run_once, torch_device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "median_ms": {name: round(value * 1e3, 4) for name, value in medians.items()},
        "ratio_to_fedspine": {
            name: round(value / medians[baseline], 3) for name, value in medians.items() if name != baseline
        },
        "repetitions": len(times[baseline]),
    }


def timed(run_once: Callable[[], Any], torch_device: str) -> float:
    """Return the seconds of one call: wall time on a CPU, time between CUDA events on a GPU."""
    if torch_device == "cpu":
        begin = time.perf_counter()
        run_once()
        return time.perf_counter() - begin
    begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin_event.record()
    run_once()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) / 1e3


def importance_cases(
    name: str, rows: int, cols: int, rank: int, dtype: torch.dtype, torch_device: str
) -> list[tuple[dict[str, Any], Candidates, str]]:
    """Return cases with groups of 8 rows (as in q or up) and of 8 columns (as in o or down)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch_device, dtype)

    tensors = (normal(rows, cols), normal(rank, cols), normal(rows, rank), normal(rank, cols), normal(rows, rank))
    cases = []
    for by_row, length in ((True, rows), (False, cols)):
        group = (torch.arange(length, dtype=torch.int32) // 8).to(torch_device)
        options: dict[str, Any] = {"group_of_row" if by_row else "group_of_col": group}
        options["num_groups"] = (length + 7) // 8

        def fedspine(options: dict[str, Any] = options) -> Tensor:
            return ops.importance_accumulate(*tensors, 2.0, **options)

        def eager(options: dict[str, Any] = options) -> Tensor:
            return reference.importance_accumulate(*tensors, 2.0, **options)

        what = {"op": "importance_accumulate", "case": name, "groups": "rows" if by_row else "columns", "r": rank}
        cases.append(({**what, "dtype": str(dtype)}, {"fedspine": fedspine, "eager torch": eager}, "fedspine"))
    return cases


class Eager(nn.Module):
    """LoRA as plain modules and in the form of PEFT: base(x) + B(A(x)) * scaling, each term in a separate tensor."""

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        low_rank = nn.functional.linear(nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return (self.base(x) + low_rank * self.scaling).to(x.dtype)


class Fedspine(Eager):
    """The same layer with lora_linear."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.lora_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scaling)


def peft_layer(base: nn.Linear, lora_A: Tensor, lora_B: Tensor, alpha: int) -> nn.Module | None:
    """Return PEFT's layer with the same weights, or None if peft is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    config = LoraConfig(r=lora_A.shape[0], lora_alpha=alpha, target_modules=["base"], lora_dropout=0.0)
    holder = nn.ModuleDict({"base": base})
    layer = inject_adapter_in_model(config, holder)["base"]
    for module, value in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
        module["default"].weight.data = value.clone()
    return layer


def lora_case(
    name: str, rows: int, cols: int, rank: int, tokens: int, dtype: torch.dtype, adapter: torch.dtype, torch_device: str
) -> tuple[dict[str, Any], Candidates, str]:
    """Return the case of one lora_linear, forward and backward, with gradients to x, A and B."""
    torch.manual_seed(0)
    base = nn.Linear(cols, rows).to(torch_device, dtype).requires_grad_(False)
    lora_A, lora_B = (torch.randn(rank, cols) * 0.05).to(torch_device, adapter), torch.randn(rows, rank) * 0.05
    lora_B = lora_B.to(torch_device, adapter)
    x = torch.randn(tokens, cols, device=torch_device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, rows, device=torch_device, dtype=dtype)
    layers: dict[str, nn.Module] = {
        "fedspine": Fedspine(base, lora_A, lora_B, 2.0),
        "eager": Eager(base, lora_A, lora_B, 2.0),
    }
    frozen_copy = nn.Linear(cols, rows).to(torch_device, dtype).requires_grad_(False)
    frozen_copy.load_state_dict(base.state_dict())
    peft = peft_layer(frozen_copy, lora_A, lora_B, 2 * rank)
    if peft is not None:
        layers["peft"] = peft

    def step(layer: nn.Module) -> Callable[[], None]:
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.backward(layer(x), grad, inputs=leaves) or clear(leaves)

    def base_only() -> None:
        torch.autograd.backward(base(x), grad, inputs=[x])
        clear([x])

    candidates: Candidates = {key: step(layer) for key, layer in layers.items()}
    candidates["base GEMMs alone"] = base_only
    what = {"op": "lora_linear forward + backward", "case": name, "tokens": tokens, "r": rank, "dtype": str(dtype)}
    return {**what, "adapter_dtype": str(adapter)}, candidates, "fedspine"


def shared_case(
    name: str, cols: int, widths: tuple[int, ...], rank: int, tokens: int, dtype: torch.dtype, torch_device: str
) -> tuple[dict[str, Any], Candidates, str]:
    """Return the case of projections with shared input: the shared op, one lora_linear each, and PEFT's layers."""
    torch.manual_seed(0)
    bases = [nn.Linear(cols, rows).to(torch_device, dtype).requires_grad_(False) for rows in widths]
    adapters = [((torch.randn(rank, cols) * 0.05), torch.randn(rows, rank) * 0.05) for rows in widths]
    adapters = [(a.to(torch_device, dtype), b.to(torch_device, dtype)) for a, b in adapters]
    fedspine = [Fedspine(base, a, b, 2.0) for base, (a, b) in zip(bases, adapters)]
    x = torch.randn(tokens, cols, device=torch_device, dtype=dtype, requires_grad=True)
    grads = [torch.randn(tokens, rows, device=torch_device, dtype=dtype) for rows in widths]
    function = ops.lora_qkv if len(widths) == 3 else ops.lora_gate_up

    def shared() -> Sequence[Tensor]:
        parts = [ops.Projection(one.base.weight, one.base.bias, one.lora_A, one.lora_B) for one in fedspine]
        return function(x, *parts, 2.0)

    def step(outputs: Callable[[], Sequence[Tensor]], modules: Sequence[nn.Module]) -> Callable[[], None]:
        leaves = [x, *(p for module in modules for p in module.parameters() if p.requires_grad)]
        return lambda: torch.autograd.backward(outputs(), grads, inputs=leaves) or clear(leaves)

    candidates: Candidates = {"fedspine": step(shared, fedspine)}
    candidates["one lora_linear each"] = step(lambda: [one(x) for one in fedspine], fedspine)
    copies = []
    for base in bases:
        copies.append(nn.Linear(cols, base.out_features).to(torch_device, dtype).requires_grad_(False))
        copies[-1].load_state_dict(base.state_dict())
    peft = [peft_layer(copy, a, b, 2 * rank) for copy, (a, b) in zip(copies, adapters)]
    found = [layer for layer in peft if layer is not None]
    if found:
        candidates["peft"] = step(lambda: [layer(x) for layer in found], found)
    candidates["base GEMMs alone"] = step(lambda: [base(x) for base in bases], [])
    what = {"op": "lora_qkv / lora_gate_up", "case": name, "tokens": tokens, "r": rank, "dtype": str(dtype)}
    return what, candidates, "fedspine"


def elementwise_cases(
    name: str, hidden: int, channels: int, tokens: int, dtype: torch.dtype, torch_device: str
) -> list[tuple[dict[str, Any], Candidates, str]]:
    """Return the cases of rms_norm and swiglu, forward and backward, against plain operators."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=torch_device, dtype=dtype)

    x, gate, up = (normal(tokens, width).requires_grad_() for width in (hidden, channels, channels))
    weight, grad_x, grad_up = normal(hidden), normal(tokens, hidden), normal(tokens, channels)

    def step(call: Callable[[], Tensor], grad: Tensor, leaves: list[Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(call(), grad, inputs=leaves) or clear(leaves)

    what = {"case": name, "tokens": tokens, "r": 0, "dtype": str(dtype)}
    modules = {"fedspine": ops, "eager torch": reference}
    norms = {k: step(lambda m=m: m.rms_norm(x, weight, 1e-5), grad_x, [x]) for k, m in modules.items()}
    gates = {k: step(lambda m=m: m.swiglu(gate, up), grad_up, [gate, up]) for k, m in modules.items()}
    return [
        ({"op": "rms_norm forward + backward", **what}, norms, "fedspine"),
        ({"op": "swiglu forward + backward", **what}, gates, "fedspine"),
    ]


def machine_limits(torch_device: str) -> dict[str, float]:
    """Return the GFLOP/s of torch's fp32 GEMM and the GB/s (read and write) of a copy on this machine."""
    a = torch.randn(1024, 1024, device=torch_device)
    source = torch.randn(1 << 25, device=torch_device)
    target = torch.empty_like(source)
    gemm = measure({"x": lambda: a @ a}, "x", torch_device, 1.0)["median_ms"]["x"]
    copy = measure({"x": lambda: target.copy_(source)}, "x", torch_device, 1.0)["median_ms"]["x"]
    return {"gemm_gflops": round(2 * 1024**3 / gemm / 1e6, 1), "copy_gb_s": round(2 * 4 * (1 << 25) / copy / 1e6, 1)}


def clear(leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def gather_cases(torch_device: str) -> list[tuple[dict[str, Any], Candidates, str]]:
    """Return cases that copy half the columns of a square matrix, which takes longer than rows."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.randn(1536, 1536, device=torch_device).to(dtype)
        index = torch.arange(0, 1536, 2, device=torch_device)
        candidates: Candidates = {
            "fedspine": lambda t=t, index=index: ops.gather_cols(t, index),
            "eager torch": lambda t=t, index=index: t.index_select(1, index),
        }
        if native.supports(t):
            candidates["native kernel"] = lambda t=t, index=index: native.gather(t, index, by_row=False)
        cases.append(({"op": "gather_cols", "case": "1536x1536", "dtype": str(dtype)}, candidates, "fedspine"))
    return cases
