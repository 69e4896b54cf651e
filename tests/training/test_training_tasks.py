"""Token classification, prompts with answers and pairs of texts: each task learns its targets only."""

import json
import shutil

import pytest
import tiny_bert
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

from fedspine_edge import EdgeTuner
from fedspine_edge.config import DataSettings
from fedspine_edge.data.examples import Example
from fedspine_edge.data.loading import read_examples
from fedspine_edge.model.loading import load_tokenizer
from fedspine_edge.training import batching
from fedspine_edge.training.trainer import Trainer

SECRET = "zanzibar"


def tagged(count, seed=0):
    """Words labelled 1 if good, 2 if bad, else 0."""
    kinds = {**dict.fromkeys(tiny_bert.GOOD, 1), **dict.fromkeys(tiny_bert.BAD, 2)}
    return [(text.split(), [kinds.get(w, 0) for w in text.split()]) for text, _ in tiny_bert.sentences(count, seed)]


@pytest.fixture
def language_model(tmp_path, tiny_folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=27,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / "llama" / name)
    return tmp_path / "llama"


def test_tuner_classifies_words_prunes_saves_and_reloads(tiny_folder, tmp_path):
    options = {"task": "token_classification", "num_labels": 3, "torch_device": "cpu"}
    tuner = EdgeTuner.from_pretrained(tiny_folder, r=4, learning_rate=1e-2, **options)
    test = tagged(50, seed=9)
    tuner.fit(tagged(200), steps=70).prune(0.5, steps=5).fit(tagged(200), steps=70)
    result = tuner.evaluate(test)
    assert result["num_examples"] == sum(len(words) for words, _ in test)  # one label a word, none for [CLS] and [SEP]
    assert result["accuracy"] > 0.9
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"text": words, "label": labels}) + "\n" for words, labels in test))
    again = EdgeTuner.from_pretrained(tuner.save(tmp_path / "out"), **options)
    assert again.evaluate(path) == result


def test_only_the_first_token_of_a_word_carries_its_label(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    [encoded] = batching.encode(
        read_examples([(["films", "films"], [1, 2])], DataSettings(path="", num_labels=3), "token_classification"),
        tokenizer,
        24,
    )
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["[CLS]", "film", "##s", "film", "##s", "[SEP]"]
    assert encoded.token_labels == [-100, 1, -100, 2, -100, -100]


def test_only_the_answer_of_a_prompt_is_learned(language_model):
    tuner = EdgeTuner.from_pretrained(language_model, task="causal_lm", r=4, torch_device="cpu", learning_rate=1e-2)
    pairs = [(f"the {w}", "good good") for w in tiny_bert.FILLER]
    before = tuner.evaluate(pairs)
    assert before["num_examples"] == 12 * 2  # two words; this tokenizer has no end token
    tuner.fit(pairs, steps=30)
    assert tuner.evaluate(pairs)["accuracy"] > 0.95
    examples = batching.encode(read_examples(pairs[:1], task="causal_lm"), tuner.tokenizer, 24, causal=True)
    trainer: Trainer = tuner._trainer(examples, 1)
    labels = torch.tensor([examples[0].token_labels])
    expected = tuner.model.module(input_ids=torch.tensor([examples[0].input_ids]), labels=labels).loss
    assert trainer.evaluate(examples).loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_encode_truncates_a_long_prompt_at_its_beginning(language_model):
    tokenizer = load_tokenizer(language_model)
    pair = Example("film " * 40 + "bad", 0, "good fine")
    [encoded] = batching.encode([pair], tokenizer, 10, causal=True)
    words = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert len(words) == 10
    assert words[-4:] == ["bad", "[SEP]", "good", "fine"]
    assert encoded.token_labels == [-100] * 8 + encoded.input_ids[-2:]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encode_separates_pairs_of_texts(family, tiny_folder, tmp_path):
    """The label is that of the first text; a model that cannot separate them is right in 75 % at best."""
    folder = tiny_folder
    if family == "roberta":
        folder = tmp_path / "roberta"
        torch.manual_seed(0)
        RobertaModel(
            RobertaConfig(
                vocab_size=27,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.2,
                pad_token_id=0,
                type_vocab_size=1,
            )
        ).save_pretrained(folder)
        shutil.copy(tiny_folder / "tokenizer.json", folder)
        settings = json.loads((tiny_folder / "tokenizer_config.json").read_text())
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    pairs = [
        (a, b, int(a in tiny_bert.GOOD)) for a in tiny_bert.GOOD + tiny_bert.BAD for b in tiny_bert.GOOD + tiny_bert.BAD
    ]
    tuner = EdgeTuner.from_pretrained(folder, r=8, learning_rate=1e-2, torch_device="cpu")
    encoded = tuner._encoded(pairs[:1])[0]
    assert len(encoded.input_ids) == 5  # [CLS] a [SEP] b [SEP]
    assert encoded.token_type_ids == ([0, 0, 0, 1, 1] if family == "bert" else None)
    tuner.fit(pairs, steps=150)
    assert tuner.evaluate(pairs)["accuracy"] > 0.9
