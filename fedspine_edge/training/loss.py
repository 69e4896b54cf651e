"""Loss and number of correct predictions of a batch, for every task.

The logits of a small language model need more memory than all other activations (SmolLM2 has 49,152 per token). They
are therefore computed for a few predicted tokens at a time, together with their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedspine_edge.data.targets import IGNORED
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.training.batching import Ints

LOGITS_PER_CHUNK = 4 << 20
"""Logits that exist at a time in the loss of a language model: 16 MiB in float32."""


def loss_sum(model: PrunableModel, batch: Mapping[str, Ints]) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses and the number of correct predictions of a batch from `collate` or `pack`."""
    device = next(model.module.parameters()).device
    wanted = targets(batch, model.task)
    inputs = {name: torch.from_numpy(value).to(device) for name, value in batch.items() if name != "labels"}
    if "segments" in inputs:
        inputs["attention_mask"] = _within_segments(inputs.pop("segments"), model.compute_dtype)
    if model.task == "causal_lm":
        hidden = model.module.get_submodule(model.architecture.backbone)(**inputs)[0]
        rows, columns = np.nonzero(wanted != IGNORED)
        counted = torch.from_numpy(rows * hidden.shape[1] + columns).to(device)
        labels = torch.from_numpy(wanted[rows, columns]).to(device)
        head = model.module.get_output_embeddings()
        loss, correct = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1)[counted], head.weight, head.bias, labels)
        return loss, correct
    logits = model(**inputs).logits.float()
    labels, logits = torch.from_numpy(wanted.reshape(-1)).to(device), logits.reshape(-1, logits.shape[-1])
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return loss, (logits.detach().argmax(-1) == labels).sum()


def can_pack(model: PrunableModel, max_tokens: int) -> bool:
    """Return whether examples may share rows: in language models without an attention window shorter than a row."""
    window = getattr(model.module.config, "sliding_window", None)
    return model.task == "causal_lm" and (window is None or window >= max_tokens)


def num_targets(batch: Mapping[str, Ints], task: str) -> int:
    """Return the number of predictions in the loss, at least 1."""
    return max(1, int((targets(batch, task) != IGNORED).sum()))


def targets(batch: Mapping[str, Ints], task: str) -> Ints:
    """Return the targets, IGNORED where there is none. For causal_lm they are the tokens after the first."""
    labels = batch["labels"]
    if task != "causal_lm":
        return labels
    if labels.ndim == 1:  # plain text: every token
        labels = np.where(batch["attention_mask"] == 0, IGNORED, batch["input_ids"])
    return labels[:, 1:]


def _within_segments(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (rows, 1, tokens, tokens) of causal attention within each example."""
    tokens = segments.shape[1]
    visible = (segments[:, :, None] == segments[:, None, :]).tril_()
    mask = torch.zeros((segments.shape[0], tokens, tokens), dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


class _ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Sum of the cross entropies of hidden (tokens, hidden_size) with a frozen head, and correct predictions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if wanted else None
        chunk = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part, classes = hidden[start : start + chunk], labels[start : start + chunk, None]
            logits = functional.linear(part, weight, bias).float()
            correct += (logits.argmax(-1, keepdim=True) == classes).sum()
            total = logits.logsumexp(-1, keepdim=True)
            loss += (total - logits.gather(1, classes)).sum()
            if gradient is not None:  # softmax minus the one-hot target, in the memory of the logits
                probabilities = logits.sub_(total).exp_()
                probabilities.scatter_add_(1, classes, torch.full_like(total, -1.0))
                gradient[start : start + chunk] = probabilities.to(weight.dtype) @ weight
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None
