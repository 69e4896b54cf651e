#!/usr/bin/env python3
"""Strategies against the cost model alone: no server, no wire, no training; where idle time comes from, in seconds.

    benchmarks/choosing.py --out benchmarks/results/choosing.json      # some minutes on one core

Fleets are drawn at random (speeds, step overheads, links, noise), never those of `simulation/jetsons.toml`: whatever
is chosen here is chosen on other fleets than the ones that results are reported for. Losses are drawn from the record
(`recorded_losses.json`), so every figure is about time and arms, none about models. `excess` is the sum of the rounds'
longest times over that of the oracle, which knows the cost model, less 1. `say_*` is the variance of a reward term
over the devices of a round, times its squared weight.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pvariance, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedspine_edge.bandit.reward import TERMS, RewardTerms
from fedspine_edge.config import DataSettings, DeviceConfig, FleetConfig, SimulatedSettings, convert
from fedspine_edge.device.cost_meter import emulated_conditions
from fedspine_edge.simulation.cost_model import MINILM, round_cost_s
from fedspine_edge.simulation.oracle import oracle_plan
from fedspine_edge.simulation.replay import BUILT_IN, LossRecord
from fedspine_edge.strategies import DeviceInfo, RoundOutcome, create

TOKENS = 32


def random_fleet(seed: int, num_devices: int = 10) -> list[DeviceConfig]:
    """Devices of 2 to 4 classes; a class's slowest to fastest sustained rates lie up to a factor of 8 apart."""
    rng = random.Random(f"fleet/{seed}")
    classes = []
    for _ in range(rng.choice((2, 3, 4))):
        up = math.exp(rng.uniform(math.log(6), math.log(30)))
        simulated = SimulatedSettings(
            flops_per_s=math.exp(rng.uniform(math.log(50e9), math.log(400e9))),
            step_s=rng.uniform(0.015, 0.09),
            jitter=rng.choice((0.0, 0.03, 0.06)),
            link_jitter=rng.choice((0.0, 0.1, 0.25)),
            drift=rng.choice((0.0, 0.01, 0.03)),
        )
        classes.append((up, simulated))
    devices = []
    for number in range(num_devices):
        kind = rng.randrange(len(classes))
        up, simulated = classes[kind]
        devices.append(
            DeviceConfig(
                device_id=f"c{kind}-{number}",
                model="none",
                data=DataSettings(path="none.csv"),
                device_class=f"c{kind}",
                up_mbit_s=up,
                down_mbit_s=2 * up,
                time_kind="simulated",
                simulated=simulated,
                seed=seed,
            )
        )
    return devices


def time_s(device: DeviceConfig, fleet: FleetConfig, server_round: int, before: float, after: float, r: int) -> float:
    """Completion time with the round's jitter and drift."""
    found = emulated_conditions(device, server_round)
    return round_cost_s(device, fleet, MINILM, TOKENS, before=before, after=after, r=r, conditions=found)


def oracle_run(fleet: FleetConfig, devices: Sequence[DeviceConfig], *, noise: bool) -> Run:
    """The oracle's arms, with the rounds' jitter and drift, of which it knows nothing, or without."""
    run, ratio = Run([], [], []), {device.device_id: 0.0 for device in devices}
    for server_round, arms in enumerate(oracle_plan(fleet, devices, MINILM, TOKENS), start=1):
        times = {}
        for device in devices:
            arm = arms[device.device_id]
            before, ratio[device.device_id] = ratio[device.device_id], arm.pruning_ratio
            times[device.device_id] = (
                time_s(device, fleet, server_round, before, arm.pruning_ratio, arm.r) if noise else arm.time_s
            )
        run.times.append(times)
        run.arms.append({i: (None, arm.r, arm.pruning_ratio) for i, arm in arms.items()})
    return run


@dataclass
class Run:
    """What one run did, round by round."""

    times: list[dict[str, float]]
    arms: list[dict[str, tuple[float | None, int, float]]]
    """By device: u, rank, ratio."""
    terms: list[dict[str, RewardTerms | None]]

    @property
    def idle_share(self) -> float:
        return fmean(1 - t / max(round_.values()) for round_ in self.times for t in round_.values())

    @property
    def work_time_s(self) -> float:
        return sum(max(round_.values()) for round_ in self.times)


def play(fleet: FleetConfig, devices: Sequence[DeviceConfig], record: LossRecord, costs: FleetConfig) -> Run:
    """A run of `fleet`'s strategy, its rounds paid for as in a fleet with the settings `costs`."""
    strategy, run = create(fleet), Run([], [], [])
    ratio = {device.device_id: 0.0 for device in devices}
    by_id = {device.device_id: device for device in devices}
    for server_round in range(1, fleet.num_rounds + 1):
        infos = [DeviceInfo(i, d.device_class, 256, 0, ratio[i]) for i, d in sorted(by_id.items())]
        asked = strategy.assign(infos, server_round)
        outcomes, times = [], {}
        for device_id, a in asked.items():
            device = by_id[device_id]
            times[device_id] = time_s(device, costs, server_round, ratio[device_id], a.pruning_ratio, a.r)
            draw = random.Random(f"{device.seed}/{device_id}/{server_round}")
            point = record.draw((server_round - 1) / fleet.num_rounds, a.pruning_ratio, a.r, draw)
            ratio[device_id] = a.pruning_ratio
            outcomes.append(
                RoundOutcome(
                    device_id,
                    "ok",
                    times[device_id],
                    point.loss_before,
                    point.loss_after,
                    point.lora_importance,
                    a.pruning_ratio,
                )
            )
        run.terms.append(strategy.observe(outcomes, server_round))
        run.times.append(times)
        run.arms.append({i: (a.u, a.r, a.pruning_ratio) for i, a in asked.items()})
    return run


def weighted_variances(run: Run, fleet: FleetConfig) -> dict[str, float]:
    """Mean over rounds of each term's variance over the devices, times its squared weight: its say in the reward."""
    weights = {name: getattr(fleet.reward, name) for name in TERMS}
    return {
        name: fmean(pvariance([getattr(t, name) for t in terms.values() if t]) for terms in run.terms)
        * weights[name] ** 2
        for name in TERMS
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    half = 1.98 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(fmean(values), 4), "half_95": round(half, 4)}


def compare(variants: Mapping[str, Mapping[str, Any]], fleets: int, rounds: int, first: int) -> dict[str, Any]:
    record = LossRecord.load(BUILT_IN)
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in range(first, first + fleets):
        devices = random_fleet(seed)
        base = {"num_rounds": rounds, "pruning_ratio": 0.6, "seed": seed}
        fleet = convert(base, FleetConfig)
        best = oracle_run(fleet, devices, noise=False)
        runs = {"oracle": best, "oracle, jitter and drift": oracle_run(fleet, devices, noise=True)}
        configs = {name: convert({**base, **settings}, FleetConfig) for name, settings in variants.items()}
        for name, config in configs.items():
            # The blob that is sent down is as large as the largest rank, also where a variant plays smaller ones.
            runs[name] = play(config, devices, record, costs=fleet)
        for name, run in runs.items():
            figures = {
                "idle_share": run.idle_share,
                "excess": run.work_time_s / best.work_time_s - 1,
                "mean_rank": fmean(r for arms in run.arms for _, r, _ in arms.values()),
                "mean_ratio": fmean(p for arms in run.arms for _, _, p in arms.values()),
            }
            if run.terms:
                figures |= {f"say_{term}": v for term, v in weighted_variances(run, configs[name]).items()}
            for key, value in figures.items():
                rows.setdefault(name, {}).setdefault(key, []).append(value)
    return {name: {key: summary(values) for key, values in row.items()} for name, row in rows.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "fixed": {"strategy": "fixed"},
    "fedapt": {"strategy": "fedapt"},
    "uniform": {"bandit": {"arm_choice": "uniform"}},
    "uniform, reward is time": {
        "bandit": {"arm_choice": "uniform"},
        "reward": {"loss": 0.0, "time": 1.0, "lora": 0.0},
    },
    "uniform, no exploration": {"bandit": {"arm_choice": "uniform", "exploration": 0.0}},
    "uniform, one rank": {"bandit": {"arm_choice": "uniform"}, "ranks": [8]},
    "uniform, smaller leaves": {"bandit": {"arm_choice": "uniform", "min_leaf_width": 0.1}},
    "paced": {},
    "paced, slack 0.02": {"bandit": {"time_tolerance": 0.02}},
    "paced, slack 0.1": {"bandit": {"time_tolerance": 0.1}},
    "paced, slack 0.2": {"bandit": {"time_tolerance": 0.2}},
    "uniform, target mean": {"bandit": {"arm_choice": "uniform"}, "target": "mean"},
    "paced, target mean": {"target": "mean"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fleets", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first fleet")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    variants = {name: settings for name, settings in VARIANTS.items() if arguments.only in name}
    found = compare(variants, arguments.fleets, arguments.rounds, arguments.first)
    for name, row in found.items():
        shown = "  ".join(
            f"{key} {value['mean']:.3f}±{value['half_95']:.3f}" for key, value in row.items() if key[:3] != "say"
        )
        says = "  ".join(f"{key[4:]} {1e3 * value['mean']:.2f}" for key, value in row.items() if key[:3] == "say")
        print(f"{name:<30} {shown}   weighted variance ×1000: {says}")
    if arguments.out:
        settings = {"fleets": arguments.fleets, "first": arguments.first, "rounds": arguments.rounds}
        old = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        same = all(old.get(key) == value for key, value in settings.items())
        results = {**settings, "variants": {**(old["variants"] if same else {}), **found}}
        arguments.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
