"""Command `fedspine-edge report`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """fedspine-edge report runs/fleet --out report.html
  fedspine-edge report runs/fleet --csv rounds.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="run folder of the server")
    parser.add_argument("--out", type=Path, default=None, help="HTML file to write (default: RUN_DIR/report.html)")
    parser.add_argument(
        "--csv",
        type=Path,
        default=None,
        help="write one row per device and round to this CSV file; no HTML report without --out",
    )


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.monitoring.report import write_report
    from fedspine_edge.monitoring.run_view import read_run

    view = read_run(arguments.run_dir)
    if arguments.csv is not None:
        from fedspine_edge.monitoring.csv_export import COLUMNS, flatten, write_csv

        print(write_csv(arguments.csv, list(COLUMNS), flatten(view.rows)))
        if arguments.out is None:
            return 0
    out = arguments.out or arguments.run_dir / "report.html"
    print(
        write_report(
            out, title=f"Fleet run {arguments.run_dir.name}", rows=view.rows, summary=view.result, widths=view.widths
        )
    )
    return 0
