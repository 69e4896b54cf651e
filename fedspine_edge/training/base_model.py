"""Where working copies of the unpruned base come from, and on which processor they run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fedspine_edge.config import Task
from fedspine_edge.errors import ConfigError
from fedspine_edge.files import LAYOUT
from fedspine_edge.model.checkpoint import load_model
from fedspine_edge.model.loading import load_base, load_tokenizer
from fedspine_edge.model.precision import BaseDtype, compute_dtype
from fedspine_edge.model.prunable import PrunableModel

log = logging.getLogger("fedspine_edge.device")


class BaseModelLoader:
    """Gives fresh unpruned models of one base, since a compact model never grows back.

    Args:
        path: Folder (or hub id) of the base model.
        num_labels: Classes of the task head; 0 for causal_lm.
        task: What the models are for.
        torch_device: Where the models go.
        base_dtype: How the frozen weights are kept; see `PrunableModel.set_base_dtype`.
        model: An unpruned model that is already in memory, used instead of reading `path` again and again (a
            simulation's many devices). It is not changed; copies share its frozen weights. Its head stands for the
            fresh head of whatever seed a plan names.
    """

    def __init__(
        self,
        path: str,
        *,
        num_labels: int,
        task: Task = "classification",
        torch_device: str = "cpu",
        base_dtype: BaseDtype = "float32",
        model: PrunableModel | None = None,
    ) -> None:
        self._path = path
        self._task: Task = task
        self._num_labels = num_labels
        self._torch_device = torch_device
        self._base_dtype = base_dtype
        self._model = model
        self._heads: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        if model is not None:
            model.module.to(torch_device)

    def fresh(self, seed: int = 0) -> PrunableModel:
        """A new working copy; `seed` is that of a task head the base does not bring. Raises `ModelError`."""
        if self._model is not None:
            tensors = (*self._model.module.parameters(), *self._model.module.buffers())
            kept = self._model.base_dtype == self._base_dtype
            shared = {id(t): t for t in tensors if kept and not t.requires_grad}
            model = copy.deepcopy(self._model, shared)
            model.set_base_dtype(self._base_dtype)
        else:
            model = load_base(
                self._path, task=self._task, num_labels=self._num_labels, base_dtype=self._base_dtype, seed=seed
            )
            model.module.to(self._torch_device)
        self._heads[seed] = _head_of(model)
        return model

    def initial_head(self, seed: int) -> Mapping[str, npt.NDArray[np.float32]]:
        """The untrained task head, named as in a round blob ("head.*"); the same on every device of the fleet.

        Empty for causal_lm.
        """
        if self._task == "causal_lm":
            return {}
        if seed not in self._heads:
            self.fresh(seed)
        return self._heads[seed]

    def tokenizer(self) -> Any:
        """The base's tokenizer. Raises `CheckpointError`."""
        if self._model is not None and self._model.folder is not None:
            return load_tokenizer(self._model.folder, gguf_file=self._model.gguf_file)
        return load_tokenizer(self._path)


def open_model(
    path: str | Path,
    *,
    task: Task,
    num_labels: int | None,
    gguf_file: str | None = None,
    base_dtype: BaseDtype | None = None,
    seed: int = 0,
) -> PrunableModel:
    """A base model with a head for `num_labels` (default 2), or a model that this package saved.

    `base_dtype` None is float32, or what the saved model has. Raises `ModelError`, and `ConfigError` for a saved model
    of another task or number of labels, or for an unknown `base_dtype`.
    """
    if base_dtype is not None:
        compute_dtype(base_dtype)  # an unknown name is told before anything is loaded
    if not (Path(path).expanduser() / LAYOUT).exists():
        classes = 2 if num_labels is None else num_labels
        return load_base(
            path, task=task, num_labels=classes, gguf_file=gguf_file, base_dtype=base_dtype or "float32", seed=seed
        )
    model = load_model(path)
    if model.task != task or (num_labels is not None and model.num_labels != num_labels):
        asked = task if num_labels is None else f"{task} with {num_labels}"
        raise ConfigError(
            f"{path} was saved for {model.task} with {model.num_labels} labels, not for {asked}.",
            remedy="Pass the `task` and `num_labels` it was saved with, or the base model.",
        )
    if base_dtype is not None:
        model.set_base_dtype(base_dtype)
    return model


def choose_torch_device(wanted: Literal["auto", "cpu", "cuda"]) -> str:
    """ "cpu" or "cuda", the latter only if a kernel really runs: a torch wheel made for servers imports on a
    Jetson and fails at its first launch. Raises `ConfigError` when CUDA was asked for and does not work.
    """
    if wanted == "cpu":
        return "cpu"
    reason = "torch sees no GPU"
    if torch.cuda.is_available():
        try:
            torch.ones(8, device="cuda").sum().item()
            return "cuda"
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    if wanted == "cuda":
        raise ConfigError(
            f"torch_device is 'cuda', but CUDA does not work here: {reason}.",
            remedy="On a Jetson use the board's own torch (jetson/README.md); otherwise set torch_device = 'cpu'.",
        )
    if torch.cuda.is_available():
        log.warning("a GPU is here, but its first kernel failed (%s); training on the CPU", reason)
    return "cpu"


def _head_of(model: PrunableModel) -> dict[str, npt.NDArray[np.float32]]:
    return {name: value for name, value in model.adapter_state().items() if name.startswith("head.")}
