"""Command `fedspine-edge assemble`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedspine_edge.cli.options import add_json_option

EXAMPLE = "fedspine-edge assemble runs/fleet --model path/to/base --out model/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="run folder of the server")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model that the fleet trained")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the finished model to")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.export.fleet_model import build_finished_model

    finished = build_finished_model(arguments.run_dir, arguments.model, arguments.out)
    figures = {
        "model": str(finished.folder),
        "parameters": finished.num_parameters,
        "pruning_ratio": finished.layout.pruning_ratio,
        "sparsity": finished.layout.sparsity,
    }
    if arguments.json:
        print_json(figures)
    else:
        print(f"{finished.folder}: {finished.num_parameters:,} parameters, {finished.layout.sparsity:.1%} removed")
        print(f"next: fedspine-edge compile {finished.folder}")
    return 0
