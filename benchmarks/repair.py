#!/usr/bin/env python3
"""Measure what repair at the cut is worth: MiniLM on four-domain sentiment, paired seeds, all test sentences.

    benchmarks/repair.py                 # runs the seeds missing in benchmarks/results/repair.json
    benchmarks/repair.py --seeds 5
    benchmarks/repair.py --table         # prints means and 95 % intervals of the paired differences

One `fit` per seed is the start of every variant: pruning to 0.5 or 0.7 in one or three stages, with and without repair,
then recovery steps. All variants of a ratio take the same number of training steps of the same batches. Accuracy is
that right after the last cut and after the recovery. The file is written after every variant; a run that is stopped
continues there. Times are CPU seconds of the process on one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = ROOT / "benchmarks" / "results" / "repair.json"
RATIOS = (0.5, 0.7)
VARIANTS = [(stages, repair) for stages in (3, 1) for repair in (False, True)]
FIT_STEPS, STAGE_STEPS, STEPS_AFTER_FIT = 300, 20, 100
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def run_seed(seed: int, results: list[dict[str, Any]], write: Any) -> None:
    """Measure what is missing of one seed."""
    import torch

    from fedspine_edge import EdgeTuner
    from fedspine_edge.data import sentiment
    from fedspine_edge.simulation.fleet_settings import default_model

    wanted = [(ratio, *variant) for ratio in RATIOS for variant in VARIANTS]
    done = {(row["ratio"], row["stages"], row["repair"]) for row in results if row["seed"] == seed and "ratio" in row}
    if not set(wanted) - done:
        return
    torch.set_num_threads(1)
    data = sentiment.load(test_share=0.15)
    train = [(sentence.text, sentence.label) for sentence in data.train]
    random.Random(seed).shuffle(train)
    test = [(sentence.text, sentence.label) for sentence in data.test]
    start = EdgeTuner.from_pretrained(default_model(), r=16, seed=seed, max_length_tokens=48)
    start.fit(train, steps=FIT_STEPS)
    if not any(row["seed"] == seed and "ratio" not in row for row in results):
        unpruned = copy.deepcopy(start).fit(train, steps=STEPS_AFTER_FIT)
        results.append({"seed": seed, "unpruned": unpruned.evaluate(test)})
        write()
    for ratio, stages, repair in wanted:
        if (ratio, stages, repair) in done:
            continue
        tuner = copy.deepcopy(start)
        began = time.process_time()
        tuner.prune(ratio, stages=stages, steps=STAGE_STEPS, repair=repair)
        pruned_s = time.process_time() - began
        cut = tuner.evaluate(test)
        tuner.fit(train, steps=STEPS_AFTER_FIT - STAGE_STEPS * (stages - 1))
        row = {"seed": seed, "ratio": ratio, "stages": stages, "repair": repair, "prune_cpu_s": round(pruned_s, 1)}
        results.append({**row, "after_cut": cut, "recovered": tuner.evaluate(test)})
        write()
        print(json.dumps(results[-1]), flush=True)


def print_table(results: list[dict[str, Any]]) -> None:
    """Print accuracy in % and loss against the unpruned model with equally many steps, by variant."""
    unpruned = {row["seed"]: row["unpruned"] for row in results if "unpruned" in row}
    print("ratio stages repair | accuracy after cut, recovered | difference to unpruned, points | nats | prune, CPU s")
    for ratio in RATIOS:
        for stages, repair in VARIANTS:
            rows = [r for r in results if (r.get("ratio"), r.get("stages"), r.get("repair")) == (ratio, stages, repair)]
            if not rows:
                continue
            points = [100 * (r["recovered"]["accuracy"] - unpruned[r["seed"]]["accuracy"]) for r in rows]
            nats = [r["recovered"]["loss"] - unpruned[r["seed"]]["loss"] for r in rows]
            print(
                f"{ratio} {stages} {'yes' if repair else 'no '} | "
                f"{100 * fmean(r['after_cut']['accuracy'] for r in rows):.1f} "
                f"{100 * fmean(r['recovered']['accuracy'] for r in rows):.1f} | "
                f"{with_interval(points, 1)} | {with_interval(nats, 3)} | {fmean(r['prune_cpu_s'] for r in rows):.0f}"
            )


def with_interval(values: list[float], digits: int) -> str:
    """Return a mean and half its 95 % interval over seeds."""
    if len(values) < 2:
        return f"{fmean(values):+.{digits}f}"
    half = T_975[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):+.{digits}f} ± {half:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"results file (default: {RESULTS.name})")
    parser.add_argument("--table", action="store_true", help="print the table of the results file and stop")
    arguments = parser.parse_args()
    content = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"results": []}
    results = content["results"]

    def write() -> None:
        import torch
        import transformers

        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        about = {
            "machine": platform.machine(),
            "versions": versions,
            "steps": [FIT_STEPS, STAGE_STEPS, STEPS_AFTER_FIT],
        }
        arguments.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")

    if not arguments.table:
        for seed in range(arguments.seeds):
            run_seed(seed, results, write)
    print_table(results)


if __name__ == "__main__":
    main()
