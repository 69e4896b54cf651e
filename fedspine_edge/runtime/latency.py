"""LatencyStatistics of sessions: percentiles, throughput, memory; several sessions are timed in alternation."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.errors import ConfigError

if TYPE_CHECKING:
    from fedspine_edge.runtime.session import Session


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what a session answers."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values


class WallTimes(Result, frozen=True, kw_only=True):
    """Wall time of repeated runs of one shape, in milliseconds."""

    batch: int
    tokens: int
    repeats: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float


class LatencyStatistics(WallTimes, frozen=True, kw_only=True):
    """The wall times of one session."""

    backend: str
    per_s: float
    """Sequences a second, one run after the other."""


class LatencyComparison(Result, frozen=True, kw_only=True):
    """Two sessions timed in alternation, so that a busy moment of the machine hits both."""

    first: LatencyStatistics
    second: LatencyStatistics
    ratio: float
    """Median of the second over median of the first; below 1 the second is faster."""

    @property
    def first_ms(self) -> float:
        """Median of the first session."""
        return self.first.p50_ms

    @property
    def second_ms(self) -> float:
        """Median of the second session."""
        return self.second.p50_ms


def compare_latency(
    first: Session, second: Session, *, batch: int = 1, tokens: int = 32, repeats: int = 200
) -> LatencyComparison:
    """Times two sessions in alternation within one run: first, second, first, … on the same shape.

    For a fair comparison load both with the same `threads` and `backend`.
    """
    inputs = [(session, session.random_inputs(batch, tokens)) for session in (first, second)]
    times_first, times_second = time_sessions(inputs, repeats, warmup=10)
    a, b = (
        latency_of(first.backend, batch, tokens, times_first),
        latency_of(second.backend, batch, tokens, times_second),
    )
    return LatencyComparison(first=a, second=b, ratio=b.p50_ms / a.p50_ms)


def time_sessions(sessions: Sequence[tuple[Session, dict[str, Array]]], repeats: int, warmup: int) -> list[list[float]]:
    prepared = [(session.live_runner(), session.checked_inputs(inputs)) for session, inputs in sessions]
    return time_calls([functools.partial(runner.run, inputs) for runner, inputs in prepared], repeats, warmup)


def time_calls(calls: Sequence[Callable[[], Any]], repeats: int, warmup: int = 10) -> list[list[float]]:
    """Wall times of every call in milliseconds, all of them called in turn, after `warmup` turns not counted."""
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; it must be at least 1.")
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(warmup + repeats):
        for taken, call in zip(times, calls):
            start = time.perf_counter()
            call()
            if repeat >= warmup:
                taken.append((time.perf_counter() - start) * 1e3)
    return times


def latency_of(backend: str, batch: int, tokens: int, times_ms: list[float]) -> LatencyStatistics:
    """The figures of a list of wall times."""
    figures = figures_of(times_ms)
    return LatencyStatistics(
        backend=backend, batch=batch, tokens=tokens, **figures, per_s=batch / figures["mean_ms"] * 1e3
    )


def figures_of(times_ms: Sequence[float]) -> dict[str, Any]:
    """The fields of a `WallTimes` that come from the times alone."""
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, (50, 90, 99)))
    mean, least = float(np.mean(times_ms)), float(np.min(times_ms))
    return {"repeats": len(times_ms), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": mean, "min_ms": least}
