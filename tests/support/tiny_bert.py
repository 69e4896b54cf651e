"""A tiny BERT with a WordPiece tokenizer and synthetic sentences, written once per session. Also a program."""

from __future__ import annotations

import csv
import random
from pathlib import Path

GOOD = ["good", "fine", "great", "lovely", "superb"]
BAD = ["bad", "poor", "sad", "awful", "dire"]
FILLER = ["the", "film", "was", "and", "plot", "a", "quite", "with", "story", "zanzibar", "actor", "scene"]


def write_model(folder: Path, seed: int = 0) -> None:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER, "##s"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # with the usual 0.02 a random frozen model hardly tells two texts apart
    )
    BertModel(config).save_pretrained(folder)


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """(text, label): two telling words among filler of varying length."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        label = rng.randrange(2)
        words = rng.choices(FILLER, k=rng.randrange(1, 9)) + rng.choices(GOOD if label else BAD, k=2)
        rng.shuffle(words)
        found.append((" ".join(words), label))
    return found


def write_csv(path: Path, rows: list[tuple[str, int]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path
