"""What the rounds start from: the fleet's adapter, whole in the run's folder and in bands of ranks at the broker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout, union
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.blobs import order_from_tensors
from fedspine_edge.protocol.chunks import BlobStore, ref_of
from fedspine_edge.protocol.codec import Tensor, pack, unpack
from fedspine_edge.protocol.messages import BlobRef, RoundPlan
from fedspine_edge.protocol.rank_slices import slice_by_rank, slice_starts
from fedspine_edge.server.aggregate_round import initial_tensors
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.publisher import ServerPublisher


class AdapterStore:
    """The adapters of one run, each by the JSON of the `BlobRef` of all of it; older ones are deleted.

    Args:
        store: Of the run, which holds the round's updates too.
        journal: Of the run.
        post: Which publishes the bands.
        config: The fleet's settings.
    """

    def __init__(self, store: BlobStore, journal: Journal, post: ServerPublisher, config: FleetConfig) -> None:
        self._store, self._journal, self._post, self._config = store, journal, post, config

    def first(self, spec: ModelSpec) -> str:
        """Keep what round 1 starts from."""
        return self.keep(initial_tensors(self._config, spec))

    def keep(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep the next round's adapter, head and order, in full coordinates."""
        data = pack(tensors)
        self._store.put(data)
        return msgspec.json.encode(ref_of(data)).decode()

    def load(self, kept: str) -> dict[str, Tensor]:
        """What `keep` was given."""
        return unpack(self._store.get(parse_ref(kept).sha256))

    def slice_for_devices(self, kept: str, devices: Iterable[str], spec: ModelSpec) -> list[BlobRef]:
        """Cut it into the bands that these devices need, lowest components first; all other blobs are deleted."""
        self._store.prune([parse_ref(kept).sha256])
        layouts = {device_id: layout for device_id, (layout, _) in self._journal.layouts(spec).items()}
        bands = encode_slices(self.load(kept), devices, layouts, config=self._config, spec=spec)
        for data in bands:
            self._store.put(data)
        return [ref_of(data) for data in bands]

    def of_plans(self, plans: Iterable[RoundPlan]) -> list[tuple[BlobRef, bytes]]:
        """The bands that any of `plans` names."""
        refs = {ref.sha256: ref for plan in plans for ref in plan.adapter}
        return [(ref, self._store.get(ref.sha256)) for ref in refs.values()]

    def clear(self) -> None:
        """Remove the chunks of every round so far from the broker."""
        for ref in self._journal.published():
            if self._post.clear(ref):
                self._journal.forget_published(ref.sha256)


def parse_ref(kept: str) -> BlobRef:
    """The name of an adapter as a whole."""
    return msgspec.json.decode(kept, type=BlobRef)


def encode_slices(
    tensors: Mapping[str, Tensor],
    devices: Iterable[str],
    layouts: Mapping[str, Layout],
    *,
    config: FleetConfig,
    spec: ModelSpec,
) -> list[bytes]:
    """The bands of a round as bytes.

    Args:
        tensors: What the round starts from, in full coordinates.
        devices: Those that are asked to take part.
        layouts: By device what it keeps; a device that is not in it keeps everything.
        config: The fleet's settings.
        spec: The fleet's model.
    """
    order = order_from_tensors(spec, tensors) if config.layout == "consensus" else None
    held = [layouts.get(device_id) or Layout.full(spec) for device_id in sorted(devices)]
    if order is not None:  # devices start from the common order, whatever they held before
        held = [Layout.prefix(spec, order, layout.counts) for layout in held]
    return [pack(band) for band in slice_by_rank(tensors, config.ranks, union(held), config.download_dtype)]


def slices_for_rank(refs: Sequence[BlobRef], config: FleetConfig, r: int) -> tuple[BlobRef, ...]:
    """The bands that hold the first `r` components. Raises `ConfigError` for a rank that the adapter does not have."""
    if r > max(config.ranks):
        raise ConfigError(f"the strategy assigned rank {r}; the largest of ranks is {max(config.ranks)}.")
    return tuple(
        ref for ref, start in zip(refs, slice_starts(config.ranks, max(config.ranks)), strict=True) if start < r
    )
