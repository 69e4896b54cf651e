"""Aggregates the accepted updates of a round into the next global adapter, task head and order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from fedspine_edge.aggregation.consensus import DeviceScores, average_scores, kept_by_all, update_order
from fedspine_edge.aggregation.factored import initial_factors
from fedspine_edge.aggregation.rules import Aggregate, Aggregator, Factors, Rule, average_tensors
from fedspine_edge.arrays import Tensors
from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import (
    GROUP_KINDS,
    Indices,
    Layout,
    Order,
    full_shape,
    module_names,
    split_name,
    target_counts,
)
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.blobs import adapter_tensors, order_to_tensors
from fedspine_edge.protocol.codec import Tensor
from fedspine_edge.protocol.messages import Report
from fedspine_edge.pruning.selection import Scope
from fedspine_edge.server.update_validation import AcceptedUpdate

_COMPLETED = ("reconstruct", "trimmed_mean", "median")
"""Rules whose updates are completed to full rank; the others are published baselines and stay as they are."""


@dataclass(frozen=True)
class AggregationResult:
    """The result of a round.

    Attributes:
        tensors: What the next round starts from: adapter in full coordinates at the largest rank, head, order.
        aggregate: The aggregated adapter with its statistics.
        layouts: By device what it keeps now.
        scores: Per kind and layer the averaged score of every group, NaN where no device scored.
    """

    tensors: Tensors
    aggregate: Aggregate
    layouts: dict[str, Layout]
    scores: dict[str, tuple[npt.NDArray[np.float64], ...]]


def initial_tensors(config: FleetConfig, spec: ModelSpec) -> Tensors:
    """Return what the first round starts from: A seeded, B zero, no head (devices seed it) and no order."""
    return adapter_tensors(initial_factors(_shapes(spec), max(config.ranks), config.seed))


def aggregate_updates(
    devices: Sequence[tuple[Report, Callable[[], AcceptedUpdate]]],
    *,
    rule: str,
    config: FleetConfig,
    spec: ModelSpec,
    order: Order | None,
    layouts: Mapping[str, Layout],
    sent: Mapping[str, Tensor],
) -> AggregationResult:
    """Aggregate the accepted updates, one at a time, in order of device id.

    Args:
        devices: Each device's report and a function that loads its update. An update is in memory only while it is
            added (robust rules keep all of them).
        rule: Aggregation rule of the strategy.
        config: Settings of the fleet.
        spec: Model of the fleet.
        order: The order sent with the round's plans.
        layouts: What each device kept before the round, including devices that did not take part: groups that any
            device has removed keep their position in the order.
        sent: What the round started from.
    """
    if rule not in get_args(Rule):
        raise ConfigError(
            f"the strategy asks for aggregation rule {rule!r}, which is unknown.",
            remedy=f"One of: {', '.join(get_args(Rule))}.",
        )
    devices = sorted(devices, key=lambda device: device[0].device_id)
    weights = _weights([report for report, _ in devices], config)
    aggregator = Aggregator(
        rule,  # type: ignore[arg-type]  # checked above
        _shapes(spec),
        max(config.ranks),
        config.training.lora_scaling,
        config.seed,
        clip_norm=config.aggregation.clip_norm,
    )
    heads: list[tuple[float, Mapping[str, Tensor]]] = []
    scores: dict[str, list[DeviceScores]] = {kind: [] for kind in GROUP_KINDS}
    kept: dict[str, Layout] = {}
    for (report, load), weight in zip(devices, weights):
        update = load()
        kept[report.device_id] = update.layout
        rows = {name: update.layout.rows(name) for name in update.factors}
        cols = {name: update.layout.cols(name) for name in update.factors}
        factors: Factors = update.factors
        if rule in _COMPLETED and config.aggregation.complete_ranks:
            factors = complete_low_rank_update(factors, sent, update.layout)
        aggregator.add(report.device_id, weight, factors, rows, cols)
        heads.append((float(report.num_examples), update.head))
        for kind, device_scores in update.scores.items():
            scores[kind].append(device_scores)
    aggregate = aggregator.finish()
    tensors = adapter_tensors(aggregate.factors)
    tensors.update(average_tensors(heads) if heads[0][1] else {})
    sizes = _sizes(spec)
    averaged = {kind: average_scores(scores[kind], sizes[kind]) for kind in GROUP_KINDS}
    if config.layout == "consensus" and (order is not None or scores["heads"]):
        tensors.update(order_to_tensors(_next_order(order, averaged, {**layouts, **kept}, spec)))
    return AggregationResult(tensors, aggregate, kept, averaged)


def complete_low_rank_update(factors: Factors, sent: Mapping[str, Tensor], layout: Layout) -> Factors:
    """Return `factors` with the components of the sent adapter that a device of lower rank did not receive.

    A device of rank r trains the first r components and does not have the others. Averaged as it is, its update would
    claim that they are zero, so a device that learned nothing would erase them. Source: docs/concepts/aggregation.md.
    """
    completed = {}
    for name, (A, B) in factors.items():
        r = A.shape[0]
        tail_A, tail_B = layout.gather(name, sent[f"{name}.lora_A"][r:], sent[f"{name}.lora_B"][:, r:])
        live = np.flatnonzero(tail_B.any(axis=0))  # a component whose B is zero adds nothing
        completed[name] = (np.concatenate([A, tail_A[live]]), np.concatenate([B, tail_B[:, live]], axis=1))
    return completed


def coverage_layout(
    layouts: Mapping[str, Layout],
    weights: Mapping[str, float],
    scores: Mapping[str, Sequence[npt.NDArray[np.float64]]],
    *,
    pruning_ratio: float,
    round_to: int,
    scope: Scope = "layer",
) -> Layout:
    """Return one layout at `pruning_ratio` for a fleet whose devices ranked alone.

    Each layer keeps the groups that the devices with most training examples kept, since the global adapter was trained
    on those; ties are broken by the averaged score, then by index.

    Args:
        layouts: What each device keeps.
        weights: Number of training examples of each device.
        scores: Per kind and layer the averaged score of every group, NaN where no device scored.
        pruning_ratio: Pruning ratio of the result.
        round_to: Channel counts are multiples of this.
        scope: With "global" the width of a layer is its mean width on the devices.
    """
    spec = next(iter(layouts.values())).spec
    sizes = _sizes(spec)
    ranked: dict[str, tuple[Indices, ...]] = {}
    for kind in GROUP_KINDS:
        orders = []
        for layer in range(spec.num_layers):
            held = np.zeros(sizes[kind][layer])
            for device_id in sorted(layouts):
                held[getattr(layouts[device_id], kind)[layer]] += weights[device_id]
            score = np.nan_to_num(scores[kind][layer], nan=-math.inf)
            orders.append(np.lexsort((np.arange(held.size), -score, -held)).astype(np.int64))
        ranked[kind] = tuple(orders)
    counts = [target_counts(spec, pruning_ratio, round_to=round_to)] * spec.num_layers
    if scope == "global":
        devices = sorted(layouts)
        mean = np.average([layouts[i].counts for i in devices], axis=0, weights=[weights[i] for i in devices])
        counts = [(_whole(h, 1, spec.num_kv_heads), _whole(c, round_to, spec.intermediate_size)) for h, c in mean]
    return Layout.prefix(spec, Order(ranked["heads"], ranked["channels"]), counts)


def _whole(width: float, unit: int, full: int) -> int:
    """Round `width` to a multiple of `unit`, at least one and at most `full`."""
    return min(full, max(unit, round(width / unit) * unit))


def _next_order(
    order: Order | None,
    scores: Mapping[str, tuple[npt.NDArray[np.float64], ...]],
    layouts: Mapping[str, Layout],
    spec: ModelSpec,
) -> Order:
    sizes = _sizes(spec)
    ranked = {}
    for kind in GROUP_KINDS:
        held = kept_by_all([getattr(layout, kind) for _, layout in sorted(layouts.items())], sizes[kind])
        ranked[kind] = update_order(None if order is None else getattr(order, kind), scores[kind], held)
    return Order(ranked["heads"], ranked["channels"])


def _weights(reports: Sequence[Report], config: FleetConfig) -> list[float]:
    examples = [float(report.num_examples) for report in reports]
    if not config.aggregation.weight_by_importance:
        return examples
    weights = [n * max(0.0, report.lora_importance or 0.0) for n, report in zip(examples, reports)]
    # Without a measured importance on any device, only the examples count.
    return weights if any(weights) else examples


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    return {name: full_shape(spec, split_name(name)[1]) for name in module_names(spec)}


def _sizes(spec: ModelSpec) -> dict[str, list[int]]:
    return {"heads": [spec.num_kv_heads] * spec.num_layers, "channels": [spec.intermediate_size] * spec.num_layers}
