"""Weights, config and adapters of a folder must describe one model; contradictions are kept apart or rejected."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from test_interoperability import write_gguf

from fedspine_edge.errors import CheckpointError, MissingDependency
from fedspine_edge.model import peft_format
from fedspine_edge.model.checkpoint import load_model, save_model
from fedspine_edge.model.loading import load_base, load_tokenizer
from fedspine_edge.model.weight_files import check_readable, file_sha256, read_tensors


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rejected(match, call, *args, **kwargs):
    with pytest.raises(CheckpointError, match=match) as caught:
        call(*args, **kwargs)
    assert caught.value.remedy
    return caught.value


@pytest.fixture
def separate_head(tmp_path):
    """A language model with two different matrices whose config states that they are tied."""
    folder = tmp_path / "base"
    tiny.module("llama_lm").save_pretrained(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    return folder


@pytest.mark.parametrize("merged", [False, True])
def test_separate_head_survives_save_and_load(separate_head, tmp_path, merged):
    model = load_base(separate_head, task="causal_lm")
    model.attach_lora(2, 2.0, 0)
    head, embeddings = (m.weight for m in (model.module.lm_head, model.module.get_input_embeddings()))
    assert not torch.equal(head, embeddings)
    inputs = tiny.batch(model)
    folder = save_model(model, tmp_path / "out", merged=merged)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_model(folder)(**inputs).logits, model(**inputs).logits)


def test_folder_with_a_wrong_tie_flag_loads_its_own_head(separate_head, tmp_path):
    model = load_base(separate_head, task="causal_lm")
    inputs = tiny.batch(model)
    folder = save_model(model, tmp_path / "out")
    edit_json(folder / "config.json", tie_word_embeddings=True)  # as versions before 0.2 wrote it
    hashes = json.loads((folder / "layout.json").read_text())["sha256"]
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    edit_json(folder / "layout.json", sha256={**hashes, "config.json": digest})
    assert torch.equal(load_model(folder)(**inputs).logits, model(**inputs).logits)


def test_tied_head_stays_tied(tmp_path):
    tiny.module("llama_lm", tied=True).save_pretrained(tmp_path / "base")
    folder = save_model(load_base(tmp_path / "base", task="causal_lm"), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    module = load_model(folder).module
    assert module.lm_head.weight is module.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("kind", "layers", "task"),
    [
        ("bert", "num_hidden_layers", "classification"),
        ("roberta", "num_hidden_layers", "classification"),
        ("distilbert", "n_layers", "classification"),
        ("gpt2_lm", "n_layer", "causal_lm"),
        ("llama_lm", "num_hidden_layers", "causal_lm"),
        ("llama_lm", "num_hidden_layers", "classification"),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_load_base_rejects_more_layers_than_the_config_has(kind, layers, task, bare, tmp_path):
    module = tiny.module(kind)
    (module.base_model if bare and task != "causal_lm" else module).save_pretrained(tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", **{layers: 1})
    rejected("has no place for", load_base, tmp_path / "base", task=task)


def test_load_base_rejects_biases_that_the_config_does_not_have(tmp_path):
    tiny.module("llama_lm").save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    error = rejected("1 weights", load_base, tmp_path / "base", task="causal_lm")
    assert "model.layers.1.self_attn.q_proj.bias" in str(error)


def test_load_base_accepts_heads_of_other_tasks_and_computed_tables(tmp_path):
    tiny.module("llama_lm").save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "value_head.weight": torch.ones(1, 32)}
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert load_base(tmp_path / "base", task="classification").head_names == ("score.weight",)
    assert load_base(tmp_path / "base", task="causal_lm").head_names == ()


def test_load_base_rejects_a_peft_adapter_beside_the_weights(base, tmp_path):
    model = load_base(base)
    model.attach_lora(2, 2.0, 0)
    peft_format.save_adapter(model, base)
    rejected("holds a PEFT adapter", load_base, base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(base / name, adapter / name)
    rejected("without its base model", load_base, adapter)
    assert load_base(base).r is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("a_field_of_a_later_release", {"any": "value"}),
    ],
)
def test_load_adapter_names_a_field_that_it_does_not_understand(saved, name, value):
    edit_json(saved / "adapter_config.json", **{name: value})
    model = tiny.prunable("bert")
    rejected("bias is" if name == "bias" else f"{name} is set", peft_format.load_adapter, model, saved)


@pytest.mark.parametrize("initialization", ["lora_ga", "pissa", "pissa_niter_4", "olora", "corda", "loftq", "next_one"])
def test_load_adapter_rejects_initializations_that_change_the_base(saved, initialization):
    edit_json(saved / "adapter_config.json", init_lora_weights=initialization)
    rejected("changed the base weights", peft_format.load_adapter, tiny.prunable("bert"), saved)


@pytest.mark.parametrize("initialization", [True, False, "gaussian", "orthogonal", "eva", None])
def test_load_adapter_accepts_plain_initializations(initialization, tmp_path):
    model = tiny.prunable("bert", r=4)
    peft_format.save_adapter(model, tmp_path)
    edit_json(tmp_path / "adapter_config.json", init_lora_weights=initialization, a_later_field=None)
    other = tiny.prunable("bert")
    peft_format.load_adapter(other, tmp_path)
    for name, value in model.adapter_state().items():
        np.testing.assert_array_equal(other.adapter_state()[name], value)


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_load_base_of_gguf_rejects_a_rope_scaling_it_would_lose(factor, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    add = gguf.GGUFWriter.write_header_to_file

    def with_rope_freqs(writer, *args, **kwargs):
        writer.add_tensor("rope_freqs.weight", np.full(4, factor, np.float32))
        add(writer, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_rope_freqs)
    path = write_gguf(tiny.module("llama_lm"), tmp_path / "tiny.gguf")
    if factor == 1.0:
        load_base(path, task="causal_lm")
        load_base(path, task="classification")
    else:
        rejected("rope_freqs.weight", load_base, path, task="causal_lm")


def test_load_base_of_gguf_rejects_biases_it_would_lose(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    add = gguf.GGUFWriter.write_header_to_file

    def with_bias(writer, *args, **kwargs):
        writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32))
        add(writer, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_bias)
    path = write_gguf(tiny.module("llama_lm"), tmp_path / "tiny.gguf")
    rejected("blk.0.attn_q.bias", load_base, path, task="causal_lm")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_load_base_rejects_quantized_checkpoints(base, quantization, words):
    edit_json(base / "config.json", quantization_config=quantization)
    error = rejected(f"quantized \\({words}\\)", load_base, base)
    assert "base_dtype='int8'" in error.remedy


def test_code_of_a_model_folder_is_not_run(base, tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(base)
    (base / "tokenization_other.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Other: pass\n")
    names = {"AutoTokenizer": ["tokenization_other.Other", None]}
    edit_json(base / "tokenizer_config.json", auto_map=names, tokenizer_class="Other")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(CheckpointError):  # transformers may have a class of its own for the folder
        load_tokenizer(base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_weights_are_reported_as_such(base):
    (base / "model.safetensors").chmod(0)
    rejected("Permission denied", load_base, base)


def test_permission_errors_name_the_permission(base, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    path = base / "model.safetensors"
    for call in (lambda: check_readable([path]), lambda: read_tensors(path), lambda: file_sha256(path)):
        assert "permission" in rejected("Permission denied", call).remedy


def test_pickle_remedy_names_the_class_of_the_head(tmp_path):
    tiny.module("llama_lm").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    error = rejected("pickled", load_base, tmp_path / "base", task="causal_lm")
    assert "LlamaForCausalLM.from_pretrained" in error.remedy
    assert "AutoTokenizer" in error.remedy


@pytest.mark.parametrize("name", ["spm.model", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_tokenizers_name_the_missing_package(name, base, monkeypatch):
    (base / name).write_bytes(b"model")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(MissingDependency, match="SentencePiece") as caught:
        load_tokenizer(base)
    assert caught.value.remedy == "pip install sentencepiece protobuf"


def test_save_model_writes_a_sentencepiece_tokenizer_as_json(base, tmp_path, monkeypatch):
    (base / "spm.model").write_bytes(b"model")

    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    monkeypatch.setattr("fedspine_edge.model.checkpoint.load_tokenizer", lambda *_, **__: Tokenizer())
    folder = save_model(load_base(base), tmp_path / "out")
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "spm.model").read_bytes() == b"model"
    load_model(folder)
