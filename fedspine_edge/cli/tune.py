"""Command `fedspine-edge tune`."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine_edge.cli.options import TASKS, accept_old_name, add_column_options, add_json_option, data_settings

if TYPE_CHECKING:
    from fedspine_edge.data.examples import Example
    from fedspine_edge.tuner import EdgeTuner

EXAMPLE = """fedspine-edge tune --model path/to/base --data train.csv --pruning-ratio 0.5 --out model/
  fedspine-edge tune --task causal_lm --model llm/ --data chats.jsonl --text prompt --text-pair answer --out model/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hugging Face hub id of the base model")
    parser.add_argument("--data", required=True, help="CSV, JSON lines or Parquet file with the training examples")
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="classification",
        help="task to train for",
    )
    add_column_options(parser)
    parser.add_argument("--test", default=None, help="file with the same columns to measure accuracy on")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write the tuned model to; OUT.unfinished holds the checkpoints until then, from which the same "
        "command continues after an interruption",
    )
    parser.add_argument("--pruning-ratio", type=float, default=0.0, help="share of the prunable parameters to remove")
    parser.add_argument(
        "--pruning-stages",
        type=int,
        default=3,
        help="number of pruning stages, with training in between",
    )
    parser.add_argument("--pruning-steps", type=int, default=20, help="training steps between two stages")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="refit the outputs of attention and FFN by least squares at every cut, on 256 of the training texts",
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps before pruning, and again after it")
    parser.add_argument("--num-labels", type=int, help="number of classes (default: that of the names, otherwise 2)")
    parser.add_argument(
        "--labels",
        metavar="NAME,NAME",
        type=lambda names: tuple(name.strip() for name in names.split(",")),
        help="names of the classes in the order of their indices (default: the sorted names in --data, if any)",
    )
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="skip and count unusable rows, such as empty cells"
    )
    rank = parser.add_argument("--rank", dest="r", metavar="RANK", type=int, default=8, help="LoRA rank")
    accept_old_name(parser, "--r", rank)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per step")
    parser.add_argument("--max-length-tokens", type=int, help="longer texts are truncated (default: 128)")
    parser.add_argument(
        "--base-dtype",
        choices=("float32", "bfloat16", "float16", "int8", "int4"),
        help="precision of the frozen weights; fewer bits need less memory (default: float32)",
    )
    parser.add_argument(
        "--criterion",
        choices=("lora", "apt", "magnitude", "random"),
        default="lora",
        help="criterion that ranks heads and channels; apt is recommended for language models",
    )
    parser.add_argument(
        "--scope", choices=("layer", "global"), default="layer", help="prune every layer equally, or let layers compete"
    )
    parser.add_argument("--torch-device", choices=("auto", "cpu", "cuda"), default="auto", help="device to train on")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations: less memory, about a third slower"
    )
    parser.add_argument("--log-dir", type=Path, help="folder for TensorBoard curves (extra: tensorboard)")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.data.loading import count_names
    from fedspine_edge.errors import ConfigError
    from fedspine_edge.model.checkpoint import check_target
    from fedspine_edge.model.layout import check_ratio, prunable_parameters
    from fedspine_edge.pruning.selection import PruningSettings
    from fedspine_edge.tuner import EdgeTuner, MemorySettings

    arguments.out = arguments.out.expanduser().absolute()
    check_ratio(arguments.pruning_ratio)
    for name in ("steps", "pruning_stages", "pruning_steps", "batch_size"):
        if (number := getattr(arguments, name)) < 1:
            raise ConfigError(f"`{name}` is {number}; it must be at least 1.", remedy="Leave it out for the default.")
    check_target(arguments.out)
    # Errors in the data are reported now, not after the model has been loaded and trained.
    if arguments.labels is not None:
        count_names(arguments.labels, arguments.num_labels)
    elif arguments.task != "causal_lm":
        arguments.labels = _find_labels(arguments)
    train = _read(arguments.data, arguments)
    test = _read(arguments.test, arguments) if arguments.test else []
    labels = arguments.labels or ()
    _log(f"loading {arguments.model}")
    tuner = EdgeTuner.from_pretrained(
        arguments.model,
        task=arguments.task,
        num_labels=None if arguments.task == "causal_lm" else arguments.num_labels or len(labels) or 2,
        labels=labels or None,
        r=arguments.r,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        max_length_tokens=arguments.max_length_tokens,
        pruning=PruningSettings(criterion=arguments.criterion, scope=arguments.scope),
        memory=MemorySettings(base_dtype=arguments.base_dtype, gradient_checkpointing=arguments.gradient_checkpointing),
        torch_device=arguments.torch_device,
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
        print(f"next: fedspine-edge compile {shlex.quote(str(arguments.out))}")
    return 0


def _tune(tuner: EdgeTuner, train: list[Example], test: list[Example], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, prune, train again, evaluate and save. Continues from the checkpoints in OUT.unfinished."""
    from fedspine_edge.errors import CheckpointError

    unfinished = arguments.out.with_name(f"{arguments.out.name}.unfinished")
    if unfinished.exists():
        _log(f"an earlier command was interrupted; continuing from {unfinished}")
    shown: dict[str, Any] = {"steps": arguments.steps, "log_dir": arguments.log_dir, "progress": True}
    share = arguments.steps * arguments.batch_size / len(train)
    _log(f"training {arguments.steps} steps of {arguments.batch_size} examples ({share:.2g} epochs)")
    tuner.fit(train, checkpoint=unfinished / "fit", **shown)
    if arguments.pruning_ratio > 0:
        stages, steps = arguments.pruning_stages, arguments.pruning_steps
        _log(f"pruning to {arguments.pruning_ratio:g} in {stages} stages, with {steps} training steps in between")
        tuner.prune(arguments.pruning_ratio, stages=stages, steps=steps, repair=arguments.repair, progress=True)
        _log(f"training {arguments.steps} steps to recover")
        tuner.fit(train, checkpoint=unfinished / "recovery", **shown)
    metrics = {}
    if test:
        _log(f"evaluating on {len(test):,} examples")
        metrics = tuner.evaluate(test, progress=True)
    _log("measuring latency")
    metrics["latency_ms"] = tuner.measure_latency().total_ms
    _log(f"saving {arguments.out}")
    try:
        tuner.save(arguments.out)
    except CheckpointError as error:
        after = "Then run the same command to continue."
        if "non-finite" in error.message:
            after = f"Before that, delete {unfinished}, which holds the diverged training."
        raise CheckpointError(error.message, remedy=f"{error.remedy} {after}") from error
    shutil.rmtree(unfinished, ignore_errors=True)
    return {"model": str(arguments.out), "pruning_ratio": tuner.layout.pruning_ratio, **metrics}


def _read(path: str, arguments: argparse.Namespace) -> list[Example]:
    from fedspine_edge.config import DataSettings
    from fedspine_edge.data.loading import read_examples

    data = data_settings(path, arguments)
    columns = DataSettings(path="", num_labels=arguments.num_labels or 2, labels=arguments.labels or ())
    examples = read_examples(data, columns, arguments.task, skip_bad_rows=arguments.skip_bad_rows)
    _log(f"{path} has {len(examples):,} examples")
    if arguments.task == "classification" and len({example.label for example in examples}) == 1:
        _log(f"every label is {examples[0].label}; a model trained on it will predict nothing else")
    return examples


def _log(line: str) -> None:
    print(f"tune: {line}", file=sys.stderr, flush=True)


def _find_labels(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the class names in the training data and print their indices; none if its labels are numbers."""
    from fedspine_edge.data.loading import find_labels

    names = find_labels(arguments.data, data_settings(arguments.data, arguments), arguments.task)
    if names:
        _log("labels: " + ", ".join(f"{name} = {index}" for index, name in enumerate(names)))
    return names
