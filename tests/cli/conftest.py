"""Fixtures for the command line: a tiny model folder, tiny data, a tuned model and its bundle."""

from __future__ import annotations

import csv
import hashlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "the", "was", "quite"]


def write_rows(path: Path, rows: list[tuple[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a BERT with 2 layers, random weights and a tokenizer of ten words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[tuple[str, object]] = [(f"the film was {'good' if i % 2 else 'bad'}", i % 2) for i in range(40)]
    return write_rows(tmp_path_factory.mktemp("data") / "train.csv", rows)


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, train_csv: Path) -> Path:
    """Return a folder written by `fedspine-edge tune`. Copy it before changing it."""
    from fedspine_edge.cli.main import main

    out = tmp_path_factory.mktemp("tuned") / "model"
    options = ["--model", str(base_folder), "--data", str(train_csv), "--out", str(out)]
    assert main(["tune", *options, "--steps", "2", "--rank", "2", "--pruning-ratio", "0.5"]) == 0
    return out


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, tuned: Path) -> Path:
    """Return the bundle compiled from it. Copy it before changing it."""
    from fedspine_edge.cli.main import main

    out = tmp_path_factory.mktemp("compiled") / "bundle"
    assert main(["compile", str(tuned), "--out", str(out), "--backend", "onnxruntime"]) == 0
    return out


@pytest.fixture
def fingerprint() -> Callable[[Path], dict[str, str]]:
    """Return a function that hashes every file in a folder."""

    def take(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return take


@pytest.fixture
def dead_port() -> Iterator[int]:
    """Yield a port that refuses connections: bound without a listener."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
