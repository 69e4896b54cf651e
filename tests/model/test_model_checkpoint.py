"""Saved models come back equal; damaged ones are refused with the reason; nothing is overwritten."""

import json
import pickle

import numpy as np
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file

from fedspine_edge.errors import CheckpointError, ConfigError, UnknownArchitecture
from fedspine_edge.model.architecture import SUPPORTED
from fedspine_edge.model.checkpoint import base_digest, load_base, load_model, load_tokenizer, read_manifest
from fedspine_edge.model.layout import Layout


@pytest.fixture
def base(tmp_path):
    """A plain folder with a tiny BERT encoder: no head, as a pretrained model has none."""
    folder = tmp_path / "base"
    tiny.module("bert").bert.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(base, tmp_path):
    model = load_base(base, num_labels=3)
    model.attach_lora(3, 2.0, 0)
    model.compact(tiny.random_layout(model, 1))
    return model.save(tmp_path / "saved")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_save_and_load_give_equal_logits_with_unequal_widths(kind, tied, tmp_path):
    model = tiny.prunable(kind, bias=True, tied=tied, layers=3)
    model.compact(tiny.random_layout(model, 1))
    inputs = tiny.batch(model)
    expected = model(**inputs).logits.detach()
    loaded = load_model(model.save(tmp_path / "a"))
    assert torch.equal(loaded(**inputs).logits, expected)
    assert loaded.layout.to_dict() == model.layout.to_dict()
    assert (loaded.spec, loaded.task, loaded.r, loaded.scaling) == (model.spec, model.task, 3, 0.5)
    assert list(loaded.trainable_parameters()) == list(model.trainable_parameters())
    assert loaded.num_parameters() == model.num_parameters()
    again = load_model(loaded.save(tmp_path / "b"))
    assert torch.equal(again(**inputs).logits, expected)
    merged = load_model(model.save_merged(tmp_path / "c"))
    assert merged.r is None
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    again.compact(tiny.random_layout(again, 2))  # what was loaded can be pruned and trained further
    again(**inputs).loss.backward()


STANDARD = [family for family, entry in SUPPORTED.items() if entry.free_head_dim]


@pytest.mark.parametrize("kind", ["llama", "llama_tokens", *(f"{family}_lm" for family in STANDARD)])
def test_a_merged_llama_of_equal_widths_loads_in_transformers_alone_and_generates(kind, tmp_path):
    model = tiny.prunable(kind, heads=4, kv_heads=2)
    heads, channels = np.array([1]), np.arange(0, 16, 2)
    model.compact(Layout(model.spec, (heads, heads), (channels, channels)))
    inputs = tiny.batch(model)
    folder = model.save_merged(tmp_path / "out")
    assert read_manifest(folder).standard
    assert torch.equal(load_model(folder)(**inputs).logits, model.merged()(**inputs).logits)
    alone = tiny.AUTO[model.task].from_pretrained(folder).eval()
    torch.testing.assert_close(alone(**inputs).logits, model(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)
    if model.task == "causal_lm":
        ids = torch.tensor([[5, 6, 7]])
        options = {
            "max_new_tokens": 6,
            "do_sample": False,
            "eos_token_id": None,
            "attention_mask": torch.ones_like(ids),
        }
        assert alone.generate(ids, **options).tolist() == model.module.generate(ids, **options).tolist()


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_an_unpruned_model_merges_into_what_transformers_itself_would_hold(kind, tmp_path):
    """Same modules, same names, same orientation: fused and transposed weights are put together again."""
    plain = tiny.module(kind)
    merged = tiny.prunable(kind).merged()
    expected = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()} == expected
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    model = tiny.prunable(kind)
    folder = model.save_merged(tmp_path / "out")
    alone = tiny.AUTO[model.task].from_pretrained(folder).eval()
    inputs = tiny.batch(model)
    torch.testing.assert_close(alone(**inputs).logits, model(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)


def test_a_variant_that_the_entry_does_not_describe_is_refused(tmp_path):
    tiny.module("deberta-v2").save_pretrained(tmp_path / "m")
    edit_json(tmp_path / "m/config.json", share_att_key=False)
    refused("(?s)share_att_key = False.*only models with", load_base, tmp_path / "m", error=UnknownArchitecture)


def test_labels_card_and_dtype(base, tmp_path):
    model = load_base(base, num_labels=2, labels=["bad", "good"], base_dtype="bfloat16")
    assert model.linear("layers.0.q").weight.dtype == torch.bfloat16
    model.attach_lora(2, 1.0, 0)
    folder = model.save(tmp_path / "out", metrics={"accuracy": 0.8125})
    card = (folder / "README.md").read_text()
    assert "bad, good" in card
    assert "| accuracy | 0.8125 |" in card
    assert "accuracy" not in (model.save(tmp_path / "other") / "README.md").read_text()
    loaded = load_model(folder)
    assert loaded.linear("layers.0.q").weight.dtype == torch.bfloat16
    assert loaded.module.config.id2label == {0: "bad", 1: "good"}


def test_a_fresh_head_depends_on_the_seed_alone(base):
    torch.manual_seed(1)
    first = load_base(base, num_labels=3, seed=5).adapter_state()
    torch.manual_seed(2)
    second = load_base(base, num_labels=3, seed=5).adapter_state()
    other = load_base(base, num_labels=3, seed=6).adapter_state()
    np.testing.assert_array_equal(first["head.classifier.weight"], second["head.classifier.weight"])
    assert (first["head.classifier.weight"] != other["head.classifier.weight"]).any()
    assert not first["head.classifier.bias"].any()


def test_a_head_that_the_checkpoint_brings_is_kept_and_one_of_another_size_replaced(tmp_path):
    original = tiny.module("roberta", num_labels=3)
    original.save_pretrained(tmp_path / "m")
    kept = load_base(tmp_path / "m", num_labels=3)
    torch.testing.assert_close(kept.module.classifier.out_proj.weight.data, original.classifier.out_proj.weight.data)
    fresh = load_base(tmp_path / "m", num_labels=5)
    assert fresh.module.classifier.out_proj.weight.shape == (5, 32)
    assert not torch.equal(fresh.module.classifier.dense.weight, original.classifier.dense.weight)
    assert len(fresh.head_names) == 4


def test_a_bert_without_pooler_trains_a_seeded_one(tmp_path):
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
    loaded = load_model(model.save(tmp_path / "out"))
    inputs = tiny.batch(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_bert_with_pooler_keeps_it_and_trains_it(base):
    model = load_base(base)
    expected = load_file(base / "model.safetensors")["pooler.dense.weight"]
    np.testing.assert_array_equal(model.adapter_state()["head.bert.pooler.dense.weight"], expected.numpy())


def test_the_digest_of_one_file_is_its_sha256_and_shards_count_together(tmp_path):
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
def test_padding_does_not_change_a_llama_classifiers_answer(side, tmp_path):
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


# Bad input


def refused(match, call, *args, error=CheckpointError, **kwargs):
    with pytest.raises(error, match=match):
        call(*args, **kwargs)


def test_missing_and_misplaced_folders(base, saved, tmp_path):
    refused(r"/no/such does not exist", load_base, "/no/such")
    refused("does not exist", load_model, tmp_path / "none")
    refused("Pass a local folder", load_base, "some-org/some-model")
    refused("was not saved by this package", load_model, base)
    refused("saved by this package, not a plain one", load_base, saved)
    refused("is a file", load_base, base / "config.json")
    (tmp_path / "empty").mkdir()
    refused("no config.json", load_base, tmp_path / "empty")
    refused("has no file 'x.gguf'", load_base, base, gguf_file="x.gguf")


def test_unknown_architecture_names_the_supported_ones(base):
    edit_json(base / "config.json", model_type="mamba")
    refused(
        f"(?s)'mamba' is not supported.*{', '.join(sorted(SUPPORTED))}",
        load_base,
        base,
        error=UnknownArchitecture,
    )


def test_wrong_task_and_labels(base):
    refused(
        "(?s)bert models do not support task 'causal_lm'.*classification",
        load_base,
        base,
        task="causal_lm",
        error=ConfigError,
    )
    refused("num_labels is 1", load_base, base, num_labels=1, error=ConfigError)
    refused("3 label names", load_base, base, num_labels=2, labels=["a", "b", "c"], error=ConfigError)


def test_damaged_plain_folders(base):
    good = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(good[: len(good) // 2])
    refused("cannot be loaded", load_base, base)
    (base / "model.safetensors").write_bytes(b"\xff" * 64)
    refused("cannot be loaded", load_base, base)
    (base / "model.safetensors").write_bytes(good)
    tensors = load_file(base / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    save_file({**tensors, name: tensors[name] * float("nan")}, base / "model.safetensors", metadata={"format": "pt"})
    refused(r"query.weight' has non-finite", load_base, base)
    save_file({k: v for k, v in tensors.items() if k != name}, base / "model.safetensors", metadata={"format": "pt"})
    refused("lack or misfit 1 tensors .*query.weight", load_base, base)
    save_file({**tensors, name: torch.zeros(4, 4)}, base / "model.safetensors", metadata={"format": "pt"})
    refused("lack or misfit 1 tensors .*query.weight", load_base, base)
    (base / "model.safetensors").unlink()
    refused("no model.safetensors", load_base, base)
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused("(?s)pickled weights.*Convert", load_base, base)
    (base / "config.json").write_text("{")
    refused("config.json is damaged", load_base, base)


def test_a_missing_tokenizer_is_named(base):
    refused("(?s)has no tokenizer.*tokenizer.json", load_tokenizer, base)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_model.safetensors", "adapter_config.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_every_damaged_file_of_a_saved_model_is_refused(saved, name, damage):
    path = saved / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    refused(name.replace(".", r"\."), load_model, saved)


def test_a_layout_that_does_not_fit_is_refused(saved):
    original = (saved / "layout.json").read_text()
    layout = json.loads(original)

    def with_changes(**changes):
        (saved / "layout.json").write_text(json.dumps({**layout, **changes}))

    with_changes(heads=[[0, 1, 2, 3], [0, 1, 2, 3]], channels=[list(range(24))] * 2)
    refused("does not have the widths of layout.json", load_model, saved)
    with_changes(heads=[[0], [99]])
    refused("layout.json: layer 1 heads", load_model, saved)
    with_changes(heads=[[0]])
    refused("layout has heads for 1 layers", load_model, saved)
    with_changes(surprise=1)
    refused("layout.json is damaged.*surprise", load_model, saved)
    with_changes(version=2)
    refused("layout.json is damaged", load_model, saved)
    with_changes(sha256={**layout["sha256"], "../config.json": "0" * 64})
    refused("outside its folder", load_model, saved)
    with_changes(sha256={})
    refused("has no hash for adapter_config.json", load_model, saved)
    (saved / "layout.json").write_text(original[:100])
    refused("layout.json is damaged", load_model, saved)


def test_the_adapter_of_another_base_is_refused(saved, tmp_path):
    other = tiny.prunable("bert", layers=3)
    other.save(tmp_path / "other")
    (saved / "adapter_model.safetensors").write_bytes((tmp_path / "other/adapter_model.safetensors").read_bytes())
    refused("adapter_model.safetensors is not the file that was saved", load_model, saved)


def test_saving_never_overwrites_what_is_not_a_saved_model(base, saved, tmp_path):
    model = tiny.prunable("bert")
    before = sorted((p.name, p.stat().st_size) for p in base.iterdir())
    refused("nothing was written", model.save, base)
    refused("nothing was written", model.save, base / "config.json")
    assert sorted((p.name, p.stat().st_size) for p in base.iterdir()) == before
    with torch.no_grad():
        model.linear("layers.0.q").base_layer.weight.fill_(float("nan"))
    digest = read_manifest(saved).sha256
    refused("non-finite", model.save, saved)
    assert read_manifest(saved).sha256 == digest
    load_model(saved)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "saved"]


def test_a_full_disk_leaves_the_older_model(saved, monkeypatch):
    model = load_model(saved)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedspine_edge.model.peft_format.save_file", full)
    refused("(?s)cannot be written: .*No space.*Check space", model.save, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir() if p.name.startswith(".")] == []


def test_saving_again_replaces_the_older_model(saved):
    model = load_model(saved)
    with torch.no_grad():
        model.linear("layers.0.q").lora_B.fill_(0.25)
    model.save(saved)
    assert float(load_model(saved).linear("layers.0.q").lora_B.detach().max()) == 0.25
