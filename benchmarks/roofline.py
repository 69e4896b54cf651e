"""Roofline plot of importance_accumulate, with the limits that the machine reached in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> bool:
    """Write a PNG. Returns False if matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    limits = report["limits"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    intensities = [0.25 * 2**i for i in range(10)]
    axes.loglog(intensities, [min(limits["gemm_gflops"], i * limits["copy_gb_s"]) for i in intensities], "k-")
    axes.annotate("GEMM and copy of torch in this run", (intensities[0], limits["gemm_gflops"]), fontsize=8)
    rows = [row for row in report["results"] if row["op"] == "importance_accumulate"]
    marks = {("fedspine", "rows"): "o", ("fedspine", "columns"): "s", ("eager torch", "rows"): "x"}
    for (candidate, groups), mark in marks.items():
        chosen = [row for row in rows if row["groups"] == groups]
        # The necessary work and memory traffic, the same for both: 6 r FLOPs and one read of W per element.
        size = [2 if "16" in row["dtype"] else 4 for row in chosen]
        x = [6 * row["r"] / item for row, item in zip(chosen, size)]
        y = [6e-6 * row["r"] * elements(row) / row["median_ms"][candidate] for row in chosen]
        axes.loglog(x, y, mark, label=f"{candidate}, {groups}", alpha=0.7)
    axes.set_xlabel("necessary FLOPs per byte of W")
    axes.set_ylabel("necessary GFLOP/s")
    axes.set_title(f"importance_accumulate, {report['machine']['gpu'] or report['machine']['cpu']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def elements(row: dict[str, Any]) -> int:
    """Return out * in from the name of a case such as "MiniLM q 384x384"."""
    rows, cols = row["case"].rsplit(" ", 1)[-1].split("x")
    return int(rows) * int(cols)
