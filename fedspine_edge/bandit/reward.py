"""What a device's round was worth, between 0 and 1. Source: docs/algorithms.md, "Reward"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Literal

Status = Literal["ok", "late", "out_of_memory", "failed", "lost"]
"""late: no report by the deadline. failed: the device or the server's gate said why. lost: connection or power."""

TERMS = ("loss", "time", "lora", "prune")
DEFAULT_WEIGHTS: Mapping[str, float] = {"loss": 0.3, "time": 0.5, "lora": 0.2, "prune": 0.0}

LOSS_FLOOR = 0.05
"""A round whose largest relative fall of the loss is smaller is not stretched to 1: that would amplify noise."""

REASONS = {
    "late": "no report before the deadline",
    "out_of_memory": "ran out of memory",
    "failed": "the round failed on the device",
}


@dataclass(frozen=True)
class Outcome:
    """What is known about one device at the end of a round."""

    device_id: str
    status: Status = "ok"
    completion_time_s: float = 0.0
    loss_before: float | None = None
    """Mean loss on the local held-out examples before the first step; `loss_after` after the last."""
    loss_after: float | None = None
    lora_importance: float | None = None
    pruning_ratio: float = 0.0
    previous_ratio: float = 0.0
    target: float = 0.0
    """The pruning ratio that this device is heading for."""
    reason: str = ""


@dataclass(frozen=True)
class RewardTerms:
    """The reward and what it is made of; every number is between 0 and 1."""

    loss: float = 0.0
    time: float = 0.0
    lora: float = 0.0
    prune: float = 0.0
    total: float = 0.0
    reason: str = ""
    """Why the reward is 0, for a device that did not finish; else empty."""


def rewards(
    outcomes: Sequence[Outcome],
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    *,
    mode: Literal["sum", "product"] = "sum",
    expected_s: float | None = None,
) -> dict[str, RewardTerms | None]:
    """Rewards by device id.

    A device that was late, out of memory or failed gets 0 with the reason. One that was lost gets None: a lost
    connection says nothing about the arm. Only devices that finished enter the round's means and maxima.

    Args:
        weights: Share of each term in mode `sum`; they sum to 1.
        mode: `product` is the paper's loss · lora / |T - Tbar| with the distance bounded away from 0.
        expected_s: Tbar where the round was planned to take so long; else the mean of the times.
    """
    done = [o for o in outcomes if o.status == "ok"]
    mean_time = expected_s or (fmean(o.completion_time_s for o in done) if done else 0.0)
    best_fall = max((_relative_fall(o) for o in done), default=0.0)
    best_lora = max((_known(o.lora_importance) for o in done), default=0.0)
    result: dict[str, RewardTerms | None] = {}
    for o in sorted(outcomes, key=lambda o: o.device_id):
        if o.status == "lost":
            result[o.device_id] = None
        elif o.status != "ok":
            result[o.device_id] = RewardTerms(reason=o.reason or REASONS[o.status])
        else:
            terms = {
                "loss": _relative_fall(o) / max(LOSS_FLOOR, best_fall),
                "time": _closeness(o.completion_time_s, mean_time),
                "lora": _known(o.lora_importance) / best_lora if best_lora > 0 else 0.0,
                "prune": _progress(o),
            }
            if mode == "product":
                far = abs(o.completion_time_s - mean_time) / mean_time if mean_time > 0 else 0.0
                total = terms["loss"] * terms["lora"] / (1.0 + far)
            else:
                total = math.fsum(weights.get(name, 0.0) * terms[name] for name in TERMS)
            result[o.device_id] = RewardTerms(total=min(1.0, max(0.0, total)), reason="", **terms)
    return result


def variances(terms: Mapping[str, RewardTerms | None]) -> dict[str, float]:
    """Variance over the round's finished devices of each term and of the total.

    A term whose weighted variance is far above the others' decides alone what the bandit learns.
    """
    done = [t for t in terms.values() if t is not None and not t.reason]
    return {name: pvariance(getattr(t, name) for t in done) if done else 0.0 for name in (*TERMS, "total")}


def _known(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) and value > 0 else 0.0


def _relative_fall(o: Outcome) -> float:
    before = _known(o.loss_before)
    if before == 0.0 or o.loss_after is None or not math.isfinite(o.loss_after):
        return 0.0
    return min(1.0, max(0.0, (before - o.loss_after) / before))


def _closeness(time_s: float, mean_s: float) -> float:
    longest = max(time_s, mean_s)
    return 1.0 - abs(time_s - mean_s) / longest if longest > 0 else 1.0


def _progress(o: Outcome) -> float:
    to_go = o.target - o.previous_ratio
    if to_go <= 1e-9:
        return 1.0
    return min(1.0, max(0.0, (o.pruning_ratio - o.previous_ratio) / to_go))
