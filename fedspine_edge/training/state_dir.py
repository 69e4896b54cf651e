"""What a device must not lose when power fails: one folder, every file replaced atomically, no pickle.

    lock                    held while an agent runs; two agents cannot share a folder
    device.state            across rounds: identity, layout, importance EMA, last report
    round.state             inside a round: phase, adapter, moments, meter; gone when the round is finished
    blobs/{sha256}          the update that a pending report announces
    download/               chunks of the round's adapter, so that a transfer goes on where it stopped

A `.state` file is safetensors; its metadata holds a JSON document and the SHA-256 of everything, so a torn or
altered file is noticed before anything of it is used.
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

from fedspine_edge.errors import CheckpointError, ConfigError
from fedspine_edge.files import write_atomically

Tensors = dict[str, npt.NDArray[Any]]

SCHEMA = 1


SECRET = "secret"


class CorruptState(CheckpointError):
    """A file of the state folder cannot be used; only its owner can decide to delete it."""


@dataclass(frozen=True)
class StateRecord:
    """One state file: plain data and the tensors that go with it."""

    info: dict[str, Any]
    tensors: Tensors


class StateDir:
    """A device's durable folder. Close it, or use it as a context manager, to let another agent in.

    Raises `ConfigError` when the folder cannot be written or another agent holds it.
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
                remedy="Stop that one, or give each a folder of its own: a device its `state_dir`.",
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be used: {error.strerror}.", remedy="Name a folder you may write to."
            ) from None

    def __enter__(self) -> StateDir:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; harmless when repeated."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, name: str, document: StateRecord) -> None:
        """Replace `{name}.state`; on return it is on the disk."""
        body = json.dumps({"schema": SCHEMA, **document.info}, allow_nan=True, separators=(",", ":"))
        arrays = {key: np.asarray(value, order="C") for key, value in document.tensors.items()}
        metadata = {"json": body, "sha256": _digest(body, arrays)}
        write_atomically(self._path(name), safetensors.numpy.save(arrays, metadata), sync=True)

    def read(self, name: str) -> StateRecord | None:
        """The content of `{name}.state`, None if there is none. Raises `CheckpointError` for a damaged file."""
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
        """Random text that was drawn once for this folder and never leaves it."""
        saved = self.read(SECRET)
        if saved is None:
            saved = StateRecord({"secret": secrets.token_hex(32)}, {})
            self.write(SECRET, saved)
        return str(saved.info["secret"])

    def damaged(self, name: str, why: str) -> CorruptState:
        """The error for a state file whose content cannot be used."""
        return CorruptState(
            f"state file {self._path(name)} cannot be used: {why}.",
            remedy=f"Delete the folder {self.folder} to begin anew; a device then rejoins the fleet as a new one.",
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.state"


def prefixed(prefix: str, tensors: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    """`tensors` with `prefix` before every name."""
    return {prefix + name: value for name, value in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(body: str, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    found = hashlib.sha256(body.encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return found.hexdigest()
