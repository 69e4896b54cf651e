"""Cost of a round by the cost model of device/cost_meter.py, and the model shapes that simulations use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import DeviceConfig, FleetConfig
from fedspine_edge.device.cost_meter import CostMeter, EmulatedConditions
from fedspine_edge.errors import ConfigError
from fedspine_edge.model.flops import pass_flops
from fedspine_edge.model.layout import Layout, module_names, target_counts
from fedspine_edge.model.spec import ModelSpec

_EVALUATION_BATCH = 32

SMALL = ModelSpec(
    family="bert",
    num_layers=2,
    hidden_size=16,
    num_heads=12,
    num_kv_heads=12,
    head_dim=2,
    intermediate_size=192,
    gated_ffn=False,
    attention_bias=True,
    ffn_bias=True,
    num_parameters=40_000,
    base_sha256="5" * 64,
)
"""Small model for the messages of a simulation whose message sizes do not matter. It has as many heads as MiniLM."""

MINILM = ModelSpec(
    family="bert",
    num_layers=6,
    hidden_size=384,
    num_heads=12,
    num_kv_heads=12,
    head_dim=32,
    intermediate_size=1536,
    gated_ffn=False,
    attention_bias=True,
    ffn_bias=True,
    num_parameters=22_713_600,
    base_sha256="6" * 64,
)
"""Shapes of all-MiniLM-L6-v2, for the cost of a step and for message sizes."""


def find_spec(name: str) -> ModelSpec:
    """Return the model shapes named `small` or `minilm`. Raises `ConfigError` for another name."""
    known = {"small": SMALL, "minilm": MINILM}
    if name not in known:
        raise ConfigError(f"unknown model shapes {name!r}.", remedy=f"Use one of: {', '.join(known)}.")
    return known[name]


def round_cost_s(
    device: DeviceConfig,
    fleet: FleetConfig,
    spec: ModelSpec,
    tokens: int,
    *,
    before: float,
    after: float,
    r: int,
    conditions: EmulatedConditions | None = None,
) -> float:
    """Return the simulated completion time in seconds of a round that prunes from ratio `before` to `after`.

    Args:
        device: The device's settings.
        fleet: The server's settings.
        spec: Model whose steps and bytes are paid for.
        tokens: Padded length of a batch.
        before: Pruning ratio at the start of the round.
        after: Pruning ratio at its end.
        r: LoRA rank.
        conditions: Emulated conditions of the round; None for none, hence no jitter.
    """
    meter = CostMeter(
        "simulated",
        time_factor=device.time_factor,
        up_mbit_s=device.up_mbit_s,
        down_mbit_s=device.down_mbit_s,
        clock=VirtualClock(),
        simulated=device.simulated,
        conditions=conditions,
    )
    layout = record_work(
        meter,
        spec,
        tokens,
        ratios=(before, after),
        r=r,
        steps=(fleet.training.tau, fleet.training.recovery_steps),
        batch_size=fleet.training.batch_size,
        round_to=fleet.round_to,
        holdout=device.data.holdout,
    )
    meter.transfer(
        down_bytes=2 * fetched_rank(fleet.ranks, r) * factor_elements(typical_layout(spec, before, fleet.round_to)),
        up_bytes=2 * r * factor_elements(layout),
    )
    return meter.completion_s()


def record_work(
    meter: CostMeter,
    spec: ModelSpec,
    tokens: int,
    *,
    ratios: tuple[float, float],
    r: int,
    steps: tuple[int, int],
    batch_size: int,
    round_to: int,
    holdout: int,
) -> Layout:
    """Record the passes of a round in `meter`, as a real device does, and return the layout after pruning."""
    before, after = (typical_layout(spec, ratio, round_to) for ratio in ratios)
    for layout in (before, after):
        evaluation = _flops(spec, layout.counts[0], r, min(_EVALUATION_BATCH, holdout), tokens)
        for _ in range(math.ceil(holdout / _EVALUATION_BATCH)):
            meter.work(evaluation)
    scored = _flops(spec, before.counts[0], r, batch_size, tokens, backward=True, scored=True)
    recovery = _flops(spec, after.counts[0], r, batch_size, tokens, backward=True)
    for flops in (scored,) * steps[0] + (recovery,) * steps[1]:
        meter.work(flops)
    return after


def fetched_rank(ranks: Sequence[int], r: int) -> int:
    """Return how many components a device of rank `r` fetches: all rank slices up to the one that holds `r`."""
    return min(end for end in ranks if end >= r)


def factor_elements(layout: Layout) -> int:
    """Return the number of elements of A and B at rank 1."""
    return _factor_elements(layout.spec, *layout.counts[0])


def typical_layout(spec: ModelSpec, ratio: float, round_to: int) -> Layout:
    """Return a layout of `spec` at `ratio`. Its cost does not depend on which groups it keeps."""
    return _layout(spec, *target_counts(spec, ratio, round_to=round_to))


# Cached because a simulation has few layouts and ranks, but thousands of devices that need their costs in every round.


@lru_cache(maxsize=4096)
def _layout(spec: ModelSpec, heads: int, channels: int) -> Layout:
    layers = range(spec.num_layers)
    return Layout(spec, tuple(np.arange(heads) for _ in layers), tuple(np.arange(channels) for _ in layers))


@lru_cache(maxsize=4096)
def _factor_elements(spec: ModelSpec, heads: int, channels: int) -> int:
    layout = _layout(spec, heads, channels)
    return sum(layout.rows(name).size + layout.cols(name).size for name in module_names(spec))


@lru_cache(maxsize=65536)
def _flops(
    spec: ModelSpec,
    counts: tuple[int, int],
    r: int,
    batch: int,
    tokens: int,
    *,
    backward: bool = False,
    scored: bool = False,
) -> float:
    return pass_flops(_layout(spec, *counts), r, batch, tokens, backward=backward, scored=scored)
