"""What every device did in every round as one flat table, for pandas and the like."""

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
    "server_round": "round, from 1",
    "attempt": "from 1, above it where the round was repeated; only the newest is listed",
    "device_id": "the device",
    "device_class": "its class",
    "status": "ok, refused, failed, out_of_memory, late, lost or running (no answer yet)",
    "reason": "why not ok; a remark where it is",
    "u": "the arm's place in the envelope; empty where no bandit chose",
    "pruning_ratio": "share of prunable parameters that was to be removed by the end of the round",
    "r": "LoRA rank",
    "achieved_ratio": "share that is removed, after rounding to whole groups",
    "sparsity": "share of all parameters that is absent",
    "num_examples": "the device's training examples, its weight in averages",
    "completion_time_s": "seconds from plan to report",
    "time_kind": "measured, modelled or simulated: what those seconds are",
    "loss_before": "mean loss in nats on the device's held-out examples before the first step",
    "loss_after": "the same after the last step",
    "accuracy_before": "accuracy on them before the first step",
    "accuracy_after": "the same after the last step",
    "train_loss": "mean loss of the round's steps",
    "lora_importance": "I(B_total)",
    "peak_memory_bytes": "largest memory of the round where it was measured",
    "reward": "the reward, in [0, 1]",
    **{f"reward_{term}": f"its term `{term}`, in [0, 1], before the weight" for term in TERMS},
    "bytes_up": "sent by the device",
    "bytes_down": "received by it",
    "restarts": "times it was cut off during the round",
}
"""Columns and what they mean; docs/experiments.md repeats them. What was not measured is empty."""


def flat(rows: Iterable[DeviceView]) -> list[dict[str, Any]]:
    """One dict a row with the keys of `COLUMNS`, None where nothing was measured."""
    table = []
    for row in rows:
        terms = {f"reward_{term}": value for term, value in (row.reward_terms or {}).items()}
        table.append({name: terms.get(name, getattr(row, name, None)) for name in COLUMNS})
    return table


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write all of it or nothing, since others may be reading; what a row lacks is left empty. Returns the path."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(path, table.getvalue())
    return path
