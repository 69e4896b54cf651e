"""The native ops against PEFT and eager torch, in one run on one machine.

Each case times its contestants in turn, round after round, and compares medians, so that a machine that slows down
slows all of them. Ratios are contestant / ours: above 1, ours is faster. Random data; nothing is downloaded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.kernels import native, ops, reference

# (out, in): MiniLM attention and FFN, SmolLM2 q, RoBERTa-base FFN, a 1-2 B decoder's square, and a pruned, odd width.
SHAPES = {
    "MiniLM q 384x384": (384, 384),
    "MiniLM up 1536x384": (1536, 384),
    "MiniLM down 384x1536": (384, 1536),
    "MiniLM up at 0.5 776x384": (776, 384),
    "RoBERTa up 3072x768": (3072, 768),
    "2048x2048": (2048, 2048),
    "4096x4096": (4096, 4096),
}
# in_features and the widths of projections that share it; BERT and LLaMA with grouped queries, and pruned by half.
SHARED = {
    "MiniLM qkv 384 -> 3 x 384": (384, (384, 384, 384)),
    "MiniLM qkv at 0.5 384 -> 3 x 192": (384, (192, 192, 192)),
    "SmolLM2 qkv 576 -> 576, 192, 192": (576, (576, 192, 192)),
    "SmolLM2 gate, up 576 -> 2 x 1536": (576, (1536, 1536)),
}
# hidden_size and intermediate_size, for norms and gates.
DECODERS = {
    "SmolLM2 576, 1536": (576, 1536),
    "SmolLM2 at 0.5 576, 768": (576, 768),
    "LLaMA 3.2 1B 2048, 8192": (2048, 8192),
}
Contestants = dict[str, Callable[[], Any]]


def run(torch_device: str, *, seconds: float, quick: bool = False) -> list[dict[str, Any]]:
    """Every case on `torch_device` ("cpu" or "cuda"), about `seconds` in all."""
    cases: list[tuple[dict[str, Any], Contestants, str]] = []
    shapes = dict(list(SHAPES.items())[:2]) if quick else SHAPES
    dtypes = [torch.float32] if torch_device == "cpu" else [torch.float32, torch.bfloat16]
    for name, (rows, cols) in shapes.items():
        for dtype in dtypes:
            cases += importance_cases(name, rows, cols, 16, dtype, torch_device)
            if torch_device == "cpu" and rows * cols > 2048 * 2048:
                continue  # seconds a step on a CPU, and nothing but GEMM
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
        {**what, **measure(contestants, ours, torch_device, seconds / len(cases))} for what, contestants, ours in cases
    ]


def measure(contestants: Contestants, ours: str, torch_device: str, seconds: float) -> dict[str, Any]:
    """Median milliseconds of each contestant, interleaved, and its ratio to `ours`."""
    for run_once in contestants.values():
        run_once()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[ours]) < 5:
        for name, run_once in contestants.items():
            times[name].append(timed(run_once, torch_device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "median_ms": {name: round(value * 1e3, 4) for name, value in medians.items()},
        "ratio_to_ours": {name: round(value / medians[ours], 3) for name, value in medians.items() if name != ours},
        "repetitions": len(times[ours]),
    }


def timed(run_once: Callable[[], Any], torch_device: str) -> float:
    """Seconds of one call: wall time on a CPU, events on a GPU."""
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
) -> list[tuple[dict[str, Any], Contestants, str]]:
    """Row groups (as for q or up) and column groups (as for o or down), one group per 8 elements."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch_device, dtype)

    tensors = (normal(rows, cols), normal(rank, cols), normal(rows, rank), normal(rank, cols), normal(rows, rank))
    cases = []
    for by_row, length in ((True, rows), (False, cols)):
        group = (torch.arange(length, dtype=torch.int32) // 8).to(torch_device)
        options: dict[str, Any] = {"group_of_row" if by_row else "group_of_col": group}
        options["num_groups"] = (length + 7) // 8

        def ours(options: dict[str, Any] = options) -> Tensor:
            return ops.importance_accumulate(*tensors, 2.0, **options)

        def eager(options: dict[str, Any] = options) -> Tensor:
            return reference.importance_accumulate(*tensors, 2.0, **options)

        what = {"op": "importance_accumulate", "case": name, "groups": "rows" if by_row else "columns", "r": rank}
        cases.append(({**what, "dtype": str(dtype)}, {"fedspine": ours, "eager torch": eager}, "fedspine"))
    return cases


class Eager(nn.Module):
    """LoRA as plain modules, in the form PEFT computes it: base + B(A(x)) * scaling, each a tensor of its own."""

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        low_rank = nn.functional.linear(nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return (self.base(x) + low_rank * self.scaling).to(x.dtype)


class Ours(Eager):
    """The same layer on lora_linear."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.lora_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scaling)


def peft_layer(base: nn.Linear, lora_A: Tensor, lora_B: Tensor, alpha: int) -> nn.Module | None:
    """PEFT's own layer on the same weights, or None where peft is not installed."""
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
) -> tuple[dict[str, Any], Contestants, str]:
    """Forward and backward of one adapted linear, gradients to x, A and B."""
    torch.manual_seed(0)
    base = nn.Linear(cols, rows).to(torch_device, dtype).requires_grad_(False)
    lora_A, lora_B = (torch.randn(rank, cols) * 0.05).to(torch_device, adapter), torch.randn(rows, rank) * 0.05
    lora_B = lora_B.to(torch_device, adapter)
    x = torch.randn(tokens, cols, device=torch_device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, rows, device=torch_device, dtype=dtype)
    layers: dict[str, nn.Module] = {
        "fedspine": Ours(base, lora_A, lora_B, 2.0),
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

    contestants: Contestants = {key: step(layer) for key, layer in layers.items()}
    contestants["base GEMMs alone"] = base_only
    what = {"op": "lora_linear forward + backward", "case": name, "tokens": tokens, "r": rank, "dtype": str(dtype)}
    return {**what, "adapter_dtype": str(adapter)}, contestants, "fedspine"


def shared_case(
    name: str, cols: int, widths: tuple[int, ...], rank: int, tokens: int, dtype: torch.dtype, torch_device: str
) -> tuple[dict[str, Any], Contestants, str]:
    """Projections of one input, forward and backward: the shared op, one lora_linear each, PEFT's layers."""
    torch.manual_seed(0)
    bases = [nn.Linear(cols, rows).to(torch_device, dtype).requires_grad_(False) for rows in widths]
    adapters = [((torch.randn(rank, cols) * 0.05), torch.randn(rows, rank) * 0.05) for rows in widths]
    adapters = [(a.to(torch_device, dtype), b.to(torch_device, dtype)) for a, b in adapters]
    ours = [Ours(base, a, b, 2.0) for base, (a, b) in zip(bases, adapters)]
    x = torch.randn(tokens, cols, device=torch_device, dtype=dtype, requires_grad=True)
    grads = [torch.randn(tokens, rows, device=torch_device, dtype=dtype) for rows in widths]
    function = ops.lora_qkv if len(widths) == 3 else ops.lora_gate_up

    def shared() -> Sequence[Tensor]:
        parts = [ops.Projection(one.base.weight, one.base.bias, one.lora_A, one.lora_B) for one in ours]
        return function(x, *parts, 2.0)

    def step(outputs: Callable[[], Sequence[Tensor]], modules: Sequence[nn.Module]) -> Callable[[], None]:
        leaves = [x, *(p for module in modules for p in module.parameters() if p.requires_grad)]
        return lambda: torch.autograd.backward(outputs(), grads, inputs=leaves) or clear(leaves)

    contestants: Contestants = {"fedspine": step(shared, ours)}
    contestants["one lora_linear each"] = step(lambda: [one(x) for one in ours], ours)
    copies = []
    for base in bases:
        copies.append(nn.Linear(cols, base.out_features).to(torch_device, dtype).requires_grad_(False))
        copies[-1].load_state_dict(base.state_dict())
    peft = [peft_layer(copy, a, b, 2 * rank) for copy, (a, b) in zip(copies, adapters)]
    found = [layer for layer in peft if layer is not None]
    if found:
        contestants["peft"] = step(lambda: [layer(x) for layer in found], found)
    contestants["base GEMMs alone"] = step(lambda: [base(x) for base in bases], [])
    what = {"op": "lora_qkv / lora_gate_up", "case": name, "tokens": tokens, "r": rank, "dtype": str(dtype)}
    return what, contestants, "fedspine"


def elementwise_cases(
    name: str, hidden: int, channels: int, tokens: int, dtype: torch.dtype, torch_device: str
) -> list[tuple[dict[str, Any], Contestants, str]]:
    """A norm with a frozen weight and a gate, forward and backward, against the same in plain operators."""
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
    """What this machine reached in this run: GFLOP/s of torch's fp32 GEMM and GB/s of a copy (read and write)."""
    a = torch.randn(1024, 1024, device=torch_device)
    source = torch.randn(1 << 25, device=torch_device)
    target = torch.empty_like(source)
    gemm = measure({"x": lambda: a @ a}, "x", torch_device, 1.0)["median_ms"]["x"]
    copy = measure({"x": lambda: target.copy_(source)}, "x", torch_device, 1.0)["median_ms"]["x"]
    return {"gemm_gflops": round(2 * 1024**3 / gemm / 1e6, 1), "copy_gb_s": round(2 * 4 * (1 << 25) / copy / 1e6, 1)}


def clear(leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def gather_cases(torch_device: str) -> list[tuple[dict[str, Any], Contestants, str]]:
    """Half the columns of a square, the slower of the two directions."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.randn(1536, 1536, device=torch_device).to(dtype)
        index = torch.arange(0, 1536, 2, device=torch_device)
        contestants: Contestants = {
            "fedspine": lambda t=t, index=index: ops.gather_cols(t, index),
            "eager torch": lambda t=t, index=index: t.index_select(1, index),
        }
        if native.supports(t):
            contestants["native kernel"] = lambda t=t, index=index: native.gather(t, index, by_row=False)
        cases.append(({"op": "gather_cols", "case": "1536x1536", "dtype": str(dtype)}, contestants, "fedspine"))
    return cases
