"""Stores the global adapter in the run folder and slices it by rank for the devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout, union
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.blobs import order_from_tensors
from fedspine_edge.protocol.chunks import BlobStore, ref_of
from fedspine_edge.protocol.codec import Tensor, pack, unpack
from fedspine_edge.protocol.messages import BlobRef, RoundPlan
from fedspine_edge.protocol.rank_slices import slice_by_rank, slice_starts

Blob = tuple[BlobRef, bytes]


class AdapterStore:
    """The global adapter, task head and order of a run, before and after each round.

    Args:
        store: Blob store of the run, which also holds the round's updates.
        config: Settings of the fleet.
    """

    def __init__(self, store: BlobStore, config: FleetConfig) -> None:
        self._store, self._config = store, config
        self._newest: tuple[BlobRef, dict[str, Tensor]] | None = None

    def put(self, tensors: Mapping[str, Tensor]) -> BlobRef:
        """Store adapter, head and order in full coordinates."""
        data = pack(tensors)
        self._store.put(data)
        ref = ref_of(data)
        self._newest = ref, {name: np.asarray(value, order="C") for name, value in tensors.items()}
        return ref

    def load(self, ref: BlobRef) -> dict[str, Tensor]:
        """Return what `put` stored; the disk is read only after a restart."""
        if self._newest is None or self._newest[0] != ref:
            self._newest = ref, unpack(self._store.get(ref.sha256))
        return self._newest[1]

    def slice_for_devices(
        self, ref: BlobRef, devices: Iterable[str], layouts: Mapping[str, Layout], spec: ModelSpec
    ) -> list[Blob]:
        """Slice the adapter for the devices of a round, lowest components first, and store the slices.

        All other blobs are deleted: the updates of earlier rounds are part of the adapter.

        Args:
            ref: The adapter.
            devices: Ids of the devices that take part.
            layouts: What each device keeps; a device that is absent keeps everything.
            spec: Model of the fleet.
        """
        self._store.prune([ref.sha256])
        slices = encode_slices(self.load(ref), devices, layouts, config=self._config, spec=spec)
        for data in slices:
            self._store.put(data)
        return [(ref_of(data), data) for data in slices]

    def load_slices(self, plans: Iterable[RoundPlan]) -> list[Blob]:
        """Return the slices that any of `plans` refers to."""
        refs = {ref.sha256: ref for plan in plans for ref in plan.adapter}
        return [(ref, self._store.get(ref.sha256)) for ref in refs.values()]


def encode_slices(
    tensors: Mapping[str, Tensor],
    devices: Iterable[str],
    layouts: Mapping[str, Layout],
    *,
    config: FleetConfig,
    spec: ModelSpec,
) -> list[bytes]:
    """Return the encoded slices of a round, lowest components first.

    Args:
        tensors: What the round starts from, in full coordinates.
        devices: Ids of the devices that take part.
        layouts: What each device keeps; a device that is absent keeps everything.
        config: Settings of the fleet.
        spec: Model of the fleet.
    """
    order = order_from_tensors(spec, tensors) if config.layout == "consensus" else None
    held = [layouts.get(device_id) or Layout.full(spec) for device_id in sorted(devices)]
    if order is not None:  # devices start from the common order, whatever they kept before
        held = [Layout.prefix(spec, order, layout.counts) for layout in held]
    return [pack(one) for one in slice_by_rank(tensors, config.ranks, union(held), config.download_dtype)]


def slices_for_rank(refs: Sequence[BlobRef], config: FleetConfig, r: int) -> tuple[BlobRef, ...]:
    """Return the slices that hold the first `r` components. Raises `ConfigError` for a rank above the largest."""
    if r > max(config.ranks):
        raise ConfigError(f"the strategy assigned rank {r}; the largest of ranks is {max(config.ranks)}.")
    return tuple(
        ref for ref, start in zip(refs, slice_starts(config.ranks, max(config.ranks)), strict=True) if start < r
    )
