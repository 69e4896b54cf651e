"""Command `fedspine-edge demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedspine_edge.cli.options import accept_old_name, add_json_option

EXAMPLE = "fedspine-edge demo --num-rounds 6 --num-devices 6 --pruning-ratio 0.5 --out fedspine-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("fedspine-demo"), help="folder of the run")
    rounds = parser.add_argument(
        "--num-rounds", type=int, default=6, help="server rounds; at least 5 with the default pruning ratio"
    )
    accept_old_name(parser, "--rounds", rounds)
    devices = parser.add_argument("--num-devices", type=int, default=6, help="number of device processes")
    accept_old_name(parser, "--devices", devices)
    parser.add_argument("--pruning-ratio", type=float, default=0.5, help="share of the prunable parameters to remove")
    parser.add_argument(
        "--layout", choices=["consensus", "local"], default="consensus", help="prune in one common order, or per device"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--model", type=Path, default=None, help="base model folder (default: all-MiniLM-L6-v2)")
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        help="CSV, JSON lines or Parquet file with the columns text and label (default: sentences of four domains)",
    )
    parser.add_argument("--num-labels", type=int, default=2, help="number of classes in --data")
    parser.add_argument(
        "--no-reference", action="store_true", help="skip the unpruned fleet that is trained for comparison"
    )
    add_json_option(parser, "print one JSON object with every measured figure")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.live_table import LiveTable
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.demo.demo import DemoSettings, run_demo

    settings = DemoSettings(
        out=arguments.out,
        num_rounds=arguments.num_rounds,
        num_devices=arguments.num_devices,
        pruning_ratio=arguments.pruning_ratio,
        layout=arguments.layout,
        seed=arguments.seed,
        model=arguments.model,
        data=arguments.data,
        num_labels=arguments.num_labels,
        reference=not arguments.no_reference,
    )
    with LiveTable(quiet=arguments.json) as table:
        summary = run_demo(settings, on_progress=table.update)
    if arguments.json:
        print_json(summary)
    else:
        table.print_summary(summary)
    return 0
