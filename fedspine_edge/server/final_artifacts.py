"""Writes `run_dir/final` at the end of a run: the global adapter, the layout of the model, and a summary."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from fedspine_edge.config import FleetConfig
from fedspine_edge.files import LAYOUT
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.manifest import FleetLayout
from fedspine_edge.protocol.blobs import adapter_and_head
from fedspine_edge.protocol.codec import Tensor, digest, pack
from fedspine_edge.server.journal.schema import RoundView

ADAPTER, RUN = "adapter.safetensors", "run.json"


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        run_id: Unique to the run.
        num_rounds: Rounds that were aggregated.
        final_dir: Folder of `adapter.safetensors` (the global adapter in full coordinates, and the task head),
            `layout.json` and `run.json`.
        adapter_sha256: Digest of `adapter.safetensors`; equal for equal inputs in virtual time.
        pruning_ratio: Share of prunable parameters that the final layout has removed.
        sparsity: Share of all parameters that it has removed.
        num_devices: Number of devices accepted in the last round.
    """

    run_id: str
    num_rounds: int
    final_dir: str
    adapter_sha256: str
    pruning_ratio: float
    sparsity: float
    num_devices: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FinishedRun:
    """Everything that the final files are made of.

    Attributes:
        run_id: The run.
        config: Settings of the fleet.
        tensors: The last aggregate; its adapter in full coordinates and its task head are written.
        layout: Layout of the finished model.
        device_layouts: What each device that was accepted in the last round keeps.
        rounds: Every attempt at every round.
        num_labels: Number of classes.
        trained_examples: Number of training examples of the devices of the last round.
        trained_steps: Number of training steps over all rounds.
    """

    run_id: str
    config: FleetConfig
    tensors: Mapping[str, Tensor]
    layout: Layout
    device_layouts: Mapping[str, Layout]
    rounds: list[RoundView]
    num_labels: int
    trained_examples: int
    trained_steps: int


def write_final(run_dir: Path, run: FinishedRun) -> RunResult:
    """Write `run_dir/final` atomically, and return the result."""
    config, layout = run.config, run.layout
    adapter = pack(adapter_and_head(run.tensors))
    final = run_dir / "final"
    result = RunResult(
        run_id=run.run_id,
        num_rounds=config.num_rounds,
        final_dir=str(final),
        adapter_sha256=digest(adapter),
        pruning_ratio=layout.pruning_ratio,
        sparsity=layout.sparsity,
        num_devices=len(run.device_layouts),
    )
    fleet_layout = FleetLayout(
        **layout.to_dict(),
        spec=layout.spec,
        scaling=config.training.lora_scaling,
        r=max(config.ranks),
        seed=config.seed,
        task=config.task,
        num_labels=run.num_labels,
        trained_examples=run.trained_examples,
        trained_steps=run.trained_steps,
        adapter_sha256=result.adapter_sha256,
    )
    summary = {
        **result.to_dict(),
        "layout": config.layout,
        "strategy": config.strategy,
        "rounds": [asdict(view) for view in run.rounds],
        "devices": {
            device_id: {
                "pruning_ratio": kept.pruning_ratio,
                "sparsity": kept.sparsity,
                "widths": kept.counts,
                # With layout `consensus` the widths suffice: the layout is a prefix of the order.
                **({"layout": kept.to_dict()} if config.layout == "local" else {}),
            }
            for device_id, kept in sorted(run.device_layouts.items())
        },
    }
    staging = run_dir / "final.writing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    _write(staging / ADAPTER, adapter)
    _write(staging / LAYOUT, json.dumps(msgspec.to_builtins(fleet_layout)).encode())
    _write(staging / RUN, json.dumps(summary, indent=2).encode())
    # A folder of that name is left by a server that was killed after the rename; the new one has the same content.
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staging, final)
    return result


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
