"""The supervisor: restarts, their limit, and termination of all children."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedspine_edge.demo.supervisor import Supervisor
from fedspine_edge.errors import FedspineError

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


def _wait_until_dead(supervisor: Supervisor, name: str) -> None:
    process = supervisor.children[name].process
    assert process is not None
    process.wait(10)


def test_killed_child_is_restarted(tmp_path: Path) -> None:
    with Supervisor() as supervisor:
        child = supervisor.start("sleeper", SLEEPER, tmp_path / "log")
        first = child.process
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        _wait_until_dead(supervisor, "sleeper")
        assert supervisor.check() == ["sleeper"]
        assert child.process is not first
        assert child.returncode is None
        assert child.restarts == 1


def test_finished_child_is_not_restarted(tmp_path: Path) -> None:
    with Supervisor() as supervisor:
        child = supervisor.start("quick", [sys.executable, "-c", "pass"], tmp_path / "log")
        _wait_until_dead(supervisor, "quick")
        assert supervisor.check() == []
        assert child.returncode == 0


def test_usage_error_is_not_retried(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(2)"]
    with Supervisor() as supervisor:
        supervisor.start("device", argv, tmp_path / "log")
        _wait_until_dead(supervisor, "device")
        with pytest.raises(FedspineError, match=r"device exited with code 2.*no such model"):
            supervisor.check()


def test_restarts_are_limited(tmp_path: Path) -> None:
    with Supervisor(max_restarts=1) as supervisor:
        supervisor.start("crashing", [sys.executable, "-c", "import sys; sys.exit(1)"], tmp_path / "log")
        _wait_until_dead(supervisor, "crashing")
        assert supervisor.check() == ["crashing"]
        _wait_until_dead(supervisor, "crashing")
        with pytest.raises(FedspineError, match="after 1 restarts"):
            supervisor.check()


def test_stop_terminates_every_child(tmp_path: Path) -> None:
    with Supervisor() as supervisor:
        children = [supervisor.start(f"sleeper-{i}", SLEEPER, tmp_path / f"{i}.log") for i in range(2)]
    assert all(child.returncode == -signal.SIGTERM for child in children)


def test_children_exit_with_killed_parent(tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import time",
            "from pathlib import Path",
            "from fedspine_edge.demo.supervisor import Supervisor",
            f"child = Supervisor().start('x', {SLEEPER!r}, Path({str(tmp_path / 'log')!r}))",
            "print(child.process.pid, flush=True)",
            "time.sleep(60)",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while _alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(grandchild)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
