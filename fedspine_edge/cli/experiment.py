"""Command `fedspine-edge experiment`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedspine_edge.cli.options import accept_old_name, add_json_option

EXAMPLE = """fedspine-edge experiment heterogeneity --quick
  fedspine-edge experiment mine.toml --workers 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", help="name of a built-in experiment, or .toml file of your own; lists all names if omitted"
    )
    parser.add_argument("--quick", action="store_true", help="run the short version (minutes instead of hours)")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder to write to (default: runs/experiments/NAME-FORM)"
    )
    parser.add_argument("--workers", type=int, default=1, help="number of processes, one core each")
    executor = parser.add_argument(
        "--executor",
        choices=["processes", "ray"],
        default="processes",
        help="where jobs run; ray: on the cluster at RAY_ADDRESS or a local one (extra: ray)",
    )
    accept_old_name(parser, "--engine", executor)
    add_json_option(parser, "print the summary as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.simulation.experiments.experiment import load_experiment, names, run_experiment
    from fedspine_edge.simulation.experiments.experiment_page import format_interval, write_page

    if arguments.name is None:
        for name in names():
            print(f"{name:<18} {load_experiment(name, quick=True).title}")
        return 0
    experiment = load_experiment(arguments.name, quick=arguments.quick)
    out = arguments.out or Path("runs/experiments") / f"{experiment.name}-{experiment.form}"

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    summary = run_experiment(
        experiment, out.resolve(), workers=arguments.workers, engine=arguments.executor, on_progress=log
    )
    page = write_page(summary, out / "index.html")
    if arguments.json:
        print_json({**summary, "page": str(page)})
        return 0
    for variant, row in summary["variants"].items():
        print(f"{variant}: " + ", ".join(f"{name} {format_interval(row[name])}" for name in summary["measures"]))
    print(f"page: {page}")
    return 0
