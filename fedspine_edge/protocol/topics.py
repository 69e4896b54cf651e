"""MQTT topics of messages and chunks, `fedspine/v1/{fleet}/...`. Only this module builds and parses them.

    fedspine/v1/{fleet}/device/{id}/status                 device → server, retained, last will
    fedspine/v1/{fleet}/device/{id}/plan                   server → device, retained
    fedspine/v1/{fleet}/device/{id}/report                 device → server
    fedspine/v1/{fleet}/device/{id}/ack                    server → device
    fedspine/v1/{fleet}/device/{id}/blob/{sha256}/{index}  device → server
    fedspine/v1/{fleet}/blob/{sha256}/{index}              server → fleet, retained

A device writes only below its own `device/{id}/`, so a broker's access list can restrict it to that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Union

from fedspine_edge.errors import ConfigError, MessageError

ROOT = "fedspine/v1"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,6}")

Role = Literal["server", "device", "doctor"]


def client_id(fleet: str, role: Role, name: str = "") -> str:
    """Return the MQTT client identifier of a program.

    The parts are separated by a character that no name contains, so that a device named "server", or a device of a
    fleet with a similar name, cannot have the identifier of another client and disconnect it.
    """
    return ":".join(part for part in ("fedspine", fleet, role, name) if part)


DeviceKind = Literal["status", "plan", "report", "ack"]


@dataclass(frozen=True)
class DeviceTopic:
    """A message to or from one device."""

    device_id: str
    kind: DeviceKind


@dataclass(frozen=True)
class BlobTopic:
    """One chunk of a blob for the whole fleet."""

    sha256: str
    index: int


@dataclass(frozen=True)
class UploadTopic:
    """One chunk of a device's update."""

    device_id: str
    sha256: str
    index: int


Topic = Union[DeviceTopic, BlobTopic, UploadTopic]


class Topics:
    """The topics of one fleet.

    Args:
        fleet: Name of the fleet, 1 to 64 of A-Z a-z 0-9 _ -. Raises `ConfigError` otherwise, as do all methods for a
            device id, hash or chunk index that cannot be part of a topic.
    """

    def __init__(self, fleet: str) -> None:
        self.fleet = _checked(_NAME, fleet, "fleet")
        self.prefix = f"{ROOT}/{fleet}"

    def status(self, device_id: str) -> str:
        return self._device(device_id, "status")

    def plan(self, device_id: str) -> str:
        return self._device(device_id, "plan")

    def report(self, device_id: str) -> str:
        return self._device(device_id, "report")

    def ack(self, device_id: str) -> str:
        return self._device(device_id, "ack")

    def blob(self, sha256: str, index: int) -> str:
        return f"{self.prefix}/blob/{_checked(_SHA256, sha256, 'sha256')}/{_checked(_INDEX, str(index), 'index')}"

    def upload(self, device_id: str, sha256: str, index: int) -> str:
        chunk = f"{_checked(_SHA256, sha256, 'sha256')}/{_checked(_INDEX, str(index), 'index')}"
        return self._device(device_id, f"blob/{chunk}")

    @property
    def server_filters(self) -> tuple[str, ...]:
        """Subscriptions of a server: status, reports and uploads of all devices."""
        device = f"{self.prefix}/device/+"
        return f"{device}/status", f"{device}/report", f"{device}/blob/+/+"

    def device_filters(self, device_id: str) -> tuple[str, ...]:
        """Return the permanent subscriptions of a device: its plan and its acks. It subscribes to chunks one by one."""
        return self.plan(device_id), self.ack(device_id)

    def parse(self, topic: str) -> Topic:
        """Parse `topic`. Raises `MessageError` for a topic that is not one of this fleet's."""
        start, _, rest = topic.partition(f"{self.prefix}/")
        pieces = rest.split("/") if not start else []
        if len(pieces) == 3 and pieces[0] == "blob":
            sha256, index = pieces[1:]
            if _SHA256.fullmatch(sha256) and _INDEX.fullmatch(index):
                return BlobTopic(sha256, int(index))
        elif len(pieces) >= 3 and pieces[0] == "device" and _NAME.fullmatch(pieces[1]):
            device_id, kind = pieces[1], pieces[2]
            if len(pieces) == 3 and kind in ("status", "plan", "report", "ack"):
                return DeviceTopic(device_id, kind)  # type: ignore[arg-type]
            if len(pieces) == 5 and kind == "blob" and _SHA256.fullmatch(pieces[3]) and _INDEX.fullmatch(pieces[4]):
                return UploadTopic(device_id, pieces[3], int(pieces[4]))
        raise MessageError(f"{topic[:200]!r} is not a topic of fleet {self.fleet!r}.")

    def _device(self, device_id: str, rest: str) -> str:
        return f"{self.prefix}/device/{_checked(_NAME, device_id, 'device_id')}/{rest}"


def _checked(pattern: re.Pattern[str], value: str, what: str) -> str:
    if not pattern.fullmatch(value):
        raise ConfigError(
            f"{what} {value[:80]!r} cannot be part of a topic.", remedy=f"It must match the pattern {pattern.pattern}."
        )
    return value
