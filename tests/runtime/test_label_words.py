"""Token classifiers at run time: every word gets the label that torch computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_bert
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import RobertaConfig, RobertaModel

from fedspine_edge.cli.main import main
from fedspine_edge.errors import ConfigError, DataError, DeployError
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import load_model, save_model
from fedspine_edge.model.loading import load_base, load_tokenizer
from fedspine_edge.runtime.session import Session, WordLabel

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("other", "praise", "blame")
TEXTS = [
    ["the", "films", "was", "good"],
    ["bad", "plots", "and", "zanzibars", "actor", "superb", "scenes", "films"],
    ["awful"],
    ["a", "lovely", "story"],
]
"""The tokenizer splits a trailing s into a separate token."""


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory) -> Path:
    """Save a tiny token classifier whose random head assigns different labels to different words."""
    base = tmp_path_factory.mktemp("words") / "base"
    tiny_bert.write_model(base)
    model = load_base(base, task="token_classification", num_labels=3, labels=NAMES)
    torch.manual_seed(3)
    with torch.no_grad():
        model.module.classifier.weight.normal_()
    save_model(model, base.parent / "model")
    return base.parent / "model"


@pytest.fixture(scope="module")
def words_bundle(words_folder) -> Path:
    return compile_engine(words_folder, backend="onnxruntime")


@pytest.fixture
def session(words_bundle):
    with Session.load(words_bundle, threads=1) as session:
        yield session


def by_torch(folder, words):
    """Return (index, probability) of every word, computed by torch at each word's first token."""
    encoded = load_tokenizer(folder)([words], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        scores = load_model(folder).merge()(**encoded).logits[0].softmax(-1)
    places = encoded.word_ids(0)
    rows = [scores[places.index(word)] for word in range(len(words))]
    return [(int(row.argmax()), float(row.max())) for row in rows]


def test_label_words_agrees_with_torch_first_token(session, words_folder):
    found = [session.label_words(words) for words in TEXTS]
    for words, answers in zip(TEXTS, found):
        expected = by_torch(words_folder, words)
        assert [(answer.word, answer.index) for answer in answers] == list(zip(words, [i for i, _ in expected]))
        assert [answer.label for answer in answers] == [NAMES[i] for i, _ in expected]
        assert [answer.probability for answer in answers] == pytest.approx([p for _, p in expected], abs=1e-5)
    assert len({answer.index for answers in found for answer in answers}) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_label_words_keeps_order_for_any_batch_size(session, batch_size):
    together = session.label_words(TEXTS, batch_size=batch_size)
    for labels, words in zip(together, TEXTS, strict=True):
        alone = session.label_words(words)
        assert [(a.word, a.label) for a in labels] == [(a.word, a.label) for a in alone]
        assert [a.probability for a in labels] == pytest.approx([a.probability for a in alone], abs=1e-5)


def test_label_words_result_has_shape_of_input(session):
    [one] = session.label_words(("good",))
    assert isinstance(one, WordLabel)
    assert one.to_dict() == {"word": "good", "label": one.label, "probability": one.probability, "index": one.index}
    assert session.label_words([["good"]]) == [[one]]
    assert session.label_words_async(["good"]).result(timeout=60) == [one]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "empty list"),
        ("good film", "Text 1 is not a list of words"),
        ([["good"], "film"], "Text 2 is not a list of words"),
        (["good", 3], "Text 1 is not a list of words"),
        ([["good"], []], "Text 2 has no words"),
        ([["good"], ["film", " ", "bad"]], "Word 2 of text 2 has no tokens"),
    ],
)
def test_label_words_invalid_input_raises(session, words, message):
    with pytest.raises(DataError, match=message) as caught:
        session.label_words(words)
    assert caught.value.remedy
    assert not any(word in str(caught.value) for word in ("film", "bad"))
    with pytest.raises(ConfigError, match="`batch_size` is 0"):
        session.label_words(["good"], batch_size=0)


def test_label_words_long_text_states_fitting_words(session):
    words = ["films"] * 40  # two tokens each, of 64 with [CLS] and [SEP]
    with pytest.raises(DataError, match="Text 2 has 82 tokens; the model and its engine allow 64") as caught:
        session.label_words([["good"], words])
    assert "its first 31 words fit" in caught.value.remedy
    assert len(session.label_words(words[:31])) == 31
    with pytest.raises(DataError):
        session.label_words(words[:32])


def test_calls_on_wrong_task_name_right_call(session, shared_bundle):
    with pytest.raises(DeployError, match="contains a token_classification model") as caught:
        session.classify("good")
    assert "label_words()" in caught.value.remedy
    with Session.load(shared_bundle) as classifier, pytest.raises(DeployError, match="contains a classification model"):
        classifier.label_words(["good"])


def test_tokenizer_config_overrides_prefix_space(tmp_path):
    """RoBERTa's tokenizer adds a space before every word only if tokenizer_config.json enables it."""
    write_byte_level_roberta(tmp_path / "base")
    save_model(load_base(tmp_path / "base", task="token_classification", num_labels=3), tmp_path / "model")
    words = ["the", "film", "was", "good"]
    expected = load_tokenizer(tmp_path / "model")([words], is_split_into_words=True)
    raw = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode(words, is_pretokenized=True)
    assert raw.ids != expected["input_ids"][0]
    with Session.load(compile_engine(tmp_path / "model", backend="onnxruntime")) as session:
        [encoding] = session.codec.encode_words([words])
        assert encoding.ids == expected["input_ids"][0]
        assert encoding.word_ids == expected.word_ids(0)


def write_byte_level_roberta(folder):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, letters = ["<s>", "<pad>", "</s>", "<unk>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=letters)
    tokenizer.train_from_iterator(["the film was good and the story was good"] * 9, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=300, max_position_embeddings=40, pad_token_id=1, type_vocab_size=1, **shape)
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))


def test_run_command_prints_one_line_per_word(words_bundle, session, capsys):
    texts = ["the films was good", "awful"]
    command = ["run", str(words_bundle), "--backend", "onnxruntime", "--text", texts[0], "--text", texts[1]]
    assert main(command) == 0
    printed = capsys.readouterr().out
    expected = session.label_words([text.split() for text in texts])
    lines = [[f"{a.word}\t{a.label}\t{a.probability:.3f}" for a in answers] for answers in expected]
    assert printed == "\n\n".join("\n".join(each) for each in lines) + "\n"
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [[word["word"] for word in words] for words in results] == [text.split() for text in texts]
    assert results[0][0]["label"] in NAMES


def test_label_words_needs_no_torch(words_bundle):
    program = f"""
import sys
for name in ("torch", "transformers", "peft", "onnx"):
    sys.modules[name] = None  # importing it would raise
from fedspine_edge import Session
with Session.load({str(words_bundle)!r}) as session:
    print(len(session.label_words([["the", "films"], ["good"]])[0]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"
