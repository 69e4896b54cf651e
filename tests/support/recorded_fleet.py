"""Small fleet of replay devices for tests, with a synthetic loss record."""

from pathlib import Path
from typing import Any

from fedspine_edge.config import DeviceConfig, FleetConfig
from fedspine_edge.server.server import RunResult
from fedspine_edge.simulation.device_classes import load_device_classes
from fedspine_edge.simulation.fleet_settings import DeviceInputs, simulated_fleet
from fedspine_edge.simulation.replay import LossRecord, LossSample, ReplayContext
from fedspine_edge.simulation.virtual_fleet import simulate_recorded

RECORD = LossRecord(
    "synthetic, for tests",
    tuple(
        LossSample(
            t / 6, p, r, 0.7 - 0.05 * t, 0.66 - 0.05 * t + 0.1 * p, 0.5 + 0.05 * t, 0.52 + 0.05 * t, 1.0 + 0.01 * r
        )
        for t in range(6)
        for p in (0.0, 0.25, 0.5)
        for r in (4, 8)
    ),
)


def recorded_fleet(folder: Path, mix: dict[str, int], **settings: Any) -> tuple[FleetConfig, tuple[DeviceConfig, ...]]:
    """Return the settings of a fleet with run_dir `folder / "run"`."""
    defaults: dict[str, Any] = {
        "num_rounds": 6,
        "ranks": [4, 8],
        "training": {"tau": 4, "recovery_steps": 4, "batch_size": 8},
    }
    probability = settings.pop("disconnect_probability", None)
    inputs = DeviceInputs(model="none", shares=[Path("none.csv")], disconnect_probability=probability)
    return simulated_fleet(folder, mix, load_device_classes(), inputs, **{**defaults, **settings})


def run_recorded(folder: Path, *, mix: dict[str, int], **settings: Any) -> RunResult:
    """Run a fleet with run_dir `folder`, which must be named "run"."""
    fleet, devices = recorded_fleet(folder.parent, mix, **settings)
    assert Path(fleet.run_dir) == folder
    return simulate_recorded(fleet, devices, ReplayContext(RECORD))
