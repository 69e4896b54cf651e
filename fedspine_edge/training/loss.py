"""What a batch's loss is, for every task, and how many of its answers are right.

A language model's logits would outweigh all other activations of a small model (49,152 of them for each token of
SmolLM2), so they are formed a few tokens at a time, only where something is to be predicted,
and with their gradient at once.
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

LOGITS_AT_ONCE = 4 << 20
"""Logits that exist at a time in a language model's loss: 16 MiB in float32."""


def loss_sum(model: PrunableModel, batch: Mapping[str, Ints]) -> tuple[Tensor, Tensor]:
    """(sum of the losses, number of right answers) of one batch of `batches.collate` or `batches.pack`."""
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
        loss, right = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1)[counted], head.weight, head.bias, labels)
        return loss, right
    logits = model(**inputs).logits.float()
    labels, logits = torch.from_numpy(wanted.reshape(-1)).to(device), logits.reshape(-1, logits.shape[-1])
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return loss, (logits.detach().argmax(-1) == labels).sum()


def can_pack(model: PrunableModel, max_tokens: int) -> bool:
    """Whether examples may share rows: for language models whose attention has no window shorter than a row."""
    window = getattr(model.module.config, "sliding_window", None)
    return model.task == "causal_lm" and (window is None or window >= max_tokens)


def num_targets(batch: Mapping[str, Ints], task: str) -> int:
    """Answers that count, at least 1."""
    return max(1, int((targets(batch, task) != IGNORED).sum()))


def targets(batch: Mapping[str, Ints], task: str) -> Ints:
    """What is to be predicted, IGNORED where nothing is; for causal_lm the token that follows each but the last."""
    labels = batch["labels"]
    if task != "causal_lm":
        return labels
    if labels.ndim == 1:  # plain text: every token
        labels = np.where(batch["attention_mask"] == 0, IGNORED, batch["input_ids"])
    return labels[:, 1:]


def _within_segments(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (rows, 1, tokens, tokens): a token sees itself and what precedes it in its example."""
    tokens = segments.shape[1]
    seen = (segments[:, :, None] == segments[:, None, :]).tril_()
    mask = torch.zeros((segments.shape[0], tokens, tokens), dtype=dtype, device=segments.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


class _ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Sum of the cross entropies of hidden (tokens, hidden_size) against a frozen head, and the right answers."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        right = torch.zeros((), dtype=torch.int64, device=hidden.device)
        gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if wanted else None
        at_once = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, hidden.shape[0], at_once):
            part, answers = hidden[start : start + at_once], labels[start : start + at_once, None]
            logits = functional.linear(part, weight, bias).float()
            right += (logits.argmax(-1, keepdim=True) == answers).sum()
            total = logits.logsumexp(-1, keepdim=True)
            loss += (total - logits.gather(1, answers)).sum()
            if gradient is not None:  # softmax less the answer, in the memory of the logits
                probabilities = logits.sub_(total).exp_()
                probabilities.scatter_add_(1, answers, torch.full_like(total, -1.0))
                gradient[start : start + at_once] = probabilities.to(weight.dtype) @ weight
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None
