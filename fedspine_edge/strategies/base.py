"""What a strategy is told, what it answers, and the parts that all of them share.

A strategy does no I/O. The server asks `assign` once a round, tells it the results with `observe`, and journals
`to_dict` after either. Both are functions of the state and their arguments: a server that was killed loads the
newest state, asks again and gets the same answer. Source: docs/algorithms.md, "Strategies".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedspine_edge.bandit.pruning_schedule import MEAN_SPREAD, PruningSchedule, rounds_needed
from fedspine_edge.bandit.reward import TERMS, Outcome, RewardTerms, Status, rewards
from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError


@dataclass(frozen=True)
class DeviceInfo:
    """A device as the server knows it before a round."""

    device_id: str
    device_class: str = "unknown"
    num_examples: int = 0
    memory_bytes: int = 0
    """Memory the device is willing to train in; 0 means not stated."""
    pruning_ratio: float = 0.0
    """What the device has removed so far."""
    memory_by_rank: Mapping[int, int] | None = None
    """Estimated peak of a round in bytes at each rank, at the ratio so far (the peak lies before the pruning);
    ranks above `memory_bytes` are not played. None: no estimate, everything may be tried."""


@dataclass(frozen=True)
class Assignment:
    """What one device is to do in one round."""

    pruning_ratio: float
    r: int
    tau: int
    """Scored iterations before pruning; `recovery_steps` follow it."""
    recovery_steps: int
    u: float | None = None
    """The arm's place in the envelope; None where no bandit chose."""


@dataclass(frozen=True)
class RoundOutcome:
    """What became of an assignment."""

    device_id: str
    status: Status = "ok"
    completion_time_s: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None
    lora_importance: float | None = None
    pruning_ratio: float = 0.0
    """Share of prunable parameters that the device has removed now."""
    reason: str = ""


@runtime_checkable
class Strategy(Protocol):
    """Decides what each device does in each round."""

    aggregation: str
    """Name of the aggregation rule that goes with it."""

    def assign(self, devices: Sequence[DeviceInfo], server_round: int) -> dict[str, Assignment]:
        """Assignments by device id for `server_round` (from 1)."""
        ...

    def observe(self, outcomes: Sequence[RoundOutcome], server_round: int) -> dict[str, RewardTerms | None]:
        """Learn from a round; None for a device that says nothing about its assignment (lost, or not asked)."""
        ...

    def explain(self, device_id: str) -> dict[str, Any]:
        """Why the device got its newest assignment, as plain JSON data."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The whole state, as plain JSON data."""
        ...

    def load_dict(self, data: Mapping[str, Any]) -> None:
        """Continue from what `to_dict` returned. Raises `ConfigError` for another strategy's state."""
        ...


@dataclass(frozen=True)
class Choice:
    """A subclass's decision for one device: the part of an `Assignment` that strategies differ in."""

    pruning_ratio: float
    r: int
    u: float | None = None
    steps: tuple[int, int] | None = None
    """(tau, recovery_steps) where they are not the configured ones."""


class BaseStrategy:
    """Bookkeeping shared by the built-in strategies; a subclass supplies `choose`, and perhaps `reward` and `learn`.

    Args:
        config: Settings of the fleet.

    Raises:
        ConfigError: the pruning ratio cannot be reached within the rounds.
    """

    name = ""
    aggregation: str

    def __init__(self, config: FleetConfig) -> None:
        self.config = config
        self.aggregation = config.aggregation.rule
        self._asked: dict[str, dict[str, Any]] = {}
        """By device: round, u, r, pruning_ratio and previous ratio of the assignment not yet observed."""
        self._done: dict[str, tuple[float, float]] = {}
        """By device: (asked, achieved) ratio of its newest finished round."""
        self._too_big: dict[str, tuple[int, float]] = {}
        """By device: the rank that ran out of memory, and the ratio at which it did."""

    # -- for subclasses ---------------------------------------------------------------------------------------

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Choice:
        """What `device`, which has removed `previous`, does in `server_round`; others are looked at in `prepare`."""
        raise NotImplementedError

    def prepare(self, devices: Mapping[str, DeviceInfo], previous: Mapping[str, float], server_round: int) -> None:
        """A first look at all devices of the round together, before `choose` is asked for each."""

    def settle(self, choices: dict[str, Choice], previous: Mapping[str, float], server_round: int) -> dict[str, Choice]:
        """A last look at all choices of the round together."""
        return choices

    def expected_s(self) -> float | None:
        """What completion times are compared to in the reward; None for the mean of the round's reports."""
        return None

    def target_of(self, device_id: str) -> float:
        """The pruning ratio that the device ends at."""
        return self.config.pruning_ratio

    def reward(self, outcomes: Sequence[Outcome]) -> dict[str, RewardTerms | None]:
        """What a round was worth to each device, in [0, 1]; None for one that says nothing of its assignment.

        By default docs/algorithms.md, "Reward", with the configured weights.
        """
        weights = {name: getattr(self.config.reward, name) for name in TERMS}
        return rewards(outcomes, weights, mode=self.config.reward.mode, expected_s=self.expected_s())

    def learn(self, terms: Mapping[str, RewardTerms | None], server_round: int) -> None:
        """What to do with rewards; by default nothing."""

    # -- Strategy ---------------------------------------------------------------------------------------------

    def assign(self, devices: Sequence[DeviceInfo], server_round: int) -> dict[str, Assignment]:
        by_id = {device.device_id: device for device in sorted(devices, key=lambda d: d.device_id)}
        previous = {device_id: self._previous(device) for device_id, device in by_id.items()}
        self.prepare(by_id, previous, server_round)
        choices = {i: self.choose(device, server_round, previous[i]) for i, device in by_id.items()}
        assignments: dict[str, Assignment] = {}
        for device_id, choice in self.settle(choices, previous, server_round).items():
            tau, recovery = choice.steps or (self.config.training.tau, self.config.training.recovery_steps)
            assignments[device_id] = Assignment(choice.pruning_ratio, choice.r, tau, recovery, choice.u)
            self._asked[device_id] = {
                "round": server_round,
                "u": choice.u,
                "r": choice.r,
                "pruning_ratio": choice.pruning_ratio,
                "previous": previous[device_id],
            }
        return assignments

    def observe(self, outcomes: Sequence[RoundOutcome], server_round: int) -> dict[str, RewardTerms | None]:
        answered = [o for o in outcomes if self._asked.get(o.device_id, {}).get("round") == server_round]
        terms = self.reward([self._outcome(o) for o in answered])
        self.learn(terms, server_round)
        for o in answered:
            asked = self._asked.pop(o.device_id)
            if o.status == "ok":
                self._done[o.device_id] = (asked["pruning_ratio"], o.pruning_ratio)
            elif o.status == "out_of_memory":
                self._too_big[o.device_id] = (asked["r"], asked["previous"])
        return {o.device_id: terms.get(o.device_id) for o in sorted(outcomes, key=lambda o: o.device_id)}

    def explain(self, device_id: str) -> dict[str, Any]:
        return {"device_id": device_id, "strategy": self.name, "asked": self._asked.get(device_id)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "strategy": self.name,
            "asked": {i: dict(a) for i, a in self._asked.items()},
            "done": {i: list(d) for i, d in self._done.items()},
            "too_big": {i: list(b) for i, b in self._too_big.items()},
        }

    def load_dict(self, data: Mapping[str, Any]) -> None:
        if data.get("strategy") != self.name:
            raise ConfigError(
                f"the saved run used strategy {data.get('strategy')!r}, the settings say {self.name!r}.",
                remedy="Continue with the strategy it began with, or start a new run in another run_dir.",
            )
        self._asked = {i: dict(a) for i, a in data["asked"].items()}
        self._done = {i: (d[0], d[1]) for i, d in data["done"].items()}
        self._too_big = {i: (b[0], b[1]) for i, b in data["too_big"].items()}

    # -- shared parts -----------------------------------------------------------------------------------------

    def ranks_that_fit(self, device: DeviceInfo, previous: float) -> list[int]:
        """Ranks within the device's memory, by its estimate and by what already failed; at least the smallest."""
        fitting = list(self.config.ranks)
        if device.memory_bytes and device.memory_by_rank:
            fitting = [r for r in fitting if device.memory_by_rank.get(r, 0) <= device.memory_bytes]
        failed_r, failed_at = self._too_big.get(device.device_id, (0, -1.0))
        if previous <= failed_at:  # a model pruned further may fit after all
            fitting = [r for r in fitting if r < failed_r]
        return fitting or [self.config.ranks[0]]

    def largest_fitting(self, wanted: int, device: DeviceInfo, previous: float) -> int:
        """`wanted`, or the largest smaller rank that fits the device."""
        fitting = self.ranks_that_fit(device, previous)
        return max((r for r in fitting if r <= wanted), default=fitting[0])

    def middle_rank(self) -> int:
        """The rank of strategies that use one for all; the lower one of an even number of ranks."""
        return self.config.ranks[(len(self.config.ranks) - 1) // 2]

    def _previous(self, device: DeviceInfo) -> float:
        """The ratio to go on from.

        The one that was asked for, not the one that whole groups allowed: else rounding would eat into `max_step`.
        A device that has lost what it removed (a new disk) starts from what it has.
        """
        asked, achieved = self._done.get(device.device_id, (0.0, 0.0))
        return max(asked, device.pruning_ratio) if device.pruning_ratio >= achieved - 1e-6 else device.pruning_ratio

    def _outcome(self, o: RoundOutcome) -> Outcome:
        return Outcome(
            device_id=o.device_id,
            status=o.status,
            completion_time_s=o.completion_time_s,
            loss_before=o.loss_before,
            loss_after=o.loss_after,
            lora_importance=o.lora_importance,
            pruning_ratio=o.pruning_ratio,
            previous_ratio=self._asked[o.device_id]["previous"],
            target=self.target_of(o.device_id),
            reason=o.reason,
        )


def envelope(config: FleetConfig, *, spread: bool = False) -> PruningSchedule:
    """The pruning schedule of a run; with the consensus layout round 1 scores and prunes nothing.

    Raises `ConfigError` when the pruning ratio cannot be reached, with the number of rounds it takes.
    """
    last, start = config.num_rounds - 2, int(config.layout == "consensus")
    needed = rounds_needed(config.pruning_ratio, config.bandit.max_step)
    if needed > last - start:
        raise ConfigError(
            f"pruning_ratio {config.pruning_ratio} cannot be reached in num_rounds = {config.num_rounds} with "
            f"bandit.max_step = {config.bandit.max_step}: {_schedule_text(start)}.",
            remedy=_schedule_remedy(config, needed + start + 2, last - start),
        )
    return PruningSchedule(
        target=config.pruning_ratio,
        last_pruning_round=last,
        max_step=config.bandit.max_step,
        start=start,
        spread=MEAN_SPREAD if spread and config.target == "fleet_mean" else 0.0,
    )


def _schedule_remedy(config: FleetConfig, enough: int, pruning_rounds: int) -> str:
    if pruning_rounds < 1:
        return f"Use num_rounds >= {enough}."
    step = math.ceil(100 * config.pruning_ratio / pruning_rounds) / 100
    within = f"bandit.max_step >= {step:g} or pruning_ratio <= {config.bandit.max_step * pruning_rounds:g}"
    return f"Use num_rounds >= {enough}, {within}."


def _schedule_text(start: int) -> str:
    return "the first round only scores and the last two only tune" if start else "the last two rounds only tune"


def missing_methods(candidate: object) -> Iterable[str]:
    """Names that `candidate` lacks to be a `Strategy`."""
    return [
        n for n in ("aggregation", "assign", "observe", "explain", "to_dict", "load_dict") if not hasattr(candidate, n)
    ]
