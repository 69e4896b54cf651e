"""Tiny random models with unequal widths, and tokenizers for their folders."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from fedspine_edge.model.layout import Layout
from fedspine_edge.model.prunable import PrunableModel

VOCAB = 120
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "board", "very", "not", "a", "the"]


def tiny_model(
    family: str, task: str = "classification", *, layers: int = 2, seed: int = 0, kv_heads: int = 2
) -> PrunableModel:
    """Return a random model whose layers have different widths, with an adapter that changes the output."""
    torch.manual_seed(seed)
    common = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": VOCAB}
    common |= {"intermediate_size": 64, "max_position_embeddings": 66, "num_labels": 3, "pad_token_id": 0}
    if family == "bert":
        kind = "Token" if task == "token_classification" else "Sequence"
        module = getattr(transformers, f"BertFor{kind}Classification")(transformers.BertConfig(**common))
    elif family == "roberta":
        common["pad_token_id"] = 1
        module = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**common, type_vocab_size=1, bos_token_id=2, eos_token_id=3)
        )
    else:
        config = transformers.LlamaConfig(**common, num_key_value_heads=kv_heads, head_dim=8)
        kind = transformers.LlamaForCausalLM if task == "causal_lm" else transformers.LlamaForSequenceClassification
        module = kind(config)
    with torch.no_grad():  # the default initialization has zero biases and tiny outputs
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model = PrunableModel.from_module(module.eval(), task=task)
    model.attach_lora(2, 1.0, seed)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    model.compact(unequal_layout(model))
    return model


def unequal_layout(model: PrunableModel) -> Layout:
    """Return a layout whose layers keep different numbers of heads and different channels."""
    spec = model.spec
    heads = [np.arange(spec.num_kv_heads - 1 - layer % 2 * (spec.num_kv_heads > 2)) + 1 for layer in range(2)]
    channels = [np.arange(0, 64, 2), np.arange(5, 45)]
    rest = spec.num_layers - 2
    return Layout(spec, (*heads, *heads[:1] * rest), (*channels, *channels[:1] * rest))


def write_tokenizer(folder) -> None:
    """Write a word-level tokenizer with BERT's template as tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=50)  # left over from training; the runtime must ignore it
    tokenizer.save(str(folder / "tokenizer.json"))


def write_byte_tokenizer(folder) -> None:
    """Write a tokenizer with one token per ASCII character below `VOCAB` and no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {chr(index) if index >= 32 else f"<{index}>": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
