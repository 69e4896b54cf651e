"""Device classes of the simulation, read from one documented file; what they assume stands in its head."""

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
    """One device class in one power mode; either `flops_per_s` or GPU cores and clock say how fast it is."""

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
        """Sustained float operations a second."""
        if self.flops_per_s is not None:
            return self.flops_per_s
        assert self.gpu_cores is not None  # held by __post_init__
        assert self.gpu_mhz is not None
        return 2.0 * self.gpu_cores * self.gpu_mhz * 1e6 * self.sustained

    def settings(self, *, disconnect_probability: float | None = None) -> dict[str, Any]:
        """Fields of `DeviceConfig` that make a device one of this class."""
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
    """Every profile of the file by name. Raises `ConfigError` naming file, section and key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"profile file {path} cannot be used: {error}.", remedy=f"{BUILT_IN} is one, with explanations."
        ) from error
    profiles = {}
    for name, section in data.items():
        if isinstance(section, dict) and "drop_out" in section and "disconnect_probability" not in section:
            log.warning("%s, [%s]: `drop_out` is now called `disconnect_probability`.", path, name)
            section["disconnect_probability"] = section.pop("drop_out")
        try:
            profiles[name] = msgspec.convert(section, DeviceClass)
        except msgspec.ValidationError as error:
            raise ConfigError(f"profile file {path}, [{name}]: {error}.") from None
    return profiles


def parse_mix(text: str, profiles: Mapping[str, DeviceClass]) -> dict[str, int]:
    """`tx2=30,nx=40,agx=10` as counts or shares by class. Raises `ConfigError` for an unknown class or no number."""
    mix: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = part.strip().partition("=")
        if name not in profiles:
            close = difflib.get_close_matches(name, profiles, n=1)
            known = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(profiles)}."
            raise ConfigError(f"--mix names an unknown class {name!r}.", remedy=known)
        if not count.isdecimal() or int(count) < 1 or name in mix:
            raise ConfigError(f"--mix: {part.strip()!r} is not CLASS=COUNT, or names a class twice.")
        mix[name] = int(count)
    return mix


def scaled(mix: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """`mix` brought to `num_devices` in all, by largest remainders, at least one of each class.

    Raises `ConfigError` when there are fewer devices than classes.
    """
    if num_devices < len(mix):
        raise ConfigError(f"{num_devices} devices cannot be of {len(mix)} classes.", remedy="Use more --devices.")
    total = sum(mix.values())
    exact = {name: num_devices * count / total for name, count in mix.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    while sum(counts.values()) != num_devices:
        up = sum(counts.values()) < num_devices
        candidates = counts if up else {name: n for name, n in counts.items() if n > 1}
        gap = {name: (exact[name] - counts[name]) * (1 if up else -1) for name in candidates}
        chosen = max(gap, key=lambda name: (gap[name], name))
        counts[chosen] += 1 if up else -1
    return counts
