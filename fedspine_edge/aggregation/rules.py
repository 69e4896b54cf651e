"""Aggregation rules: combine the adapters of many devices, of different rank and different kept groups, into one.

| rule         | what is averaged                    | weights | divided by          | memory           |
|--------------|-------------------------------------|---------|---------------------|------------------|
| reconstruct  | B·A, exactly                        | given   | holders' weight     | does not grow    |
| zero_pad     | A and B separately, padded (HetLoRA)| given   | holders' weight     | does not grow    |
| stack        | B·A (FLoRA), then cut to r_max      | given   | all devices' weight | does not grow    |
| svd          | B·A (FlexLoRA)                      | equal   | holders' weight     | does not grow    |
| trimmed_mean | B·A per element, extremes left out  | equal   | holders in the trim | one copy/device  |
| median       | B·A per element                     | equal   | -                   | one copy/device  |

Devices are added in the order of the calls of `add`; sorted by device_id, the result is bit-identical every time.
Inputs come from accepted updates and are not checked again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedspine_edge.aggregation.factored import (
    DEAD,
    MAX_STACK_RANK,
    Decomposition,
    Float32,
    Indices,
    LowRank,
    LowRankSum,
    Shape,
    balanced,
    decompose_dense,
    kaiming_rows,
    prefix_explained_variance,
    product_norm,
)
from fedspine_edge.arrays import Float64Array
from fedspine_edge.errors import ConfigError

Rule = Literal["reconstruct", "zero_pad", "stack", "svd", "trimmed_mean", "median"]
Factors = Mapping[str, tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]]

ROBUST_RULES = ("trimmed_mean", "median")
"""Rules that take a middle value per element, with equal weights. They keep every update in memory until `finish`."""

BLOCK_ELEMENTS = 4_000_000
"""Number of elements that a robust rule sorts at a time: 32 MB, whatever the size of the module."""


@dataclass(frozen=True)
class Aggregate:
    """The global adapter after a round.

    Attributes:
        factors: Per module (A, B) with A (r_max, in) and B (out, r_max), float32, full coordinates.
        explained_variance: Per module (r_max,); entry i is the share of ‖dW‖² kept at rank i + 1.
        clipped: By device the factor below 1 by which its update was scaled down; only devices that were clipped.
        num_devices: Number of devices added, those of weight zero included.
    """

    factors: dict[str, tuple[Float32, Float32]]
    explained_variance: dict[str, Float64Array]
    clipped: dict[str, float] = field(default_factory=dict)
    num_devices: int = 0


@dataclass(frozen=True)
class _Update:
    device_id: str
    weight: float
    factors: Factors
    rows: Mapping[str, Indices]
    cols: Mapping[str, Indices]
    scale: float = 1.0


class Aggregator:
    """Aggregates device updates into the global adapter.

    Args:
        rule: See the table above.
        shapes: (out, in) of every unpruned module.
        r_max: Rank of the result, and the largest rank of a device.
        scaling: lora_alpha / r, the same for every rank.
        seed: Seed for the rows of A of empty components.
        trim: Share of the holders that `trimmed_mean` leaves out at either end, at least one of three or more.
        max_stack_rank: See `LowRankSum`.

    Raises `ConfigError` for an unknown rule or an impossible number.
    """

    def __init__(
        self,
        rule: Rule,
        shapes: Mapping[str, Shape],
        r_max: int,
        scaling: float,
        seed: int,
        *,
        trim: float = 0.2,
        max_stack_rank: int = MAX_STACK_RANK,
    ) -> None:
        if rule not in get_args(Rule):
            raise ConfigError(f"aggregation rule {rule!r} is unknown.", remedy=f"One of: {', '.join(get_args(Rule))}.")
        if r_max < 1 or not scaling > 0 or not 0 <= trim < 0.5:
            raise ConfigError(
                f"aggregation needs r_max ≥ 1, scaling > 0 and 0 ≤ trim < 0.5; got {r_max}, {scaling}, {trim}."
            )
        self.rule: Rule = rule
        self.shapes = dict(shapes)
        self.r_max, self.scaling, self.seed = r_max, scaling, seed
        self._trim, self._max_stack_rank = trim, max_stack_rank
        self._buffered: list[_Update] = []
        self._num_devices = 0
        self._clipped: dict[str, float] = {}
        self._streams = rule not in ROBUST_RULES
        self._sums = self._new_sums()

    def add(
        self,
        device_id: str,
        weight: float,
        factors: Factors,
        rows: Mapping[str, Indices],
        cols: Mapping[str, Indices],
        scale: float = 1.0,
    ) -> None:
        """Add the accepted update of one device.

        Args:
            device_id: The device.
            weight: Weight of the device, not negative; with weight zero it changes nothing.
            factors: Per module (A, B) in compact coordinates, A (r, kept in) and B (kept out, r). A module that is
                absent counts as not kept.
            rows: Per module the original indices of B's rows, ascending.
            cols: Per module the original indices of A's columns, ascending.
            scale: Factor of the update from `clip_scales`; 1 for one that is not clipped.
        """
        self._num_devices += 1
        if scale < 1.0:
            self._clipped[device_id] = scale
        update = _Update(device_id, weight, factors, rows, cols, scale)
        if self._streams:
            self._accumulate(self._sums, update)
        else:
            self._buffered.append(update)

    def finish(self) -> Aggregate:
        """Return the aggregate of the updates added so far; more may be added afterwards.

        Raises `ValueError` when nothing was added.
        """
        if self._num_devices == 0:
            raise ValueError("nothing to aggregate: no device was added")
        if self._streams:
            found = {name: total.result(self, name) for name, total in self._sums.items()}
        else:
            found = {name: self._robust(name, self._buffered) for name in self.shapes}
        return Aggregate(
            factors={name: (low.A, low.B) for name, low in found.items()},
            explained_variance={name: low.explained_variance for name, low in found.items()},
            clipped=dict(self._clipped),
            num_devices=self._num_devices,
        )

    def _new_sums(self) -> dict[str, _Products | _Padded]:
        if self.rule == "zero_pad":
            return {name: _Padded(shape, self.r_max) for name, shape in self.shapes.items()}
        return {
            name: _Products(LowRankSum(shape, max_stack_rank=self._max_stack_rank), per_holder=self.rule != "stack")
            for name, shape in self.shapes.items()
        }

    def _accumulate(self, sums: Mapping[str, _Products | _Padded], update: _Update) -> None:
        weight = float(update.weight > 0) if self.rule == "svd" else update.weight
        for name, total in sums.items():
            if name in update.factors:
                A, B = update.factors[name]
                total.add(weight, A, update.scale * B.astype(np.float64), update.rows[name], update.cols[name])
            else:
                total.skip(weight)

    def _robust(self, name: str, updates: list[_Update]) -> LowRank:
        shape = self.shapes[name]
        holders = [u for u in updates if u.weight > 0 and name in u.factors]
        combined: Float64Array = np.zeros(shape)
        block = max(1, BLOCK_ELEMENTS // max(1, len(holders) * shape[1]))
        for start in range(0, shape[0] if holders else 0, block):
            stop = min(start + block, shape[0])
            values = np.full((len(holders), stop - start, shape[1]), np.nan)
            for k, update in enumerate(holders):
                _put_dense(values[k], update, name, start, stop)
            trim = self._trim if self.rule == "trimmed_mean" else None
            combined[start:stop] = _middle(values, trim)
        parts = decompose_dense(self.scaling * combined)
        return balanced(parts, r=self.r_max, scaling=self.scaling, name=name, seed=self.seed)


class _Products:
    """Running sum of one module for the rules that average B·A."""

    def __init__(self, total: LowRankSum, *, per_holder: bool) -> None:
        self._total = total
        self._per_holder = per_holder

    def add(self, weight: float, A: Any, B: Any, rows: Indices, cols: Indices) -> None:
        self._total.add(weight, A, B, rows, cols)

    def skip(self, weight: float) -> None:
        """Count a device without this module among all devices, not among the holders."""
        if not self._per_holder:
            self._total.total_weight += weight

    def result(self, settings: Aggregator, name: str) -> LowRank:
        mean = self._total.decompose(per_holder=self._per_holder)
        scaling = settings.scaling
        scaled = Decomposition(mean.U, mean.S * scaling, mean.Vt, mean.total * scaling**2)
        return balanced(scaled, r=settings.r_max, scaling=scaling, name=name, seed=settings.seed)


class _Padded:
    """Running sums of one module for HetLoRA: A and B averaged separately, lower ranks padded with zeros.

    It is biased, since the mean of products is not the product of means; it serves as a baseline.
    """

    def __init__(self, shape: Shape, r_max: int) -> None:
        self._A, self._B = np.zeros((r_max, shape[1])), np.zeros((shape[0], r_max))
        self._row_weight, self._col_weight = np.zeros(shape[0]), np.zeros(shape[1])

    def add(self, weight: float, A: Any, B: Any, rows: Indices, cols: Indices) -> None:
        r = A.shape[0]
        self._A[:r, cols] += weight * A.astype(np.float64)
        self._B[rows, :r] += weight * B.astype(np.float64)
        self._row_weight[rows] += weight
        self._col_weight[cols] += weight

    def skip(self, weight: float) -> None:
        pass

    def result(self, settings: Aggregator, name: str) -> LowRank:
        A = np.divide(self._A, self._col_weight, out=np.zeros_like(self._A), where=self._col_weight > 0)
        rows = self._row_weight[:, None]
        B = np.divide(self._B, rows, out=np.zeros_like(self._B), where=rows > 0)
        explained = prefix_explained_variance(A, B)
        strength = np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=0)
        dead = strength <= DEAD * strength.max()
        A[dead] = kaiming_rows(name, A.shape[1], settings.r_max, settings.seed)[dead]
        B[:, dead] = 0.0
        return LowRank(A.astype(np.float32), B.astype(np.float32), explained)


def adapter_norm(factors: Factors) -> float:
    """Return the norm of B·A over all modules."""
    return math.sqrt(sum(product_norm(A, B) ** 2 for A, B in factors.values()))


def clip_scales(norms: Sequence[float], weights: Sequence[float], multiple: float) -> list[float]:
    """Return the factor of each update that limits its norm to a multiple of the median norm.

    Args:
        norms: Norm of each update.
        weights: Weight of each device; those of weight zero do not affect the median.
        multiple: The multiple; 0 turns clipping off.
    """
    counted = [norm for norm, weight in zip(norms, weights) if weight > 0]
    limit = multiple * float(np.median(counted)) if counted else 0.0
    if limit == 0.0:  # off, or most devices have learned nothing and there is no usual norm
        return [1.0] * len(norms)
    return [limit / norm if norm > limit else 1.0 for norm in norms]


def combine_heads(
    heads: Sequence[Mapping[str, npt.NDArray[Any]]],
    weights: Sequence[float],
    *,
    rule: str,
    reference: Mapping[str, npt.NDArray[Any]],
    clip: float,
    trim: float = 0.2,
) -> dict[str, Float32]:
    """Return the task head of the fleet.

    Robust rules take the median or the trimmed mean per element. The other rules average by weight, after limiting how
    far each head is from the reference to a multiple of the median distance.

    Args:
        heads: Head of each device, of equal names and shapes; may be empty mappings.
        weights: Weight of each device.
        rule: Aggregation rule.
        reference: Head that the round started from. Where it is empty, in the first round, the median of the heads
            takes its place.
        clip: The multiple; 0 turns clipping off.
        trim: See `Aggregator`.
    """
    counted = [head for head, weight in zip(heads, weights) if weight > 0]
    if not counted or not counted[0]:
        return {}
    if rule in ROBUST_RULES:
        return _middle_tensors(counted, trim if rule == "trimmed_mean" else None)
    if clip > 0:
        center = reference or _middle_tensors(counted, None)
        distances = [_distance(head, center) for head in heads]
        heads = [
            head
            if scale == 1.0
            else {n: center[n] + scale * (v.astype(np.float64) - center[n]) for n, v in head.items()}
            for head, scale in zip(heads, clip_scales(distances, weights, clip))
        ]
    return average_tensors(zip(weights, heads))


def _distance(head: Mapping[str, npt.NDArray[Any]], center: Mapping[str, npt.NDArray[Any]]) -> float:
    return math.sqrt(sum(float(np.sum((v.astype(np.float64) - center[n]) ** 2)) for n, v in head.items()))


def _middle_tensors(tensors: Sequence[Mapping[str, npt.NDArray[Any]]], trim: float | None) -> dict[str, Float32]:
    found = {}
    for name, first in tensors[0].items():
        values = np.stack([one[name].astype(np.float64).reshape(1, -1) for one in tensors])
        found[name] = _middle(values, trim).reshape(first.shape).astype(np.float32)
    return found


def average_tensors(updates: Iterable[tuple[float, Mapping[str, npt.NDArray[Any]]]]) -> dict[str, Float32]:
    """Return the weighted mean of tensors of equal names and shapes (the task heads), summed in the given order.

    Args:
        updates: Weight and tensors of each device.

    Raises `ValueError` when the weights sum to zero.
    """
    sums: dict[str, Float64Array] = {}
    total = 0.0
    for weight, tensors in updates:
        for name, tensor in tensors.items():
            sums[name] = sums.get(name, np.zeros(tensor.shape)) + weight * tensor.astype(np.float64)
        total += weight
    if not total > 0:
        raise ValueError("nothing to average: the weights sum to zero")
    return {name: (value / total).astype(np.float32) for name, value in sums.items()}


def _put_dense(target: Float64Array, update: _Update, name: str, start: int, stop: int) -> None:
    """Write rows start..stop of the device's B·A into `target` (stop - start, in), where it keeps them."""
    A, B = update.factors[name]
    rows = update.rows[name]
    first, last = np.searchsorted(rows, (start, stop))
    product = (update.scale * B[first:last].astype(np.float64)) @ A.astype(np.float64)
    target[np.ix_(rows[first:last] - start, update.cols[name])] = product


def _middle(values: Float64Array, trim: float | None) -> Float64Array:
    """Return the median (trim None) or trimmed mean over axis 0 of (k, rows, cols).

    NaN marks elements that a device does not keep.
    """
    values.sort(axis=0)  # NaN last
    count = (~np.isnan(values)).sum(axis=0)
    if trim is None:
        low, high = (np.take_along_axis(values, np.maximum(i, 0)[None], 0)[0] for i in ((count - 1) // 2, count // 2))
        return np.where(count > 0, 0.5 * low + 0.5 * high, 0.0)
    cut = np.maximum((trim * count).astype(np.int64), (count >= 3) & (trim > 0))
    position = np.arange(values.shape[0])[:, None, None]
    inside = (position >= cut) & (position < count - cut)
    kept = np.maximum(inside.sum(axis=0), 1)
    return np.asarray(np.where(inside, values, 0.0).sum(axis=0) / kept)
