"""The run folder: used by one server at a time, with one configuration for its whole life."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from fedspine_edge.config import FleetConfig, with_current_names
from fedspine_edge.errors import ConfigError
from fedspine_edge.server.journal.reader import FILE
from fedspine_edge.server.journal.writer import Journal

LOCK = "lock"
LOCK_ATTEMPTS, LOCK_PAUSE_S = 5, 0.05
"""`is_server_running` holds the lock for a moment, which must not prevent a server from starting."""

KNOWN_ENTRIES = frozenset(
    {
        LOCK,
        FILE,
        f"{FILE}-wal",
        f"{FILE}-shm",
        f"{FILE}-journal",
        "simulated.json",  # written by simulations
        "blobs",
        "uploads",
        "rejected",
        "final",
        "final.writing",
    }
)

OPERATIONAL = (
    *("broker", "run_dir", "deadline_s", "join_timeout_s", "min_devices", "min_reports", "max_failed_rounds"),
    "validation.keep_rejected",
)
"""Settings that may change between two starts of a run, because they do not affect its result."""


class RunDir:
    """The folder of one run, locked from construction to `close`.

    Args:
        config: Settings of the fleet; `run_dir` is created if absent.

    Raises `ConfigError` when another server uses the folder, when it contains anything but a run, or a run with
    other settings (naming them).
    """

    def __init__(self, config: FleetConfig) -> None:
        self.path = Path(config.run_dir)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = sorted(set(os.listdir(self.path)) - KNOWN_ENTRIES)
            if foreign and not (self.path / FILE).exists():
                raise ConfigError(
                    f"run_dir {self.path} is not empty and contains no run (it contains {foreign[0]!r}).",
                    remedy="Use an empty or new folder as run_dir.",
                )
            self._lock = self._acquire()
        except OSError as error:
            raise ConfigError(f"run_dir {self.path} cannot be used: {error}.") from error
        with ExitStack() as undo:
            undo.enter_context(self._lock)
            self.journal = Journal.open(self.path / FILE)
            undo.enter_context(self.journal)
            self._check_settings(config)
            undo.pop_all()

    def close(self) -> None:
        """Close the journal and release the lock. May be called repeatedly."""
        self.journal.close()
        self._lock.close()

    def _acquire(self) -> IO[str]:
        lock = (self.path / LOCK).open("a")
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError:
                if attempt < LOCK_ATTEMPTS - 1:
                    time.sleep(LOCK_PAUSE_S)
        lock.close()
        raise ConfigError(f"another server is using run_dir {self.path}.", remedy="Stop it, or use another run_dir.")

    def _check_settings(self, config: FleetConfig) -> None:
        stored = self.journal.meta("config")
        if stored is None:
            return
        before, now = settings(json.loads(stored)), settings(msgspec.to_builtins(config))
        # Settings that the version which started the run did not have are not compared.
        changed = sorted(name for name in before if before[name] != now.get(name))
        if changed:
            listed = ", ".join(f"{n} was {before.get(n)!r}, is {now.get(n)!r}" for n in changed[:3])
            raise ConfigError(
                f"run_dir {self.path} contains a run with other settings: {listed}.",
                remedy="Restore them to continue that run, or use another run_dir for a new one.",
            )


def is_server_running(run_dir: Path) -> bool | None:
    """Return whether a server holds the folder's lock; None where the lock cannot be read or is not supported."""
    try:
        with (run_dir / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None


def changed_wall_s(run_dir: Path) -> float:
    """Return the real time, in seconds since the epoch, of the last write to the folder's journal."""
    newest = (run_dir / FILE).stat().st_mtime
    with suppress(FileNotFoundError):  # deleted when a server ends
        log = (run_dir / f"{FILE}-wal").stat()
        if log.st_size:  # a reader creates an empty one
            newest = max(newest, log.st_mtime)
    return newest


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a run's result depends on, all but `OPERATIONAL`, as flat `section.key` → value."""
    plain, _ = with_current_names(json.loads(json.dumps(config)))  # the run may be of an earlier version
    flat = {
        f"{name}.{key}" if key else name: value
        for name, section in plain.items()
        for key, value in (section.items() if isinstance(section, dict) else (("", section),))
    }
    return {name: v for name, v in flat.items() if name not in OPERATIONAL and name.split(".")[0] not in OPERATIONAL}
