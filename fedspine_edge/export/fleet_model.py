"""A finished fleet run as a model: the base, compacted to the fleet's layout, with the global adapter in it."""

from __future__ import annotations

from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.numpy import load

from fedspine_edge.errors import CheckpointError, LayoutError
from fedspine_edge.files import LAYOUT
from fedspine_edge.model.loading import load_base
from fedspine_edge.model.manifest import FleetLayout
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.protocol.codec import digest


def load_fleet_model(final: Path, base: str | Path, *, pruned: bool = True) -> PrunableModel:
    """Load the model that a fleet trained.

    Args:
        final: The `final` folder of the server's run: `adapter.safetensors` and `layout.json`.
        base: The base model that the devices trained on.
        pruned: False keeps every head and channel and only adds the adapter.

    Raises `CheckpointError` for missing or damaged files, or for another base model than the fleet's.
    """
    fleet_layout = _read_layout(final / LAYOUT)
    adapter_bytes = _read(final / "adapter.safetensors")
    try:
        layout = fleet_layout.to_layout()
    except LayoutError as error:
        raise CheckpointError(f"{final / LAYOUT} is not the layout of a fleet: {error.message}") from error
    if digest(adapter_bytes) != fleet_layout.adapter_sha256:
        raise CheckpointError(
            f"{final / 'adapter.safetensors'} is not the file that the run wrote (its hash differs).",
            remedy="Copy the run's folder again.",
        )
    try:
        adapter = load(adapter_bytes)
    except SafetensorError as error:
        raise CheckpointError(f"{final / 'adapter.safetensors'} cannot be read: {error}.") from error
    spec = fleet_layout.spec
    model = load_base(base, task=fleet_layout.task, num_labels=fleet_layout.num_labels, seed=fleet_layout.seed)
    if model.spec.base_sha256 != spec.base_sha256:
        raise CheckpointError(
            f"{base} is not the model that the fleet trained: its weights have the digest "
            f"{model.spec.base_sha256[:12]}…, the fleet's {spec.base_sha256[:12]}….",
            remedy="Give the same base model that the devices have.",
        )
    if pruned:
        model.compact(layout)
    model.load_adapter(adapter, scaling=fleet_layout.scaling)
    model.trained_examples, model.trained_steps = fleet_layout.trained_examples, fleet_layout.trained_steps
    return model


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _read_layout(path: Path) -> FleetLayout:
    data = _read(path)
    try:
        return msgspec.json.decode(data, type=FleetLayout)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} is not the layout of a fleet: {error}.") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
