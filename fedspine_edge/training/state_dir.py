"""A durable state folder in which every file is replaced atomically. No pickle is used.

    lock                    held while a process uses the folder
    device.state            state between rounds: identity, layout, importance averages, last report
    round.state             state within a round: phase, adapter, moments, cost meter; deleted when the round is
    finished blobs/{sha256}          update of a pending report download/               chunks of the round's adapter,
    so that a transfer continues where it stopped

A `.state` file is a safetensors file. Its metadata holds a JSON document and the SHA-256 of everything, so that a torn
or altered file is detected before anything of it is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from fedspine_edge.arrays import Tensors
from fedspine_edge.errors import CheckpointError, ConfigError
from fedspine_edge.files import write_atomically

SCHEMA = 1
SECRET = "secret"


class CorruptState(CheckpointError):
    """A file of the state folder is damaged. Only its owner can decide to delete it."""


@dataclass(frozen=True)
class StateRecord:
    """Content of one state file: plain data and tensors."""

    info: dict[str, Any]
    tensors: Tensors


class StateDir:
    """A durable folder for one process at a time. Close it, or use it as a context manager, to release it.

    Raises `ConfigError` if the folder cannot be written or another process uses it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._lock: IO[str] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(
                f"{self.folder} is in use by another process.",
                remedy="Stop that process, or use another folder; a device sets it with `state_dir`.",
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be used: {error.strerror}.", remedy="Choose a writable folder."
            ) from None

    def __enter__(self) -> StateDir:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Further calls have no effect."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, name: str, record: StateRecord) -> None:
        """Replace `{name}.state` and flush it to the disk."""
        body = json.dumps({"schema": SCHEMA, **record.info}, allow_nan=True, separators=(",", ":"))
        arrays = {key: np.asarray(value, order="C") for key, value in record.tensors.items()}
        metadata = {"json": body, "sha256": _digest(body, arrays)}
        write_atomically(self._path(name), safetensors.numpy.save(arrays, metadata), sync=True)

    def read(self, name: str) -> StateRecord | None:
        """Return the content of `{name}.state`, or None if it does not exist. Raises `CorruptState`."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
            body = metadata["json"]
            if metadata["sha256"] != _digest(body, arrays):
                raise ValueError("its checksum does not match")
            info = json.loads(body)
            if info.pop("schema") != SCHEMA:
                raise ValueError("it was written by another version")
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.damaged(name, str(error)) from None
        return StateRecord(info, arrays)

    def remove(self, name: str) -> None:
        """Delete `{name}.state` if it exists."""
        self._path(name).unlink(missing_ok=True)

    def secret(self) -> str:
        """Return random text that is generated once for this folder and stays in it."""
        saved = self.read(SECRET)
        if saved is None:
            saved = StateRecord({"secret": secrets.token_hex(32)}, {})
            self.write(SECRET, saved)
        return str(saved.info["secret"])

    def damaged(self, name: str, why: str) -> CorruptState:
        """Return the error for a damaged state file."""
        return CorruptState(
            f"state file {self._path(name)} cannot be used: {why}.",
            remedy=f"Delete the folder {self.folder} to start over; a device then joins the fleet as a new device.",
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.state"


def prefixed(prefix: str, tensors: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    """Return `tensors` with `prefix` before every name."""
    return {prefix + name: value for name, value in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    """Return the tensors whose names start with `prefix`, without the prefix."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(body: str, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    found = hashlib.sha256(body.encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return found.hexdigest()
