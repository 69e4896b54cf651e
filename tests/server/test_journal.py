"""What the journal keeps is there after a crash, and can be read while it is written."""

from __future__ import annotations

import sqlite3
import threading

import msgspec
import pytest
from fleet_fakes import SPEC

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.layout import Layout
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import BlobRef, Report, RoundPlan, Status
from fedspine_edge.server.journal.schema import OutcomeRow, PlanRow, ReportRow, RunState
from fedspine_edge.server.journal.writer import Journal

BLOB = BlobRef(sha256="a" * 64, size_bytes=10)


def status(device_id="d0", **changes):
    return Status(device_id=device_id, state="online", model=SPEC, device_class="nx", **changes)


def plan_row(device_id="d0", number=1):
    payload = codec.encode(RoundPlan(run_id="r", device_id=device_id, server_round=number, r=4))
    return PlanRow(device_id, payload, codec.digest(payload), 0.25)


def report_row(device_id="d0", number=1, state="accepted"):
    report = Report(
        run_id="r",
        device_id=device_id,
        server_round=number,
        plan_sha256=plan_row(device_id, number).sha256,
        status="ok",
        loss_after=0.5,
        completion_time_s=3.0,
        bytes_up=7,
        bytes_down=11,
    )
    return ReportRow(device_id, msgspec.json.encode(report), state, "", [(4, 32)], 0.0, 0.0)


def open_first(journal):
    journal.put_device(status(), online=True, refused="", wall_s=1.0)
    journal.open_round(RunState(strategy={"x": 1}, blob="b"), [plan_row()], published=[BLOB], wall_s=5.0, spec="{}")


def close_first(journal, **changes):
    options = {
        "server_round": 1,
        "attempt": 1,
        "done": True,
        "outcomes": [OutcomeRow("d0", "ok", "", 0.8, {"loss": 1.0})],
        "layouts": {"d0": (Layout.full(SPEC), 0.0)},
        "energy": {"layers.0.q": [0.5, 1.0]},
        "wall_s": 9.0,
        "means": (0.5, None),
        "traffic": (7, 11),
    }
    journal.close_round(RunState(2, strategy={"x": 2}, blob="c"), **{**options, **changes})


def test_state_of_an_open_round_survives_reopening(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        journal.put_report(1, 1, report_row(), wall_s=6.0)
    with Journal.open(tmp_path / "j") as journal:
        assert journal.state() == RunState(1, 1, 0, {"x": 1}, "b", open=True)
        assert journal.plans(1, 1) == [plan_row()]
        assert journal.reports(1, 1) == [report_row()]
        assert journal.started_wall_s(1, 1) == 5.0
        assert journal.published() == [BLOB]
        assert journal.devices() == [(status(), True, "")]


def test_a_status_that_the_broker_kept_says_nothing_of_when(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        journal.put_device(status(), online=False, refused="", wall_s=None)
        journal.put_device(status("d1"), online=False, refused="", wall_s=None)
        assert journal.heard_wall_s() == {"d0": 1.0, "d1": 0.0}
        assert [online for _, online, _ in journal.devices()] == [False, False]
        journal.put_report(1, 1, report_row(), wall_s=6.0)
        assert journal.heard_wall_s()["d0"] == 6.0


def test_the_first_answer_to_a_plan_stays(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        journal.put_report(1, 1, report_row(), wall_s=6.0)
        journal.put_report(1, 1, report_row(state="refused"), wall_s=7.0)
        assert journal.answer_to("d0", plan_row().sha256) == ("accepted", "")
        assert journal.answer_to("d1", plan_row().sha256) is None
        assert journal.has_plan("d0", plan_row().sha256)
        assert not journal.has_plan("d0", "0" * 64)


def test_rows_for_people_before_and_after_the_end_of_a_round(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        (row,) = journal.device_rounds()
        assert (row.status, row.device_class, row.u, row.r, row.loss_after) == ("running", "nx", 0.25, 4, None)
        journal.put_report(1, 1, report_row(), wall_s=6.0)
        journal.note_disconnect(1, 1, "d0")
        (running,) = journal.rounds()
        assert (running.state, running.accepted, running.bytes_up, running.num_devices) == ("running", 1, 7, 1)
        close_first(journal)
        (row,) = journal.device_rounds(1)
        assert (row.status, row.reward, row.reward_terms, row.restarts) == ("ok", 0.8, {"loss": 1.0}, 1)
        assert row.widths == [(4, 32)]
        (done,) = journal.rounds()
        assert (done.state, done.ended_wall_s, done.mean_loss, done.mean_accuracy) == ("done", 9.0, 0.5, None)
        assert journal.energy(1) == {"layers.0.q": [0.5, 1.0]}
        assert journal.layouts(SPEC)["d0"][0].to_dict() == Layout.full(SPEC).to_dict()
        assert journal.state().server_round == 2
        assert journal.device_rounds(2) == []


def test_a_transaction_that_fails_leaves_nothing(tmp_path):
    with Journal.open(tmp_path / "j") as journal:
        open_first(journal)
        with pytest.raises(TypeError):
            close_first(journal, energy={"layers.0.q": [object()]})
        assert journal.state().server_round == 1
        assert journal.device_rounds()[0].status == "running"


def test_reading_while_writing_neither_waits_nor_sees_half_a_round(tmp_path):
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
            state = RunState(number, strategy={}, blob="c")
            journal.open_round(state, [plan_row(number=number)], published=[BLOB], wall_s=1.0)
            journal.put_report(number, 1, report_row(number=number), wall_s=1.0)
            close_first(journal, server_round=number)
    stop.set()
    thread.join()
    assert not errors
    assert {status for _, status in seen} <= {"running", "ok"}


def test_a_reader_cannot_write(tmp_path):
    Journal.open(tmp_path / "j").close()
    with Journal.open_readonly(tmp_path / "j") as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._db.execute("INSERT INTO meta VALUES ('a', 'b')")


def test_a_missing_journal_is_not_created_by_reading(tmp_path):
    with pytest.raises(ConfigError, match="there is no journal at"):
        Journal.open_readonly(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_schema_version_is_refused(tmp_path):
    Journal.open(tmp_path / "j").close()
    with sqlite3.connect(tmp_path / "j") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for opening in (Journal.open, Journal.open_readonly):
        with pytest.raises(ConfigError, match="schema version 99"):
            opening(tmp_path / "j")
