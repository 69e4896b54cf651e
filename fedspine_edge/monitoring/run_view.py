"""View of a fleet run, read from the server's journal. The report, the live table, `status` and the demo show it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedspine_edge.errors import ConfigError
from fedspine_edge.server.journal.schema import DeviceView
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.report_collector import escape_unprintable


@dataclass(frozen=True)
class RunView:
    """The state of a run according to its journal.

    Attributes:
        state: joining, running or finished.
        num_rounds: Number of rounds of the run; 0 before the server has started.
        rows: One row per device and round, of the newest attempt at each round.
        result: Figures of the finished run; empty before it has finished.
        widths: Widths that all devices of the last round keep, in the form that `charts.widths` takes; None if unknown.
    """

    state: str = "joining"
    num_rounds: int = 0
    rows: list[DeviceView] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    widths: dict[str, Any] | None = None


def read_run(run_dir: Path) -> RunView:
    """Read the journal of `run_dir`. Raises `ConfigError` if there is none."""
    with Journal.open_readonly(run_dir) as journal, journal.snapshot():
        return build_run_view(journal.summary(), journal.device_rounds())


def build_run_view(summary: dict[str, Any], device_rounds: Sequence[DeviceView]) -> RunView:
    """Build the view from a journal's `summary` and `device_rounds`."""
    rows = _newest_attempts([printable(row) for row in device_rounds])
    return RunView(
        state=summary["state"],
        num_rounds=summary["num_rounds"] or 0,
        rows=rows,
        result=summary["result"] or {},
        widths=_widths(rows, summary["spec"]),
    )


def printable(row: DeviceView) -> DeviceView:
    """Return `row` with control characters in its texts escaped, which devices of older versions could send."""
    reason, device_class = escape_unprintable(row.reason), escape_unprintable(row.device_class)
    if (reason, device_class) == (row.reason, row.device_class):
        return row
    return replace(row, reason=reason, device_class=device_class)


def peek_run(run_dir: Path) -> RunView:
    """Read the journal as `read_run` does, or return an empty view if the server has not created it yet."""
    try:
        return read_run(run_dir)
    except ConfigError:
        return RunView()


def by_round(rows: Sequence[DeviceView]) -> dict[int, list[DeviceView]]:
    """Return the rows grouped by round, in order of rounds."""
    groups: dict[int, list[DeviceView]] = defaultdict(list)
    for row in rows:
        groups[row.server_round].append(row)
    return dict(sorted(groups.items()))


def idle_by_device(rows: Sequence[DeviceView]) -> dict[str, float]:
    """Return each device's share of time spent waiting for the slowest one: the mean over rounds of 1 − T_i / max T."""
    shares: dict[str, list[float]] = defaultdict(list)
    for device_id, share in _idle(rows):
        shares[device_id].append(share)
    return {device_id: sum(s) / len(s) for device_id, s in sorted(shares.items())}


def idle_share(rows: Sequence[DeviceView]) -> float | None:
    """Return the mean idle share over all devices and rounds, or None without completion times."""
    shares = [share for _, share in _idle(rows)]
    return sum(shares) / len(shares) if shares else None


def _idle(rows: Sequence[DeviceView]) -> list[tuple[str, float]]:
    shares = []
    for group in by_round(rows).values():
        times = {row.device_id: row.completion_time_s for row in group if row.completion_time_s}
        shares += [(device_id, 1 - time_s / max(times.values())) for device_id, time_s in times.items()]
    return shares


def _newest_attempts(rows: Sequence[DeviceView]) -> list[DeviceView]:
    newest: dict[int, int] = {}
    for row in rows:
        newest[row.server_round] = max(row.attempt, newest.get(row.server_round, 0))
    return [row for row in rows if row.attempt == newest[row.server_round]]


def _widths(rows: Sequence[DeviceView], spec: dict[str, Any] | None) -> dict[str, Any] | None:
    kept = [row.widths for row in rows if row.widths]
    if not kept or spec is None:
        return None
    # Layouts nest under the consensus order, so the smallest counts are what all devices keep.
    last = [row.widths for row in rows if row.widths and row.server_round == rows[-1].server_round] or kept[-1:]
    layers = [tuple(min(counts) for counts in zip(*layer)) for layer in zip(*last)]
    return {
        "heads": [heads for heads, _ in layers],
        "channels": [channels for _, channels in layers],
        "full_heads": spec["num_kv_heads"],
        "full_channels": spec["intermediate_size"],
    }
