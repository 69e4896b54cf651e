"""Wall-clock measurement of functions whose runs are interleaved, and the statistics of the measured times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedspine_edge.errors import ConfigError
from fedspine_edge.runtime.results import LatencyStatistics


def time_interleaved(functions: Sequence[Callable[[], Any]], repeats: int, warmup: int = 10) -> list[list[float]]:
    """Call all functions in alternation and return the wall times of each in milliseconds.

    Args:
        functions: Functions to time.
        repeats: Number of timed calls of each function.
        warmup: Number of calls of each function before the timed ones.
    """
    if repeats < 1:
        raise ConfigError(f"`repeats` is {repeats}.", remedy="Give at least 1.")
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(warmup + repeats):
        for function_times, function in zip(times, functions):
            start = time.perf_counter()
            function()
            if repeat >= warmup:
                function_times.append((time.perf_counter() - start) * 1e3)
    return times


def latency_statistics(backend: str, batch: int, tokens: int, times_ms: Sequence[float]) -> LatencyStatistics:
    """Return the statistics of the wall times of one session."""
    statistics = wall_time_statistics(times_ms)
    return LatencyStatistics(
        backend=backend, batch=batch, tokens=tokens, **statistics, per_s=batch / statistics["mean_ms"] * 1e3
    )


def wall_time_statistics(times_ms: Sequence[float]) -> dict[str, Any]:
    """Return the fields of `WallTimes` that depend only on the times."""
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, (50, 90, 99)))
    mean, minimum = float(np.mean(times_ms)), float(np.min(times_ms))
    return {"repeats": len(times_ms), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": mean, "min_ms": minimum}
