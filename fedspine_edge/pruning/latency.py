"""Measured latency of a model for one text on this machine, and the part of it that pruning can shorten."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fedspine_edge.errors import ConfigError
from fedspine_edge.model.prunable import PrunableModel

_WARM_UP_PASSES = 2


@dataclass(frozen=True)
class ModelLatency:
    """Median latency of forward passes of one text.

    Args:
        total_ms: Time of the whole pass.
        layers_ms: Time in the layers of the transformer; the rest is for embeddings and head.
        conditions: Where and how it was measured.
    """

    total_ms: float
    layers_ms: float
    conditions: str

    def predict_ms(self, remaining_operations: float) -> float:
        """Return the predicted latency when the layers do only this share of their operations.

        This is a lower bound: norms, softmax and launches do not shrink, and narrow products run less efficiently.
        """
        return self.total_ms - self.layers_ms * (1.0 - remaining_operations)


def measure_latency(model: PrunableModel, length_tokens: int, *, repeats: int = 10) -> ModelLatency:
    """Measure forward passes, adapters included, of one text.

    Args:
        model: Model to measure.
        length_tokens: Length of the text in tokens.
        repeats: Number of passes, of which the median is taken.

    Raises `ConfigError`.
    """
    if repeats < 1 or length_tokens < 1:
        raise ConfigError(f"repeats is {repeats} and length_tokens is {length_tokens}; both must be at least 1.")
    device = next(model.module.parameters()).device
    ids = 2 + torch.arange(length_tokens, device=device)[None] % (int(model.module.config.vocab_size) - 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    layers = [model.module.get_submodule(model.architecture.layer_path(i)) for i in range(model.spec.num_layers)]
    timestamps: list[float] = []

    def record(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        timestamps.append(time.perf_counter())

    training = model.module.training
    model.module.eval()
    handles = [layers[0].register_forward_pre_hook(record), layers[-1].register_forward_hook(record)]
    passes: list[tuple[float, float]] = []
    try:
        with torch.no_grad():
            for _ in range(_WARM_UP_PASSES + repeats):
                timestamps.clear()
                record()
                model.module(**inputs)
                record()
                passes.append((timestamps[3] - timestamps[0], timestamps[2] - timestamps[1]))
    finally:
        model.module.train(training)
        for handle in handles:
            handle.remove()
    total, inside = (median(times[i] for times in passes[_WARM_UP_PASSES:]) * 1e3 for i in (0, 1))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return ModelLatency(total, inside, f"torch, {where}, one text of {length_tokens} tokens, median of {repeats}")
