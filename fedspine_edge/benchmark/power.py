"""Power measurement of a board with the INA3221 sensors of a Jetson, through sysfs.

Files and units follow the kernel's ina3221 driver: in{n}_label, in{n}_input in mV, curr{n}_input in mA.
"""

from __future__ import annotations

import threading
from pathlib import Path

SENSORS = "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"
TOTAL = "VDD_IN"
"""Rail of the whole module (Orin NX, Orin Nano). On boards without it (AGX), the rails below are summed."""
RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")


class PowerSensor:
    """Reads the power of the board.

    Attributes:
        rails: Labels of the rails that are summed.
    """

    def __init__(self, channels: dict[str, tuple[Path, Path]]) -> None:
        self._channels = channels
        self.rails = tuple(channels)

    @classmethod
    def find(cls, root: str | Path = "/") -> PowerSensor | None:
        """Return the sensor of this board, or None if no sensor measures the whole board."""
        found: dict[str, tuple[Path, Path]] = {}
        for sensor in sorted(Path(root).glob(SENSORS)):
            for label in sorted(sensor.glob("in?_label")):
                number = label.name[2]
                found[label.read_text().strip()] = (sensor / f"in{number}_input", sensor / f"curr{number}_input")
        wanted = (TOTAL,) if TOTAL in found else RAILS
        if not all(rail in found for rail in wanted):
            return None
        return cls({rail: found[rail] for rail in wanted})

    def watts(self) -> float:
        """Return the current power."""
        return sum(
            int(voltage.read_text()) * int(current.read_text()) * 1e-6 for voltage, current in self._channels.values()
        )


class PowerMeter:
    """Measures the mean power during a `with` block on a separate thread; `mean_w` contains it afterwards."""

    def __init__(self, sensor: PowerSensor, interval_s: float = 0.05) -> None:
        self._sensor, self._interval_s = sensor, interval_s
        self._done = threading.Event()
        self._samples: list[float] = []
        self.mean_w = 0.0

    def __enter__(self) -> PowerMeter:
        self._thread = threading.Thread(target=self._sample, name="fedspine-power", daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        self._samples.append(self._sensor.watts())
        while not self._done.wait(self._interval_s):
            self._samples.append(self._sensor.watts())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        self.mean_w = sum(self._samples) / len(self._samples) if self._samples else 0.0
