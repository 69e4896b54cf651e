"""What a finished run leaves in `run_dir/final`: the global adapter, the fleet's layout, a summary."""

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
from fedspine_edge.model.layout import Layout
from fedspine_edge.protocol.blobs import adapter_and_head
from fedspine_edge.protocol.codec import Tensor, digest, pack
from fedspine_edge.server.journal.schema import RoundView

ADAPTER, LAYOUT, RUN = "adapter.safetensors", "layout.json", "run.json"


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        run_id: Unique to the run.
        num_rounds: Rounds that were aggregated.
        final_dir: Folder of `adapter.safetensors` (the global adapter in full coordinates, and the task head),
            `layout.json` and `run.json`.
        adapter_sha256: Of `adapter.safetensors`; equal for equal inputs in virtual time.
        pruning_ratio: Share of prunable parameters that the final layout lacks.
        sparsity: Share of all parameters that it lacks.
        num_devices: Devices accepted in the last round.
    """

    run_id: str
    num_rounds: int
    final_dir: str
    adapter_sha256: str
    pruning_ratio: float
    sparsity: float
    num_devices: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def write_final(
    run_dir: Path,
    *,
    run_id: str,
    config: FleetConfig,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    layouts: Mapping[str, tuple[Layout, float]],
    rounds: list[RoundView],
    num_labels: int,
    trained: tuple[int, int],
) -> RunResult:
    """Write `run_dir/final`, all of it or nothing.

    Args:
        tensors: The last aggregate: `layers.*` in full coordinates and `head.*`; anything else is left out.
        layout: The fleet's layout.
        layouts: By device accepted in the last round: what it keeps and the ratio it reported.
        trained: The examples of these devices, and the steps of one through all rounds.
    """
    adapter = pack(adapter_and_head(tensors))
    final = run_dir / "final"
    result = RunResult(
        run_id=run_id,
        num_rounds=config.num_rounds,
        final_dir=str(final),
        adapter_sha256=digest(adapter),
        pruning_ratio=layout.pruning_ratio,
        sparsity=layout.sparsity,
        num_devices=len(layouts),
    )
    described = {
        **layout.to_dict(),
        "spec": msgspec.to_builtins(layout.spec),
        "scaling": config.training.lora_scaling,
        "r": max(config.ranks),
        "seed": config.seed,
        "task": config.task,
        "num_labels": num_labels,
        "trained_examples": trained[0],
        "trained_steps": trained[1],
        "adapter_sha256": result.adapter_sha256,
    }
    summary = {
        **result.to_dict(),
        "layout": config.layout,
        "strategy": config.strategy,
        "rounds": [asdict(view) for view in rounds],
        "devices": {
            device_id: {
                "pruning_ratio": kept.pruning_ratio,
                "sparsity": kept.sparsity,
                "widths": kept.counts,
                # With one order for all, the widths say it: a prefix of the order.
                **({"layout": kept.to_dict()} if config.layout == "local" else {}),
            }
            for device_id, (kept, _) in sorted(layouts.items())
        },
    }
    draft = run_dir / "final.writing"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    _write(draft / ADAPTER, adapter)
    _write(draft / LAYOUT, json.dumps(described).encode())
    _write(draft / RUN, json.dumps(summary, indent=2).encode())
    # Left by a finish that was interrupted after the rename; the new one has the same content.
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    return result


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
