"""A fleet run as rows: one device's part in one round, whatever recorded it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceRound:
    """One device's part in one round. Figures that were not measured are None."""

    server_round: int
    device_id: str
    device_class: str
    status: str
    pruning_ratio: float | None = None
    r: int | None = None
    completion_time_s: float | None = None
    time_kind: str = "measured"
    loss_before: float | None = None
    loss_after: float | None = None
    accuracy_after: float | None = None
    reward: float | None = None
    reward_terms: Mapping[str, float] | None = None
    bytes_up: int = 0
    bytes_down: int = 0


def by_round(rows: Sequence[DeviceRound]) -> dict[int, list[DeviceRound]]:
    """Rows grouped by round, in order."""
    groups: dict[int, list[DeviceRound]] = defaultdict(list)
    for row in rows:
        groups[row.server_round].append(row)
    return dict(sorted(groups.items()))


def idle_by_device(rows: Sequence[DeviceRound]) -> dict[str, float]:
    """Each device's mean share of a round spent waiting for the slowest: mean over rounds of 1 − T_i / max T."""
    shares: dict[str, list[float]] = defaultdict(list)
    for group in by_round(rows).values():
        times = {row.device_id: row.completion_time_s for row in group if row.completion_time_s}
        for device_id, time_s in times.items():
            shares[device_id].append(1 - time_s / max(times.values()))
    return {device_id: sum(s) / len(s) for device_id, s in sorted(shares.items())}


def idle_share(rows: Sequence[DeviceRound]) -> float | None:
    """Mean idle share over all devices and rounds; None without completion times."""
    times = [(row.server_round, row.completion_time_s) for row in rows if row.completion_time_s]
    slowest: dict[int, float] = defaultdict(float)
    for number, time_s in times:
        slowest[number] = max(slowest[number], time_s)
    return sum(1 - time_s / slowest[number] for number, time_s in times) / len(times) if times else None
