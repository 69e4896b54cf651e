"""The parts of one run that its server components share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.config import FleetConfig
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.server.journal.writer import Journal


@dataclass(frozen=True)
class RunContext:
    """One run of one fleet.

    Attributes:
        run_id: Unique to the run.
        config: Settings of the fleet.
        folder: The run folder.
        journal: Journal of the run.
        blobs: Adapters and accepted updates.
        wall_time: Returns the wall time in seconds, for the journal (virtual time in simulations).
        on_event: Called with a name and plain data when something happens; see `FleetServer`.
    """

    run_id: str
    config: FleetConfig
    folder: Path
    journal: Journal
    blobs: BlobStore
    wall_time: Callable[[], float]
    on_event: Callable[[str, Mapping[str, Any]], None]
