"""Device classes of the simulation, read from one documented file. The file's header states its assumptions."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fedspine_edge.config import SimulatedSettings
from fedspine_edge.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger(__name__)

BUILT_IN = Path(__file__).with_name("jetsons.toml")

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class DeviceClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device class in one power mode. Its speed is given by `flops_per_s`, or by GPU cores and clock."""

    board: str
    flops_per_s: Positive | None = None
    gpu_cores: Annotated[int, Meta(gt=0)] | None = None
    gpu_mhz: Positive | None = None
    sustained: Annotated[float, Meta(gt=0, le=1)] = 0.25
    step_s: Annotated[float, Meta(ge=0)]
    time_factor: Positive = 1.0
    memory_mib: Annotated[int, Meta(ge=0)] = 0
    up_mbit_s: Positive
    down_mbit_s: Positive
    jitter: Share = 0.0
    link_jitter: Share = 0.0
    drift: Share = 0.0
    disconnect_probability: Share = 0.0

    def __post_init__(self) -> None:
        if self.flops_per_s is None and (self.gpu_cores is None or self.gpu_mhz is None):
            raise ValueError("needs flops_per_s, or gpu_cores and gpu_mhz")

    @property
    def rate(self) -> float:
        """Sustained throughput in floating-point operations per second."""
        if self.flops_per_s is not None:
            return self.flops_per_s
        assert self.gpu_cores is not None  # checked by __post_init__
        assert self.gpu_mhz is not None
        return 2.0 * self.gpu_cores * self.gpu_mhz * 1e6 * self.sustained

    def settings(self, *, disconnect_probability: float | None = None) -> dict[str, Any]:
        """Return the fields of `DeviceConfig` for a device of this class.

        Args:
            disconnect_probability: Replaces that of the class; None keeps it.
        """
        simulated = SimulatedSettings(
            flops_per_s=self.rate,
            step_s=self.step_s,
            jitter=self.jitter,
            link_jitter=self.link_jitter,
            drift=self.drift,
            disconnect_probability=(
                self.disconnect_probability if disconnect_probability is None else disconnect_probability
            ),
        )
        return {
            "time_kind": "simulated",
            "time_factor": self.time_factor,
            "memory_limit_mib": self.memory_mib,
            "up_mbit_s": self.up_mbit_s,
            "down_mbit_s": self.down_mbit_s,
            "simulated": msgspec.to_builtins(simulated),
        }


def load_device_classes(path: Path = BUILT_IN) -> dict[str, DeviceClass]:
    """Load the device classes of a file by name. Raises `ConfigError` naming file, section and key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"device class file {path} cannot be read: {error}.",
            remedy=f"See {BUILT_IN} for a complete file with explanations.",
        ) from error
    classes = {}
    for name, section in data.items():
        if isinstance(section, dict) and "drop_out" in section and "disconnect_probability" not in section:
            log.warning("%s, [%s]: `drop_out` is now called `disconnect_probability`.", path, name)
            section["disconnect_probability"] = section.pop("drop_out")
        try:
            classes[name] = msgspec.convert(section, DeviceClass)
        except msgspec.ValidationError as error:
            raise ConfigError(f"device class file {path}, [{name}]: {error}.") from None
    return classes


def parse_mix(text: str, device_classes: Mapping[str, DeviceClass]) -> dict[str, int]:
    """Parse `tx2=30,nx=40,agx=10` into counts by class. Raises `ConfigError` for an unknown class or a bad count."""
    mix: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = part.strip().partition("=")
        if name not in device_classes:
            close = difflib.get_close_matches(name, device_classes, n=1)
            known = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(device_classes)}."
            raise ConfigError(f"--mix names an unknown device class {name!r}.", remedy=known)
        if not count.isdecimal() or int(count) < 1 or name in mix:
            raise ConfigError(f"--mix: {part.strip()!r} is not of the form CLASS=COUNT, or its class occurs twice.")
        mix[name] = int(count)
    return mix


def scale_mix(mix: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Scale `mix` to `num_devices` devices by the largest remainder method, with at least one device of each class.

    Raises `ConfigError` if there are fewer devices than classes.
    """
    if num_devices < len(mix):
        raise ConfigError(
            f"{num_devices} devices are too few for {len(mix)} device classes.",
            remedy=f"Use at least {len(mix)} devices.",
        )
    total = sum(mix.values())
    exact = {name: num_devices * count / total for name, count in mix.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    while sum(counts.values()) != num_devices:
        too_few = sum(counts.values()) < num_devices
        candidates = counts if too_few else {name: n for name, n in counts.items() if n > 1}
        gap = {name: (exact[name] - counts[name]) * (1 if too_few else -1) for name in candidates}
        chosen = max(gap, key=lambda name: (gap[name], name))
        counts[chosen] += 1 if too_few else -1
    return counts


def interleave_classes(mix: Mapping[str, int]) -> list[str]:
    """Return the class of each device, with the devices of each class spread evenly over the list."""
    positions = [((k + 0.5) / count, name) for name, count in mix.items() for k in range(count)]
    return [name for _, name in sorted(positions)]
