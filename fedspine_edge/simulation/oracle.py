"""Oracle schedule: a bound for schedulers, computed from the cost model without running a fleet.

The oracle knows every device's exact speed, without jitter or drift. In each round the slowest device gets its fastest
arm, and every other device the arm with the longest time that does not exceed it. No other choice within the pruning
schedule has a shorter round, and none with that round time has less idle time. The oracle does not consider losses: the
small ranks that it selects for speed may cost accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedspine_edge.bandit.pruning_schedule import PruningSchedule, spread_by_speed
from fedspine_edge.config import DeviceConfig, FleetConfig
from fedspine_edge.device.cost_meter import emulated_conditions
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.simulation.cost_model import round_cost_s
from fedspine_edge.strategies.base import pruning_schedule

_STEPS = 21
"""Number of pruning ratios within the schedule's limits that are considered for each rank."""


@dataclass(frozen=True)
class OracleResult:
    """Idle share, and the sum over rounds of the longest completion time in seconds.

    The first two values are those that the oracle plans. The `noisy` values result under the jitter and drift of the
    rounds, which the oracle cannot foresee, and are what a scheduler could reach.
    """

    idle_share: float
    work_time_s: float
    noisy_idle_share: float
    noisy_work_time_s: float


def oracle(fleet: FleetConfig, devices: Sequence[DeviceConfig], spec: ModelSpec, tokens: int) -> OracleResult:
    """Return the result of the oracle's schedule for `fleet` with `devices`."""
    plan = oracle_plan(fleet, devices, spec, tokens)
    planned = [{device_id: arm.time_s for device_id, arm in arms.items()} for arms in plan]
    noisy, ratio = [], {device.device_id: 0.0 for device in devices}
    for server_round, arms in enumerate(plan, start=1):
        times = {}
        for device in devices:
            arm, before = arms[device.device_id], ratio[device.device_id]
            ratio[device.device_id] = arm.pruning_ratio
            times[device.device_id] = round_cost_s(
                device,
                fleet,
                spec,
                tokens,
                before=before,
                after=arm.pruning_ratio,
                r=arm.r,
                conditions=emulated_conditions(device, server_round),
            )
        noisy.append(times)
    return OracleResult(*_idle_and_work(planned), *_idle_and_work(noisy))


def _idle_and_work(rounds: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    longest = [max(times.values()) for times in rounds]
    idle = [1 - time_s / slowest for times, slowest in zip(rounds, longest) for time_s in times.values()]
    return sum(idle) / len(idle), sum(longest)


@dataclass(frozen=True)
class OracleArm:
    """The arm of one device in one round, and its completion time in seconds."""

    pruning_ratio: float
    r: int
    time_s: float


def oracle_plan(
    fleet: FleetConfig, devices: Sequence[DeviceConfig], spec: ModelSpec, tokens: int
) -> list[dict[str, OracleArm]]:
    """Return the arm of every device in every round.

    With `target="fleet_mean"` each device gets the final ratio that FedSpine would choose if it knew the exact speeds.
    """
    schedules = _schedules(fleet, devices, spec, tokens)
    previous = {device.device_id: 0.0 for device in devices}
    plan = []
    for server_round in range(1, fleet.num_rounds + 1):
        arms = {}
        for device in devices:
            before = previous[device.device_id]
            lo, hi = schedules[device.device_id].limits(server_round=server_round, previous=before)
            ratios = {lo + (hi - lo) * k / (_STEPS - 1) for k in range(_STEPS)}
            arms[device.device_id] = {
                (p, r): round_cost_s(device, fleet, spec, tokens, before=before, after=p, r=r)
                for p in sorted(ratios)
                for r in fleet.ranks
            }
        longest = max(min(times.values()) for times in arms.values())
        selected = {}
        for device_id, times in arms.items():
            (ratio, r), time_s = _longest_within(times, longest)
            previous[device_id] = ratio
            selected[device_id] = OracleArm(ratio, r, time_s)
        plan.append(selected)
    return plan


def _schedules(
    fleet: FleetConfig, devices: Sequence[DeviceConfig], spec: ModelSpec, tokens: int
) -> dict[str, PruningSchedule]:
    schedule = pruning_schedule(fleet, spread=True)
    if schedule.spread == 0.0:
        return {device.device_id: schedule for device in devices}
    r = fleet.ranks[(len(fleet.ranks) - 1) // 2]

    def log_time(device: DeviceConfig, ratio: float) -> float:
        return math.log(round_cost_s(device, fleet, spec, tokens, before=ratio, after=ratio, r=r))

    full = {device.device_id: log_time(device, 0.0) for device in devices}
    falls = {d.device_id: (full[d.device_id] - log_time(d, schedule.target)) / schedule.target for d in devices}
    targets = spread_by_speed(full, falls, schedule)
    return {i: replace(schedule, target=target, spread=0.0) for i, target in targets.items()}


def _longest_within(times: Mapping[tuple[float, int], float], limit: float) -> tuple[tuple[float, int], float]:
    """Return the arm with the longest time up to `limit`, or else the fastest. The largest rank breaks ties."""
    allowed = {arm: t for arm, t in times.items() if t <= limit + 1e-9}
    if not allowed:
        return min(times.items(), key=lambda item: item[1])
    return max(allowed.items(), key=lambda item: (round(item[1], 9), item[0][1], -math.fabs(item[0][0])))
