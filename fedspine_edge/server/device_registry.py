"""Registry of the fleet's devices: their status, whether they are online, what they keep, and whether they may join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from fedspine_edge.config import Task
from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import Status

RATIO_TOLERANCE = 1e-6
"""Pruning ratios that differ by less are equal."""


@dataclass
class RegisteredDevice:
    """A device and its newest status.

    Attributes:
        status: The status.
        online: Whether the device is connected.
        rejection: Why it may not take part; empty if it may.
        layout: What it keeps, as of its last accepted update; None for the full model.
        reported_ratio: Pruning ratio that it reported with `layout`.
    """

    status: Status
    online: bool
    rejection: str = ""
    layout: Layout | None = None
    reported_ratio: float = 0.0


class DeviceRegistry:
    """All devices that the server knows. The first device that matches `base_sha256` sets the model of the fleet.

    Args:
        base_sha256: Digest that the base model must have; empty accepts that of the first device.
        task: Task of the fleet.
        spec: Model of a run that is being resumed.
        num_labels: Number of classes of a run that is being resumed.
    """

    def __init__(
        self,
        base_sha256: str = "",
        *,
        task: Task = "classification",
        spec: ModelSpec | None = None,
        num_labels: int = 0,
    ) -> None:
        self._base_sha256, self._task = base_sha256, task
        self._spec = spec
        self.num_labels = num_labels
        self._devices: dict[str, RegisteredDevice] = {}

    def __getitem__(self, device_id: str) -> RegisteredDevice:
        return self._devices[device_id]

    @property
    def spec(self) -> ModelSpec:
        """The model of the fleet. May be used once a device is online or a run was resumed."""
        assert self._spec is not None  # set by the first device that may take part
        return self._spec

    def update(self, status: Status) -> RegisteredDevice:
        """Store a status; the first acceptable one sets the model of the fleet."""
        known = self._devices.get(status.device_id)
        if status.state == "offline" and known is not None:
            # A last will carries the status of the moment of connecting, so only the disconnect is news.
            known.online = False
            return known
        device = RegisteredDevice(status, status.state == "online", self._rejection_reason(status))
        if known is not None:
            device.layout, device.reported_ratio = known.layout, known.reported_ratio
        if not device.rejection and self._spec is None and device.online:
            self._spec, self.num_labels = status.model, status.num_labels
        self._devices[status.device_id] = device
        return device

    def restore(self, status: Status, layout: tuple[Layout, float] | None = None) -> RegisteredDevice:
        """Add a device from the journal; it is offline until it is seen again.

        Args:
            status: Its newest status.
            layout: What it keeps and the pruning ratio it reported with it; None for the full model.
        """
        device = RegisteredDevice(status, False, self._rejection_reason(status))
        self._devices[status.device_id] = device
        if layout is not None:
            self.set_layout(status.device_id, *layout)
        return device

    def mark_online(self, device_id: str) -> None:
        """Note that a message came from the device, so it is online even if a last will was received later."""
        if device_id in self._devices:
            self._devices[device_id].online = True

    def is_online(self, device_id: str) -> bool:
        """Return whether the device is known and connected."""
        return device_id in self._devices and self._devices[device_id].online

    def set_layout(self, device_id: str, layout: Layout, reported_ratio: float) -> None:
        """Store what the device keeps after an accepted update."""
        self._devices[device_id].layout, self._devices[device_id].reported_ratio = layout, reported_ratio

    def drop_outdated_layout(self, status: Status) -> bool:
        """Forget the device's layout if its status says that it has removed less; return whether it did.

        This happens when a device has lost its state and starts from the full model again.
        """
        device = self._devices[status.device_id]
        if device.layout is None or device.reported_ratio <= status.pruning_ratio + RATIO_TOLERANCE:
            return False
        device.layout, device.reported_ratio = None, 0.0
        return True

    def layout(self, device_id: str) -> Layout:
        """Return what the device keeps."""
        known = self._devices.get(device_id)
        return Layout.full(self.spec) if known is None or known.layout is None else known.layout

    def layouts(self) -> dict[str, Layout]:
        """Return the layout of every device that has pruned."""
        return {i: device.layout for i, device in sorted(self._devices.items()) if device.layout is not None}

    def online(self) -> list[str]:
        """Return the ids of the devices that can be given a round, sorted."""
        return sorted(i for i, device in self._devices.items() if device.online and not device.rejection)

    @property
    def num_online(self) -> int:
        """Number of devices that can be given a round."""
        return sum(device.online and not device.rejection for device in self._devices.values())

    def offline(self) -> list[str]:
        """Return the ids of the devices that could be given a round if they were connected, sorted."""
        return sorted(i for i, device in self._devices.items() if not device.online and not device.rejection)

    def all_ids(self) -> list[str]:
        """Return the ids of all known devices, sorted."""
        return sorted(self._devices)

    def join_timeout_error(self, needed: int, waited_s: float) -> ConfigError:
        """Return the error of a join timeout: how many devices came, and why others were rejected."""
        online = self.online()
        rejected = [f"{i}: {device.rejection}" for i, device in sorted(self._devices.items()) if device.rejection]
        text = f"{len(online)} of {needed} devices were online after {waited_s:g} s{_listed(online)}"
        if rejected:
            return ConfigError(
                f"{text}; {len(rejected)} refused. {' '.join(rejected[:3])}",
                remedy="Give all devices the same base model, task and num_labels. The fleet's settings base_sha256 "
                "and task select which ones are accepted.",
            )
        return ConfigError(
            f"{text}.",
            remedy="Start more devices on the same fleet and broker, or lower min_devices and min_reports.",
        )

    def _rejection_reason(self, status: Status) -> str:
        model, base = status.model, self._base_sha256
        if model is None:
            return "its status does not describe its model."
        if base and model.base_sha256 != base:
            return f"its base model has digest {model.base_sha256}, this fleet trains {base} (base_sha256)."
        if status.task != self._task:
            return f"its task is {status.task}, this fleet's is {self._task}: set task = {self._task!r} on the device."
        if self._spec is None:
            return ""
        if model.base_sha256 != self._spec.base_sha256:
            return f"its base model has digest {model.base_sha256}, this fleet trains {self._spec.base_sha256}."
        if status.num_labels != self.num_labels:
            return f"it has num_labels = {status.num_labels}, the fleet {self.num_labels}."
        if model != self._spec:
            found, wanted = msgspec.structs.asdict(model), msgspec.structs.asdict(self._spec)
            differences = [f"{n} {found[n]} instead of {wanted[n]}" for n in found if found[n] != wanted[n]]
            return f"its model differs from the fleet's: {', '.join(differences)}."
        return ""


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""
