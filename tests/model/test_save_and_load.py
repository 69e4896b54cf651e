"""Saved models are loaded with equal logits, damaged ones are rejected, and nothing else is overwritten."""

import json

import numpy as np
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file

from fedspine_edge.errors import CheckpointError, UnknownArchitecture
from fedspine_edge.model.checkpoint import load_model, save_model
from fedspine_edge.model.loading import load_base
from fedspine_edge.model.manifest import read_manifest
from fedspine_edge.model.weight_files import base_digest


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_save_and_load_with_unequal_widths_give_equal_logits(kind, tied, tmp_path):
    model = tiny.prunable(kind, bias=True, tied=tied, layers=3)
    model.compact(tiny.random_layout(model, 1))
    inputs = tiny.batch(model)
    expected = model(**inputs).logits.detach()
    loaded = load_model(save_model(model, tmp_path / "a"))
    assert torch.equal(loaded(**inputs).logits, expected)
    assert loaded.layout.to_dict() == model.layout.to_dict()
    assert (loaded.spec, loaded.task, loaded.r, loaded.scaling) == (model.spec, model.task, 3, 0.5)
    assert list(loaded.trainable_parameters()) == list(model.trainable_parameters())
    assert loaded.num_parameters() == model.num_parameters()
    again = load_model(save_model(loaded, tmp_path / "b"))
    assert torch.equal(again(**inputs).logits, expected)
    merged = load_model(save_model(model, tmp_path / "c", merged=True))
    assert merged.r is None
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    again.compact(tiny.random_layout(again, 2))  # what was loaded can be pruned and trained further
    again(**inputs).loss.backward()


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_merge_of_an_unpruned_model_has_transformers_modules(kind, tmp_path):
    """Same modules, same names, same orientation: fused and transposed weights are put together again."""
    plain = tiny.module(kind)
    merged = tiny.prunable(kind).merge()
    expected = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()} == expected
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    model = tiny.prunable(kind)
    folder = save_model(model, tmp_path / "out", merged=True)
    reloaded = tiny.AUTO[model.task].from_pretrained(folder).eval()
    inputs = tiny.batch(model)
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)


def test_load_base_rejects_an_unsupported_variant(tmp_path):
    tiny.module("deberta-v2").save_pretrained(tmp_path / "m")
    edit_json(tmp_path / "m/config.json", share_att_key=False)
    with pytest.raises(UnknownArchitecture, match=r"(?s)share_att_key = False.*no other variant"):
        load_base(tmp_path / "m")


def test_saved_folder_keeps_labels_card_and_dtype(base, tmp_path):
    model = load_base(base, num_labels=2, labels=["bad", "good"], base_dtype="bfloat16")
    assert model.linear("layers.0.q").weight.dtype == torch.bfloat16
    model.attach_lora(2, 1.0, 0)
    folder = save_model(model, tmp_path / "out", metrics={"accuracy": 0.8125})
    card = (folder / "README.md").read_text()
    assert "bad, good" in card
    assert "| accuracy | 0.8125 |" in card
    assert "accuracy" not in (save_model(model, tmp_path / "other") / "README.md").read_text()
    loaded = load_model(folder)
    assert loaded.linear("layers.0.q").weight.dtype == torch.bfloat16
    assert loaded.module.config.id2label == {0: "bad", 1: "good"}


def test_new_head_depends_on_the_seed_only(base):
    torch.manual_seed(1)
    first = load_base(base, num_labels=3, seed=5).adapter_state()
    torch.manual_seed(2)
    second = load_base(base, num_labels=3, seed=5).adapter_state()
    other = load_base(base, num_labels=3, seed=6).adapter_state()
    np.testing.assert_array_equal(first["head.classifier.weight"], second["head.classifier.weight"])
    assert (first["head.classifier.weight"] != other["head.classifier.weight"]).any()
    assert not first["head.classifier.bias"].any()


def test_load_base_keeps_a_head_of_the_right_size_only(tmp_path):
    original = tiny.module("roberta", num_labels=3)
    original.save_pretrained(tmp_path / "m")
    kept = load_base(tmp_path / "m", num_labels=3)
    torch.testing.assert_close(kept.module.classifier.out_proj.weight.data, original.classifier.out_proj.weight.data)
    fresh = load_base(tmp_path / "m", num_labels=5)
    assert fresh.module.classifier.out_proj.weight.shape == (5, 32)
    assert not torch.equal(fresh.module.classifier.dense.weight, original.classifier.dense.weight)
    assert len(fresh.head_names) == 4


def test_load_base_seeds_the_pooler_of_a_bert_without_one(tmp_path):
    encoder = tiny.module("bert").bert
    encoder.save_pretrained(tmp_path / "m")
    tensors = {k: v for k, v in load_file(tmp_path / "m/model.safetensors").items() if not k.startswith("pooler")}
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(1)
    model = load_base(tmp_path / "m", seed=4)
    torch.manual_seed(2)
    same = load_base(tmp_path / "m", seed=4)
    for name, value in same.adapter_state().items():
        np.testing.assert_array_equal(value, model.adapter_state()[name])
    assert "head.bert.pooler.dense.weight" in model.trainable_parameters()
    model.attach_lora(2, 1.0, 0)
    loaded = load_model(save_model(model, tmp_path / "out"))
    inputs = tiny.batch(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_load_base_keeps_and_trains_the_pooler_of_a_bert(base):
    model = load_base(base)
    expected = load_file(base / "model.safetensors")["pooler.dense.weight"]
    np.testing.assert_array_equal(model.adapter_state()["head.bert.pooler.dense.weight"], expected.numpy())


def test_base_digest_of_one_file_and_of_shards(tmp_path):
    import hashlib

    model = tiny.module("llama_lm")
    model.save_pretrained(tmp_path / "one")
    assert (
        base_digest(tmp_path / "one") == hashlib.sha256((tmp_path / "one/model.safetensors").read_bytes()).hexdigest()
    )
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    before = base_digest(tmp_path / "shards")
    assert load_base(tmp_path / "shards", task="causal_lm").spec.base_sha256 == before
    data = bytearray(files[-1].read_bytes())
    data[-1] ^= 1
    files[-1].write_bytes(data)
    assert base_digest(tmp_path / "shards") != before
    files[0].unlink()
    with pytest.raises(CheckpointError, match=f"lacks the weight shard {files[0].name}"):
        load_base(tmp_path / "shards", task="causal_lm")


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_keeps_the_logits_of_a_llama_classifier(side, tmp_path):
    """Even when the config names no padding token and the end token stands in."""
    module = tiny.module("llama")
    module.config.pad_token_id = None
    module.save_pretrained(tmp_path / "m")
    model = load_base(tmp_path / "m", num_labels=3)
    assert model.module.config.pad_token_id == 2
    short, long = torch.tensor([[5, 9, 7]]), torch.tensor([[8, 4, 6, 11, 13]])
    filler = torch.full((1, 2), 2)
    padded = torch.cat([short, filler] if side == "right" else [filler, short], 1)
    mask = torch.tensor([[1, 1, 1, 0, 0] if side == "right" else [0, 0, 1, 1, 1], [1] * 5])
    together = model(input_ids=torch.cat([padded, long]), attention_mask=mask).logits
    torch.testing.assert_close(together[:1], model(input_ids=short).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1:], model(input_ids=long).logits, rtol=1e-4, atol=1e-4)


def test_save_model_never_overwrites_other_files(base, saved, tmp_path):
    model = tiny.prunable("bert")
    before = sorted((p.name, p.stat().st_size) for p in base.iterdir())
    for target in (base, base / "config.json"):
        with pytest.raises(CheckpointError, match="nothing was written"):
            save_model(model, target)
    assert sorted((p.name, p.stat().st_size) for p in base.iterdir()) == before
    with torch.no_grad():
        model.linear("layers.0.q").base_layer.weight.fill_(float("nan"))
    digest = read_manifest(saved).sha256
    with pytest.raises(CheckpointError, match="non-finite"):
        save_model(model, saved)
    assert read_manifest(saved).sha256 == digest
    load_model(saved)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "saved"]


def test_save_model_on_a_full_disk_keeps_the_older_model(saved, monkeypatch):
    model = load_model(saved)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedspine_edge.model.peft_format.save_file", full)
    with pytest.raises(CheckpointError, match=r"(?s)cannot be written: .*No space.*Check space"):
        save_model(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir() if p.name.startswith(".")] == []


def test_save_model_replaces_an_older_model(saved):
    model = load_model(saved)
    with torch.no_grad():
        model.linear("layers.0.q").lora_B.fill_(0.25)
    save_model(model, saved)
    assert float(load_model(saved).linear("layers.0.q").lora_B.detach().max()) == 0.25
