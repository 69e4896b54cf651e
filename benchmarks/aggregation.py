#!/usr/bin/env python3
"""Time and memory of aggregation and of the bandit at scale, with the naive dense way beside them.

    benchmarks/aggregation.py --out benchmarks/results/aggregation.json     # the full cases; minutes
    benchmarks/aggregation.py --quick                                       # small cases; seconds

Each case runs in a process of its own, so that its memory peak is its own. `factored` is fedspine_edge's Aggregator
(streaming: an update is dropped once it is folded in). `dense` adds each device's B·A to a dense sum and takes the SVD
of the mean; `dense, all kept` is the naive way that first builds every device's product and holds them all, which is
computed and not measured. Updates are float16 as on the wire. A case is one layer of its model (MiniLM has 6, LLaMA-7B
32), and `llama_q` one module of it: a whole model takes as many times the time and the memory of the sums.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedspine_edge.aggregation.factored import decompose_dense
from fedspine_edge.aggregation.rules import Aggregator
from fedspine_edge.config import FleetConfig
from fedspine_edge.strategies import DeviceInfo, RoundOutcome, create

MINILM = {"q": (384, 384), "k": (384, 384), "v": (384, 384), "o": (384, 384), "up": (1536, 384), "down": (384, 1536)}
LLAMA = {
    **dict.fromkeys(("q", "k", "v", "o"), (4096, 4096)),
    **dict.fromkeys(("up", "gate"), (11008, 4096)),
    "down": (4096, 11008),
}
SHAPES = {"minilm": MINILM, "llama": LLAMA, "llama_q": {"q": LLAMA["q"]}}
METHODS = {"bandit": ("bandit",), "llama": ("generate", "factored")}
"""The dense way is measured on LLaMA's smallest module only: its larger ones take hours."""

RANK = 16
KEPT = 0.75
"""Share of rows (columns for o and down) that each device keeps, drawn apart."""


def update(shapes: dict[str, tuple[int, int]], number: int) -> tuple[dict, dict, dict]:
    """Factors in compact coordinates, rows and columns, of device `number`."""
    rng = np.random.default_rng(number)
    factors, rows, cols = {}, {}, {}
    for name, (out_features, in_features) in shapes.items():
        by_rows = name not in ("o", "down")
        whole = [np.arange(out_features), np.arange(in_features)]
        axis = 0 if by_rows else 1
        size = whole[axis].size
        whole[axis] = np.sort(rng.permutation(size)[: int(KEPT * size)])
        rows[name], cols[name] = whole
        A = rng.standard_normal((RANK, cols[name].size), dtype=np.float32).astype(np.float16)
        B = rng.standard_normal((rows[name].size, RANK), dtype=np.float32).astype(np.float16)
        factors[name] = (A, B)
    return factors, rows, cols


def factored(shapes: dict[str, tuple[int, int]], devices: int) -> None:
    aggregator = Aggregator("reconstruct", shapes, 32, 2.0, 0)
    for number in range(devices):
        aggregator.add(f"d{number}", 1.0, *update(shapes, number))
    aggregator.finish()


def dense(shapes: dict[str, tuple[int, int]], devices: int) -> None:
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    weights = {name: np.zeros(shape) for name, shape in shapes.items()}
    for number in range(devices):
        factors, rows, cols = update(shapes, number)
        for name, (A, B) in factors.items():
            where = np.ix_(rows[name], cols[name])
            sums[name][where] += B.astype(np.float64) @ A.astype(np.float64)
            weights[name][where] += 1.0
    for name, total in sums.items():
        decompose_dense(total / np.maximum(weights[name], 1.0))


def generate(shapes: dict[str, tuple[int, int]], devices: int) -> None:
    """Making the updates alone, to be subtracted."""
    for number in range(devices):
        update(shapes, number)


def bandit(devices: int, rounds: int) -> dict[str, Any]:
    """Seconds in which the FedSpine strategy decides all devices once, and its state half-way and at the end."""
    strategy = create(FleetConfig(num_rounds=rounds, pruning_ratio=0.6))
    rng, ratio, slowest, sizes = random.Random(0), [0.0] * devices, 0.0, []
    for server_round in range(1, rounds + 1):
        infos = [DeviceInfo(f"d{i:05}", f"c{i % 3}", 256, 0, ratio[i]) for i in range(devices)]
        began = time.process_time()
        asked = strategy.assign(infos, server_round)
        slowest = max(slowest, time.process_time() - began)
        outcomes = []
        for i, info in enumerate(infos):
            arm = asked[info.device_id]
            ratio[i] = arm.pruning_ratio
            time_s = (1 + i % 3) * (10 - 6 * ratio[i] + arm.r / 16) * rng.uniform(0.95, 1.05)
            outcomes.append(
                RoundOutcome(info.device_id, "ok", time_s, 0.6, rng.uniform(0.5, 0.6), rng.random(), ratio[i])
            )
        strategy.observe(outcomes, server_round)
        if server_round in (rounds // 2, rounds):
            sizes.append(len(json.dumps(strategy.to_dict())))
    return {
        "rounds": rounds,
        "slowest_round_decide_cpu_s": round(slowest, 3),
        "state_json_bytes_half_way": sizes[0],
        "state_json_bytes": sizes[1],
    }


def measured(what: str, case: str, devices: int, pipe: Any) -> None:
    before = peak_mib()
    began, cpu = time.perf_counter(), time.process_time()
    extra: dict[str, Any] = {}
    if what == "bandit":
        extra = bandit(devices, 40)
    else:
        shapes = SHAPES[case]
        {"factored": factored, "dense": dense, "generate": generate}[what](shapes, devices)
    pipe.send(
        {
            "wall_s": round(time.perf_counter() - began, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "peak_rss_mib": peak_mib(),
            "rss_before_mib": before,
            **extra,
        }
    )


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", choices=["minilm", "llama_q", "llama", "bandit"], default=None)
    arguments = parser.parse_args()
    cases = [("minilm", 20 if arguments.quick else 1000), ("bandit", 200 if arguments.quick else 10_000)]
    if not arguments.quick:
        cases += [("llama_q", 100), ("llama", 100)]
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    context = multiprocessing.get_context("spawn")
    for case, devices in cases:
        if arguments.only not in (None, case):
            continue
        for what in METHODS.get(case, ("generate", "factored", "dense")):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=measured, args=(what, case, devices, theirs))
            child.start()
            results[f"{case} × {devices}: {what}"] = ours.recv()
            child.join()
            print(f"{case} × {devices}: {what}: {results[f'{case} × {devices}: {what}']}", flush=True)
        if case != "bandit":
            shapes, layers = SHAPES[case], 6 if case == "minilm" else 32
            elements = layers * sum(o * i for o, i in shapes.values())
            results[f"{case} × {devices}: dense, all kept"] = {"computed_bytes_fp32": 4 * devices * elements}
            results[f"{case} × {devices}: factors, all kept"] = {
                "computed_bytes_fp16": int(2 * devices * layers * RANK * sum(o + i for o, i in shapes.values()))
            }
    results["machine"] = {"processor": platform.processor() or platform.machine(), "layers_measured": 1, "rank": RANK}
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
