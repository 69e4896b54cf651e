"""Result types of sessions and benchmarks."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["end", "stop", "length"]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Base class of results."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values


class Prediction(Result, frozen=True, kw_only=True):
    """The predicted class of one text: its label, its softmax probability and its index in the logits."""

    label: str
    probability: float
    index: int


class WordLabel(Prediction, frozen=True, kw_only=True):
    """The predicted class of one word of a text."""

    word: str


class Generation(Result, frozen=True, kw_only=True):
    """A generated text with its timing; times are wall times on this machine."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: FinishReason
    """"end" after an end token of the model, "stop" after a stop string, "length" at `max_new_tokens` or the model's
    limit."""
    first_token_ms: float
    tokens_per_s: float
    """Rate of the tokens after the first; 0 if there is only one."""


class WallTimes(Result, frozen=True, kw_only=True):
    """Wall times of repeated runs of one shape, in milliseconds."""

    batch: int
    tokens: int
    repeats: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float


class LatencyStatistics(WallTimes, frozen=True, kw_only=True):
    """Wall times of one session."""

    backend: str
    per_s: float
    """Sequences per second for consecutive runs."""


class LatencyComparison(Result, frozen=True, kw_only=True):
    """Wall times of two sessions whose runs were interleaved, so that load on the machine affects both."""

    first: LatencyStatistics
    second: LatencyStatistics
    ratio: float
    """Median of the second session divided by the median of the first; below 1, the second is faster."""

    @property
    def first_ms(self) -> float:
        """Median of the first session."""
        return self.first.p50_ms

    @property
    def second_ms(self) -> float:
        """Median of the second session."""
        return self.second.p50_ms
