"""Tiny random models of every family, and what a masked full model is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedspine_edge.model.layout import Layout, module_names, split_name
from fedspine_edge.model.prunable import PrunableModel

VOCAB = 61
KINDS = ("bert", "roberta", "llama", "llama_lm")


def module(
    kind: str,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    channels: int = 24,
    bias: bool = False,
    tied: bool = False,
    attention: str = "sdpa",
    num_labels: int = 3,
    seed: int = 0,
) -> nn.Module:
    """A transformers task model with weights large enough that every group matters."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": channels,
        "num_labels": num_labels,
        "initializer_range": 0.3,
        "attn_implementation": attention,
    }
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**shared, max_position_embeddings=40, pad_token_id=0))
    elif kind == "roberta":
        model = RobertaForSequenceClassification(RobertaConfig(**shared, max_position_embeddings=40, pad_token_id=1))
    else:
        config = LlamaConfig(
            **shared,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            attention_bias=bias,
            mlp_bias=bias,
            tie_word_embeddings=tied,
            pad_token_id=0,
            max_position_embeddings=40,
        )
        model = LlamaForCausalLM(config) if kind == "llama_lm" else LlamaForSequenceClassification(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1: make them count
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def prunable(kind: str, *, r: int = 3, live_b: bool = True, seed: int = 0, **shape: Any) -> PrunableModel:
    """A prunable model with adapters whose B is not zero."""
    task: Any = "causal_lm" if kind == "llama_lm" else "classification"
    model = PrunableModel.from_module(module(kind, seed=seed, **shape), task=task)
    model.attach_lora(r, 0.5, seed)
    if live_b:
        generator = torch.Generator().manual_seed(seed + 2)
        for name, parameter in model.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(model: PrunableModel, *, rows: int = 3, tokens: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Padded inputs with labels."""
    generator = torch.Generator().manual_seed(seed)
    pad = model.module.config.pad_token_id
    ids = torch.randint(2, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, tokens - 2 :], mask[0, tokens - 2 :] = pad, 0
    labels = ids if model.task == "causal_lm" else torch.arange(rows) % model.num_labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def mask(model: PrunableModel, layout: Layout) -> None:
    """Make a full model behave as if it had only what `layout` keeps: silence the inputs of o and down."""
    for name in module_names(model.spec):
        if split_name(name)[1] not in ("o", "down"):
            continue
        keep = np.isin(model.layout.cols(name), layout.cols(name))
        factor = torch.from_numpy(keep.astype(np.float32))
        model.linear(name).register_forward_pre_hook(lambda _, args, f=factor: (args[0] * f.to(args[0].dtype),))


def random_layout(model: PrunableModel, seed: int, within: Layout | None = None) -> Layout:
    """Unequal widths, at least one group per layer."""
    rng = np.random.default_rng(seed)
    start = within or model.layout

    def some(kept: np.ndarray) -> np.ndarray:
        size = int(rng.integers(1, kept.size + 1))
        return np.sort(rng.choice(kept, size, replace=False)).astype(np.int64)

    return Layout(model.spec, tuple(map(some, start.heads)), tuple(map(some, start.channels)))
