"""`fedspine-edge tune`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine_edge.cli.column_options import add_columns, with_columns

if TYPE_CHECKING:
    from fedspine_edge.data.examples import Example
    from fedspine_edge.tuner import EdgeTuner

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
    add_columns(parser)
    parser.add_argument("--test", default=None, help="file of the same form to measure accuracy on")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write the tuned model to; until it is there, what an interrupted command needs to go on is "
        "kept in OUT.unfinished",
    )
    parser.add_argument(
        "--pruning-ratio", type=float, default=0.0, help="share of prunable parameters to remove; default 0"
    )
    parser.add_argument(
        "--pruning-stages",
        type=int,
        default=3,
        help="parts in which pruning removes them, with training in between; default 3",
    )
    parser.add_argument("--pruning-steps", type=int, default=20, help="training steps between two parts; default 20")
    parser.add_argument(
        "--steps", type=int, default=200, help="training steps before and again after pruning; default 200"
    )
    parser.add_argument("--num-labels", type=int, default=2, help="number of classes; default 2; not for causal_lm")
    parser.add_argument("--rank", dest="r", metavar="RANK", type=int, default=8, help="LoRA rank; default 8")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak of the schedule; default 0.001")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step; default 8")
    parser.add_argument("--max-length-tokens", type=int, help="longer texts are cut; default 128")
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
    from fedspine_edge.errors import ConfigError
    from fedspine_edge.model.checkpoint import check_target
    from fedspine_edge.model.layout import check_ratio, prunable_parameters
    from fedspine_edge.tuner import EdgeTuner

    check_ratio(arguments.pruning_ratio)
    for name in ("steps", "pruning_stages", "pruning_steps", "batch_size"):
        if (number := getattr(arguments, name)) < 1:
            raise ConfigError(f"`{name}` is {number}; it must be at least 1.", remedy="Leave it out for the default.")
    check_target(arguments.out)
    # What is wrong with the data is said now, not after a model was loaded and trained.
    train = _read(arguments.data, arguments)
    test = _read(arguments.test, arguments) if arguments.test else []
    _say(f"loading {arguments.model}")
    tuner = EdgeTuner.from_pretrained(
        arguments.model,
        task=arguments.task,
        num_labels=None if arguments.task == "causal_lm" else arguments.num_labels,
        r=arguments.r,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        max_length_tokens=arguments.max_length_tokens,
        base_dtype=arguments.base_dtype,
        seed=arguments.seed,
    )
    gone = 0.0
    if arguments.pruning_ratio > 0:
        check_ratio(arguments.pruning_ratio, tuner.layout)
        gone = (arguments.pruning_ratio - tuner.layout.pruning_ratio) * prunable_parameters(tuner.layout.spec)
    kept = tuner.model.num_parameters() - max(0.0, gone)
    check_target(arguments.out, needed_bytes=round(kept * tuner.model.compute_dtype.itemsize))
    figures = _tune(tuner, train, test, arguments)
    if arguments.json:
        print_json(figures)
    else:
        print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
        print(f"next: fedspine-edge compile {arguments.out}")
    return 0


def _tune(tuner: EdgeTuner, train: list[Example], test: list[Example], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, prune, train, measure and save; what was trained is found in OUT.unfinished when this is called again."""
    from fedspine_edge.errors import CheckpointError

    unfinished = arguments.out.with_name(f"{arguments.out.name}.unfinished")
    if unfinished.exists():
        _say(f"an earlier command was interrupted; this one goes on from {unfinished}")
    shown: dict[str, Any] = {"steps": arguments.steps, "log_dir": arguments.log_dir, "progress": True}
    share = arguments.steps * arguments.batch_size / len(train)
    _say(f"training {arguments.steps} steps of {arguments.batch_size} examples: {share:.2g} times through the data")
    tuner.fit(train, checkpoint=unfinished / "fit", **shown)
    if arguments.pruning_ratio > 0:
        stages, steps = arguments.pruning_stages, arguments.pruning_steps
        _say(f"pruning to {arguments.pruning_ratio:g} in {stages} parts, with {steps} training steps between two")
        tuner.prune(arguments.pruning_ratio, stages=stages, steps=steps, progress=True)
        _say(f"training {arguments.steps} steps to recover")
        tuner.fit(train, checkpoint=unfinished / "recovery", **shown)
    metrics = {}
    if test:
        _say(f"evaluating on {len(test):,} examples")
        metrics = tuner.evaluate(test, progress=True)
    _say("measuring latency")
    metrics["latency_ms"] = tuner.measure_latency().total_ms
    _say(f"saving {arguments.out}")
    try:
        tuner.save(arguments.out)
    except CheckpointError as error:
        raise CheckpointError(error.message, remedy=f"{error.remedy} Then the same command goes on.") from error
    shutil.rmtree(unfinished, ignore_errors=True)
    return {"model": str(arguments.out), "pruning_ratio": tuner.layout.pruning_ratio, **metrics}


def _read(path: str, arguments: argparse.Namespace) -> list[Example]:
    from fedspine_edge.config import DataSettings
    from fedspine_edge.data.loading import read

    data = with_columns(path, arguments)
    examples = read(data, DataSettings(path="", num_labels=arguments.num_labels), arguments.task)
    _say(f"{path} has {len(examples):,} examples")
    if arguments.task == "classification" and len({example.label for example in examples}) == 1:
        _say(f"every label in it is {examples[0].label}: a model learns nothing else from that")
    return examples


def _say(line: str) -> None:
    print(f"tune: {line}", file=sys.stderr, flush=True)
