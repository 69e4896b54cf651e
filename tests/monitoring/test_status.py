"""`fedspine-edge status` on journals as a server leaves them. test_demo.py has a fleet of real processes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from fedspine_edge.cli import status as command
from fedspine_edge.cli.main import main
from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError
from fedspine_edge.monitoring.status import FleetStatus, read_status
from fedspine_edge.protocol.messages import Report, RoundPlan, Status
from fedspine_edge.server.journal.schema import ClosedRound, IssuedPlan, RecordedReport, RunState
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.run_dir import RunDir
from fedspine_edge.strategies import RoundOutcome

NAMES = ("nx-1", "nx-2", "nx-3")
OOM = "4 GiB short. Lower data.batch_size."


class Run:
    """Writes a journal as a server does, at given times."""

    def __init__(self, folder: Path, *, at_s: float, clock: str = "real") -> None:
        self.config = FleetConfig(run_dir=str(folder), num_rounds=5, min_devices=2, deadline_s=600.0)
        self.at_s = at_s
        self.dir = RunDir(self.config)
        config = msgspec.json.encode(self.config).decode()
        self.journal.set_meta(run_id="abc", config=config, clock=clock, stopped="")

    @property
    def journal(self) -> Journal:
        return self.dir.journal

    def publish_status(self, device_id: str, *, online: bool = True, refused: str = "") -> None:
        status = Status(device_id=device_id, state="online" if online else "offline", device_class="orin-nx")
        self.journal.put_device(status, online=online, refused=refused, wall_s=self.at_s)

    def open_round(self, number: int, attempt: int = 1) -> None:
        plans = []
        for name in NAMES:
            plans.append(IssuedPlan.from_plan(RoundPlan(run_id="abc", device_id=name, server_round=number, r=4), u=0.5))
        state = RunState(number, attempt)
        self.journal.open_round(state, plans, published=[], wall_s=self.at_s)

    def report(self, number: int, device_id: str, status: str = "accepted", reason: str = "", attempt: int = 1) -> None:
        report = Report(
            run_id="abc",
            device_id=device_id,
            server_round=number,
            plan_sha256="0" * 64,
            status="ok" if status == "accepted" else "out_of_memory",
            loss_after=0.25,
            accuracy_after=0.75,
            completion_time_s=12.5,
            bytes_up=1_000_000,
            bytes_down=2_000_000,
        )
        recorded = RecordedReport(report, status, reason)
        self.journal.put_report(number, attempt, recorded, wall_s=self.at_s)

    def close_round(self, number: int, *, done: bool = True, attempt: int = 1) -> None:
        following = RunState(number + 1) if done else RunState(number, attempt + 1, 1)
        ended = {p.device_id: p for p in self.journal.device_rounds(number, attempt)}
        outcomes = [
            (RoundOutcome(i, p.status if p.status != "running" else "late", reason=p.reason), None)
            for i, p in ended.items()
        ]
        closed = ClosedRound(
            server_round=number,
            attempt=attempt,
            done=done,
            outcomes=outcomes,
            mean_loss=0.25,
            mean_accuracy=0.75,
            bytes_up=3_000_000,
            bytes_down=6_000_000,
        )
        self.journal.close_round(following, closed, wall_s=self.at_s)

    def whole_round(self, number: int, duration_s: float) -> None:
        self.open_round(number)
        self.at_s += duration_s
        for name in NAMES:
            self.report(number, name)
        self.close_round(number)

    def read(self) -> FleetStatus:
        return read_status(Path(self.config.run_dir))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run whose server started 1000 s ago, with three devices online."""
    made = Run(tmp_path / "run", at_s=time.time() - 1000.0)
    for name in NAMES:
        made.publish_status(name)
    yield made
    made.dir.close()


def shown(run_dir: str | Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["status", str(run_dir), *options]) == 0
    return capsys.readouterr().out


def test_status_waiting_shows_missing_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Run(tmp_path / "run", at_s=time.time())
    made.publish_status("nx-1")
    made.publish_status("nx-9", refused="its base model has digest 00, this fleet trains 11.")
    text = shown(tmp_path / "run", capsys)
    assert "run abc · waiting for devices before round 1 of 5: 1 of 2 online" in text
    assert "the server is running" in text
    assert "if one is missing here, run on it: fedspine-edge doctor --config device.toml" in text
    assert "nx-9: refused: its base model has digest 00" in text
    made.publish_status("nx-2")
    assert made.read().state == "running"
    made.dir.close()


def test_status_running_shows_each_device(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.open_round(1)
    run.report(1, "nx-1")
    run.report(1, "nx-2", "out_of_memory", OOM)
    run.publish_status("nx-3", online=False)
    text = shown(run.config.run_dir, capsys)
    assert "round 1 of 5 is running: 2 of 3 devices have answered" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("nx-")}
    assert rows["nx-1"][:9] == ["nx-1", "orin-nx", "ok", "0.000", "4", "12.5", "0.2500", "0.750", "1000"]
    assert rows["nx-3"][2:4] == ["running,", "offline"]
    assert rows["nx-1"][-3:] == ["17", "min", "ago"]
    assert f"nx-2: round 1, out_of_memory: {OOM}" in text
    assert "up 2.0 MB, down 4.0 MB" in text


def test_status_small_terminal_shows_failed_devices_first(run: Run) -> None:
    run.open_round(1)
    run.report(1, "nx-2", "out_of_memory", OOM)
    run.publish_status("nx-3", online=False)
    console = Console(width=80, file=io.StringIO())
    console.print(command._page(run.read(), Path(run.config.run_dir), console, rows=2))
    text = console.file.getvalue()
    assert [line.split()[0] for line in text.splitlines() if line.startswith("nx-")] == ["nx-2", "nx-3"]
    assert "and 1 more devices" in text
    assert "accuracy" in text
    assert "reward" not in text


def test_status_keeps_last_failure_after_success(run: Run) -> None:
    run.open_round(1)
    run.report(1, "nx-2", "out_of_memory", OOM)
    run.close_round(1, done=False)
    run.open_round(1, attempt=2)
    for name in NAMES:
        run.report(1, name, attempt=2)
    status = run.read()
    by_id = {device.device_id: device for device in status.devices}
    assert {name: by_id[name].newest.status for name in NAMES} == dict.fromkeys(NAMES, "ok")
    assert (by_id["nx-2"].last_failure.status, by_id["nx-2"].last_failure.attempt) == ("out_of_memory", 1)
    assert by_id["nx-1"].last_failure.status == "late"
    assert status.totals()["attempts_failed"] == 1
    assert json.dumps(status.to_dict()) == json.dumps(run.read().to_dict()), "no time of asking is in it"


def test_status_escapes_control_characters(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.open_round(1)
    run.report(1, "nx-2", "failed", "\x1b[2Jgone\r\nfake line \u202e")
    text = shown(run.config.run_dir, capsys)
    assert "\x1b" not in text
    assert "\\x1b[2Jgone\\r\\nfake line \\u202e" in text


def test_time_left_without_evidence_is_none(run: Run) -> None:
    now_s = run.at_s
    run.whole_round(1, 100.0)
    run.open_round(2)
    assert run.read().time_left_s(now_s + 100) is None, "one round is not enough"
    for name in NAMES:
        run.report(2, name)
    run.at_s += 140.0
    run.close_round(2)
    assert run.read().time_left_s(now_s + 240) is None, "the start of the next round is unknown"
    run.open_round(3)
    assert run.read().round_time_range_s == pytest.approx((100, 140))
    assert run.read().time_left_s(now_s + 240 + 30) == pytest.approx((2 * 100 + 70, 2 * 140 + 110))
    # Longer than any round so far, so it may take until its deadline.
    assert run.read().time_left_s(now_s + 240 + 200) == pytest.approx((2 * 100, 2 * 140 + 400))
    run.dir.close()
    assert run.read().time_left_s(now_s + 250) is None, "no server is running"


def test_status_distinguishes_stopped_from_running(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.open_round(1)
    assert run.read().server_running is True
    run.dir.close()  # as after SIGKILL: no error recorded
    text = shown(run.config.run_dir, capsys)
    assert "stopped before it was finished; last state: round 1 of 5 is running: 0 of 3" in text
    assert "3 online when the server stopped" in text
    assert "it was killed, or its machine stopped" in text
    assert "to continue: fedspine-edge server" in text
    run.dir = RunDir(run.config)
    run.journal.set_meta(stopped="no broker.\n  Start it.")
    run.dir.close()
    assert "reason: no broker.\n  Start it." in shown(run.config.run_dir, capsys)


def test_status_simulation_shows_virtual_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Run(tmp_path / "run", at_s=40.0, clock="virtual")
    made.publish_status("nx-1")
    made.whole_round(1, 10.0)
    made.whole_round(2, 10.0)
    made.open_round(3)
    made.dir.close()
    text = shown(tmp_path / "run", capsys)
    assert "at 60 s" in text
    assert "virtual" in text
    assert "time left" not in text


def test_follow_prints_changes_until_run_finishes(run: Run) -> None:
    run.open_round(1)
    follow = [sys.executable, "-m", "fedspine_edge", "status", run.config.run_dir, "--follow"]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [next(process.stdout)]
        run.report(1, "nx-1")
        while "nx-1 ok" not in lines[-1]:
            lines.append(next(process.stdout))
        run.journal.set_meta(result='{"num_rounds": 5}')
        lines += process.stdout
    assert process.returncode == 0
    output = [line.split(" ", 1)[1].rstrip() for line in lines]
    assert output.count("round 1: nx-1 ok, ratio 0.000, rank 4, 12.5 s measured, loss 0.2500, accuracy 0.7500") == 1
    assert output.count("round 1: nx-2 running, ratio 0.000, rank 4") == 1
    assert output[-1] == "run abc · finished after 5 rounds"


def test_follow_without_server_exits(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.dir.close()
    monkeypatch.setattr(command, "POLL_S", 0.05)
    monkeypatch.setattr(command, "SERVER_TIMEOUT_S", 0.2)
    assert main(["status", run.config.run_dir, "--follow", "--json"]) == 1
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert json.loads(line)["state"] == "stopped"
    assert "no server has been running" in err


def test_follow_removed_folder_raises(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "POLL_S", 0.05)
    changes = command._changes(Path(run.config.run_dir))
    assert next(changes).state == "running"
    run.dir.close()
    shutil.rmtree(run.config.run_dir)
    with pytest.raises(ConfigError, match="no journal"):
        list(changes)


def test_status_of_other_folder_raises_with_remedy(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(run.config.run_dir)
    assert main(["status", str(folder / "absent")]) == 2
    assert "Give the run_dir of a server" in capsys.readouterr().err
    assert main(["status", str(folder.parent)]) == 2  # simulate's --out holds the run
    assert f"Did you mean {folder}?" in capsys.readouterr().err


def test_status_read_only_leaves_no_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.whole_round(1, 10.0)
    run.dir.close()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert run.read().totals()["rounds_done"] == 1
    assert {path.name for path in Path(run.config.run_dir).iterdir()} == {"journal.sqlite", "lock"}
