"""A small fleet of recorded devices for tests, with a record made up here: the tests are not about its numbers."""

from pathlib import Path
from typing import Any

from fedspine_edge.config import DeviceConfig, FleetConfig
from fedspine_edge.server.server import RunResult
from fedspine_edge.simulation.device_classes import load_device_classes
from fedspine_edge.simulation.fleet_files import write_simulated_fleet
from fedspine_edge.simulation.replay import LossRecord, LossSample, ReplayContext
from fedspine_edge.simulation.virtual_fleet import simulate_recorded

RECORD = LossRecord(
    "made up for tests",
    tuple(
        LossSample(
            t / 6, p, r, 0.7 - 0.05 * t, 0.66 - 0.05 * t + 0.1 * p, 0.5 + 0.05 * t, 0.52 + 0.05 * t, 1.0 + 0.01 * r
        )
        for t in range(6)
        for p in (0.0, 0.25, 0.5)
        for r in (4, 8)
    ),
)


def lay_out(folder: Path, mix: dict[str, int], **settings: Any) -> tuple[FleetConfig, tuple[DeviceConfig, ...]]:
    defaults: dict[str, Any] = {
        "num_rounds": 6,
        "ranks": [4, 8],
        "training": {"tau": 4, "recovery_steps": 4, "batch_size": 8},
    }
    disconnect_probability = settings.pop("disconnect_probability", None)
    return write_simulated_fleet(
        folder,
        model="none",
        shares=[Path("none.csv")],
        mix=mix,
        profiles=load_device_classes(),
        disconnect_probability=disconnect_probability,
        **{**defaults, **settings},
    )


def run_recorded(folder: Path, *, mix: dict[str, int], **settings: Any) -> RunResult:
    """Run a fleet whose run_dir is `folder`."""
    fleet, devices = lay_out(folder.parent, mix, **settings)
    assert Path(fleet.run_dir) == folder
    return simulate_recorded(fleet, devices, ReplayContext(RECORD))
