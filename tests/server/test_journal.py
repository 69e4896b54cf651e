"""The journal survives a crash and can be read while it is written."""

from __future__ import annotations

import json
import sqlite3
import threading
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from fleet_fakes import SPEC

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout, Order
from fedspine_edge.protocol.messages import BlobRef, Report, RoundPlan, Status
from fedspine_edge.server.journal.schema import ClosedRound, IssuedPlan, RecordedReport, RunState
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.strategies import RewardTerms, RoundOutcome

BLOB = BlobRef(sha256="a" * 64, size_bytes=10)
NEXT = BlobRef(sha256="b" * 64, size_bytes=10)
STATE = RunState(strategy={"x": 1}, adapter=BLOB)


def status(device_id="d0", **changes):
    return Status(device_id=device_id, state="online", model=SPEC, device_class="nx", **changes)


def make_plan(device_id="d0", number=1):
    return IssuedPlan.from_plan(RoundPlan(run_id="r", device_id=device_id, server_round=number, r=4), u=0.25)


def make_recorded(device_id="d0", number=1, state="accepted"):
    report = Report(
        run_id="r",
        device_id=device_id,
        server_round=number,
        plan_sha256=make_plan(device_id, number).sha256,
        status="ok",
        loss_after=0.5,
        completion_time_s=3.0,
        bytes_up=7,
        bytes_down=11,
    )
    return RecordedReport(report, state, "", [(4, 32)], 0.0, 0.0)


def open_first(journal):
    journal.put_device(status(), online=True, refused="", wall_s=1.0)
    journal.open_round(STATE, [make_plan()], published=[BLOB], wall_s=5.0, spec="{}")


def close_first(journal, **changes):
    options = {
        "server_round": 1,
        "attempt": 1,
        "done": True,
        "outcomes": [(RoundOutcome("d0"), RewardTerms(loss=1.0, total=0.8))],
        "layouts": {"d0": (Layout.full(SPEC), 0.0)},
        "explained_variance": {"layers.0.q": [0.5, 1.0]},
        "mean_loss": 0.5,
        "bytes_up": 7,
        "bytes_down": 11,
        **changes,
    }
    journal.close_round(RunState(2, strategy={"x": 2}, adapter=NEXT), ClosedRound(**options), wall_s=9.0)


def test_journal_reopened_has_the_open_round(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        journal.put_report(1, 1, make_recorded(), wall_s=6.0)
    with Journal.open(tmp_path / "j") as journal:
        assert journal.state() == replace(STATE, open=True)
        assert journal.plans(1, 1) == [make_plan()]
        assert journal.reports(1, 1) == [make_recorded()]
        assert journal.started_wall_s(1, 1) == 5.0
        assert journal.published() == [BLOB]
        assert journal.devices() == [(status(), True, "")]


def test_retained_status_leaves_last_seen_unchanged(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        journal.put_device(status(), online=False, refused="", wall_s=None)
        journal.put_device(status("d1"), online=False, refused="", wall_s=None)
        assert journal.last_seen_wall_s() == {"d0": 1.0, "d1": 0.0}
        assert [online for _, online, _ in journal.devices()] == [False, False]
        journal.put_report(1, 1, make_recorded(), wall_s=6.0)
        assert journal.last_seen_wall_s()["d0"] == 6.0


def test_second_report_on_a_plan_is_ignored(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        journal.put_report(1, 1, make_recorded(), wall_s=6.0)
        journal.put_report(1, 1, make_recorded(state="refused"), wall_s=7.0)
        assert journal.recorded_status("d0", make_plan().sha256) == ("accepted", "")
        assert journal.recorded_status("d1", make_plan().sha256) is None
        assert journal.has_plan("d0", make_plan().sha256)
        assert not journal.has_plan("d0", "0" * 64)


def test_views_show_a_round_before_and_after_its_end(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        (row,) = journal.device_rounds()
        assert (row.status, row.device_class, row.u, row.r, row.loss_after) == ("running", "nx", 0.25, 4, None)
        journal.put_report(1, 1, make_recorded(), wall_s=6.0)
        journal.note_disconnect(1, 1, "d0")
        (running,) = journal.rounds()
        assert (running.state, running.accepted, running.bytes_up, running.num_devices) == ("running", 1, 7, 1)
        close_first(journal)
        (row,) = journal.device_rounds(1)
        assert (row.status, row.reward, row.restarts) == ("ok", 0.8, 1)
        assert row.reward_terms == {"loss": 1.0, "time": 0.0, "lora": 0.0, "prune": 0.0}
        assert row.widths == [(4, 32)]
        (done,) = journal.rounds()
        assert (done.state, done.ended_wall_s, done.mean_loss, done.mean_accuracy) == ("done", 9.0, 0.5, None)
        assert journal.layouts(SPEC)["d0"][0].to_dict() == Layout.full(SPEC).to_dict()
        assert journal.state().server_round == 2
        assert journal.device_rounds(2) == []


def test_failed_transaction_changes_nothing(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        with pytest.raises(TypeError):
            close_first(journal, explained_variance={"layers.0.q": [object()]})
        assert journal.state().server_round == 1
        assert journal.device_rounds()[0].status == "running"


def test_reader_never_sees_half_a_round(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
    stop, seen, errors = threading.Event(), set(), []

    def read():
        try:
            with Journal.open_readonly(tmp_path / "j") as reader:
                while not stop.is_set():
                    seen.update((view.server_round, view.status) for view in reader.device_rounds())
                    reader.rounds()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    with Journal.open(tmp_path / "j") as journal:
        close_first(journal)
        for number in range(2, 30):
            state = RunState(number, strategy={}, adapter=NEXT)
            journal.open_round(state, [make_plan(number=number)], published=[BLOB], wall_s=1.0)
            journal.put_report(number, 1, make_recorded(number=number), wall_s=1.0)
            close_first(journal, server_round=number)
    stop.set()
    thread.join()
    assert not errors
    assert {status for _, status in seen} <= {"running", "ok"}


def test_readonly_journal_rejects_writes(tmp_path):
    Journal.open(tmp_path / "j").close()
    with Journal.open_readonly(tmp_path / "j") as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._db.execute("INSERT INTO meta VALUES ('a', 'b')")


def test_reading_a_missing_journal_creates_nothing(tmp_path):
    with pytest.raises(ConfigError, match="there is no journal at"):
        Journal.open_readonly(tmp_path)
    assert not list(tmp_path.iterdir())


def test_journal_of_another_schema_version_is_rejected(tmp_path):
    Journal.open(tmp_path / "j").close()
    with sqlite3.connect(tmp_path / "j") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for opening in (Journal.open, Journal.open_readonly):
        with pytest.raises(ConfigError, match="schema version 99"):
            opening(tmp_path / "j")


def test_final_layout_round_trips(tmp_path):
    layout = Layout.prefix(SPEC, Order(*((np.arange(size)[::-1],) * 2 for size in (4, 32))), [(2, 8), (3, 4)])
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        assert journal.final_layout(SPEC) is None
        close_first(journal, final_layout=layout)
    with Journal.open(tmp_path / "j") as journal:
        assert journal.final_layout(SPEC).to_dict() == layout.to_dict()


def test_journal_of_an_earlier_version_is_readable(tmp_path):
    """Such a journal has no table final_layout, a layout in `meta`, and plans with every field."""
    text = json.dumps(Layout.full(SPEC).to_dict())
    payload = json.dumps({**json.loads(make_plan().payload), "reason": "", "action": "round"}).encode()
    with Journal.open(tmp_path / "j") as journal:
        journal.open_round(STATE, [replace(make_plan(), payload=payload)], published=[BLOB], wall_s=5.0, layout=text)
        journal._db.execute("DROP TABLE final_layout")
        state = {"server_round": 1, "attempt": 1, "failures": 0, "strategy": {"x": 1}, "open": True}
        blob = msgspec.json.encode(BLOB).decode()
        journal.set_meta(state=json.dumps({**state, "blob": blob}))
    with Journal.open_readonly(tmp_path / "j") as journal:
        assert [view.r for view in journal.device_rounds()] == [4]
    with Journal.open(tmp_path / "j") as journal:
        assert journal.state() == replace(STATE, open=True)
        assert journal.plans(1, 1)[0].plan == make_plan().plan
        assert journal.final_layout(SPEC).to_dict() == Layout.full(SPEC).to_dict()


def test_journaled_report_with_a_number_out_of_range_is_set_aside(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        journal.put_report(1, 1, make_recorded(), wall_s=6.0)
        broken = json.dumps(json.loads(msgspec.json.encode(make_recorded().report)) | {"bytes_down": 2**63})
        journal._db.execute("UPDATE reports SET report = ?", (broken,))
        (recorded,) = journal.reports(1, 1)
        assert recorded.status == "refused"
        assert "bytes_down" in recorded.reason
        assert recorded.report.plan_sha256 == make_plan().sha256
        (view,) = journal.device_rounds()
        assert view.bytes_down == 0
        assert [view.accepted for view in journal.rounds()] == [1]
