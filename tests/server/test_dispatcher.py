"""What the server answers between rounds, and before a server that starts again has taken its round up."""

from __future__ import annotations

import msgspec
from memory_transport import MemoryBroker, MemoryTransport
from test_journal import close_first, open_first, report_row, status
from test_server_publisher import TOPICS, connected

from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import Ack, Report
from fedspine_edge.server.device_registry import DeviceRegistry
from fedspine_edge.server.dispatcher import MessageDispatcher
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.transport.base import Incoming


def hearing_on(broker: MemoryBroker, journal: Journal, *, wall_s: float = 1.0) -> MessageDispatcher:
    options = {"run_id": "r", "retry_s": 0.1, "wall": lambda: wall_s, "tell": lambda name, data: None}
    return MessageDispatcher(connected(broker), TOPICS, journal, DeviceRegistry(), **options)


def acks_after_a_report(journal: Journal) -> list[str]:
    """The statuses that d0 hears when its report arrives while no round is being collected."""
    broker = MemoryBroker()
    device = MemoryTransport(broker, "d0")
    device.connect(timeout_s=1.0)
    device.subscribe(TOPICS.ack("d0"))
    hearing = hearing_on(broker, journal)
    report = msgspec.json.decode(report_row().report, type=Report)
    device.publish(TOPICS.report("d0"), codec.encode(report))
    hearing.wait(0.1)
    events = iter(lambda: device.receive(timeout_s=0.05), None)
    return [codec.decode(event.payload, Ack).status for event in events if isinstance(event, Incoming)]


def test_a_report_to_a_round_that_is_open_waits_until_it_is_taken_up_again(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        assert acks_after_a_report(journal) == []  # "late" would make the device give its work up


def test_a_report_to_a_round_that_ended_is_late(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        close_first(journal)
        assert acks_after_a_report(journal) == ["late"]


def test_a_status_from_before_the_server_is_no_sign_of_life(tmp_path):
    broker = MemoryBroker()
    device = MemoryTransport(broker, "d0")
    device.connect(timeout_s=1.0)
    device.publish(TOPICS.status("d0"), codec.encode(status()), retain=True)
    with Journal.open(tmp_path / "j") as journal:
        hearing = hearing_on(broker, journal, wall_s=7.0)
        hearing.wait(0.1)
        assert journal.heard_wall_s() == {"d0": 0.0}
        assert journal.devices()[0][1], "though it is online, or the broker would say that it is gone"
        device.publish(TOPICS.status("d0"), codec.encode(status()), retain=True)
        hearing.wait(0.1)
        assert journal.heard_wall_s() == {"d0": 7.0}
