"""Where working copies of the unpruned base come from, and on which processor they run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.checkpoint import load_base, load_tokenizer
from fedspine_edge.model.prunable import PrunableModel

log = logging.getLogger("fedspine_edge.device")


class ModelSource:
    """Gives fresh unpruned models of one base, since a compact model never grows back.

    Args:
        path: Folder (or hub id) of the base model.
        num_labels: Classes of the task head.
        torch_device: Where the models go.
        model: An unpruned model that is already in memory, used instead of reading `path` again and again (a
            simulation's many devices). It is not changed; copies share its frozen weights. Its head stands for the
            fresh head of whatever seed a plan names.
    """

    def __init__(
        self, path: str, *, num_labels: int, torch_device: str = "cpu", model: PrunableModel | None = None
    ) -> None:
        self._path = path
        self._num_labels = num_labels
        self._torch_device = torch_device
        self._model = model
        self._heads: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        if model is not None:
            model.module.to(torch_device)

    def fresh(self, seed: int = 0) -> PrunableModel:
        """A new working copy; `seed` is that of a task head the base does not bring. Raises `ModelError`."""
        if self._model is not None:
            shared = {id(p): p for n, p in self._model.module.named_parameters() if not p.requires_grad}
            model = copy.deepcopy(self._model, shared)
        else:
            model = load_base(self._path, num_labels=self._num_labels, seed=seed)
            model.module.to(self._torch_device)
        self._heads[seed] = _head_of(model)
        return model

    def initial_head(self, seed: int) -> Mapping[str, npt.NDArray[np.float32]]:
        """The untrained task head, named as in a round blob ("head.*"); the same on every device of the fleet."""
        if seed not in self._heads:
            self.fresh(seed)
        return self._heads[seed]

    def tokenizer(self) -> Any:
        """The base's tokenizer. Raises `CheckpointError`."""
        if self._model is not None and self._model.folder is not None:
            return load_tokenizer(self._model.folder, gguf_file=self._model.gguf_file)
        return load_tokenizer(self._path)


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
