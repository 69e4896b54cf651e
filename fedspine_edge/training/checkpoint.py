"""A training run of one device that may be killed at any moment: what it writes, and how it goes on."""

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
    """One fit's state in a folder of its own, which belongs to that fit alone.

    Args:
        folder: Open for as long as this object is used.
        key: Digest of what the fit's result depends on besides the weights it starts from; see `key_of`.
        total: Steps of the whole fit.
    """

    def __init__(self, folder: StateDir, key: str, total: int) -> None:
        self._folder = folder
        self._key = key
        self._total = total

    def resume(self, trainer: Trainer) -> bool:
        """Bring `trainer` to where the fit was; False if it had not begun.

        Raises `ConfigError` for another fit's folder, `CheckpointError` for a damaged one.
        """
        saved = self._folder.read(FIT)
        if saved is None:
            return False
        if saved.info.get("key") != self._key:
            raise ConfigError(
                f"{self._folder.folder} holds the checkpoint of another fit: other data, settings, steps or widths.",
                remedy="Give every fit a folder of its own, or delete this one.",
            )
        try:
            trainer.restore(StateRecord(saved.info["trainer"], saved.tensors))
        except (KeyError, TypeError, ValueError) as error:
            raise self._folder.damaged(FIT, f"it is incomplete ({type(error).__name__})") from error
        log.info("resumed after step %d", trainer.step)
        return True

    def stepped(self, trainer: Trainer) -> None:
        """Write every ten steps, and after the last. Raises `CheckpointError`; the last state stays."""
        if trainer.step % CHECKPOINT_STEPS == 0 or trainer.step == self._total:
            saved = trainer.state()
            document = StateRecord({"key": self._key, "trainer": saved.info}, saved.tensors)
            try:
                self._folder.write(FIT, document)
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder.folder} cannot be written: {error.strerror}.",
                    remedy="Check space and permissions; then the same call goes on from the last state there.",
                ) from error


@contextmanager
def open_checkpoint(folder: str | Path, key: str, total: int) -> Iterator[FitCheckpoint]:
    """The checkpoint in `folder`, which is created. Raises `ConfigError` while another process uses it."""
    with StateDir(folder) as state:
        yield FitCheckpoint(state, key, total)


def key_of(train: Iterable[Encoded], model: PrunableModel, *settings: Any) -> str:
    """Digest of the examples, of what kind of model it is, and of everything else given."""
    examples = [(x.input_ids, x.label, x.token_type_ids, x.token_labels) for x in train]
    adapter = (model.r, model.scaling, model.task, model.base_dtype)
    kind = (*adapter, model.spec.base_sha256, model.layout.to_dict())
    return hashlib.sha256(msgspec.json.encode((examples, kind, settings))).hexdigest()
