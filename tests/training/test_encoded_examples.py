"""Tokenized examples in flat arrays: the same examples as lists, in little memory."""

import hashlib

import msgspec
import numpy as np
import pytest
import tiny_bert

from fedspine_edge import EdgeTuner, load_tokenizer
from fedspine_edge.data.examples import Example
from fedspine_edge.training.batching import Encoded, EncodedExamples, collate, encode, lengths_of
from fedspine_edge.training.checkpoint import key_of

EXAMPLES = {
    "texts": [Encoded([1, 2, 3], 1), Encoded([], 0), Encoded([70_000], 2)],
    "pairs": [Encoded([1, 2, 3], 1, [0, 0, 1]), Encoded([4], 0, [0])],
    "words": [Encoded([1, 2, 3], 0, None, [-100, 5, -100]), Encoded([4, 5], 0, None, [1, -100])],
    "both": [Encoded([1, 2], 0, [0, 1], [-100, 2])],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoded") / "model"
    tiny_bert.write_model(path)
    return path


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES)
def test_encoded_examples_return_the_examples_as_lists(examples):
    encoded = EncodedExamples(examples)
    assert list(encoded) == examples
    assert encoded == examples
    assert encoded[-1] == examples[-1]
    assert list(encoded[1:]) == examples[1:]
    assert encoded.lengths.tolist() == lengths_of(examples).tolist() == [len(x.input_ids) for x in examples]
    assert encoded.largest_token == max(max(x.input_ids, default=-1) for x in examples)
    with pytest.raises(IndexError):
        encoded[len(examples)]
    for name, array in collate(examples, range(len(examples)), 0).items():
        assert np.array_equal(collate(encoded, range(len(examples)), 0)[name], array)


def test_encoded_examples_take_few_bytes_per_token():
    encoded = EncodedExamples(Encoded(list(range(30)), 1, [0] * 30) for _ in range(10_000))
    assert encoded.size_bytes < 10_000 * 250


def test_encode_in_chunks_gives_the_same_tokens(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    texts = [Example(text, label) for text, label in tiny_bert.sentences(25)]
    whole = encode(texts, tokenizer, 24)
    monkeypatch.setattr("fedspine_edge.training.batching._CHUNK_EXAMPLES", 7)
    assert encode(texts, tokenizer, 24) == whole
    assert [x.input_ids for x in whole] == [tokenizer(example.text)["input_ids"] for example in texts]


def test_key_of_is_the_digest_of_one_json_text(folder):
    tuner = EdgeTuner.from_pretrained(folder, r=2)
    model = tuner.model
    examples = EXAMPLES["pairs"]
    rows = [(x.input_ids, x.label, x.token_type_ids, x.token_labels) for x in examples]
    adapter = (model.r, model.scaling, model.task, model.base_dtype)
    kind = (*adapter, model.spec.base_sha256, model.layout.to_dict())
    expected = hashlib.sha256(msgspec.json.encode((rows, kind, (1, "a")))).hexdigest()
    assert key_of(examples, model, 1, "a") == key_of(EncodedExamples(examples), model, 1, "a") == expected


def test_estimate_counts_the_data(folder):
    tuner = EdgeTuner.from_pretrained(folder, r=2)
    few, many = (tuner.estimate([("the film was good", 1)] * count) for count in (100, 10_000))
    assert many.peak_bytes - few.peak_bytes == many.data_bytes - few.data_bytes > 9_900 * 100
    assert "data " in str(many)
    assert tuner.estimate().data_bytes == 0
    assert "data " not in str(tuner.estimate())


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([Encoded([1], 0), Encoded([2], 0)], False),
        ([Encoded([1], 0), Encoded([2, 3], 0)], True),
        ([Encoded([1, 2], 0, None, [-100, 2])], True),
        ([Encoded([1, 2], 0, None, [-100, -100]), Encoded([], 0, None, []), Encoded([3], 0, None, [3])], False),
    ],
)
def test_has_targets_needs_a_token_to_predict(examples, expected):
    assert EncodedExamples(examples).has_targets is expected
