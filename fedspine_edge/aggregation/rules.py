"""Combining the adapters of many devices, of different rank and different kept groups, into one.

| rule         | what is averaged                    | weights | divided by          | memory           |
|--------------|-------------------------------------|---------|---------------------|------------------|
| reconstruct  | B·A, exactly                        | given   | holders' weight     | does not grow    |
| zero_pad     | A and B separately, padded (HetLoRA)| given   | holders' weight     | does not grow    |
| stack        | B·A (FLoRA), then cut to r_max      | given   | everyone's weight   | does not grow    |
| svd          | B·A (FlexLoRA)                      | equal   | holders' weight     | does not grow    |
| trimmed_mean | B·A per element, extremes left out  | equal   | holders in the trim | one copy/device  |
| median       | B·A per element                     | equal   | -                   | one copy/device  |

Devices are folded in the order of `add`; a caller that adds in order of device_id gets the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedspine_edge.aggregation.factored import (
    DEAD,
    MAX_STACK_RANK,
    Array,
    Decomposition,
    Float32,
    Indices,
    LowRank,
    LowRankSum,
    Shape,
    balanced,
    decompose_dense,
    fresh_rows,
    prefix_energy,
    product_norm,
)
from fedspine_edge.errors import ConfigError, UpdateRejected

Rule = Literal["reconstruct", "zero_pad", "stack", "svd", "trimmed_mean", "median"]
Factors = Mapping[str, tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]]

BLOCK_ELEMENTS = 4_000_000
"""Elements a robust rule sorts at a time: 32 MB, whatever the size of the module."""


@dataclass(frozen=True)
class Aggregate:
    """The fleet's adapter after a round.

    Attributes:
        factors: Per module (A, B) with A (r_max, in) and B (out, r_max), float32, full coordinates.
        energy: Per module (r_max,); entry i is the share of ‖dW‖² that rank i + 1 keeps.
        singular_values: Per module (r_max,) of dW, scaling included.
        discarded: Share of ‖dW‖² lost to bounding memory, for the (very large) modules where there was any.
        clipped: Factor below 1 by which a device's update was scaled down, for those that were.
        num_devices: Devices folded in, those of weight zero included.
    """

    factors: dict[str, tuple[Float32, Float32]]
    energy: dict[str, Array]
    singular_values: dict[str, Array]
    discarded: dict[str, float] = field(default_factory=dict)
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
    """Folds device updates, then gives the fleet's adapter.

    Args:
        rule: See the table above.
        shapes: (out, in) of every unpruned module.
        r_max: Rank of the result, and the largest a device may have.
        scaling: lora_alpha / r, the same for every rank.
        seed: Of the fresh rows of A for components that carry nothing.
        clip_norm: Scale an update whose ‖B·A‖ over all modules exceeds this multiple of the devices' median
            down to it; 0 is off. Keeps every update in memory until `finish`.
        trim: Share of the holders left out at either end by `trimmed_mean`, at least one where three or more hold.
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
        clip_norm: float = 0.0,
        trim: float = 0.2,
        max_stack_rank: int = MAX_STACK_RANK,
    ) -> None:
        if rule not in get_args(Rule):
            raise ConfigError(f"aggregation rule {rule!r} is unknown.", remedy=f"One of: {', '.join(get_args(Rule))}.")
        if r_max < 1 or not scaling > 0 or clip_norm < 0 or not 0 <= trim < 0.5:
            raise ConfigError(
                f"aggregation needs r_max ≥ 1, scaling > 0, clip_norm ≥ 0 and 0 ≤ trim < 0.5; "
                f"got {r_max}, {scaling}, {clip_norm}, {trim}."
            )
        self.rule: Rule = rule
        self.shapes = dict(shapes)
        self.r_max, self.scaling, self.seed = r_max, scaling, seed
        self._clip_norm, self._trim, self._max_stack_rank = clip_norm, trim, max_stack_rank
        self._pruned_axis: dict[str, str] = {}
        self._buffered: list[_Update] = []
        self._num_devices = 0
        self._streams = clip_norm == 0 and rule not in ("trimmed_mean", "median")
        self._sums = self._new_sums()

    def add(
        self,
        device_id: str,
        weight: float,
        factors: Factors,
        rows: Mapping[str, Indices],
        cols: Mapping[str, Indices],
    ) -> None:
        """Fold in one device.

        Args:
            device_id: Named in errors.
            weight: Not negative; a device of weight zero changes nothing.
            factors: Per module (A, B) in compact coordinates, A (r, kept in) and B (kept out, r). A module that
                is absent counts as not held.
            rows: Per module the original indices of B's rows, ascending.
            cols: Per module the original indices of A's columns, ascending.

        Raises `UpdateRejected` naming the module; nothing of the update has been folded in then.
        """
        axes = self._check(device_id, weight, factors, rows, cols)
        self._pruned_axis.update(axes)
        self._num_devices += 1
        update = _Update(device_id, weight, factors, rows, cols)
        if self._streams:
            self._fold(self._sums, update)
        else:
            self._buffered.append(update)

    def finish(self) -> Aggregate:
        """The aggregate of what was added; more may be added afterwards.

        Raises `ValueError` when nothing was added.
        """
        if self._num_devices == 0:
            raise ValueError("nothing to aggregate: no device was added")
        updates, clipped = self._clip(self._buffered)
        if self.rule in ("trimmed_mean", "median"):
            found = {name: self._robust(name, updates) for name in self.shapes}
            return self._aggregate(found, {}, clipped)
        sums = self._sums
        if not self._streams:
            sums = self._new_sums()
            for update in updates:
                self._fold(sums, update)
        found = {name: total.result(self, name) for name, total in sums.items()}
        discarded = {name: total.discarded for name, total in sums.items() if isinstance(total, _Products)}
        return self._aggregate(found, discarded, clipped)

    def _aggregate(
        self, found: Mapping[str, LowRank], discarded: Mapping[str, float], clipped: dict[str, float]
    ) -> Aggregate:
        return Aggregate(
            factors={name: (low.A, low.B) for name, low in found.items()},
            energy={name: low.energy for name, low in found.items()},
            singular_values={name: low.singular_values for name, low in found.items()},
            discarded={name: share for name, share in discarded.items() if share > 0},
            clipped=clipped,
            num_devices=self._num_devices,
        )

    def _new_sums(self) -> dict[str, _Products | _Padded]:
        if self.rule == "zero_pad":
            return {name: _Padded(shape, self.r_max) for name, shape in self.shapes.items()}
        return {
            name: _Products(LowRankSum(shape, max_stack_rank=self._max_stack_rank), per_holder=self.rule != "stack")
            for name, shape in self.shapes.items()
        }

    def _fold(self, sums: Mapping[str, _Products | _Padded], update: _Update) -> None:
        weight = float(update.weight > 0) if self.rule == "svd" else update.weight
        for name, total in sums.items():
            if name in update.factors:
                A, B = update.factors[name]
                total.add(weight, A, update.scale * B.astype(np.float64), update.rows[name], update.cols[name])
            else:
                total.skip(weight)

    def _clip(self, updates: list[_Update]) -> tuple[list[_Update], dict[str, float]]:
        if self._clip_norm == 0:
            return updates, {}
        norms = [math.sqrt(sum(product_norm(A, B) ** 2 for A, B in u.factors.values())) for u in updates]
        # A device of weight zero has no say in what is usual.
        counted = [norm for norm, update in zip(norms, updates) if update.weight > 0]
        limit = self._clip_norm * float(np.median(counted)) if counted else math.inf
        result, clipped = [], {}
        for update, norm in zip(updates, norms):
            scale = limit / norm if norm > limit else 1.0
            if scale < 1.0:
                clipped[update.device_id] = scale
            result.append(_Update(update.device_id, update.weight, update.factors, update.rows, update.cols, scale))
        return result, clipped

    def _robust(self, name: str, updates: list[_Update]) -> LowRank:
        shape = self.shapes[name]
        holders = [u for u in updates if u.weight > 0 and name in u.factors]
        combined: Array = np.zeros(shape)
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

    def _check(
        self,
        device_id: str,
        weight: float,
        factors: Factors,
        rows: Mapping[str, Indices],
        cols: Mapping[str, Indices],
    ) -> dict[str, str]:
        """The axis along which each of the update's modules is pruned, if it is."""
        if not (math.isfinite(weight) and weight >= 0):
            raise UpdateRejected(f"update of {device_id}: weight {weight} must be finite and not negative.")
        axes: dict[str, str] = {}
        for name, (A, B) in factors.items():
            where = f"update of {device_id}, {name}"
            if name not in self.shapes:
                raise UpdateRejected(f"{where}: the fleet's model has no such module.")
            if name not in rows or name not in cols:
                raise UpdateRejected(f"{where}: its kept rows or columns are not given.")
            out_features, in_features = self.shapes[name]
            for what, index, limit in (("rows", rows[name], out_features), ("columns", cols[name], in_features)):
                if index.ndim != 1 or index.size == 0 or not np.issubdtype(index.dtype, np.integer):
                    raise UpdateRejected(f"{where}: kept {what} must be a non-empty vector of integers.")
                if index[0] < 0 or index[-1] >= limit or (np.diff(index) <= 0).any():
                    raise UpdateRejected(f"{where}: kept {what} must ascend within 0..{limit - 1}.")
            expected = (rows[name].size, cols[name].size)
            fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and (B.shape[0], A.shape[1]) == expected
            if not fits or not 1 <= A.shape[0] <= self.r_max:
                raise UpdateRejected(
                    f"{where}: A {A.shape} and B {B.shape} must be (r, {expected[1]}) and ({expected[0]}, r) "
                    f"with r in 1..{self.r_max}."
                )
            if not (np.isfinite(A).all() and np.isfinite(B).all()):
                raise UpdateRejected(f"{where}: contains NaN or infinity.")
            pruned = [axis for axis, n, full in zip(("rows", "columns"), expected, self.shapes[name]) if n < full]
            known = self._pruned_axis.get(name)
            if len(pruned) == 2 or (pruned and known and known != pruned[0]):
                raise UpdateRejected(f"{where}: a module loses rows or columns over the whole fleet, never both.")
            if pruned:
                axes[name] = pruned[0]
        return axes


class _Products:
    """Running sum of one module for the rules that average B·A."""

    def __init__(self, total: LowRankSum, *, per_holder: bool) -> None:
        self._total = total
        self._per_holder = per_holder

    def add(self, weight: float, A: Any, B: Any, rows: Indices, cols: Indices) -> None:
        self._total.add(weight, A, B, rows, cols)

    def skip(self, weight: float) -> None:
        """A device without this module counts among all, not among the holders."""
        if not self._per_holder:
            self._total.total_weight += weight

    def result(self, settings: Aggregator, name: str) -> LowRank:
        mean = self._total.decompose(per_holder=self._per_holder)
        scaling = settings.scaling
        scaled = Decomposition(mean.U, mean.S * scaling, mean.Vt, mean.total * scaling**2)
        return balanced(scaled, r=settings.r_max, scaling=scaling, name=name, seed=settings.seed)

    @property
    def discarded(self) -> float:
        return self._total.discarded_share


class _Padded:
    """Running sums of one module for HetLoRA: A and B averaged apart, lower ranks padded with zeros.

    Biased, since the mean of products is not the product of means; here as the baseline that it is.
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
        energy = prefix_energy(A, B)
        singular_values = np.zeros(settings.r_max)
        core = np.linalg.svd(np.linalg.qr(B)[1] @ np.linalg.qr(A.T)[1].T, compute_uv=False)
        singular_values[: core.size] = core * settings.scaling
        strength = np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=0)
        dead = strength <= DEAD * strength.max()
        A[dead] = fresh_rows(name, A.shape[1], settings.r_max, settings.seed)[dead]
        B[:, dead] = 0.0
        return LowRank(A.astype(np.float32), B.astype(np.float32), singular_values, energy)


def average_tensors(updates: Iterable[tuple[float, Mapping[str, npt.NDArray[Any]]]]) -> dict[str, Float32]:
    """Weighted mean of tensors of equal names and shapes (the task heads, by num_examples), in the order given.

    Raises `UpdateRejected` when names or shapes differ or a value is not finite, and `ValueError` when the
    weights sum to zero.
    """
    sums: dict[str, Array] = {}
    total = 0.0
    for position, (weight, tensors) in enumerate(_checked_weights(updates)):
        if position and tensors.keys() != sums.keys():
            raise UpdateRejected(f"task heads differ in their tensors: {sorted(tensors.keys() ^ sums.keys())[:3]}.")
        for name, tensor in tensors.items():
            if name in sums and sums[name].shape != tensor.shape:
                raise UpdateRejected(f"{name} is {tensor.shape} on one device and {sums[name].shape} on another.")
            if not np.isfinite(tensor).all():
                raise UpdateRejected(f"{name} contains NaN or infinity.")
            sums[name] = sums.get(name, np.zeros(tensor.shape)) + weight * tensor.astype(np.float64)
        total += weight
    if not total > 0:
        raise ValueError("nothing to average: the weights sum to zero")
    return {name: (value / total).astype(np.float32) for name, value in sums.items()}


def _checked_weights(
    updates: Iterable[tuple[float, Mapping[str, npt.NDArray[Any]]]],
) -> Iterator[tuple[float, Mapping[str, npt.NDArray[Any]]]]:
    for weight, tensors in updates:
        if not (math.isfinite(weight) and weight >= 0):
            raise UpdateRejected(f"weight {weight} must be finite and not negative.")
        yield weight, tensors


def _put_dense(target: Array, update: _Update, name: str, start: int, stop: int) -> None:
    """Write rows start..stop of the device's B·A into `target` (stop - start, in), where it holds them."""
    A, B = update.factors[name]
    rows = update.rows[name]
    first, last = np.searchsorted(rows, (start, stop))
    product = (update.scale * B[first:last].astype(np.float64)) @ A.astype(np.float64)
    target[np.ix_(rows[first:last] - start, update.cols[name])] = product


def _middle(values: Array, trim: float | None) -> Array:
    """Median (trim None) or trimmed mean over axis 0 of (k, rows, cols); NaN marks what a device does not hold."""
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
