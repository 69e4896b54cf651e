"""Packed examples give the same loss and gradients as padded ones, with less padding."""

import numpy as np
import pytest
import tiny_lm
import torch

from fedspine_edge.data.targets import IGNORED
from fedspine_edge.training import batching
from fedspine_edge.training.loss import LOGITS_PER_CHUNK, can_pack, loss_sum, num_targets


def examples(count=7, seed=0, *, answers=False):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = rng.integers(2, tiny_lm.VOCAB, rng.integers(2, 15)).tolist()
        prompt = int(rng.integers(1, len(ids)))
        labels = [IGNORED] * prompt + ids[prompt:] if answers else None
        found.append(batching.Encoded(ids, 0, None, labels))
    return found


def gradients(model, batch):
    loss, right = loss_sum(model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.trainable_parameters().items()}
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    return float(loss.detach()), int(right), found


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("answers", [False, True], ids=["texts", "answers"])
def test_packed_loss_and_gradients_equal_unpacked_ones(family, answers):
    model, encoded = tiny_lm.model(family), examples(answers=answers)
    packed = batching.pack(encoded, range(7), 0, 24)
    padded = batching.collate(encoded, range(7), 0)
    assert packed["input_ids"].shape[0] < 7
    assert num_targets(packed, "causal_lm") == num_targets(padded, "causal_lm")
    (loss, right, values), (expected, expected_right, expected_values) = (
        gradients(model, packed),
        gradients(model, padded),
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert right == expected_right
    for name, value in expected_values.items():
        torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_packed_token_attends_to_its_own_example_only():
    model, encoded = tiny_lm.model("llama"), examples(3)
    batch = batching.pack(encoded, range(3), 0, 99)
    assert batch["input_ids"].shape[0] == 1
    first = (batch["segments"] == 1) & (batch["labels"] != IGNORED)
    batch["labels"][~first] = IGNORED
    before = loss_sum(model, batch)[0].item()
    batch["input_ids"][batch["segments"] != 1] = 3
    assert loss_sum(model, batch)[0].item() == before


@pytest.mark.parametrize("max_tokens", [14, 20, 60])
def test_pack_fills_rows_up_to_the_maximum(max_tokens):
    encoded = examples(40, seed=3)
    batch, padded = batching.pack(encoded, range(40), 0, max_tokens), batching.collate(encoded, range(40), 0)
    tokens = sum(len(x.input_ids) for x in encoded)
    assert batch["input_ids"].shape[1] <= max_tokens
    assert (batch["segments"] > 0).sum() == tokens
    assert tokens / batch["input_ids"].size > 0.9 > tokens / padded["input_ids"].size
    starts = batch["position_ids"] == 0
    assert (starts & (batch["segments"] > 0)).sum() == 40
    assert (batch["labels"][starts] == IGNORED).all()


def test_pack_of_equal_lengths_equals_collate():
    encoded = [batching.Encoded([5] * 10, 0)] * 8
    assert batching.pack(encoded, range(8), 0, 16)["input_ids"].size == 80


def test_can_pack_excludes_short_windows_and_other_tasks():
    assert can_pack(tiny_lm.model("llama"), 1000)
    windowed = tiny_lm.model("mistral")
    assert windowed.module.config.sliding_window == 8
    assert can_pack(windowed, 8)
    assert not can_pack(windowed, 9)
    assert not can_pack(tiny_lm.model("llama", task="classification"), 8)


@pytest.mark.parametrize("at_once", [1, 3 * tiny_lm.VOCAB, LOGITS_PER_CHUNK])
def test_chunked_loss_equals_transformers_loss(at_once, monkeypatch):
    monkeypatch.setattr("fedspine_edge.training.loss.LOGITS_PER_CHUNK", at_once)
    model, encoded = tiny_lm.model("llama"), examples(answers=True)
    batch = batching.collate(encoded, range(7), 0)
    values = gradients(model, batch)
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    output = model(**inputs)
    (output.loss * num_targets(batch, "causal_lm")).backward()
    assert values[0] == pytest.approx(float(output.loss.detach()) * num_targets(batch, "causal_lm"), rel=1e-5)
    hits = (output.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]).sum()
    assert values[1] == int(hits)
    for name, parameter in model.trainable_parameters().items():
        torch.testing.assert_close(values[2][name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
