"""Tiny random decoders in memory, or as a folder with a tokenizer and synthetic instructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_bert
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from fedspine_edge.model.prunable import PrunableModel

VOCAB = 61
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_LLAMA = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHARED, **_LLAMA),
    "mistral": lambda: MistralConfig(**_SHARED, **_LLAMA, sliding_window=8),
    "qwen3": lambda: Qwen3Config(**_SHARED, **_LLAMA),
    "gpt2": lambda: GPT2Config(**_SHARED, n_inner=48),
}


def model(family: str = "llama", *, task: Any = "causal_lm", layers: int = 2, seed: int = 0) -> PrunableModel:
    """With adapters whose B is not zero, without dropout."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.use_cache, config.num_hidden_layers = False, layers
    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    made = PrunableModel.from_module(auto.from_config(config).eval(), task=task)
    made.attach_lora(3, 0.5, seed)
    with torch.no_grad():
        for name, parameter in made.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.3)
    return made


def write_folder(folder: Path, seed: int = 0) -> Path:
    """A LLaMA with a tokenizer of the words of `instructions`, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[END]", "[UNK]", "review:", "verdict:", *tiny_bert.GOOD, *tiny_bert.BAD, *tiny_bert.FILLER]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(LlamaConfig(**_SHARED, **_LLAMA)).save_pretrained(folder)
    return folder


def instructions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, answer): what a review made of telling words and filler comes to, in two words."""
    verdicts = ("poor film", "great film")
    return [(f"review: {text} verdict:", verdicts[label]) for text, label in tiny_bert.sentences(count, seed)]


def write_instructions(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
