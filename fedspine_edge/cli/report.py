"""`fedspine-edge report`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "fedspine-edge report runs/fleet --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="the server's run folder")
    parser.add_argument("--out", type=Path, default=None, help="HTML file (default: RUN_DIR/report.html)")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.simulation.report import write_report
    from fedspine_edge.simulation.runview import read_run

    view = read_run(arguments.run_dir)
    out = arguments.out or arguments.run_dir / "report.html"
    print(
        write_report(
            out, title=f"Fleet run {arguments.run_dir.name}", rows=view.rows, summary=view.result, widths=view.widths
        )
    )
    return 0
