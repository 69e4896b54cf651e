"""Rejected updates, kept for inspection: the bytes as received, and the reason. Only the newest few are kept."""

from __future__ import annotations

import json
from pathlib import Path

from fedspine_edge.files import write_atomically
from fedspine_edge.protocol.codec import digest
from fedspine_edge.protocol.messages import Report


class RejectedUpdates:
    """The folder `run_dir/rejected`.

    Args:
        folder: Folder to write to, created with the first rejected update.
        keep: Number of updates to keep; older ones are deleted.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def put(self, report: Report, attempt: int, data: bytes, reason: str) -> Path | None:
        """Store an update; return its file, or None when none are kept."""
        if self._keep == 0:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{report.server_round:05d}-{attempt:02d}-{report.device_id}-{digest(data)[:12]}"
        path = self.folder / f"{stem}.safetensors"
        write_atomically(path, data, sync=False)
        note = {"reason": reason, "device_id": report.device_id, "server_round": report.server_round, "r": report.r}
        write_atomically(path.with_suffix(".json"), json.dumps(note, indent=2).encode(), sync=False)
        oldest_first = sorted(self.folder.glob("*.safetensors"), key=lambda p: (p.stat().st_mtime_ns, p.name))
        for old in oldest_first[: -self._keep]:
            old.unlink(missing_ok=True)
            old.with_suffix(".json").unlink(missing_ok=True)
        return path
