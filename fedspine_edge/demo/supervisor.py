"""Supervisor of child processes: starts them, restarts those that fail, and stops all at the end.

The children terminate with their parent, however the parent ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from fedspine_edge.errors import FedspineError

_PR_SET_PDEATHSIG = 1
_STOP_GRACE_S = 10.0


@dataclass
class Child:
    """A supervised process."""

    name: str
    argv: Sequence[str]
    log: Path
    nice: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    restarts: int = 0

    @property
    def returncode(self) -> int | None:
        """Exit code of the process; None while it runs."""
        return self.process.poll() if self.process else None


class Supervisor:
    """Starts children and restarts those that were killed or crashed.

    Args:
        max_restarts: Maximum number of restarts of each child.
        environment: Environment variables of the children, in addition to those of this process.
    """

    def __init__(self, *, max_restarts: int = 5, environment: dict[str, str] | None = None) -> None:
        self._max_restarts = max_restarts
        self._environment = {**os.environ, **(environment or {})}
        self.children: dict[str, Child] = {}

    def start(self, name: str, argv: Sequence[str], log: Path, *, nice: int = 0) -> Child:
        """Start `argv` with its output appended to `log`.

        Args:
            name: Name of the child, for messages.
            argv: Command line.
            log: Log file.
            nice: Increment of the child's niceness.
        """
        child = Child(name, argv, log, nice)
        self.children[name] = child
        self._spawn(child)
        return child

    def check(self) -> list[str]:
        """Restart children that failed, and return their names.

        Raises `FedspineError` with the end of the log if a child reports a usage error (exit code 2) or has reached the
        maximum number of restarts.
        """
        restarted = []
        for child in self.children.values():
            code = child.returncode
            if code is None or code == 0:
                continue
            if code == 2 or child.restarts >= self._max_restarts:
                raise FedspineError(
                    f"{child.name} exited with code {code} after {child.restarts} restarts: {_tail(child.log)}",
                    remedy=f"See the log {child.log}.",
                )
            child.restarts += 1
            self._spawn(child)
            restarted.append(child.name)
        return restarted

    def stop(self) -> None:
        """Terminate all children, and kill those that do not exit within 10 s."""
        running = [c.process for c in self.children.values() if c.process and c.process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _STOP_GRACE_S
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, child: Child) -> None:
        child.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()

        def in_child() -> None:
            os.nice(child.nice)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:  # the parent died before the call above
                    os._exit(1)

        with child.log.open("ab") as log:
            child.process = subprocess.Popen(
                list(child.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                preexec_fn=in_child,
            )


def _tail(log: Path, lines: int = 5) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return " | ".join(text.strip().splitlines()[-lines:]) or "the log is empty"
