"""Simulation of a fleet in one process and in virtual time, with the real server, strategy, protocol and device code.

Training is real, or replaced by recorded losses. Time is modelled. The same settings and seed give the same adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import msgspec

from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import DeviceConfig, FleetConfig, Task
from fedspine_edge.device.agent import FleetDevice
from fedspine_edge.model.loading import load_base
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.server.journal.reader import FILE, JournalReader
from fedspine_edge.server.server import FleetServer, RunResult
from fedspine_edge.simulation.disconnects import DisconnectingDevice
from fedspine_edge.simulation.replay import ReplayContext, ReplayDevice
from fedspine_edge.simulation.run_identity import require_same_inputs
from fedspine_edge.simulation.virtual_network import Participant, VirtualNetwork, VirtualTransport

OnEvent = Callable[[str, Mapping[str, Any]], None]


def simulate(fleet: FleetConfig, devices: Sequence[DeviceConfig]) -> RunResult:
    """Run `fleet` with `devices` in virtual time.

    Args:
        fleet: The server's settings; its `run_dir` receives the journal and the final adapter.
        devices: The devices' settings. `time_kind` is set to "simulated", and `broker` is ignored.

    Returns:
        The server's result. `adapter_sha256` is the same for the same inputs.

    Raises:
        ConfigError: `run_dir` holds a run with other devices or data.
    """
    bases: dict[tuple[str, Task, int], PrunableModel] = {}

    def make(config: DeviceConfig, transport: VirtualTransport, clock: VirtualClock) -> FleetDevice:
        kind = (config.model, config.task, config.num_labels)
        if kind not in bases:  # loaded once; the devices share its frozen weights
            model, task, num_labels = kind
            bases[kind] = load_base(model, task=task, num_labels=num_labels, seed=fleet.seed)
        return FleetDevice(config, transport, clock, model=bases[kind])

    return _run(fleet, devices, make)


def simulate_recorded(
    fleet: FleetConfig, devices: Sequence[DeviceConfig], context: ReplayContext, *, on_event: OnEvent | None = None
) -> RunResult:
    """Run `fleet` as `simulate` does, with `ReplayDevice` instead of training. Data and model are not read.

    Args:
        fleet: The server's settings.
        devices: The devices' settings.
        context: Recorded losses and model shapes.
        on_event: The server's callback.
    """

    def make(config: DeviceConfig, transport: VirtualTransport, clock: VirtualClock) -> ReplayDevice:
        return ReplayDevice(config, transport, clock, context)

    return _run(fleet, devices, make, on_event)


class _Device(Participant, Protocol):
    def start(self) -> None: ...

    def close(self) -> None: ...


class _DeviceFactory(Protocol):
    def __call__(self, config: DeviceConfig, transport: VirtualTransport, clock: VirtualClock, /) -> _Device: ...


def _run(
    fleet: FleetConfig,
    devices: Sequence[DeviceConfig],
    make: _DeviceFactory,
    on_event: OnEvent | None = None,
) -> RunResult:
    require_same_inputs(Path(fleet.run_dir), devices)
    network = VirtualNetwork()
    start_s = _resume_time_s(Path(fleet.run_dir))
    with ExitStack() as running:
        for config in sorted(devices, key=lambda one: one.device_id):
            clock = VirtualClock(start_s)
            transport = network.join(config.device_id, clock)
            config = msgspec.structs.replace(config, time_kind="simulated")
            device = make(config, transport, clock)
            unreliable = config.simulated.disconnect_probability > 0
            transport.attach(DisconnectingDevice(device, transport, config) if unreliable else device)
            device.start()
            running.callback(device.close)
        clock = VirtualClock(start_s)
        return FleetServer(fleet, network.join("server", clock), clock, on_event=on_event).run()


def _resume_time_s(run_dir: Path) -> float:
    """Return the virtual time in seconds at which an interrupted run in `run_dir` continues; 0 for a new run."""
    if not (run_dir / FILE).is_file():
        return 0.0
    with JournalReader.open_readonly(run_dir) as journal:
        return journal.latest_wall_s()
