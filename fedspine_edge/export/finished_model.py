"""From a fleet run to a model folder: the base, compacted to the fleet's layout, with the global adapter in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.model.layout import Layout


@dataclass(frozen=True)
class FinishedModel:
    """A model folder built from a run, and what is known of it."""

    folder: Path
    layout: Layout
    num_parameters: int

    @property
    def widths(self) -> dict[str, Any]:
        """What each layer keeps, as `charts.widths` takes it."""
        return widths_of(self.layout)


def widths_of(layout: Layout) -> dict[str, Any]:
    """What each layer of `layout` keeps, as `charts.widths` takes it."""
    return {
        "heads": [heads for heads, _ in layout.counts],
        "channels": [channels for _, channels in layout.counts],
        "full_heads": layout.spec.num_kv_heads,
        "full_channels": layout.spec.intermediate_size,
    }


def build_finished_model(run_dir: Path, base: Path, out: Path, *, pruned: bool = True) -> FinishedModel:
    """Build the fleet's model from `run_dir/final` and the base model, and save it to `out`.

    Args:
        run_dir: The server's run folder; the run must be finished.
        base: The base model the fleet trained, checked by digest.
        out: Folder to write; replaced atomically.
        pruned: False keeps every head and channel and only adds the adapter, for comparison.

    Raises:
        ConfigError: The run is not finished.
        CheckpointError: Files of the run are damaged, or `base` is another model.
    """
    from fedspine_edge.export.fleet_model import load_fleet_model

    final = run_dir / "final"
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} does not exist.", remedy="Give the run_dir of a server that has finished.")
    if not final.is_dir():
        raise ConfigError(
            f"{run_dir} holds no finished run.", remedy="Start the server on it again; it continues where it stopped."
        )
    model = load_fleet_model(final, base, pruned=pruned)
    save_model(model, out)
    return FinishedModel(out, model.layout, model.num_parameters())
