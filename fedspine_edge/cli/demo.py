"""`fedspine-edge demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "fedspine-edge demo --rounds 6 --devices 6 --pruning-ratio 0.5 --out fedspine-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("fedspine-demo"), help="folder of the run; default fedspine-demo"
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="server rounds, at least 5 with the default ratio; default 6"
    )
    parser.add_argument("--devices", type=int, default=6, help="device processes; default 6")
    parser.add_argument(
        "--pruning-ratio", type=float, default=0.5, help="share of prunable parameters to remove; default 0.5"
    )
    parser.add_argument("--layout", choices=["consensus", "local"], default="consensus", help="default consensus")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--model", type=Path, default=None, help="base model folder; default: all-MiniLM-L6-v2's package"
    )
    parser.add_argument(
        "--data", type=Path, default=None, help="your CSV, JSON lines or Parquet file with text and label"
    )
    parser.add_argument("--num-labels", type=int, default=2, help="classes in --data; default 2")
    parser.add_argument(
        "--no-reference", action="store_true", help="skip the unpruned fleet that is trained for comparison"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with every measured figure")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.live_table import LiveTable
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.demo.demo import DemoSettings, run_demo

    settings = DemoSettings(
        out=arguments.out,
        num_rounds=arguments.rounds,
        num_devices=arguments.devices,
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
