"""A device of a fleet: connects the fleet protocol with the training on this device.

`FleetDevice` is driven by events and time: `start`, `handle(event)`, `tick()`. A real device calls `run()`; a
simulation makes the same three calls itself. Training happens inside `handle`, as soon as a plan and its adapter are
complete.
"""

from __future__ import annotations

from fedspine_edge.clock import Clock, RealClock
from fedspine_edge.config import DeviceConfig
from fedspine_edge.device.adapter_download import AdapterDownload
from fedspine_edge.device.messaging import MessageQueue
from fedspine_edge.device.protocol_session import ProtocolSession
from fedspine_edge.device.round_runner import RoundRunner
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.transport.base import FIRST_CONNECT_TIMEOUT_S, Event, Transport


class FleetDevice:
    """One device of a fleet.

    Args:
        config: Settings of the device.
        transport: Transport, not yet connected.
        clock: Clock of timeouts and measured durations.
        model: Unpruned base model in memory, which the devices of a simulation share; None loads `config.model`.

    The constructor raises nothing. `start` checks data, model, state folder and broker, in this order.
    """

    def __init__(
        self,
        config: DeviceConfig,
        transport: Transport,
        clock: Clock | None = None,
        *,
        model: PrunableModel | None = None,
    ) -> None:
        self.config = config
        self._transport = transport
        self._clock: Clock = RealClock() if clock is None else clock
        self._base = model
        self._queue = MessageQueue(transport, Topics(config.fleet).plan(config.device_id))
        self._watches_messages = False
        self._runner: RoundRunner | None = None
        self._session: ProtocolSession | None = None

    @property
    def spec(self) -> ModelSpec:
        """Shapes of the device's base model, once it has started."""
        assert self._runner is not None  # set by start
        return self._runner.spec

    @property
    def finished(self) -> bool:
        """Whether the server has finished the run."""
        return self._session is not None and self._session.finished

    def start(self) -> None:
        """Load data, model and state, connect, and publish the status.

        Raises `DataError`, `ModelError`, `ConfigError` (the state folder is in use), and `BrokerUnreachable`.
        """
        config = self.config
        runner = RoundRunner(config, self._clock, self._base, check_messages=self._check_messages)
        try:
            topics, folder = Topics(config.fleet), runner.state_dir.folder
            session = ProtocolSession(
                config.fleet,
                config.device_id,
                self._transport,
                self._clock,
                runner,
                updates=BlobStore(folder / "blobs"),
                download=AdapterDownload(self._transport, topics, folder / "download"),
            )
            session.restore(runner.persisted.report, acked=runner.persisted.acked)
            session.start(timeout_s=min(FIRST_CONNECT_TIMEOUT_S, config.reconnect_timeout_s))
        except BaseException:
            runner.close()
            raise
        self._runner, self._session = runner, session

    def run(self, until: float | None = None) -> int:
        """Take part until the run is finished. Returns 0, or 1 if the clock reaches `until` (seconds) first.

        Raises as `start` does, `CheckpointError` for a damaged state folder, and `BrokerUnreachable` after
        `reconnect_timeout_s` without a broker. The process can be interrupted at any moment and started again.
        """
        self.start()
        self._watches_messages = True
        try:
            while not self.finished:
                now = self._clock.now()
                if until is not None and now >= until:
                    return 1
                wakeup = self.next_wakeup()
                timeout_s = min(1.0, max(0.0, (wakeup if wakeup is not None else now + 1.0) - now))
                event = self._queue.receive(timeout_s)
                if event is not None:
                    self.handle(event)
                self.tick()
            return 0
        finally:
            self.close()

    def close(self) -> None:
        """Publish the offline status, disconnect, and release the state folder. Does nothing if already closed."""
        runner, self._runner = self._runner, None
        if runner is None or self._session is None:
            return
        try:
            self._session.close()
        finally:
            runner.close()

    def handle(self, event: Event) -> None:
        """Handle one event of the transport. Trains when a plan and its adapter are complete."""
        if self._session is not None:
            self._session.handle(event)

    def tick(self) -> None:
        """Repeat requests and reports that have not been answered in time."""
        if self._session is not None:
            self._session.tick()

    def next_wakeup(self) -> float | None:
        """Return the clock's time in seconds at which `tick` has to run; None if only an event can change anything."""
        return None if self._session is None else self._session.next_wakeup()

    def _check_messages(self, plan_sha256: str) -> None:
        # A simulation delivers events itself, so only `run` looks for messages during training.
        if self._watches_messages:
            self._queue.check(plan_sha256)
