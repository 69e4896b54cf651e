"""What a round sends of its adapter: one blob a band, and which of them a device of rank r is told to fetch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError
from fedspine_edge.model.bands import cut, starts
from fedspine_edge.model.layout import Layout, union
from fedspine_edge.server.fold import order_of
from fedspine_edge.wire.codec import Tensor, pack
from fedspine_edge.wire.messages import BlobRef, ModelSpec


def packed(
    tensors: Mapping[str, Tensor],
    devices: Iterable[str],
    layouts: Mapping[str, tuple[Layout, float]],
    *,
    config: FleetConfig,
    spec: ModelSpec,
) -> list[bytes]:
    """The blobs of a round, lowest components first.

    Args:
        tensors: What the round starts from, in full coordinates.
        devices: Those that are asked to take part.
        layouts: By device what it keeps, and the ratio it reported; a device that is not in it keeps everything.
        config: The fleet's settings.
        spec: The fleet's model.
    """
    order = order_of(tensors, spec) if config.layout == "consensus" else None
    kept = [layouts[i][0] if i in layouts else Layout.full(spec) for i in sorted(devices)]
    if order is not None:  # devices start from the common order, whatever they held before
        kept = [Layout.prefix(spec, order, layout.counts) for layout in kept]
    return [pack(band) for band in cut(tensors, config.ranks, union(kept), config.download_dtype)]


def needed(refs: Sequence[BlobRef], config: FleetConfig, r: int) -> tuple[BlobRef, ...]:
    """The blobs that hold the first `r` components. Raises `ConfigError` for a rank that the adapter does not have."""
    if r > max(config.ranks):
        raise ConfigError(f"the strategy assigned rank {r}; the largest of ranks is {max(config.ranks)}.")
    return tuple(ref for ref, start in zip(refs, starts(config.ranks, max(config.ranks)), strict=True) if start < r)
