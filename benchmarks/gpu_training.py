"""Trains and prunes small models on a GPU: with the kernels on and off, and on the different paths of the trainer.

python -m benchmarks.gpu_training kernels|paths --out FILE [--torch-device cpu]

The weights are random, with the widths of real models, and nothing is downloaded. `kernels` trains MiniLM in one
process with the extension and in another without it, prunes it to one half, and compares scores, kept groups, step time
and peak memory. `paths` takes a few steps per data type of the base and layout of the batch, and compares the first
loss with that of a float32 model on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.device_round import build
from fedspine_edge.config import OptimizerSettings
from fedspine_edge.kernels import native
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.pruning.selection import select_layout
from fedspine_edge.training.batching import Encoded
from fedspine_edge.training.trainer import BatchSettings, Trainer

ROWS, STEPS, RANK = 8, 12, 8
VOCABULARY = 2000
# Name, task, dtype of the base, whether examples share rows, whether activations are recomputed, largest relative
# difference of the first loss.
PATHS: tuple[tuple[str, str, str, bool, bool, float], ...] = (
    ("classification, float32", "classification", "float32", False, False, 0.01),
    ("classification, bfloat16", "classification", "bfloat16", False, False, 0.05),
    ("causal_lm, bfloat16, packed", "causal_lm", "bfloat16", True, False, 0.05),
    ("causal_lm, int4, packed", "causal_lm", "int4", True, False, 0.1),
    ("causal_lm, int8", "causal_lm", "int8", False, False, 0.05),
    ("causal_lm, float16, recomputed", "causal_lm", "float16", False, True, 0.05),
)


def examples(count: int, tokens: int, *, lengths_differ: bool = False) -> list[Encoded]:
    """Return random examples with labels that depend on the first token."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        length = tokens - (i % 4) * tokens // 8 if lengths_differ else tokens
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        found.append(Encoded(input_ids=ids, label=ids[0] % 2))
    return found


def trainer_of(model: PrunableModel, data: list[Encoded], steps: int, *, pack: bool = False) -> Trainer:
    settings = OptimizerSettings(learning_rate=1e-3, batch_size=ROWS, total_steps=steps)
    batches, tracker = BatchSettings(pack=pack), ImportanceTracker(model)
    return Trainer(model, data, [], settings, round_steps=steps, batches=batches, tracker=tracker)


def adapted(module: nn.Module, task: str, torch_device: str, base_dtype: str = "float32") -> PrunableModel:
    """Return the model with adapters and frozen weights of `base_dtype` on a device."""
    model = PrunableModel.from_module(module, task=task)  # type: ignore[arg-type]
    model.attach_lora(RANK, 2.0, seed=0)
    model.set_base_dtype(base_dtype)  # type: ignore[arg-type]
    model.module.to(torch_device)
    return model


def tune_and_prune(name: str, torch_device: str, tokens: int, steps: int) -> dict[str, Any]:
    """Train with scores, prune to one half and train again in this process; return what the comparison needs."""
    model = adapted(build(name), "classification", torch_device)
    data = examples(4 * ROWS, tokens)
    trainer = trainer_of(model, data, 2 * steps)
    trainer.run(2, scored=True)  # warm up
    reset_peak_memory(torch_device)
    full_ms = timed(lambda: trainer.run(steps, scored=True), torch_device) / (steps - 2)
    tracker = trainer.tracker
    assert tracker is not None
    scores = tracker.scores()
    layout = select_layout(scores, model.layout, 0.5)
    flat = [float(score) for layer in (*scores.heads, *scores.channels) for score in layer]
    kept = [[int(i) for i in layer] for layer in (*layout.heads, *layout.channels)]
    trainer.compact(layout)
    pruned_ms = timed(lambda: trainer.run(2 * steps, scored=True), torch_device) / steps
    return {
        "native": native.available() and (torch_device == "cpu" or native.cuda_available()),
        "scores": flat,
        "kept": kept,
        "losses": [trainer.train_loss],
        "step_ms": round(full_ms, 2),
        "step_ms_pruned": round(pruned_ms, 2),
        "peak_mib": peak_memory_mib(torch_device),
    }


def timed(function: Any, torch_device: str) -> float:
    """Return the milliseconds of a call, including the work that it queues on a GPU."""
    synchronize(torch_device)
    begin = time.perf_counter()
    function()
    synchronize(torch_device)
    return (time.perf_counter() - begin) * 1e3


def synchronize(torch_device: str) -> None:
    if torch_device == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(torch_device: str) -> None:
    if torch_device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mib(torch_device: str) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**20, 1) if torch_device == "cuda" else None


def compare_kernels(
    torch_device: str, *, tokens: int = 128, steps: int = STEPS, name: str = "MiniLM"
) -> dict[str, Any]:
    """Train with and without the extension, each in a process of its own, and compare the two."""
    runs = {}
    for state, value in (("on", "1"), ("off", "0")):
        command = [sys.executable, "-m", "benchmarks.gpu_training", "one", "--torch-device", torch_device]
        command += ["--model", name, "--tokens", str(tokens), "--steps", str(steps)]
        environment = {**os.environ, "FEDSPINE_NATIVE": value}
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        runs[state] = json.loads(result.stdout.splitlines()[-1])
    on, off = runs["on"], runs["off"]
    largest = max(abs(x) for x in off["scores"])
    difference = max(abs(a - b) for a, b in zip(on["scores"], off["scores"])) / largest
    # Scores that are equal up to rounding may order two groups differently, so a few kept groups may differ.
    same = [len({*a} & {*b}) / len(b) for a, b in zip(on["kept"], off["kept"])]
    comparison = {
        "kernels used": on["native"] and not off["native"],
        "largest difference of scores, relative to the largest score": float(f"{difference:.2g}"),
        "smallest share of equal kept groups in a layer": round(min(same), 3),
        "step time, on / off (ms)": f"{on['step_ms']} / {off['step_ms']}",
        "step time after pruning, on / off (ms)": f"{on['step_ms_pruned']} / {off['step_ms_pruned']}",
        "peak memory, on / off (MiB)": f"{on['peak_mib']} / {off['peak_mib']}",
    }
    passed = on["native"] and not off["native"] and difference < 5e-3 and min(same) >= 0.95
    for run in runs.values():
        del run["scores"], run["kept"]
    return {"passed": bool(passed), "comparison": comparison, "runs": runs}


def small_model(task: str) -> nn.Module:
    """Return a model with random weights: BERT for classification, LLaMA for causal_lm."""
    import transformers

    torch.manual_seed(0)
    shared = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
    shared |= {"vocab_size": VOCABULARY, "pad_token_id": 0}
    if task == "causal_lm":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, num_key_value_heads=2, head_dim=32))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**shared, **no_dropout))


def try_paths(torch_device: str, report: Any, *, tokens: int = 64, steps: int = 6) -> bool:
    """Train on each path and call `report` with the rows so far. Returns whether all passed."""
    rows: list[dict[str, Any]] = []
    for path, task, base_dtype, pack, recompute, tolerance in PATHS:
        row: dict[str, Any] = {"path": path, "passed": False}
        rows.append(row)
        try:
            data = examples(2 * ROWS, tokens, lengths_differ=True)
            expected = first_loss(adapted(small_model(task), task, "cpu"), data, pack=False)
            model = adapted(small_model(task), task, torch_device, base_dtype)
            if recompute:
                model.set_gradient_checkpointing(True)
            trainer = trainer_of(model, data, steps, pack=pack)
            reset_peak_memory(torch_device)
            trainer.run(1, scored=True)
            first = trainer.last_loss
            assert first is not None
            step_ms = timed(lambda trainer=trainer: trainer.run(steps, scored=True), torch_device) / (steps - 1)
            last = trainer.last_loss
            row |= {"first_loss": round(first, 4), "last_loss": last, "float32_on_cpu": round(expected, 4)}
            row |= {"step_ms": round(step_ms, 2), "peak_mib": peak_memory_mib(torch_device)}
            row["passed"] = bool(math.isfinite(last or math.nan) and abs(first - expected) <= tolerance * abs(expected))
        except Exception as error:  # any failure is a result of this path; the next one still runs
            row["message"] = f"{type(error).__name__}: {error}"
        report(rows)
    return all(row["passed"] for row in rows)


def first_loss(model: PrunableModel, data: list[Encoded], *, pack: bool) -> float:
    trainer = trainer_of(model, data, 1, pack=pack)
    trainer.run(1)
    assert trainer.last_loss is not None
    return trainer.last_loss


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["kernels", "paths", "one"], help="what to run; 'one' is a part of 'kernels'")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--torch-device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", default="MiniLM", help="model of benchmarks/device_round.py (default: MiniLM)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per example (default: 128)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps before the cut (default: {STEPS})")
    args = parser.parse_args()
    if args.part == "one":
        print(json.dumps(tune_and_prune(args.model, args.torch_device, args.tokens, args.steps)))
        return 0

    def write(results: dict[str, Any]) -> None:
        text = json.dumps(results, indent=1)
        print(text, flush=True)
        if args.out:
            args.out.write_text(text + "\n")

    if args.part == "kernels":
        results = compare_kernels(args.torch_device, tokens=args.tokens, steps=args.steps, name=args.model)
        write(results)
        return 0 if results["passed"] else 1
    return 0 if try_paths(args.torch_device, lambda rows: write({"results": rows})) else 1


if __name__ == "__main__":
    sys.exit(main())
