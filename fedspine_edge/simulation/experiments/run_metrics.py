"""Metrics of one simulated run, read from its journal, and their definitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from fedspine_edge.monitoring.run_view import by_round, idle_share, read_run
from fedspine_edge.server.journal.writer import Journal

CURVE: Mapping[str, str] = {
    "round": "round, counted from 1",
    "time_s": "simulated time in seconds from the start of the first round to the end of this one",
    "loss": "mean over devices of the held-out loss after the round",
    "accuracy": "mean over devices of the held-out accuracy after the round",
    "ratio": "mean pruning ratio in the plans",
    "reward": "mean reward",
    "idle_share": "mean over devices of 1 − T_i / max T",
}
"""Figures of a round and their meaning."""


def measure(run_dir: Path) -> dict[str, Any]:
    """Return the metrics of a finished run. Times are in simulated seconds.

    - total_time_s: time from the start of the first round to the end of the last one, waiting included.
    - work_time_s: Σ over rounds of the slowest device's completion time.
    - idle_share: mean over devices and rounds of 1 − T_i / max T.
    - spread: mean over rounds of (max T − min T) / mean T.
    - mean_ratio: mean over devices of the pruning ratio after the last round; max_ratio, min_ratio.
    - curve: one dict per round with the keys of `CURVE`.
    - bytes_up, bytes_down: bytes counted by the devices.
    """
    view = read_run(run_dir)
    with Journal.open_readonly(run_dir) as journal:
        rounds = [r for r in journal.rounds() if r.state == "done"]
        started_s = journal.rounds()[0].started_wall_s
    groups = by_round([row for row in view.rows if row.completion_time_s])
    times = {number: [row.completion_time_s or 0.0 for row in rows] for number, rows in groups.items()}
    curve: list[dict[str, Any]] = []
    for round_view in rounds:
        rows = groups.get(round_view.server_round, [])
        curve.append(
            {
                "round": round_view.server_round,
                "time_s": round((round_view.ended_wall_s or 0.0) - started_s, 3),
                "loss": _rounded(round_view.mean_loss),
                "accuracy": _rounded(round_view.mean_accuracy),
                "ratio": _rounded(fmean(row.pruning_ratio for row in rows) if rows else None),
                "reward": _rounded(_mean([row.reward for row in rows])),
                "idle_share": _rounded(idle_share(rows)),
            }
        )
    last = [row.pruning_ratio for row in groups[max(groups)]]
    return {
        "total_time_s": curve[-1]["time_s"],
        "work_time_s": round(sum(max(t) for t in times.values()), 3),
        "idle_share": _rounded(idle_share(view.rows)),
        "spread": _rounded(fmean((max(t) - min(t)) / fmean(t) for t in times.values())),
        "mean_ratio": _rounded(fmean(last)),
        "min_ratio": min(last),
        "max_ratio": max(last),
        "mean_reward": _rounded(_mean([row.reward for row in view.rows])),
        "bytes_up": sum(row.bytes_up for row in view.rows),
        "bytes_down": sum(row.bytes_down for row in view.rows),
        "num_devices": len({row.device_id for row in view.rows}),
        "not_ok": sum(row.status != "ok" for row in view.rows),
        "training": "recorded" if any(row.reason.startswith("training replaced") for row in view.rows) else "real",
        "curve": curve,
    }


def time_to(curve: list[dict[str, Any]], accuracy: float) -> float | None:
    """Return the simulated time after the first round whose mean held-out accuracy is at least `accuracy`."""
    return next((c["time_s"] for c in curve if c["accuracy"] is not None and c["accuracy"] >= accuracy), None)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
