"""A whole fleet in one process and in virtual time: the real server, wire, strategy and device code.

Training is real unless a record of losses takes its place; time is modelled; nothing is random but the seed: the
same configs give the same adapter.
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
from fedspine_edge.model.checkpoint import load_base
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
        devices: The devices' settings; `time_kind` is taken as "simulated" and `broker` is ignored.

    Returns:
        What the server returns; `adapter_sha256` is the same for the same inputs.

    Raises:
        ConfigError: `run_dir` holds a run of other devices or data.
    """
    network = VirtualNetwork()
    bases: dict[tuple[str, Task, int], PrunableModel] = {}

    def device(config: DeviceConfig, transport: VirtualTransport, clock: VirtualClock) -> FleetDevice:
        kind = (config.model, config.task, config.num_labels)
        if kind not in bases:  # read once; the devices share its frozen weights
            model, task, num_labels = kind
            bases[kind] = load_base(model, task=task, num_labels=num_labels, seed=fleet.seed)
        return FleetDevice(config, transport, clock, model=bases[kind])

    return _run(fleet, devices, network, device)


def simulate_recorded(
    fleet: FleetConfig, devices: Sequence[DeviceConfig], shared: ReplayContext, *, on_event: OnEvent | None = None
) -> RunResult:
    """Run `fleet` as `simulate` does, with `ReplayDevice` in the place of training; data and model are not read.

    `on_event` is the server's.
    """

    def device(config: DeviceConfig, transport: VirtualTransport, clock: VirtualClock) -> ReplayDevice:
        return ReplayDevice(config, transport, clock, shared)

    return _run(fleet, devices, VirtualNetwork(), device, on_event)


class _Device(Participant, Protocol):
    def start(self) -> None: ...

    def close(self) -> None: ...


class _Maker(Protocol):
    def __call__(self, config: DeviceConfig, transport: VirtualTransport, clock: VirtualClock, /) -> _Device: ...


def _run(
    fleet: FleetConfig,
    devices: Sequence[DeviceConfig],
    network: VirtualNetwork,
    make: _Maker,
    on_event: OnEvent | None = None,
) -> RunResult:
    require_same_inputs(Path(fleet.run_dir), devices)
    start_s = _time_so_far(Path(fleet.run_dir))
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


def _time_so_far(run_dir: Path) -> float:
    """Virtual time at which an interrupted run in `run_dir` goes on; 0 for a new one."""
    if not (run_dir / FILE).is_file():
        return 0.0
    with JournalReader.open_readonly(run_dir) as journal:
        return journal.latest_wall_s()
