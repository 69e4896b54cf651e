"""Who is in the fleet: what devices said of themselves, who is online, and who may not take part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from fedspine_edge.config import Task
from fedspine_edge.errors import ConfigError
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import Status


@dataclass
class RegisteredDevice:
    """A device as it last described itself."""

    status: Status
    online: bool
    refused: str = ""
    """Why it may not take part; empty if it may."""


class DeviceRegistry:
    """The roll of the fleet. The first device that matches `base_sha256` sets the model for all.

    Args:
        base_sha256: Digest that the base model must have; empty takes the first device's.
        task: What the fleet learns.
        spec: The model of a run that is being resumed.
        num_labels: Its number of classes.
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
        self.spec = spec
        self.num_labels = num_labels
        self._members: dict[str, RegisteredDevice] = {}

    def __getitem__(self, device_id: str) -> RegisteredDevice:
        return self._members[device_id]

    def see(self, status: Status) -> RegisteredDevice:
        """Take note of a status; the first acceptable one sets the fleet's model."""
        known = self._members.get(status.device_id)
        if status.state == "offline" and known is not None:
            # A will is as old as its connection: only that it came matters.
            known.online = False
            return known
        member = RegisteredDevice(status, status.state == "online", self._objection(status))
        if not member.refused and self.spec is None and member.online:
            self.spec, self.num_labels = status.model, status.num_labels
        self._members[status.device_id] = member
        return member

    def heard(self, device_id: str) -> None:
        """A device that reports is online, whatever an old will said."""
        if device_id in self._members:
            self._members[device_id].online = True

    def is_online(self, device_id: str) -> bool:
        """Whether the device is known and connected."""
        return device_id in self._members and self._members[device_id].online

    def recall(self, status: Status) -> None:
        """A device of an earlier process of this server; it is offline until it is heard."""
        self._members[status.device_id] = RegisteredDevice(status, False, self._objection(status))

    def online(self) -> list[str]:
        """Devices that can be given a plan, by id."""
        return sorted(i for i, m in self._members.items() if m.online and not m.refused)

    @property
    def num_online(self) -> int:
        """How many devices can be given a plan."""
        return sum(m.online and not m.refused for m in self._members.values())

    def offline(self) -> list[str]:
        """Devices that could take part if they were there, by id."""
        return sorted(i for i, m in self._members.items() if not m.online and not m.refused)

    def everyone(self) -> list[str]:
        """All devices ever seen, by id."""
        return sorted(self._members)

    def too_few(self, needed: int, waited_s: float) -> ConfigError:
        """The error of a join timeout: how many came, and why others were refused."""
        online = self.online()
        refused = [f"{i}: {m.refused}" for i, m in sorted(self._members.items()) if m.refused]
        text = f"{len(online)} of {needed} devices were online after {waited_s:g} s{_listed(online)}"
        if refused:
            return ConfigError(
                f"{text}; {len(refused)} refused. {' '.join(refused[:3])}",
                remedy="Give all devices one base model, task and num_labels; base_sha256 and task in the fleet's "
                "settings say which are meant.",
            )
        return ConfigError(
            f"{text}.", remedy="Start more devices on the same fleet and broker, or lower min_devices and min_reports."
        )

    def _objection(self, status: Status) -> str:
        model, base = status.model, self._base_sha256
        if model is None:
            return "it did not say which model it has."
        if base and model.base_sha256 != base:
            return f"its base model has digest {model.base_sha256}, this fleet trains {base} (base_sha256)."
        if status.task != self._task:
            return f"it learns {status.task}, this fleet {self._task}: set task = {self._task!r} on the device."
        if self.spec is None:
            return ""
        if model.base_sha256 != self.spec.base_sha256:
            return f"its base model has digest {model.base_sha256}, this fleet trains {self.spec.base_sha256}."
        if status.num_labels != self.num_labels:
            return f"it has num_labels = {status.num_labels}, the fleet {self.num_labels}."
        if model != self.spec:
            mine, fleet = msgspec.structs.asdict(model), msgspec.structs.asdict(self.spec)
            other = [f"{name} {mine[name]} instead of {fleet[name]}" for name in mine if mine[name] != fleet[name]]
            return f"its model differs from the fleet's: {', '.join(other)}."
        return ""


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""
