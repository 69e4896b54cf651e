"""Worker processes of an experiment: pinned to cores, and terminated with their parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are pinned on Linux only")
CHILD = """
import os, sys, time
from pathlib import Path
from fedspine_edge.simulation.experiments import executors

def job(settings, folder):
    Path(settings["note"]).with_suffix(f".{os.getpid()}").write_text(str(sorted(os.sched_getaffinity(0))))
    time.sleep(settings["seconds"])
    return {}

executors.run_job = job
if __name__ == "__main__":
    jobs = {str(i): {"note": sys.argv[1], "seconds": float(sys.argv[2])} for i in range(4)}
    print(len(list(executors.run_jobs(jobs, Path(sys.argv[3]), engine="processes", workers=2))))
"""


def started(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), str(tmp_path / "note.x"), str(seconds), str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def notes(tmp_path: Path) -> dict[int, str]:
    return {int(path.suffix[1:]): path.read_text() for path in tmp_path.glob("note.[0-9]*")}


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_are_pinned_and_run_all_jobs(tmp_path: Path) -> None:
    child = started(tmp_path, 0.5)
    output, _ = child.communicate(timeout=120)
    assert output.strip() == "4"
    cores = list(notes(tmp_path).values())
    assert len(cores) == 2
    assert len(set(cores)) == min(2, len(os.sched_getaffinity(0)))


def test_workers_exit_with_killed_parent(tmp_path: Path) -> None:
    child = started(tmp_path, 300.0)
    try:
        wait_for(lambda: len(notes(tmp_path)) == 2)
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=30)
        wait_for(lambda: not any(alive(pid) for pid in notes(tmp_path)))
    finally:
        child.kill()
        child.communicate(timeout=30)
        for pid in notes(tmp_path):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
