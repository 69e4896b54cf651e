"""One order of heads and channels for the whole fleet, from the scores of its devices.

A device at any pruning ratio keeps a prefix of the order, so all layouts nest and one model exists for every
ratio. To stay nested over rounds the order is append-only at its tail: what any device has removed keeps its
place, and only groups that everyone still holds are ranked anew. Heads and channels are handled alike, in
separate calls. Source: docs/algorithms.md, "Groups".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedspine_edge.errors import UpdateRejected

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DeviceScores:
    """One device's scores of heads, or of channels.

    Attributes:
        weight: Its num_examples.
        layers: Per layer (original indices, scores), both of shape (groups scored,).
    """

    weight: float
    layers: tuple[tuple[npt.NDArray[np.integer], npt.NDArray[np.floating]], ...]


def average_scores(ballots: Sequence[DeviceScores], sizes: Sequence[int]) -> tuple[Array, ...]:
    """Per layer the (size,) weighted mean score of every group; NaN where nobody scored it.

    Each device's scores of a layer are divided by their root mean square over the groups that all devices scored
    there, so that neither large gradients nor many remaining groups give a device more say. A layer that a device
    scored only with zeros does not count.

    Args:
        ballots: In order of device_id, for equal bits on every run.
        sizes: Groups of each layer of the unpruned model.

    Raises `UpdateRejected` for indices out of range or repeated, and for scores that are not finite.
    """
    for ballot in ballots:
        _check(ballot, sizes)
    return tuple(_average_layer([(b.weight, *b.layers[i]) for b in ballots], size) for i, size in enumerate(sizes))


def kept_by_all(kept: Sequence[Sequence[npt.NDArray[np.integer]]], sizes: Sequence[int]) -> tuple[Indices, ...]:
    """Per layer the ascending groups that every device still holds; all of them when there is no device.

    Args:
        kept: Per device, per layer the kept original indices.
        sizes: Groups of each layer of the unpruned model.
    """
    common = [np.arange(size) for size in sizes]
    for device in kept:
        common = [np.intersect1d(mine, theirs) for mine, theirs in zip(common, device, strict=True)]
    return tuple(index.astype(np.int64) for index in common)


def update_order(
    previous: Sequence[npt.NDArray[np.integer]] | None, scores: Sequence[Array], held: Sequence[Indices]
) -> tuple[Indices, ...]:
    """Per layer all groups from most to least important.

    Groups in `held` come first, highest score first, ties by index; those without a score (NaN) follow in their
    previous order. All others keep the sequence they have in `previous`, behind them. Any set of groups that
    contains all of `held` and was a prefix of `previous` is a prefix of the result.

    Args:
        previous: The last order, or None in the first round; then groups outside `held` are ranked by score too.
        scores: Per layer (size,), from `average_scores`.
        held: Per layer, from `kept_by_all`.
    """
    if previous is None:
        previous = tuple(_ranked(np.arange(score.size), score) for score in scores)
    orders = []
    for before, score, free in zip(previous, scores, held, strict=True):
        if not np.array_equal(np.sort(before), np.arange(score.size)):
            raise ValueError(f"previous order is not a permutation of 0..{score.size - 1}")
        is_free = np.isin(before, free)
        orders.append(np.concatenate([_ranked(before[is_free], score), before[~is_free]]).astype(np.int64))
    return tuple(orders)


def _ranked(groups: npt.NDArray[np.integer], score: Array) -> Indices:
    """`groups` by falling score, ties by index; those without a score last, as they came."""
    scored = ~np.isnan(score[groups])
    known = groups[scored]
    return np.concatenate([known[np.lexsort((known, -score[known]))], groups[~scored]]).astype(np.int64)


def _average_layer(
    votes: Sequence[tuple[float, npt.NDArray[np.integer], npt.NDArray[np.floating]]], size: int
) -> Array:
    common = np.arange(size)
    for weight, index, _ in votes:
        if weight > 0 and index.size:
            common = np.intersect1d(common, index)
    total, weights = np.zeros(size), np.zeros(size)
    for weight, index, values in votes:
        score = values.astype(np.float64)
        basis = score[np.isin(index, common)]
        if not basis.any():
            basis = score
        unit = math.sqrt(float((basis**2).mean())) if basis.size else 0.0
        if weight > 0 and unit > 0:
            total[index] += weight * (score / unit)
            weights[index] += weight
    mean: Array = np.divide(total, weights, out=np.full(size, np.nan), where=weights > 0)
    return mean


def _check(ballot: DeviceScores, sizes: Sequence[int]) -> None:
    if len(ballot.layers) != len(sizes):
        raise UpdateRejected(f"scores cover {len(ballot.layers)} layers, the model has {len(sizes)}.")
    if not (math.isfinite(ballot.weight) and ballot.weight >= 0):
        raise UpdateRejected(f"scores have weight {ballot.weight}; it must be finite and not negative.")
    for layer, ((index, values), size) in enumerate(zip(ballot.layers, sizes)):
        if index.ndim != 1 or index.shape != values.shape:
            raise UpdateRejected(f"layer {layer}: {values.shape} scores for {index.shape} groups.")
        if index.size and (index.min() < 0 or index.max() >= size or np.unique(index).size != index.size):
            raise UpdateRejected(f"layer {layer}: scored groups must be unique and within 0..{size - 1}.")
        if not np.isfinite(values).all():
            raise UpdateRejected(f"layer {layer}: scores contain NaN or infinity.")
