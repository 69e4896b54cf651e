"""The rows of a run as one flat CSV table: one row per device and round."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspine_edge.bandit.reward import TERMS
from fedspine_edge.files import write_text_atomically
from fedspine_edge.server.journal.schema import DeviceView

COLUMNS: Mapping[str, str] = {
    "server_round": "round, counted from 1",
    "attempt": "attempt at the round, counted from 1; only the newest attempt is listed",
    "device_id": "device id",
    "device_class": "device class",
    "status": "ok, refused, failed, out_of_memory, late, lost or running (no answer yet)",
    "reason": "reason for a status other than ok; a warning if the status is ok",
    "u": "position of the arm within the pruning schedule's bounds, in [0, 1]; empty if no bandit selected it",
    "pruning_ratio": "pruning ratio in the plan: share of prunable parameters to remove by the end of the round",
    "r": "LoRA rank",
    "achieved_ratio": "share of prunable parameters removed, after rounding to whole groups",
    "sparsity": "share of all parameters removed",
    "num_examples": "number of training examples of the device, its weight in averages",
    "completion_time_s": "time from plan to report in seconds",
    "time_kind": "how the completion time was obtained: measured, modelled or simulated",
    "loss_before": "mean loss in nats on the device's held-out examples before the first step",
    "loss_after": "mean loss in nats on the held-out examples after the last step",
    "accuracy_before": "accuracy on the held-out examples before the first step",
    "accuracy_after": "accuracy on the held-out examples after the last step",
    "train_loss": "mean training loss over the steps of the round",
    "lora_importance": "importance of the adapter, I(B_total)",
    "peak_memory_bytes": "peak memory of the round in bytes, if it was measured",
    "reward": "total reward, in [0, 1]",
    **{f"reward_{term}": f"reward term `{term}`, in [0, 1], before weighting" for term in TERMS},
    "bytes_up": "bytes sent by the device",
    "bytes_down": "bytes received by the device",
    "restarts": "times the device lost its connection or restarted during the round",
}
"""Columns and their meaning, repeated in the documentation. A figure that was not measured is left empty."""


def flatten(rows: Iterable[DeviceView]) -> list[dict[str, Any]]:
    """Return one dict per row with the keys of `COLUMNS`. Figures that were not measured are None."""
    table = []
    for row in rows:
        terms = {f"reward_{term}": value for term, value in (row.reward_terms or {}).items()}
        table.append({name: terms.get(name, getattr(row, name, None)) for name in COLUMNS})
    return table


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write the table atomically and return `path`. A column that a row lacks is left empty."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(path, table.getvalue())
    return path
