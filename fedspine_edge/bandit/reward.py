"""Outcome of a device's round and its reward between 0 and 1. Source: docs/concepts/s-ucb.md, "Reward"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

Status = Literal["ok", "late", "out_of_memory", "failed", "refused", "lost"]
"""late: no report by the deadline. failed: reported by the device. refused: the update failed the server's validation.
lost: the device lost its connection or power."""

TERMS = ("loss", "time", "lora", "prune")
DEFAULT_WEIGHTS: Mapping[str, float] = {"loss": 0.3, "time": 0.5, "lora": 0.2, "prune": 0.0}

LOSS_FLOOR = 0.05
"""Smallest decrease of the loss that the best device is normalized by: scaling up less would amplify noise."""

REASONS = {
    "late": "no report before the deadline",
    "out_of_memory": "ran out of memory",
    "failed": "the round failed on the device",
    "refused": "the update was refused",
}
"""Reasons of a reward of 0, where the outcome has none."""


@dataclass(frozen=True)
class RoundOutcome:
    """The outcome of one device's assignment at the end of a round.

    Attributes:
        device_id: The device.
        status: How the round ended.
        completion_time_s: Time of the round, in seconds.
        loss_before: Mean loss on the local held-out examples before the first step.
        loss_after: Mean loss on the same examples after the last step.
        lora_importance: I(B_total), as reported.
        pruning_ratio: Share of prunable parameters that the device has removed now.
        previous_ratio: That share before the round; filled in by the strategy.
        target: Pruning ratio that the device is to reach; filled in by the strategy.
        reason: Why the status is not ok, or a remark of the device.
    """

    device_id: str
    status: Status = "ok"
    completion_time_s: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None
    lora_importance: float | None = None
    pruning_ratio: float = 0.0
    previous_ratio: float = 0.0
    target: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class RewardTerms:
    """A reward and its terms; every number is between 0 and 1."""

    loss: float = 0.0
    time: float = 0.0
    lora: float = 0.0
    prune: float = 0.0
    total: float = 0.0
    reason: str = ""
    """Why the reward is 0, for a device that did not finish; otherwise empty."""


def rewards(
    outcomes: Sequence[RoundOutcome],
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    *,
    mode: Literal["sum", "product"] = "sum",
    expected_s: float | None = None,
) -> dict[str, RewardTerms | None]:
    """Return the reward of each device, by device id.

    A device that was late, ran out of memory, failed or was refused gets 0 with the reason. A device that was lost gets
    None: a lost connection carries no information about the arm. Only devices that finished enter the round's means and
    maxima.

    Args:
        outcomes: The outcomes of one round.
        weights: Share of each term in mode `sum`; they sum to 1.
        mode: `product` is the paper's loss · lora / |T - Tbar| with the distance bounded away from 0.
        expected_s: Tbar, the time in seconds that the round was planned to take; None for the mean of the times.
    """
    done = [o for o in outcomes if o.status == "ok"]
    mean_time = expected_s or (fmean(o.completion_time_s for o in done) if done else 0.0)
    best_decrease = max((_relative_decrease(o) for o in done), default=0.0)
    best_lora = max((_known(o.lora_importance) for o in done), default=0.0)
    result: dict[str, RewardTerms | None] = {}
    for o in sorted(outcomes, key=lambda o: o.device_id):
        if o.status == "lost":
            result[o.device_id] = None
        elif o.status != "ok":
            result[o.device_id] = RewardTerms(reason=o.reason or REASONS[o.status])
        else:
            terms = {
                "loss": _relative_decrease(o) / max(LOSS_FLOOR, best_decrease),
                "time": _closeness(o.completion_time_s, mean_time),
                "lora": _known(o.lora_importance) / best_lora if best_lora > 0 else 0.0,
                "prune": _progress(o),
            }
            if mode == "product":
                distance = abs(o.completion_time_s - mean_time) / mean_time if mean_time > 0 else 0.0
                total = terms["loss"] * terms["lora"] / (1.0 + distance)
            else:
                total = math.fsum(weights.get(name, 0.0) * terms[name] for name in TERMS)
            result[o.device_id] = RewardTerms(total=min(1.0, max(0.0, total)), reason="", **terms)
    return result


def _known(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) and value > 0 else 0.0


def _relative_decrease(o: RoundOutcome) -> float:
    before = _known(o.loss_before)
    if before == 0.0 or o.loss_after is None or not math.isfinite(o.loss_after):
        return 0.0
    return min(1.0, max(0.0, (before - o.loss_after) / before))


def _closeness(time_s: float, mean_s: float) -> float:
    longest = max(time_s, mean_s)
    return 1.0 - abs(time_s - mean_s) / longest if longest > 0 else 1.0


def _progress(o: RoundOutcome) -> float:
    remaining = o.target - o.previous_ratio
    if remaining <= 1e-9:
        return 1.0
    return min(1.0, max(0.0, (o.pruning_ratio - o.previous_ratio) / remaining))
