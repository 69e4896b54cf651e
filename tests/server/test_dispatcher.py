"""Acknowledgements between rounds, and before a restarted server has resumed its round."""

from __future__ import annotations

from pathlib import Path

from fleet_fakes import make_config
from memory_transport import MemoryBroker, MemoryTransport
from test_journal import close_first, make_recorded, open_first, status
from test_server_publisher import TOPICS, connected

from fedspine_edge.protocol import codec
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.messages import Ack
from fedspine_edge.server.device_registry import DeviceRegistry
from fedspine_edge.server.dispatcher import MessageDispatcher
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.run_context import RunContext
from fedspine_edge.transport.base import Incoming


def make_dispatcher(broker: MemoryBroker, journal: Journal, folder: Path, *, wall_s: float = 1.0) -> MessageDispatcher:
    run = RunContext(
        "r", make_config(folder), folder, journal, BlobStore(folder / "blobs"), lambda: wall_s, lambda name, data: None
    )
    return MessageDispatcher(run, connected(broker), TOPICS, DeviceRegistry(), retry_s=0.1)


def acks_after_a_report(journal: Journal, folder: Path) -> list[str]:
    """Return the acknowledgements that d0 receives when its report arrives while no round is being collected."""
    broker = MemoryBroker()
    device = MemoryTransport(broker, "d0")
    device.connect(timeout_s=1.0)
    device.subscribe(TOPICS.ack("d0"))
    dispatcher = make_dispatcher(broker, journal, folder)
    device.publish(TOPICS.report("d0"), codec.encode(make_recorded().report))
    dispatcher.process_next(0.1)
    events = iter(lambda: device.receive(timeout_s=0.05), None)
    return [codec.decode(event.payload, Ack).status for event in events if isinstance(event, Incoming)]


def test_report_on_open_round_is_not_answered_before_the_round_resumes(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        assert acks_after_a_report(journal, tmp_path) == []  # "late" would make the device discard its update


def test_report_on_closed_round_is_late(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        close_first(journal)
        assert acks_after_a_report(journal, tmp_path) == ["late"]


def test_retained_status_does_not_count_as_last_seen(tmp_path):
    broker = MemoryBroker()
    device = MemoryTransport(broker, "d0")
    device.connect(timeout_s=1.0)
    device.publish(TOPICS.status("d0"), codec.encode(status()), retain=True)
    with Journal.open(tmp_path / "j") as journal:
        dispatcher = make_dispatcher(broker, journal, tmp_path, wall_s=7.0)
        dispatcher.process_next(0.1)
        assert journal.last_seen_wall_s() == {"d0": 0.0}
        assert journal.devices()[0][1], "it is online: otherwise the broker would have sent its last will"
        device.publish(TOPICS.status("d0"), codec.encode(status()), retain=True)
        dispatcher.process_next(0.1)
        assert journal.last_seen_wall_s() == {"d0": 7.0}


def test_statuses_of_invented_ids_are_ignored_beyond_the_limit(tmp_path, monkeypatch):
    for module in ("device_registry", "dispatcher"):
        monkeypatch.setattr(f"fedspine_edge.server.{module}.MAX_DEVICES", 3)
    broker = MemoryBroker()
    with Journal.open(tmp_path / "j") as journal:
        dispatcher = make_dispatcher(broker, journal, tmp_path)
        device = MemoryTransport(broker, "anyone")
        device.connect(timeout_s=1.0)
        for number in range(6):
            device.publish(TOPICS.status(f"d{number}"), codec.encode(status(f"d{number}")))
            device.publish(TOPICS.report(f"x{number}"), codec.encode(make_recorded(f"x{number}").report))
        for _ in range(12):
            dispatcher.process_next(0.05)
        assert [known.device_id for known, _, _ in journal.devices()] == ["d0", "d1", "d2"]
        assert journal.meta_names("reported/") == set()
