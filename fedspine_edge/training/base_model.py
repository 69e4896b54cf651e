"""Loading of base models for training, and the choice between CPU and GPU."""

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
    """Loads unpruned copies of one base model, because a compact model cannot grow back.

    Args:
        path: Folder or hub id of the base model.
        num_labels: Number of classes of the task head; 0 for causal_lm.
        task: Task of the models.
        torch_device: Device of the models: "cpu" or "cuda".
        base_dtype: Data type of the frozen weights; see `PrunableModel.set_base_dtype`.
        model: Unpruned model in memory, which is copied instead of reading `path` for each of the many devices of a
            simulation. It is not changed, and copies share its frozen weights. Copies have its head, whatever the seed.
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

    def load(self, seed: int = 0) -> PrunableModel:
        """Return a new copy. `seed` initializes a task head that the base does not have. Raises `ModelError`."""
        if self._model is not None:
            tensors = (*self._model.module.parameters(), *self._model.module.buffers())
            same_dtype = self._model.base_dtype == self._base_dtype
            shared = {id(t): t for t in tensors if same_dtype and not t.requires_grad}
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
        """Return the untrained task head, named as in a round blob ("head.*"). It is the same on every device.

        Empty for causal_lm.
        """
        if self._task == "causal_lm":
            return {}
        if seed not in self._heads:
            self.load(seed)
        return self._heads[seed]

    def tokenizer(self) -> Any:
        """Return the tokenizer of the base model. Raises `CheckpointError`."""
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
    """Load a base model, or a model that this package saved.

    Args:
        path: Folder, GGUF file or hub id.
        task: Task of the model.
        num_labels: Number of classes (default: 2, or that of the saved model).
        gguf_file: GGUF file within the folder.
        base_dtype: Data type of the frozen weights (default: float32, or that of the saved model).
        seed: Seed for a new head.

    Raises `ModelError`, and `ConfigError` for a saved model of another task or number of labels and for an unknown
    `base_dtype`.
    """
    if base_dtype is not None:
        compute_dtype(base_dtype)  # raises for an unknown name before anything is loaded
    if not (Path(path).expanduser() / LAYOUT).exists():
        classes = 2 if num_labels is None else num_labels
        return load_base(
            path, task=task, num_labels=classes, gguf_file=gguf_file, base_dtype=base_dtype or "float32", seed=seed
        )
    model = load_model(path)
    if model.task != task or (num_labels is not None and model.num_labels != num_labels):
        requested = task if num_labels is None else f"{task} with {num_labels}"
        raise ConfigError(
            f"{path} was saved for {model.task} with {model.num_labels} labels, not for {requested}.",
            remedy="Pass the `task` and `num_labels` that it was saved with, or use the base model.",
        )
    if base_dtype is not None:
        model.set_base_dtype(base_dtype)
    return model


def choose_torch_device(requested: Literal["auto", "cpu", "cuda"]) -> str:
    """Return "cpu" or "cuda". A test kernel must run first: torch wheels for servers fail at the first launch on a
    Jetson.

    Raises `ConfigError` if CUDA was requested and does not work.
    """
    if requested == "cpu":
        return "cpu"
    reason = "torch sees no GPU"
    if torch.cuda.is_available():
        try:
            torch.ones(8, device="cuda").sum().item()
            return "cuda"
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    if requested == "cuda":
        raise ConfigError(
            f"torch_device is 'cuda', but CUDA does not work here: {reason}.",
            remedy="On a Jetson, use the board's own torch (jetson/README.md); otherwise set torch_device = 'cpu'.",
        )
    if torch.cuda.is_available():
        log.warning("the first kernel on the GPU failed (%s); training on the CPU", reason)
    return "cpu"


def _head_of(model: PrunableModel) -> dict[str, npt.NDArray[np.float32]]:
    return {name: value for name, value in model.adapter_state().items() if name.startswith("head.")}
