"""`fedspine-edge tune`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """fedspine-edge tune --model path/to/base --data train.csv --pruning-ratio 0.5 --out model/
  fedspine-edge tune --task causal_lm --model llm/ --data chats.jsonl --text prompt --text-pair answer --out model/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder (or hub id) of the base model")
    parser.add_argument("--data", required=True, help="CSV, JSON lines or Parquet file with text and label columns")
    parser.add_argument(
        "--task",
        choices=["classification", "token_classification", "causal_lm"],
        default="classification",
        help="what is learned; default classification",
    )
    parser.add_argument("--text", default="text", help="column of the texts, words or prompts; default text")
    parser.add_argument("--text-pair", default="", help="column of second texts, or of the answers to the prompts")
    parser.add_argument("--label", default="label", help="column of the labels; default label; not for causal_lm")
    parser.add_argument("--test", default=None, help="file of the same form to measure accuracy on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tuned model to")
    parser.add_argument(
        "--pruning-ratio", type=float, default=0.0, help="share of prunable parameters to remove; default 0"
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="training steps before and again after pruning; default 200"
    )
    parser.add_argument("--num-labels", type=int, default=2, help="number of classes; default 2; not for causal_lm")
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank; default 8")
    parser.add_argument(
        "--base-dtype",
        choices=("float32", "bfloat16", "float16", "int8", "int4"),
        help="how the frozen weights are kept: fewer bits for less memory; default float32",
    )
    parser.add_argument("--log-dir", type=Path, help="write TensorBoard curves there (extra: tensorboard)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.config import DataSettings
    from fedspine_edge.data.reading import read
    from fedspine_edge.model.checkpoint import check_target
    from fedspine_edge.model.layout import check_ratio
    from fedspine_edge.tuner import EdgeTuner

    check_ratio(arguments.pruning_ratio)
    check_target(arguments.out)
    if arguments.test:  # what is wrong with it is said now, not after the training
        names = {"text": arguments.text, "text_pair": arguments.text_pair, "label": arguments.label}
        read(arguments.test, DataSettings(path="", num_labels=arguments.num_labels, **names), arguments.task)
    tuner = EdgeTuner.from_pretrained(
        arguments.model,
        task=arguments.task,
        num_labels=None if arguments.task == "causal_lm" else arguments.num_labels,
        text=arguments.text,
        text_pair=arguments.text_pair,
        label=arguments.label,
        r=arguments.rank,
        base_dtype=arguments.base_dtype,
        seed=arguments.seed,
    )
    tuner.fit(arguments.data, steps=arguments.steps, log_dir=arguments.log_dir)
    if arguments.pruning_ratio > 0:
        tuner.prune(arguments.pruning_ratio)
        tuner.fit(arguments.data, steps=arguments.steps, log_dir=arguments.log_dir)
    metrics = tuner.evaluate(arguments.test) if arguments.test else {}
    metrics["latency_ms"] = tuner.measure_latency().total_ms
    tuner.save(arguments.out)
    figures = {"model": str(arguments.out), "pruning_ratio": tuner.layout.pruning_ratio, **metrics}
    if arguments.json:
        print_json(figures)
    else:
        print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
    return 0
