"""Tiny random models of every family, and masked full models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from fedspine_edge.model.families import SUPPORTED
from fedspine_edge.model.layout import Layout, module_names, split_name
from fedspine_edge.model.prunable import PrunableModel

VOCAB = 61
SUFFIXES = {"classification": "", "token_classification": "_tokens", "causal_lm": "_lm"}
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "causal_lm": AutoModelForCausalLM,
}
CONFIGS: dict[str, Any] = {
    "bert": lambda s, n: BertConfig(**s, intermediate_size=n["channels"], pad_token_id=0),
    "roberta": lambda s, n: RobertaConfig(**s, intermediate_size=n["channels"], pad_token_id=1),
    "distilbert": lambda s, n: DistilBertConfig(**s, hidden_dim=n["channels"], pad_token_id=0),
    "deberta-v2": lambda s, n: DebertaV2Config(
        **{**s, "attn_implementation": "eager"},
        intermediate_size=n["channels"],
        pad_token_id=0,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    "modernbert": lambda s, n: ModernBertConfig(
        **s,
        intermediate_size=n["channels"],
        attention_bias=n["bias"],
        mlp_bias=n["bias"],
        local_attention=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    ),
    "gpt2": lambda s, n: GPT2Config(
        **s, n_inner=n["channels"], pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=n["tied"]
    ),
    "llama": lambda s, n: LlamaConfig(**_llama(s, n), attention_bias=n["bias"], mlp_bias=n["bias"]),
    "mistral": lambda s, n: MistralConfig(**_llama(s, n), sliding_window=4),
    "qwen2": lambda s, n: Qwen2Config(**_llama(s, n)),
    "qwen3": lambda s, n: Qwen3Config(**_llama(s, n), attention_bias=n["bias"]),
}
"""One line per family: shared settings and this package's numbers → a tiny config."""
KINDS = tuple(family + SUFFIXES[task] for family, entry in SUPPORTED.items() for task in entry.head)
"""Every family with every task it has."""
FAMILIES = tuple(family if "causal_lm" not in entry.head else f"{family}_lm" for family, entry in SUPPORTED.items())
"""Every family once, for what does not depend on the task."""


def _llama(shared: dict[str, Any], n: dict[str, Any]) -> dict[str, Any]:
    own = {"num_key_value_heads": n["kv_heads"], "head_dim": n["head_dim"], "intermediate_size": n["channels"]}
    return {**shared, **own, "tie_word_embeddings": n["tied"], "pad_token_id": 0}


def task_of(kind: str) -> tuple[str, Any]:
    """ "llama_lm" → ("llama", "causal_lm")."""
    for task, suffix in SUFFIXES.items():
        if suffix and kind.endswith(suffix):
            return kind.removesuffix(suffix), task
    return kind, "classification"


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
        "max_position_embeddings": 40,
        "num_labels": num_labels,
        "initializer_range": 0.3,
        "attn_implementation": attention,
    }
    numbers = {"kv_heads": kv_heads, "head_dim": head_dim, "channels": channels, "bias": bias, "tied": tied}
    family, task = task_of(kind)
    config = CONFIGS[family](shared, numbers)
    config.use_cache = False
    model = AUTO[task].from_config(config, attn_implementation=config._attn_implementation)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1: make them count
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def prunable(kind: str, *, r: int = 3, live_b: bool = True, seed: int = 0, **shape: Any) -> PrunableModel:
    """A prunable model with adapters whose B is not zero."""
    model = PrunableModel.from_module(module(kind, seed=seed, **shape), task=task_of(kind)[1])
    model.attach_lora(r, 0.5, seed)
    if live_b:
        generator = torch.Generator().manual_seed(seed + 2)
        for name, parameter in model.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(
    model: PrunableModel, *, rows: int = 3, tokens: int = 7, seed: int = 0, pair: bool = False
) -> dict[str, torch.Tensor]:
    """Padded inputs with labels; with `pair` the second half is a second text, where the family tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    pad = model.module.config.pad_token_id
    ids = torch.randint(2, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, tokens - 2 :], mask[0, tokens - 2 :] = pad, 0
    labels = ids
    if model.task != "causal_lm":
        labels = (ids if model.task == "token_classification" else torch.arange(rows)) % model.num_labels
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if pair and getattr(model.module.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = (torch.arange(tokens) >= tokens // 2).long().expand(rows, tokens) * mask
    return inputs


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
