"""How long one text takes through a model on this machine, and which part of that pruning can shorten."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from fedspine_edge.errors import ConfigError

if TYPE_CHECKING:
    from fedspine_edge.model.prunable import PrunableModel

_WARM_UP = 2


@dataclass(frozen=True)
class ModelLatency:
    """Medians over forward passes of one text.

    Args:
        total_ms: The whole pass.
        layers_ms: The part of it in the transformer's layers; embeddings and head are the rest.
        conditions: Where and how it was measured.
    """

    total_ms: float
    layers_ms: float
    conditions: str

    def at(self, share_of_operations: float) -> float:
        """Milliseconds if the layers did only this share of their operations.

        An estimate: norms, softmax and launches do not shrink, and narrow products run less efficiently.
        """
        return self.total_ms - self.layers_ms * (1.0 - share_of_operations)


def measure_latency(model: PrunableModel, length_tokens: int, *, repeats: int = 10) -> ModelLatency:
    """Time forward passes of one text of `length_tokens` tokens, adapters included. Raises `ConfigError`."""
    if repeats < 1 or length_tokens < 1:
        raise ConfigError(f"repeats is {repeats} and length_tokens {length_tokens}; both must be at least 1.")
    device = next(model.module.parameters()).device
    ids = 2 + torch.arange(length_tokens, device=device)[None] % (int(model.module.config.vocab_size) - 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    layers = [model.module.get_submodule(model.architecture.layer_path(i)) for i in range(model.spec.num_layers)]
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    training = model.module.training
    model.module.eval()
    handles = [layers[0].register_forward_pre_hook(mark), layers[-1].register_forward_hook(mark)]
    passes: list[tuple[float, float]] = []
    try:
        with torch.no_grad():
            for _ in range(_WARM_UP + repeats):
                marks.clear()
                mark()
                model.module(**inputs)
                mark()
                passes.append((marks[3] - marks[0], marks[2] - marks[1]))
    finally:
        model.module.train(training)
        for handle in handles:
            handle.remove()
    total, inside = (median(times[i] for times in passes[_WARM_UP:]) * 1e3 for i in (0, 1))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return ModelLatency(total, inside, f"torch, {where}, one text of {length_tokens} tokens, median of {repeats}")
