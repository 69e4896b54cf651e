"""The virtual network: delivery in order of virtual time, retained messages, and busy devices."""

from fedspine_edge.clock import VirtualClock
from fedspine_edge.simulation.virtual_network import VirtualNetwork, VirtualTransport
from fedspine_edge.transport.base import Connected, Event, Incoming


def endpoint(network: VirtualNetwork, name: str) -> tuple[VirtualTransport, VirtualClock]:
    clock = VirtualClock()
    transport = network.join(name, clock)
    transport.connect(timeout_s=1)
    assert transport.receive(timeout_s=0) == Connected()
    return transport, clock


class Worker:
    """Answers every message after `duration_s` of its own time."""

    def __init__(self, transport: VirtualTransport, clock: VirtualClock, duration_s: float) -> None:
        self.transport, self.clock, self.duration_s = transport, clock, duration_s
        self.ticks: list[float] = []
        self.wakeup: float | None = None

    def handle(self, event: Event) -> None:
        if isinstance(event, Incoming):
            self.clock.spend(self.duration_s)
            self.transport.publish("answer", f"{self.duration_s}".encode())

    def tick(self) -> None:
        if self.wakeup is not None and self.clock.now() >= self.wakeup:
            self.ticks.append(self.clock.now())
            self.wakeup = None

    def next_wakeup(self) -> float | None:
        return self.wakeup


def test_answers_arrive_in_order_of_virtual_time() -> None:
    network = VirtualNetwork(latency_s=0.5)
    for name, duration_s in (("slow", 30.0), ("quick", 10.0)):
        clock = VirtualClock()
        transport = network.join(name, clock)
        transport.attach(Worker(transport, clock, duration_s))
        transport.subscribe("work")
    server, clock = endpoint(network, "server")
    server.subscribe("answer")
    server.publish("work", b"")
    assert server.receive(timeout_s=100) == Incoming("answer", b"10.0")
    assert clock.now() == 11.0  # two trips of 0.5 s and 10 s of work
    assert server.receive(timeout_s=100) == Incoming("answer", b"30.0")
    assert clock.now() == 31.0


def test_busy_device_handles_next_message_afterwards() -> None:
    network = VirtualNetwork(latency_s=0.0)
    clock = VirtualClock()
    transport = network.join("device", clock)
    transport.attach(Worker(transport, clock, 10.0))
    transport.subscribe("work")
    server, server_clock = endpoint(network, "server")
    server.subscribe("answer")
    server.publish("work", b"1")
    server.publish("work", b"2")
    assert [server.receive(timeout_s=100) and server_clock.now() for _ in range(2)] == [10.0, 20.0]


def test_receive_returns_none_at_deadline() -> None:
    server, clock = endpoint(VirtualNetwork(), "server")
    assert server.receive(timeout_s=7.5) is None
    assert clock.now() == 7.5


def test_retained_messages_reach_late_subscribers() -> None:
    network = VirtualNetwork()
    server, _ = endpoint(network, "server")
    server.publish("plan/a", b"now", retain=True)
    server.publish("plan/b", b"gone", retain=True)
    server.publish("plan/b", b"", retain=True)
    assert server.receive(timeout_s=1) is None
    late, _ = endpoint(network, "late")
    late.subscribe("plan/+")
    assert late.receive(timeout_s=1) == Incoming("plan/a", b"now", retained=True)
    assert late.receive(timeout_s=1) is None


def test_device_tick_runs_at_wakeup_time() -> None:
    network = VirtualNetwork(latency_s=0.0)
    clock = VirtualClock()
    transport = network.join("device", clock)
    worker = Worker(transport, clock, 0.0)
    worker.wakeup = 4.0
    transport.attach(worker)
    transport.connect(timeout_s=1)
    server, _ = endpoint(network, "server")
    assert server.receive(timeout_s=3) is None
    assert worker.ticks == []
    assert server.receive(timeout_s=3) is None
    assert worker.ticks == [4.0]
