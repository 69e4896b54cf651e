"""Command `fedspine-edge explain`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedspine_edge.cli.options import add_json_option

EXAMPLE = "fedspine-edge explain runs/fleet --device orin-01 --round 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="run folder of the server, during or after the run")
    parser.add_argument("--device", required=True, help="id of the device")
    parser.add_argument("--round", type=int, default=None, help="server round (default: the latest)")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.monitoring.explain import describe, explain

    explained = explain(arguments.run_dir, arguments.device, server_round=arguments.round)
    if arguments.json:
        print_json(explained)
    else:
        print(describe(explained))
    return 0
