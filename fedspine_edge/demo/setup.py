"""Configuration files of the demo's fleets.

They are the files that `fedspine-edge server` and `fedspine-edge device` take, so the same fleet can be run by the
demo's processes, in virtual time, or by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from fedspine_edge.config import DeviceConfig, FleetConfig, convert
from fedspine_edge.errors import MissingDependency

TIME_FACTORS = {"agx": 1.0, "nx": 1.2, "tx2": 1.43}
"""Completion-time factors of the emulated classes AGX Xavier : Xavier NX : TX2 (arXiv 2501.02438, section 5)."""


@dataclass(frozen=True)
class FleetInputs:
    """Model and data of a fleet.

    Attributes:
        model: Folder of the base model.
        shares: One data file per device.
        test_csv: Sentences that no device trains on, as `text,label` rows.
        num_labels: Number of classes.
        holdout: Number of examples that each device holds out to measure its loss.
    """

    model: Path
    shares: Sequence[Path]
    test_csv: Path
    num_labels: int
    holdout: int = 64


@dataclass(frozen=True)
class FleetSetup:
    """Settings of a fleet, and the paths of the files that hold them."""

    folder: Path
    inputs: FleetInputs
    fleet: FleetConfig
    devices: tuple[DeviceConfig, ...]

    @property
    def fleet_file(self) -> Path:
        """The server's configuration file."""
        return self.folder / "fleet.toml"

    def device_file(self, device: DeviceConfig) -> Path:
        """Return the configuration file of `device`."""
        return self.folder / "devices" / f"{device.device_id}.toml"

    @property
    def device_files(self) -> list[Path]:
        """The configuration files of all devices."""
        return [self.device_file(device) for device in self.devices]


def write_fleet(
    folder: Path,
    inputs: FleetInputs,
    *,
    time_kind: Literal["modelled", "simulated"],
    port: int,
    **fleet_settings: Any,
) -> FleetSetup:
    """Write `fleet.toml` and `devices/*.toml` for one device per share, with device classes in equal parts.

    Args:
        folder: Folder of the fleet.
        inputs: Model and data.
        time_kind: How completion times are obtained.
        port: Port of the broker on this machine.
        **fleet_settings: Fields of `FleetConfig`.

    Raises:
        ConfigError: A setting is invalid.
    """
    broker = {"host": "127.0.0.1", "port": port}
    fleet = convert(
        {"fleet": "demo", "run_dir": str(folder / "run"), "broker": broker, **fleet_settings}, FleetConfig, where="demo"
    )
    names = list(TIME_FACTORS)
    devices = []
    for index, share in enumerate(inputs.shares):
        device_class = names[index * len(names) // len(inputs.shares)]
        devices.append(
            convert(
                {
                    "device_id": f"{device_class}-{index + 1}",
                    "fleet": fleet.fleet,
                    "model": str(inputs.model),
                    "data": {"path": str(share), "num_labels": inputs.num_labels, "holdout": inputs.holdout},
                    "state_dir": str(folder / "devices" / f"{device_class}-{index + 1}"),
                    "device_class": device_class,
                    "time_kind": time_kind,
                    "time_factor": TIME_FACTORS[device_class],
                    "torch_threads": 1,
                    "torch_device": "cpu",
                    "seed": fleet.seed,
                    "broker": broker,
                },
                DeviceConfig,
                where="demo",
            )
        )
    setup = FleetSetup(folder, inputs, fleet, tuple(devices))
    (folder / "devices").mkdir(parents=True, exist_ok=True)
    _write_toml(setup.fleet_file, fleet)
    for device in devices:
        _write_toml(setup.device_file(device), device)
    return setup


def _write_toml(path: Path, settings: msgspec.Struct) -> None:
    try:
        encoded = msgspec.toml.encode(settings)
    except ImportError:
        raise MissingDependency.of("tomli-w", extra="demo", purpose="Writing a fleet's config files") from None
    path.write_bytes(encoded)
