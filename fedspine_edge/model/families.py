"""The supported model families, one declarative entry each. Only this module knows transformers' module names.

To add a family, add an `Architecture` to `SUPPORTED` and a tiny config to tests/support/tiny_models.py. Every test of
the package then runs on it. See docs/guides/add-a-model-family.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedspine_edge.errors import UnknownArchitecture
from fedspine_edge.model.architecture import Architecture
from fedspine_edge.model.layout import Part

_BERT_LINEARS: Mapping[Part, str] = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_BERT_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def _llama_like(family: str, **differences: Any) -> Architecture:
    """Return the entry of a family that differs from LLaMA only in biases, norms and attention windows."""
    return Architecture(
        family=family,
        backbone="model",
        layers="layers",
        linears={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "up": "mlp.up_proj",
            "gate": "mlp.gate_proj",
            "down": "mlp.down_proj",
        },
        attention="self_attn",
        head={"classification": ("score",), "token_classification": ("score",), "causal_lm": ()},
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"),
        kv_heads="num_key_value_heads",
        dropouts=("attention_dropout",),
        last_token_pools=True,
        rms_norms=True,
        feed_forward="mlp",
        free_head_dim=True,
        **differences,
    )


SUPPORTED: Mapping[str, Architecture] = {
    entry.family: entry
    for entry in (
        Architecture(
            family="bert",
            token_types=True,
            learned_positions=True,
            backbone="bert",
            layers="encoder.layer",
            linears=_BERT_LINEARS,
            attention="attention.self",
            head={
                "classification": ("classifier", "bert.pooler"),  # docs/decisions/0021 has the measurement
                "token_classification": ("classifier",),
            },
            lora_targets=_BERT_TARGETS,
            head_counts=("num_attention_heads",),
            head_widths=("all_head_size",),
        ),
        Architecture(
            family="roberta",
            token_types=True,
            learned_positions=True,
            positions_after_padding=True,
            backbone="roberta",
            layers="encoder.layer",
            linears=_BERT_LINEARS,
            attention="attention.self",
            head={"classification": ("classifier",), "token_classification": ("classifier",)},
            lora_targets=_BERT_TARGETS,
            head_counts=("num_attention_heads",),
            head_widths=("all_head_size",),
        ),
        Architecture(
            family="distilbert",
            learned_positions=True,
            backbone="distilbert",
            layers="transformer.layer",
            linears={
                "q": "attention.q_lin",
                "k": "attention.k_lin",
                "v": "attention.v_lin",
                "o": "attention.out_lin",
                "up": "ffn.lin1",
                "down": "ffn.lin2",
            },
            attention="attention",
            head={"classification": ("pre_classifier", "classifier"), "token_classification": ("classifier",)},
            lora_targets=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
            channels="hidden_dim",
            head_counts=("n_heads",),
        ),
        Architecture(
            family="deberta-v2",
            token_types=True,
            shared_attention_input=False,
            backbone="deberta",
            layers="encoder.layer",
            linears={
                **_BERT_LINEARS,
                "q": "attention.self.query_proj",
                "k": "attention.self.key_proj",
                "v": "attention.self.value_proj",
            },
            attention="attention.self",
            head={"classification": ("pooler", "classifier"), "token_classification": ("classifier",)},
            lora_targets=("query_proj", "key_proj", "value_proj", *_BERT_TARGETS[3:]),
            head_counts=("num_attention_heads",),
            head_widths=("all_head_size",),
            requires={"share_att_key": True},  # as in DeBERTa-v3; others project positions with linears of their own
        ),
        Architecture(
            family="modernbert",
            backbone="model",
            layers="layers",
            linears={
                "q": "attn.Wqkv.q",
                "k": "attn.Wqkv.k",
                "v": "attn.Wqkv.v",
                "o": "attn.Wo",
                "up": "mlp.Wi.up",
                "gate": "mlp.Wi.gate",
                "down": "mlp.Wo",
            },
            attention="attn",
            head={"classification": ("head", "classifier"), "token_classification": ("head", "classifier")},
            lora_targets=("Wqkv", "attn.Wo", "Wi", "mlp.Wo"),
            biases=("attention_bias", "mlp_bias"),
            pooling="classifier_pooling",
            fused={"attn.Wqkv": ("q", "k", "v"), "mlp.Wi": ("gate", "up")},
            dropouts=("attention_dropout",),
        ),
        Architecture(
            family="gpt2",
            learned_positions=True,
            backbone="transformer",
            layers="h",
            linears={
                "q": "attn.c_attn.q",
                "k": "attn.c_attn.k",
                "v": "attn.c_attn.v",
                "o": "attn.c_proj",
                "up": "mlp.c_fc",
                "down": "mlp.c_proj",
            },
            attention="attn",
            head={"classification": ("score",), "token_classification": ("classifier",), "causal_lm": ()},
            lora_targets=("c_attn", "c_proj", "c_fc"),
            channels="n_inner",
            fused={"attn.c_attn": ("q", "k", "v")},
            transposed=True,
            head_counts=("num_heads",),
            head_widths=("split_size",),
            last_token_pools=True,
            requires={"add_cross_attention": False},
        ),
        _llama_like("llama", biases=("attention_bias", "mlp_bias")),
        _llama_like("mistral", biases=(False, False)),
        _llama_like("qwen2", biases=(True, False), unbiased=("o",)),
        _llama_like("qwen3", biases=("attention_bias", False)),
    )
}


def architecture_of(config: Any) -> Architecture:
    """Return the entry for a transformers config or a family name.

    Raises `UnknownArchitecture`, which lists the supported families.
    """
    family = str(config if isinstance(config, str) else getattr(config, "model_type", None))
    if family not in SUPPORTED:
        raise UnknownArchitecture(
            f"model type {family!r} is not supported.",
            remedy=f"Use one of {', '.join(sorted(SUPPORTED))}, or add it: docs/guides/add-a-model-family.md.",
        )
    return SUPPORTED[family]


def max_tokens_of(config: Any) -> int:
    """Return the length in tokens, KV cache included, up to which a transformers model has positions."""
    entry = SUPPORTED.get(config.model_type)
    return int(config.max_position_embeddings) if entry is None else entry.max_tokens(config)


def num_token_types_of(config: Any) -> int:
    """Return the number of segments that a transformers model distinguishes; see `Architecture.num_token_types`."""
    entry = SUPPORTED.get(config.model_type)
    return int(getattr(config, "type_vocab_size", 0) or 0) if entry is None else entry.num_token_types(config)
