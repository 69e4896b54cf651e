"""Cost of a round on a device: transferred bytes, and the completion time, which is of one of three kinds.

- measured: wall-clock time from the arrival of the plan to the report.
- modelled: process CPU time of the work × `time_factor`, plus the transfer time of the blobs over the modelled links.
  For emulated devices that share a machine, whose wall-clock time would depend on its scheduler.
- simulated: time of the same work by a cost model in FLOPs × `time_factor`, plus the same transfer time, each
  multiplied by a factor of the round's emulated conditions. It is a function of plan, layout, batches and seed only, so
  a run is repeatable bit for bit on any machine.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from fedspine_edge.clock import Clock
from fedspine_edge.config import DeviceConfig, SimulatedSettings

TimeKind = Literal["measured", "modelled", "simulated"]


@dataclass(frozen=True)
class EmulatedConditions:
    """Emulated conditions of a device in one round.

    Attributes:
        work: Factor on the computing time.
        link: Factor on the transfer time.
    """

    work: float = 1.0
    link: float = 1.0


def emulated_conditions(config: DeviceConfig, server_round: int) -> EmulatedConditions:
    """Return the emulated conditions of a round, a function of the device's seed, id and settings only.

    Jitter is drawn independently in each round with mean 1. Drift is a random walk over the rounds so far.
    """
    simulated = config.simulated

    def normal(what: str, number: int) -> float:
        return random.Random(f"{config.seed}/{config.device_id}/{what}/{number}").gauss(0.0, 1.0)

    walk = 0.0
    if simulated.drift > 0:
        walk = simulated.drift * sum(normal("drift", number) for number in range(2, server_round + 1))
    work = math.exp(simulated.jitter * normal("work", server_round) - simulated.jitter**2 / 2 + walk)
    link = math.exp(simulated.link_jitter * normal("link", server_round) - simulated.link_jitter**2 / 2)
    return EmulatedConditions(work, link)


class CostMeter:
    """Accumulates the cost of a round. `to_dict` and `restore` carry it over a restart.

    Args:
        time_kind: Kind of the time that `completion_s` returns.
        time_factor: Completion-time factor of the emulated class (modelled and simulated only).
        up_mbit_s: Uplink rate in Mbit/s.
        down_mbit_s: Downlink rate in Mbit/s.
        clock: Source of wall-clock time.
        simulated: Parameters of the cost model (simulated only).
        conditions: Emulated conditions of the round (simulated only).
    """

    def __init__(
        self,
        time_kind: TimeKind,
        *,
        time_factor: float,
        up_mbit_s: float,
        down_mbit_s: float,
        clock: Clock,
        simulated: SimulatedSettings | None = None,
        conditions: EmulatedConditions | None = None,
    ) -> None:
        self.time_kind = time_kind
        self.bytes_up = 0
        self.bytes_down = 0
        self._time_factor = time_factor
        self._up_bytes_s = up_mbit_s * 1e6 / 8
        self._down_bytes_s = down_mbit_s * 1e6 / 8
        self._simulated = simulated or SimulatedSettings()
        self._conditions = conditions or EmulatedConditions()
        self._clock = clock
        self._started_s = clock.now()
        self._wall_s = 0.0
        self._cpu_s = 0.0
        self._working_since: float | None = None
        self._simulated_s = 0.0

    @classmethod
    def of(cls, config: DeviceConfig, server_round: int, clock: Clock) -> CostMeter:
        """Create the cost meter of one round of a device."""
        return cls(
            config.time_kind,
            time_factor=config.time_factor,
            up_mbit_s=config.up_mbit_s,
            down_mbit_s=config.down_mbit_s,
            clock=clock,
            simulated=config.simulated,
            conditions=emulated_conditions(config, server_round),
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the process CPU time spent in the context. Not reentrant."""
        self._working_since = time.process_time()
        try:
            yield
        finally:
            self._cpu_s = self.cpu_s
            self._working_since = None

    @property
    def cpu_s(self) -> float:
        """CPU time of this process spent working so far, in seconds, over all threads."""
        running = 0.0 if self._working_since is None else time.process_time() - self._working_since
        return self._cpu_s + running

    @property
    def wall_s(self) -> float:
        """Time since the plan arrived, in seconds, without the time that the process was not running."""
        return self._wall_s + self._clock.now() - self._started_s

    def work(self, flops: float) -> None:
        """Add one training step or evaluation batch of `flops` floating-point operations."""
        self._simulated_s += flops / self._simulated.flops_per_s + self._simulated.step_s

    def transfer(self, *, down_bytes: int = 0, up_bytes: int = 0) -> None:
        """Add payload bytes of blobs."""
        self.bytes_down += down_bytes
        self.bytes_up += up_bytes

    def completion_s(self) -> float:
        """Return the completion time of the round so far in seconds, of the meter's kind."""
        if self.time_kind == "measured":
            return max(0.0, self.wall_s)
        transfer_s = self.bytes_down / self._down_bytes_s + self.bytes_up / self._up_bytes_s
        if self.time_kind == "modelled":
            return self.cpu_s * self._time_factor + transfer_s
        work_s = self._simulated_s * self._time_factor
        return work_s * self._conditions.work + transfer_s * self._conditions.link

    def to_dict(self) -> dict[str, float]:
        """Return the accumulated cost as plain numbers."""
        return {
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "simulated_s": self._simulated_s,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }

    def restore(self, data: Mapping[str, Any]) -> None:
        """Continue from the result of `to_dict`. Wall-clock time counts from now on."""
        self._started_s = self._clock.now()
        self._wall_s = float(data["wall_s"])
        self._cpu_s = float(data["cpu_s"])
        self._simulated_s = float(data["simulated_s"])
        self.bytes_up = int(data["bytes_up"])
        self.bytes_down = int(data["bytes_down"])
