"""Checkpoints of one `fit`, from which the same call continues after the process was killed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from fedspine_edge.errors import CheckpointError, ConfigError
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.training.batching import Encoded
from fedspine_edge.training.state_dir import StateDir, StateRecord
from fedspine_edge.training.trainer import Trainer

log = logging.getLogger("fedspine_edge.tuner")

CHECKPOINT_STEPS = 10
FIT = "fit"
"""Name of the state file in the folder."""


class FitCheckpoint:
    """State of one fit, in a folder that belongs to that fit only.

    Args:
        folder: State folder, which stays open while this object is used.
        key: Digest of everything that determines the result of the fit, except the initial weights; see `key_of`.
        total_steps: Steps of the whole fit.
    """

    def __init__(self, folder: StateDir, key: str, total_steps: int) -> None:
        self._folder = folder
        self._key = key
        self._total_steps = total_steps

    def resume(self, trainer: Trainer) -> bool:
        """Restore the state into `trainer`, and return whether there was one.

        Raises `ConfigError` for the folder of another fit and `CheckpointError` for a damaged one.
        """
        saved = self._folder.read(FIT)
        if saved is None:
            return False
        if saved.info.get("key") != self._key:
            raise ConfigError(
                f"{self._folder.folder} holds the checkpoint of another fit: data, settings, steps or widths differ.",
                remedy=f"Delete {self._folder.folder} to start over, or use a separate folder for every fit.",
            )
        try:
            trainer.restore(StateRecord(saved.info["trainer"], saved.tensors))
        except CheckpointError as error:
            raise CheckpointError(
                f"the checkpoint in {self._folder.folder} cannot be continued: {error.message}",
                remedy=f"Delete {self._folder.folder} to start over, with a lower learning rate if it diverged.",
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise self._folder.damaged(FIT, f"it is incomplete ({type(error).__name__})") from error
        log.info("resumed after step %d", trainer.step)
        return True

    def save(self, trainer: Trainer) -> None:
        """Write the state every ten steps and after the last step. Raises `CheckpointError`; the last state stays."""
        if trainer.step % CHECKPOINT_STEPS == 0 or trainer.step == self._total_steps:
            saved = trainer.state()
            record = StateRecord({"key": self._key, "trainer": saved.info}, saved.tensors)
            try:
                self._folder.write(FIT, record)
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder.folder} cannot be written: {error.strerror}.",
                    remedy="Check space and permissions. The same call then continues from the last state in the "
                    "folder.",
                ) from error


@contextmanager
def open_checkpoint(folder: str | Path, key: str, total_steps: int) -> Iterator[FitCheckpoint]:
    """Open or create the checkpoint in `folder`. Raises `ConfigError` while another process uses it."""
    with StateDir(folder) as state:
        yield FitCheckpoint(state, key, total_steps)


def key_of(train: Iterable[Encoded], model: PrunableModel, *settings: Any) -> str:
    """Return a digest of the examples, the kind of model and all `settings`."""
    adapter = (model.r, model.scaling, model.task, model.base_dtype)
    kind = (*adapter, model.spec.base_sha256, model.layout.to_dict())
    # The digest of the JSON text of (examples, kind, settings), which is too large to build for many examples.
    digest = hashlib.sha256(b"[[")
    for number, x in enumerate(train):
        digest.update(b"," if number else b"")
        digest.update(msgspec.json.encode((x.input_ids, x.label, x.token_type_ids, x.token_labels)))
    digest.update(b"]," + msgspec.json.encode(kind) + b"," + msgspec.json.encode(settings) + b"]")
    return digest.hexdigest()
