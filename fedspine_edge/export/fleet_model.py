"""Builds the model of a finished fleet run: the base model, pruned to the fleet's layout, with the global adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.numpy import load

from fedspine_edge.errors import CheckpointError, ConfigError, LayoutError
from fedspine_edge.files import LAYOUT
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.loading import load_base
from fedspine_edge.model.manifest import FleetLayout
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.protocol.codec import digest


@dataclass(frozen=True)
class FinishedModel:
    """A model folder that was built from a fleet run.

    Attributes:
        folder: The model folder.
        layout: Kept heads and channels of every layer.
        num_parameters: Number of parameters.
    """

    folder: Path
    layout: Layout
    num_parameters: int

    @property
    def widths(self) -> dict[str, Any]:
        """Kept and original widths of every layer, in the form that `charts.widths` draws."""
        return {
            "heads": [heads for heads, _ in self.layout.counts],
            "channels": [channels for _, channels in self.layout.counts],
            "full_heads": self.layout.spec.num_kv_heads,
            "full_channels": self.layout.spec.intermediate_size,
        }


def build_finished_model(run_dir: Path, base: Path, out: Path, *, pruned: bool = True) -> FinishedModel:
    """Build the fleet's model from `run_dir/final` and the base model, and save it to `out`.

    Args:
        run_dir: Run folder of the server; the run must be finished.
        base: Base model that the fleet trained; its digest is checked.
        out: Folder to write; it is replaced atomically.
        pruned: Whether to remove heads and channels. False only adds the adapter, for comparison.

    Raises:
        ConfigError: The run is not finished.
        CheckpointError: A file of the run is damaged, or `base` is another model.
    """
    final = run_dir / "final"
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} does not exist.", remedy="Give the run_dir of a server that has finished.")
    if not final.is_dir():
        raise ConfigError(
            f"{run_dir} contains no finished run.",
            remedy="Start the server on it again; it continues where it stopped.",
        )
    model = load_fleet_model(final, base, pruned=pruned)
    save_model(model, out)
    return FinishedModel(out, model.layout, model.num_parameters())


def load_fleet_model(final: Path, base: str | Path, *, pruned: bool = True) -> PrunableModel:
    """Load the model that a fleet trained.

    Args:
        final: `final` folder of the server's run, with `adapter.safetensors` and `layout.json`.
        base: Base model that the devices trained.
        pruned: Whether to remove heads and channels; False only adds the adapter.

    Raises `CheckpointError` if a file is missing or damaged, or if `base` is another model than the fleet's.
    """
    fleet_layout = _read_layout(final / LAYOUT)
    adapter_bytes = _read(final / "adapter.safetensors")
    try:
        layout = fleet_layout.to_layout()
    except LayoutError as error:
        raise CheckpointError(f"{final / LAYOUT} is not the layout of a fleet: {error.message}") from error
    if digest(adapter_bytes) != fleet_layout.adapter_sha256:
        raise CheckpointError(
            f"{final / 'adapter.safetensors'} was altered after the run wrote it: its hash differs.",
            remedy="Copy the run folder again.",
        )
    try:
        adapter = load(adapter_bytes)
    except SafetensorError as error:
        raise CheckpointError(f"{final / 'adapter.safetensors'} cannot be read: {error}.") from error
    spec = fleet_layout.spec
    model = load_base(base, task=fleet_layout.task, num_labels=fleet_layout.num_labels, seed=fleet_layout.seed)
    if model.spec.base_sha256 != spec.base_sha256:
        raise CheckpointError(
            f"{base} is not the model that the fleet trained: the digest of its weights is "
            f"{model.spec.base_sha256[:12]}…, that of the fleet is {spec.base_sha256[:12]}….",
            remedy="Give the base model that the devices have.",
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
