"""Aggregates the accepted updates of a round into the next global adapter, task head and order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import get_args

import numpy as np
import numpy.typing as npt

from fedspine_edge.aggregation.consensus import DeviceScores, average_scores, kept_by_all, update_order
from fedspine_edge.aggregation.factored import initial_factors
from fedspine_edge.aggregation.rules import (
    Aggregate,
    Aggregator,
    Factors,
    Rule,
    adapter_norm,
    clip_scales,
    combine_heads,
)
from fedspine_edge.arrays import Tensors
from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError, FedspineError
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
from fedspine_edge.protocol.blobs import adapter_tensors, head_tensors, order_to_tensors
from fedspine_edge.protocol.codec import Tensor
from fedspine_edge.protocol.messages import Report
from fedspine_edge.pruning.selection import Scope
from fedspine_edge.server.update_validation import AcceptedUpdate

CACHE_BYTES = 256 * 1024**2
"""Bytes of updates that aggregation keeps in memory between its two passes."""

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
        devices: Each device's report and a function that loads its update. At most `CACHE_BYTES` of updates are kept
            in memory (robust rules keep all of them).
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
    reports = [report for report, _ in devices]
    examples = list(example_weights(reports, config).values())
    weights = _weights(reports, examples, config)
    completes = rule in _COMPLETED and config.aggregation.complete_ranks

    def factors_of(update: AcceptedUpdate) -> Factors:
        return complete_low_rank_update(update.factors, sent, update.layout) if completes else update.factors

    # The median norm is known only after all updates were seen, so they are read twice where they do not fit in memory.
    cache = _UpdateCache()
    norms: list[float] = []
    heads: list[Mapping[str, Tensor]] = []
    scores: dict[str, list[DeviceScores]] = {kind: [] for kind in GROUP_KINDS}
    kept: dict[str, Layout] = {}
    for (report, load), weight in zip(devices, examples):
        update = cache.load(report.device_id, load)
        kept[report.device_id] = update.layout
        heads.append(update.head)
        for kind, device_scores in update.scores.items():
            scores[kind].append(replace(device_scores, weight=weight))
        norms.append(adapter_norm(factors_of(update)) if config.aggregation.clip_norm > 0 else 0.0)
    scales = clip_scales(norms, weights, config.aggregation.clip_norm)
    aggregator = Aggregator(
        rule,  # type: ignore[arg-type]  # checked above
        _shapes(spec),
        max(config.ranks),
        config.training.lora_scaling,
        config.seed,
    )
    for (report, load), weight, scale in zip(devices, weights, scales):
        update = cache.load(report.device_id, load)
        rows = {name: update.layout.rows(name) for name in update.factors}
        cols = {name: update.layout.cols(name) for name in update.factors}
        aggregator.add(report.device_id, weight, factors_of(update), rows, cols, scale)
    aggregate = aggregator.finish()
    tensors = adapter_tensors(aggregate.factors)
    tensors.update(
        combine_heads(heads, examples, rule=rule, reference=head_tensors(sent), clip=config.aggregation.clip_head)
    )
    _check_finite(tensors)
    sizes = _sizes(spec)
    averaged = {kind: average_scores(scores[kind], sizes[kind]) for kind in GROUP_KINDS}
    if config.layout == "consensus" and (order is not None or scores["heads"]):
        tensors.update(order_to_tensors(_next_order(order, averaged, {**layouts, **kept}, spec)))
    return AggregationResult(tensors, aggregate, kept, averaged)


class _UpdateCache:
    """Updates of a round that fit into `CACHE_BYTES`; the others are loaded each time."""

    def __init__(self) -> None:
        self._updates: dict[str, AcceptedUpdate] = {}
        self._bytes_left = CACHE_BYTES

    def load(self, device_id: str, load: Callable[[], AcceptedUpdate]) -> AcceptedUpdate:
        if device_id in self._updates:
            return self._updates[device_id]
        update = load()
        size = sum(A.nbytes + B.nbytes for A, B in update.factors.values())
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._updates[device_id] = update
        return update


def example_weights(reports: Sequence[Report], config: FleetConfig) -> dict[str, float]:
    """Return by device the number of examples that counts in averages.

    Devices report the number themselves, so it counts up to `aggregation.max_examples_ratio` times the median.
    """
    examples = {report.device_id: float(report.num_examples) for report in reports}
    ratio = config.aggregation.max_examples_ratio
    if ratio == 0 or not examples:
        return examples
    limit = max(1.0, ratio * median(examples.values()))
    return {device_id: min(number, limit) for device_id, number in examples.items()}


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise FedspineError(
                f"the aggregate of the round is not finite in {name}.",
                remedy='Lower validation.max_norm, or use aggregation.rule = "median"; then start the server again.',
            )


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


def _weights(reports: Sequence[Report], examples: Sequence[float], config: FleetConfig) -> list[float]:
    if not config.aggregation.weight_by_importance:
        return list(examples)
    importances = [max(0.0, report.lora_importance or 0.0) for report in reports]
    limit = 2.0 * median(importances) if importances else 0.0
    weights = [n * min(importance, limit or importance) for n, importance in zip(examples, importances)]
    # Without a measured importance on any device, only the examples count.
    return weights if any(weights) else list(examples)


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    return {name: full_shape(spec, split_name(name)[1]) for name in module_names(spec)}


def _sizes(spec: ModelSpec) -> dict[str, list[int]]:
    return {"heads": [spec.num_kv_heads] * spec.num_layers, "channels": [spec.intermediate_size] * spec.num_layers}
