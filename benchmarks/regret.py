#!/usr/bin/env python3
"""Regret of S-UCB against uniform play and plain UCB1 on a grid, on synthetic rewards; standard library only.

    benchmarks/regret.py --out benchmarks/results/regret.json     # about a minute

Reward of an arm: 0.9 − 0.6 |u − u*| − 0.12 |rank steps from r*| + noise 0.05, held within 0..1; the peak is a random
arm; `drift` moves the peak to another random arm half-way. Regret is the mean distance from the best arm's reward up
to each pull. UCB1's grid is 4 places of u × 4 ranks, its exploration tuned to its best of four values for each case,
S-UCB's at its defaults.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedspine_edge.bandit.sucb import SUCB, Arm

RANKS = (4, 8, 16, 32)
CHECKPOINTS = (6, 10, 20, 40, 100, 200)
Player = Callable[[int], tuple[Callable[[int], Arm], Callable[[int, Arm, float], None]]]


def landscape(seed: int, pulls: int, drift: bool) -> Callable[[int, Arm], float]:
    """Mean reward of an arm at a pull."""
    rng = random.Random(f"landscape/{seed}")
    peaks = [(rng.random(), rng.randrange(len(RANKS))) for _ in range(2)]

    def mean(pull: int, arm: Arm) -> float:
        u, cell = peaks[int(drift and pull > pulls // 2)]
        return max(0.0, 0.9 - 0.6 * abs(arm.u - u) - 0.12 * abs(RANKS.index(arm.r) - cell))

    return mean


def sucb(discount: float) -> Player:
    def make(seed: int) -> Any:
        bandit = SUCB(RANKS, seed=seed, discount=discount)
        return (
            lambda now: bandit.decide("d", now=now),
            lambda now, arm, reward: bandit.update("d", arm, reward, now=now),
        )

    return make


def uniform(seed: int) -> Any:
    rng = random.Random(f"uniform/{seed}")
    return (lambda now: Arm(rng.random(), rng.choice(RANKS)), lambda now, arm, reward: None)


def ucb1(width: float) -> Player:
    def make(seed: int) -> Any:
        rng = random.Random(f"ucb/{seed}")
        arms = [Arm((k + 0.5) / 4, r) for k in range(4) for r in RANKS]
        rng.shuffle(arms)
        sums, counts = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0)

        def decide(now: int) -> Arm:
            fresh = [arm for arm in arms if counts[arm] == 0]
            if fresh:
                return fresh[0]
            return max(arms, key=lambda a: sums[a] / counts[a] + width * math.sqrt(2 * math.log(now) / counts[a]))

        def learn(now: int, arm: Arm, reward: float) -> None:
            sums[arm] += reward
            counts[arm] += 1

        return decide, learn

    return make


def regrets(player: Player, seed: int, pulls: int, drift: bool) -> list[float]:
    """Mean regret up to each checkpoint."""
    mean, rng = landscape(seed, pulls, drift), random.Random(f"noise/{seed}")
    decide, learn = player(seed)
    lost, found = 0.0, []
    for now in range(1, pulls + 1):
        arm = decide(now)
        value = mean(now, arm)
        learn(now, arm, min(1.0, max(0.0, value + rng.gauss(0.0, 0.05))))
        lost += 0.9 - value
        if now in CHECKPOINTS:
            found.append(lost / now)
    return found


def curve(player: Player, seeds: int, pulls: int, drift: bool) -> dict[str, list[float]]:
    runs = [regrets(player, seed, pulls, drift) for seed in range(seeds)]
    return {
        "mean": [round(fmean(values), 4) for values in zip(*runs)],
        "half_95": [round(1.98 * stdev(values) / math.sqrt(seeds), 4) for values in zip(*runs)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"checkpoints": CHECKPOINTS, "seeds": arguments.seeds}
    pulls = CHECKPOINTS[-1]
    for drift in (False, True):
        widths = {w: curve(ucb1(w), arguments.seeds, pulls, drift) for w in (0.02, 0.05, 0.1, 0.2)}
        best = min(widths, key=lambda w: widths[w]["mean"][-1])
        results["drift" if drift else "constant"] = {
            "sucb": curve(sucb(0.95), arguments.seeds, pulls, drift),
            "sucb, λ 0.99": curve(sucb(0.99), arguments.seeds, pulls, drift),
            "sucb, not discounted": curve(sucb(1.0), arguments.seeds, pulls, drift),
            "uniform": curve(uniform, arguments.seeds, pulls, drift),
            f"ucb1 on a grid, width {best}": widths[best],
        }
    for name, players in results.items():
        if isinstance(players, dict):
            for player, found in players.items():
                print(f"{name:<9} {player:<28} {found['mean']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
