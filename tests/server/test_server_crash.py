"""A server that is killed with SIGKILL and started again ends with the same adapter as one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fleet_fakes import Fleet, make_config

from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.transport.base import LONGEST_PAUSE_S

CHILD = Path(__file__).with_name("crash_child.py")
ROOT = Path(__file__).parents[2]


def child(folder, point="never", count=0):
    return subprocess.run(
        [sys.executable, str(CHILD), str(folder), point, str(count)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    done = child(tmp_path_factory.mktemp("whole"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("before:open_round", 1),
        ("after:open_round", 2),
        ("after:put_report", 5),
        ("before:close_round", 3),
        ("after:close_round", 3),
        ("after:clear", 2),
        ("after:close_round", 5),
        ("before:set_meta", 5),
    ],
)
def test_server_killed_once_ends_with_the_same_adapter(tmp_path, uninterrupted, point, count):
    killed = child(tmp_path, point, count)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout == ""
    done = child(tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["adapter_sha256"] == uninterrupted["adapter_sha256"]
    assert result["sparsity"] == uninterrupted["sparsity"]
    with Journal.open_readonly(tmp_path / "run") as journal:
        assert [(v.server_round, v.attempt, v.state, v.accepted) for v in journal.rounds()] == [
            (n, 1, "done", 3) for n in range(1, 6)
        ]


def test_server_killed_repeatedly_ends_with_the_same_adapter(tmp_path, uninterrupted):
    kills = 0
    for _ in range(20):
        done = child(tmp_path, "after:put_report", 2)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    assert kills > 5
    assert json.loads(done.stdout)["adapter_sha256"] == uninterrupted["adapter_sha256"]


def test_restarted_server_publishes_the_same_plans(tmp_path):
    folder = tmp_path / "devices"
    folder.mkdir()
    config = make_config(tmp_path / "run")

    class Killed(BaseException):
        pass

    def die(name, data):
        if name == "report" and data["status"] == "accepted":
            raise Killed

    first = Fleet(folder)
    first.add_three()
    with pytest.raises(Killed):
        first.serve(config, on_event=die)
    before = {device_id: device.plans[0] for device_id, device in first.devices.items()}
    second = Fleet(folder)  # a broker that has forgotten everything
    second.add_three()
    opened = []
    second.serve(config, on_event=lambda name, data: opened.append(data) if name == "round_opened" else None)
    assert {device_id: device.plans[0] for device_id, device in second.devices.items()} == before
    assert [data["server_round"] for data in opened] == [2, 3, 4, 5]
    # The journaled report is acknowledged as often as the device repeats it, and is not requested again.
    assert {ack.status for ack in second.devices["d0"].acks if ack.server_round == 1} == {"accepted"}


def test_server_restarted_after_the_deadline_waits_for_devices(tmp_path):
    """A broker that went down with the server and lost everything: devices look for it again after their pause."""
    folder = tmp_path / "devices"
    folder.mkdir()
    config = make_config(tmp_path / "run", min_reports=1)
    first = Fleet(folder)
    first.add_three()

    class Killed(BaseException):
        pass

    def die(name, data):
        if name == "report":
            raise Killed

    with pytest.raises(Killed):
        first.serve(config, on_event=die)
    second = Fleet(folder)
    second.clock.advance_to(first.clock.now() + 3 * config.deadline_s)
    for device_id, pause_s in (("d0", 0.0), ("d1", 10.0), ("d2", LONGEST_PAUSE_S)):
        device = second.add(device_id, start=False, duration_s=0.0)
        device.clock.advance_to(second.clock.now() + pause_s)
        device.start()
    second.serve(config)
    with Journal.open_readonly(config.run_dir) as journal:
        assert journal.rounds()[0].accepted == 3


def test_deadline_continues_while_the_server_is_down(tmp_path):
    folder = tmp_path / "devices"
    folder.mkdir()
    config = make_config(tmp_path / "run", min_reports=1)
    first = Fleet(folder)
    first.add_three()
    first.devices["d2"].silent = lambda plan: plan.server_round == 1

    class Killed(BaseException):
        pass

    def die(name, data):
        if name == "report" and data["device_id"] == "d1":
            raise Killed

    with pytest.raises(Killed):
        first.serve(config, on_event=die)
    killed_at = first.clock.now()
    second = Fleet(folder)
    second.clock.advance_to(killed_at + 60.0)  # the server was down for a minute
    second.add_three()
    second.devices["d2"].silent = lambda plan: plan.server_round == 1
    second.serve(config)
    with Journal.open_readonly(config.run_dir) as journal:
        row = journal.rounds()[0]
    assert row.ended_wall_s - row.started_wall_s == pytest.approx(config.deadline_s, abs=1.0)
    assert row.accepted == 2
