"""Registry of the fleet's devices: their status, whether they are online, what they keep, and whether they may join."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from fedspine_edge.config import Task
from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout, full_shape, module_names, prunable_parameters, split_name
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import MAX_BLOB_BYTES, Status

_Model = tuple[ModelSpec, int]
"""Model and number of classes."""

MAX_ADAPTER_BYTES = MAX_BLOB_BYTES - 16 * 1024**2
"""Largest adapter in float32, with room for names, order and layout in its blob."""

MAX_DEVICES = 100_000
"""Ids that a server accepts statuses of. Limits what a client that invents ids can add to memory and journal."""

MAX_SILENT_ROUNDS = 2
"""Rounds in a row without any message after which a device counts as offline until a message arrives.

The broker may keep "online" for a device that is gone: one that lost power together with the broker has no last will.
"""

RATIO_TOLERANCE = 1e-6
"""Pruning ratios that differ by less are equal."""


@dataclass
class RegisteredDevice:
    """A device and its newest status.

    Attributes:
        status: The status.
        online: Whether the device is connected.
        fault: Why it cannot be in any run of this fleet, whatever its model is; empty if it can.
        layout: What it keeps, as of its last accepted update; None for the full model.
        reported_ratio: Pruning ratio that it reported with `layout`.
        silent_rounds: Number of consecutive rounds in which it had a plan and sent no message.
    """

    status: Status
    online: bool
    fault: str = ""
    layout: Layout | None = None
    reported_ratio: float = 0.0
    silent_rounds: int = 0


class DeviceRegistry:
    """All devices that the server knows, and the model of the fleet.

    Until `decide_model` is called, before the first round, the model of the fleet is the one that most online devices
    report. No single device can choose it for the others.

    Args:
        base_sha256: Digest that the base model must have; empty accepts any.
        task: Task of the fleet.
        spec: Model of a run that is being resumed.
        num_labels: Number of classes of a run that is being resumed.
        r_max: Largest rank of the fleet.
    """

    def __init__(
        self,
        base_sha256: str = "",
        *,
        task: Task = "classification",
        spec: ModelSpec | None = None,
        num_labels: int = 0,
        r_max: int = 1,
    ) -> None:
        self._base_sha256, self._task, self._r_max = base_sha256, task, r_max
        self._model: _Model | None = None if spec is None else (spec, num_labels)
        self._online: dict[_Model, set[str]] = {}
        """By model the online devices without a fault."""
        self._devices: dict[str, RegisteredDevice] = {}
        self._seen: set[str] = set()
        """Devices that have sent a message since the round started."""

    def __getitem__(self, device_id: str) -> RegisteredDevice:
        return self._devices[device_id]

    @property
    def spec(self) -> ModelSpec:
        """The model of the fleet. May be used after `decide_model`, or in a run that was resumed."""
        assert self._model is not None
        return self._model[0]

    @property
    def num_labels(self) -> int:
        """Number of classes of the fleet."""
        return 0 if self._model is None else self._model[1]

    def decide_model(self) -> list[str]:
        """Settle the model of the fleet; return the ids of the devices that it rejects, sorted.

        At least one online device must be acceptable. Later calls change nothing and return an empty list.
        """
        if self._model is not None:
            return []
        self._model = self._reference()
        return [device_id for device_id in self.all_ids() if self.rejection(device_id)]

    def is_known(self, device_id: str) -> bool:
        """Return whether the device has published a status."""
        return device_id in self._devices

    def is_full_for(self, device_id: str) -> bool:
        """Return whether the device is unknown and no further one is accepted."""
        return device_id not in self._devices and len(self._devices) >= MAX_DEVICES

    def update(self, status: Status, *, retained: bool = False) -> RegisteredDevice:
        """Store a status.

        Args:
            status: The status.
            retained: Whether the broker had kept it, so that it says nothing about the present. A device that has been
                silent stays offline then.
        """
        known = self._devices.get(status.device_id)
        if known is not None:
            self._set_online(known, False)
        if status.state == "offline" and known is not None:
            # A last will carries the status of the moment of connecting, so only the disconnect is news.
            return known
        device = RegisteredDevice(status, False, self._fault(status))
        self._set_online(device, status.state == "online")
        if known is not None:
            device.layout, device.reported_ratio = known.layout, known.reported_ratio
            device.silent_rounds = known.silent_rounds
        self._devices[status.device_id] = device
        if not retained:
            self.mark_seen(status.device_id)
        elif device.silent_rounds >= MAX_SILENT_ROUNDS:
            self._set_online(device, False)
        return device

    def restore(self, status: Status, layout: tuple[Layout, float] | None = None) -> RegisteredDevice:
        """Add a device from the journal; it is offline until it is seen again.

        Args:
            status: Its newest status.
            layout: What it keeps and the pruning ratio it reported with it; None for the full model.
        """
        device = self._devices[status.device_id] = RegisteredDevice(status, False, self._fault(status))
        if layout is not None:
            self.set_layout(status.device_id, *layout)
        return device

    def rejection(self, device_id: str) -> str:
        """Return why the device may not take part; empty if it may."""
        return self._rejection_reason(self._devices[device_id])

    def mark_online(self, device_id: str) -> None:
        """Note that a report came from the device, so it is online even if a last will was received later."""
        if device_id in self._devices:
            self._set_online(self._devices[device_id], True)
            self.mark_seen(device_id)

    def mark_seen(self, device_id: str) -> None:
        """Note that a message came from the device."""
        if device_id in self._devices:
            self._seen.add(device_id)
            self._devices[device_id].silent_rounds = 0

    def start_round(self) -> None:
        """Begin to note which devices send a message."""
        self._seen.clear()

    def end_round(self, silent: Iterable[str]) -> list[str]:
        """Count a silent round for devices without any message since `start_round`.

        Args:
            silent: Ids of the participants that did not report.

        Returns the ids of the devices that count as offline from now on.
        """
        gone = []
        for device_id in silent:
            device = self._devices[device_id]
            if device_id not in self._seen:
                device.silent_rounds += 1
                if device.silent_rounds >= MAX_SILENT_ROUNDS and device.online:
                    self._set_online(device, False)
                    gone.append(device_id)
        return gone

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
        return sorted(i for i, device in self._devices.items() if device.online and not self.rejection(i))

    @property
    def num_online(self) -> int:
        """Number of devices that can be given a round."""
        reference = self._reference()
        return 0 if reference is None else len(self._online.get(reference, ()))

    def offline(self) -> list[str]:
        """Return the ids of the devices that could be given a round if they were connected, sorted."""
        return sorted(i for i, device in self._devices.items() if not device.online and not self.rejection(i))

    def all_ids(self) -> list[str]:
        """Return the ids of all known devices, sorted."""
        return sorted(self._devices)

    def join_timeout_error(self, needed: int, waited_s: float) -> ConfigError:
        """Return the error of a join timeout: how many devices came, and why others were rejected."""
        online = self.online()
        rejected = [f"{i}: {reason}" for i in self.all_ids() if (reason := self.rejection(i))]
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

    def _set_online(self, device: RegisteredDevice, online: bool) -> None:
        device.online = online
        status = device.status
        if status.model is not None and not device.fault:
            with_model = self._online.setdefault((status.model, status.num_labels), set())
            (with_model.add if online else with_model.discard)(status.device_id)

    def _reference(self) -> _Model | None:
        """Return the model of the fleet, or the most common one of the online devices while it is not decided.

        Among equally common models it is that of the smallest device id.
        """
        if self._model is not None:
            return self._model
        most = max((len(ids) for ids in self._online.values()), default=0)
        candidates = [model for model, ids in self._online.items() if len(ids) == most > 0]
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        return min(candidates, key=lambda model: min(self._online[model]))

    def _fault(self, status: Status) -> str:
        """Return why the device cannot be in any run of this fleet; empty if it can."""
        model, base = status.model, self._base_sha256
        if model is None:
            return "its status does not describe its model."
        if base and model.base_sha256 != base:
            return f"its base model has digest {model.base_sha256}, this fleet trains {base} (base_sha256)."
        if status.task != self._task:
            return f"its task is {status.task}, this fleet's is {self._task}: set task = {self._task!r} on the device."
        if model.num_heads % model.num_kv_heads or prunable_parameters(model) > model.num_parameters:
            return "the description of its model is inconsistent."
        elements = self._r_max * sum(sum(full_shape(model, split_name(n)[1])) for n in module_names(model))
        if 4 * elements > MAX_ADAPTER_BYTES:
            return f"its adapter of rank {self._r_max} would have {4 * elements:,} bytes; the limit is 2 GiB."
        return ""

    def _rejection_reason(self, device: RegisteredDevice) -> str:
        status, reference, model = device.status, self._reference(), device.status.model
        if device.fault or reference is None or model is None:
            return device.fault
        spec, num_labels = reference
        if model.base_sha256 != spec.base_sha256:
            return f"its base model has digest {model.base_sha256}, this fleet trains {spec.base_sha256}."
        if status.num_labels != num_labels:
            return f"it has num_labels = {status.num_labels}, the fleet {num_labels}."
        if model != spec:
            found, wanted = msgspec.structs.asdict(model), msgspec.structs.asdict(spec)
            differences = [f"{n} {found[n]} instead of {wanted[n]}" for n in found if found[n] != wanted[n]]
            return f"its model differs from the fleet's: {', '.join(differences)}."
        return ""


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""
