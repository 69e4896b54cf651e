"""A fleet run for people: rows from the server's journal, for the report, the live table, `status` and the demo."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspine_edge.errors import ConfigError
from fedspine_edge.server.journal.schema import DeviceView
from fedspine_edge.server.journal.writer import Journal


@dataclass(frozen=True)
class RunView:
    """What a journal says of a run so far.

    Attributes:
        state: joining, running or finished.
        num_rounds: Rounds asked for; 0 before the server has started.
        rows: Every device's part in every round, the newest attempt of each.
        result: Figures of the finished run; empty before.
        widths: What the last round's devices keep in common, as `charts.widths` takes it; None if nothing is known.
    """

    state: str = "joining"
    num_rounds: int = 0
    rows: list[DeviceView] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    widths: dict[str, Any] | None = None


def read_run(run_dir: Path) -> RunView:
    """Read the journal of `run_dir`. Raises `ConfigError` when there is none."""
    with Journal.open_readonly(run_dir) as journal, journal.snapshot():
        return view_of(journal.summary(), journal.device_rounds())


def view_of(summary: dict[str, Any], parts: Sequence[DeviceView]) -> RunView:
    """The view of what a journal's `summary` and `device_rounds` say."""
    rows = _newest_attempts(parts)
    return RunView(
        state=summary["state"],
        num_rounds=summary["num_rounds"] or 0,
        rows=rows,
        result=summary["result"] or {},
        widths=_widths(rows, summary["spec"]),
    )


def peek_run(run_dir: Path) -> RunView:
    """Like `read_run`, but an empty view while the server has not made its journal yet."""
    try:
        return read_run(run_dir)
    except ConfigError:
        return RunView()


def by_round(rows: Sequence[DeviceView]) -> dict[int, list[DeviceView]]:
    """Rows grouped by round, in order."""
    groups: dict[int, list[DeviceView]] = defaultdict(list)
    for row in rows:
        groups[row.server_round].append(row)
    return dict(sorted(groups.items()))


def idle_by_device(rows: Sequence[DeviceView]) -> dict[str, float]:
    """Each device's mean share of a round spent waiting for the slowest: mean over rounds of 1 − T_i / max T."""
    shares: dict[str, list[float]] = defaultdict(list)
    for device_id, share in _idle(rows):
        shares[device_id].append(share)
    return {device_id: sum(s) / len(s) for device_id, s in sorted(shares.items())}


def idle_share(rows: Sequence[DeviceView]) -> float | None:
    """Mean idle share over all devices and rounds; None without completion times."""
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
    # with the consensus order layouts nest, so the smallest counts are what the devices have in common
    last = [row.widths for row in rows if row.widths and row.server_round == rows[-1].server_round] or kept[-1:]
    layers = [tuple(min(counts) for counts in zip(*layer)) for layer in zip(*last)]
    return {
        "heads": [heads for heads, _ in layers],
        "channels": [channels for _, channels in layers],
        "full_heads": spec["num_kv_heads"],
        "full_channels": spec["intermediate_size"],
    }
