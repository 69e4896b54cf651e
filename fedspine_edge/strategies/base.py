"""Interface of strategies, and the bookkeeping that the built-in ones share.

A strategy does no I/O. Once a round, the server asks `assign` for the assignments and passes the outcomes to `observe`,
and it journals `to_dict` after each. Both methods are functions of the state and their arguments: a server that was
killed loads the newest state, asks again and gets the same result. Source: docs/concepts/strategies.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from fedspine_edge.bandit.pruning_schedule import MEAN_SPREAD, PruningSchedule, rounds_needed
from fedspine_edge.bandit.reward import TERMS, RewardTerms, RoundOutcome, rewards
from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError


@dataclass(frozen=True)
class DeviceInfo:
    """A device as the server knows it before a round.

    Attributes:
        device_id: The device.
        device_class: Its hardware class.
        num_examples: Number of training examples.
        memory_bytes: Memory that the device is willing to train in; 0 means not stated.
        pruning_ratio: Share of prunable parameters that the device has removed so far.
        memory_by_rank: Estimated peak memory of a round in bytes at each rank, at the ratio so far (the peak occurs
            before the pruning step). Ranks that need more than `memory_bytes` are not selected. None means that there
            is no estimate, so any rank may be tried.
    """

    device_id: str
    device_class: str = "unknown"
    num_examples: int = 0
    memory_bytes: int = 0
    pruning_ratio: float = 0.0
    memory_by_rank: Mapping[int, int] | None = None


@dataclass(frozen=True)
class Assignment:
    """Work of one device in one round.

    Attributes:
        pruning_ratio: Share of prunable parameters to have removed after the round.
        r: LoRA rank.
        u: Position of the selected arm in the pruning schedule, in [0, 1]; None where no bandit chose.
        tau: Scored iterations before the pruning step; None for the configured number.
        recovery_steps: Iterations after the pruning step; None for the configured number.
    """

    pruning_ratio: float
    r: int
    u: float | None = None
    tau: int | None = None
    recovery_steps: int | None = None


@runtime_checkable
class Strategy(Protocol):
    """Decides what each device does in each round."""

    aggregation: str
    """Name of the aggregation rule that the strategy uses."""

    def assign(self, devices: Sequence[DeviceInfo], server_round: int) -> dict[str, Assignment]:
        """Return the assignments for `server_round` (from 1), by device id."""
        ...

    def observe(self, outcomes: Sequence[RoundOutcome], server_round: int) -> dict[str, RewardTerms | None]:
        """Learn from a round; return by device id its reward.

        The reward is None for a device whose outcome carries no information about its assignment (lost, or without
        an assignment).
        """
        ...

    def explain(self, device_id: str) -> dict[str, Any]:
        """Return the reasons for the device's newest assignment, as plain JSON data."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the whole state, as plain JSON data."""
        ...

    def load_dict(self, data: Mapping[str, Any]) -> None:
        """Restore the state that `to_dict` returned. Raises `ConfigError` for the state of another strategy."""
        ...


class BaseStrategy:
    """Base of the built-in strategies; a subclass implements `choose`, and perhaps `reward` and `learn`.

    Args:
        config: Settings of the fleet.

    Raises:
        ConfigError: The pruning ratio cannot be reached within the rounds.
    """

    name = ""
    aggregation: str

    def __init__(self, config: FleetConfig) -> None:
        self.config = config
        self.aggregation = config.aggregation.rule
        self._asked: dict[str, dict[str, Any]] = {}
        """By device: round, u, r, pruning_ratio and previous ratio of the assignment whose outcome is unknown."""
        self._done: dict[str, tuple[float, float]] = {}
        """By device: (assigned, achieved) ratio of its newest finished round."""
        self._too_big: dict[str, tuple[int, float]] = {}
        """By device: the rank that ran out of memory, and the ratio at which it did."""

    # For subclasses

    def choose(self, device: DeviceInfo, server_round: int, previous: float) -> Assignment:
        """Return the assignment of one device.

        Args:
            device: The device. To consider all devices of the round, override `prepare`.
            server_round: The round, from 1.
            previous: Pruning ratio that the device has reached.
        """
        raise NotImplementedError

    def prepare(self, devices: Mapping[str, DeviceInfo], previous: Mapping[str, float], server_round: int) -> None:
        """Consider all devices of the round, before `choose` is called for each of them."""

    def adjust(
        self, assignments: dict[str, Assignment], previous: Mapping[str, float], server_round: int
    ) -> dict[str, Assignment]:
        """Return the assignments of the round after considering all of them; by default unchanged."""
        return assignments

    def expected_s(self) -> float | None:
        """Return the time that the reward compares completion times with; None for the mean of the round's reports."""
        return None

    def target_of(self, device_id: str) -> float:
        """Return the pruning ratio that the device is to reach by the end of the run."""
        return self.config.pruning_ratio

    def reward(self, outcomes: Sequence[RoundOutcome]) -> dict[str, RewardTerms | None]:
        """Return the reward of each device in [0, 1]; None for an outcome without information about the assignment.

        By default docs/concepts/s-ucb.md, "Reward", with the configured weights.
        """
        weights = {name: getattr(self.config.reward, name) for name in TERMS}
        return rewards(outcomes, weights, mode=self.config.reward.mode, expected_s=self.expected_s())

    def learn(self, terms: Mapping[str, RewardTerms | None], server_round: int) -> None:
        """Learn from the rewards of a round; by default does nothing."""

    # Strategy

    def assign(self, devices: Sequence[DeviceInfo], server_round: int) -> dict[str, Assignment]:
        by_id = {device.device_id: device for device in sorted(devices, key=lambda d: d.device_id)}
        previous = {device_id: self._previous(device) for device_id, device in by_id.items()}
        self.prepare(by_id, previous, server_round)
        chosen = {i: self.choose(device, server_round, previous[i]) for i, device in by_id.items()}
        assignments = self.adjust(chosen, previous, server_round)
        for device_id, assignment in assignments.items():
            self._asked[device_id] = {
                "round": server_round,
                "u": assignment.u,
                "r": assignment.r,
                "pruning_ratio": assignment.pruning_ratio,
                "previous": previous[device_id],
            }
        return assignments

    def observe(self, outcomes: Sequence[RoundOutcome], server_round: int) -> dict[str, RewardTerms | None]:
        assigned = [o for o in outcomes if self._asked.get(o.device_id, {}).get("round") == server_round]
        terms = self.reward([self._with_ratios(o) for o in assigned])
        self.learn(terms, server_round)
        for o in assigned:
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
                f"the saved run used strategy {data.get('strategy')!r}, the settings name {self.name!r}.",
                remedy="Continue with the strategy that the run started with, or use another run_dir for a new run.",
            )
        self._asked = {i: dict(a) for i, a in data["asked"].items()}
        self._done = {i: (d[0], d[1]) for i, d in data["done"].items()}
        self._too_big = {i: (b[0], b[1]) for i, b in data["too_big"].items()}

    # Shared by subclasses

    def ranks_that_fit(self, device: DeviceInfo, previous: float) -> list[int]:
        """Return the ranks within the device's memory, at least the smallest rank.

        A rank fits by the device's estimate, and if neither it nor a smaller one has run out of memory before.
        """
        fitting = list(self.config.ranks)
        if device.memory_bytes and device.memory_by_rank:
            fitting = [r for r in fitting if device.memory_by_rank.get(r, 0) <= device.memory_bytes]
        failed_r, failed_at = self._too_big.get(device.device_id, (0, -1.0))
        if previous <= failed_at:  # a model that was pruned further since may fit
            fitting = [r for r in fitting if r < failed_r]
        return fitting or [self.config.ranks[0]]

    def largest_fitting(self, wanted: int, device: DeviceInfo, previous: float) -> int:
        """Return `wanted`, or the largest smaller rank that fits the device."""
        fitting = self.ranks_that_fit(device, previous)
        return max((r for r in fitting if r <= wanted), default=fitting[0])

    def middle_rank(self) -> int:
        """Return the rank of strategies that use one for all; the lower one of an even number of ranks."""
        return self.config.ranks[(len(self.config.ranks) - 1) // 2]

    def _previous(self, device: DeviceInfo) -> float:
        """Return the pruning ratio to continue from.

        It is the ratio that was assigned, not the one that whole groups allowed, so that rounding does not reduce the
        next step. A device that has lost what it removed (a new disk) continues from what it reports.
        """
        assigned, achieved = self._done.get(device.device_id, (0.0, 0.0))
        return max(assigned, device.pruning_ratio) if device.pruning_ratio >= achieved - 1e-6 else device.pruning_ratio

    def _with_ratios(self, outcome: RoundOutcome) -> RoundOutcome:
        return replace(
            outcome,
            previous_ratio=self._asked[outcome.device_id]["previous"],
            target=self.target_of(outcome.device_id),
        )


def pruning_schedule(config: FleetConfig, *, spread: bool = False) -> PruningSchedule:
    """Return the pruning schedule of a run; with the consensus layout the first round only scores.

    Args:
        config: Settings of the fleet.
        spread: Whether final ratios may differ by device where `target` is "fleet_mean".

    Raises `ConfigError` with the number of rounds it takes when the pruning ratio cannot be reached.
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
    """Return the names that `candidate` lacks to be a `Strategy`."""
    return [
        n for n in ("aggregation", "assign", "observe", "explain", "to_dict", "load_dict") if not hasattr(candidate, n)
    ]
