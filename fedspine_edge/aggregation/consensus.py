"""The consensus order: one order of heads and channels for the whole fleet, from the scores of its devices.

A device at any pruning ratio keeps a prefix of the order, so all layouts are nested and one model exists for every
ratio. To stay nested over rounds, groups that any device has removed keep their position at the end of the order, and
only groups that all devices still keep are ranked again. Heads and channels are handled alike, in separate calls.
Source: docs/concepts/pruning.md, "Groups".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedspine_edge.arrays import Float64Array

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DeviceScores:
    """One device's scores of heads, or of channels, from an accepted update.

    Attributes:
        weight: Number of training examples of the device.
        layers: Per layer (original indices, scores), both of shape (groups scored,).
    """

    weight: float
    layers: tuple[tuple[npt.NDArray[np.integer], npt.NDArray[np.floating]], ...]


def average_scores(scores: Sequence[DeviceScores], sizes: Sequence[int]) -> tuple[Float64Array, ...]:
    """Return per layer the (size,) weighted mean score of every group; NaN where no device scored it.

    Each device's scores of a layer are divided by their root mean square over the groups that all devices scored
    there, so that neither large gradients nor many remaining groups give a device more influence. A layer in which all
    scores of a device are zero does not count.

    Args:
        scores: Scores of the devices, sorted by device id for bit-identical results.
        sizes: Number of groups in each layer of the unpruned model.
    """
    return tuple(_average_layer([(s.weight, *s.layers[i]) for s in scores], size) for i, size in enumerate(sizes))


def kept_by_all(kept: Sequence[Sequence[npt.NDArray[np.integer]]], sizes: Sequence[int]) -> tuple[Indices, ...]:
    """Return per layer the ascending groups that every device still keeps; all groups when there is no device.

    Args:
        kept: Per device and layer the kept original indices.
        sizes: Number of groups in each layer of the unpruned model.
    """
    common = [np.arange(size) for size in sizes]
    for device in kept:
        common = [np.intersect1d(index, other) for index, other in zip(common, device, strict=True)]
    return tuple(index.astype(np.int64) for index in common)


def update_order(
    previous: Sequence[npt.NDArray[np.integer]] | None, scores: Sequence[Float64Array], held: Sequence[Indices]
) -> tuple[Indices, ...]:
    """Return per layer all groups from most to least important.

    Groups in `held` come first, highest score first, ties by index; those without a score (NaN) follow in their
    previous order. All others come last, in the sequence they have in `previous`. Any set of groups that contains all
    of `held` and was a prefix of `previous` is a prefix of the result.

    Args:
        previous: The previous order; None in the first round, in which groups outside `held` are ranked by score too.
        scores: Per layer (size,) scores, from `average_scores`.
        held: Per layer the groups that all devices keep, from `kept_by_all`.
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


def _ranked(groups: npt.NDArray[np.integer], score: Float64Array) -> Indices:
    """Return `groups` by decreasing score, ties by index; those without a score come last, in the given order."""
    has_score = ~np.isnan(score[groups])
    known = groups[has_score]
    return np.concatenate([known[np.lexsort((known, -score[known]))], groups[~has_score]]).astype(np.int64)


def _average_layer(
    scored: Sequence[tuple[float, npt.NDArray[np.integer], npt.NDArray[np.floating]]], size: int
) -> Float64Array:
    common = np.arange(size)
    for weight, index, _ in scored:
        if weight > 0 and index.size:
            common = np.intersect1d(common, index)
    total, weights = np.zeros(size), np.zeros(size)
    for weight, index, values in scored:
        score = values.astype(np.float64)
        basis = score[np.isin(index, common)]
        if not basis.any():
            basis = score
        unit = math.sqrt(float((basis**2).mean())) if basis.size else 0.0
        if weight > 0 and unit > 0:
            total[index] += weight * (score / unit)
            weights[index] += weight
    mean: Float64Array = np.divide(total, weights, out=np.full(size, np.nan), where=weights > 0)
    return mean
