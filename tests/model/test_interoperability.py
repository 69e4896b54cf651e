"""transformers and PEFT read saved folders, and the package reads theirs and GGUF files."""

import numpy as np
import peft
import pytest
import tiny_models as tiny
import torch

import fedspine_edge
from fedspine_edge.errors import CheckpointError
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.model.families import SUPPORTED
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.loading import load_base
from fedspine_edge.model.manifest import read_manifest

FREE = [kind for kind in tiny.KINDS if SUPPORTED[tiny.task_of(kind)[0]].free_head_dim]
"""Families whose config states head_dim, so that a model with fewer heads is a standard one."""
DECODERS = [kind for kind in tiny.KINDS if kind.endswith("_lm")]


def equal_widths(model, heads, channels):
    """The same heads and channels in every layer."""
    layers = model.spec.num_layers
    kept = np.asarray(heads, dtype=np.int64), np.asarray(channels, dtype=np.int64)
    return Layout(model.spec, (kept[0],) * layers, (kept[1],) * layers)


def assert_read_alone(model, folder):
    """transformers' own class gives the model's answers, and for a decoder its text."""
    reloaded = tiny.AUTO[model.task].from_pretrained(folder).eval()
    inputs = tiny.batch(model)
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)
    if model.task == "causal_lm":
        ids = torch.tensor([[5, 6, 7]])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(ids)
        text = model.module.generate(ids, **options)
        assert text.shape == (1, 9)
        assert reloaded.generate(ids, **options).tolist() == text.tolist()


@pytest.mark.parametrize(
    ("kind", "tied"), [(kind, False) for kind in FREE] + [(kind, True) for kind in FREE if kind.endswith("_lm")]
)
def test_equal_widths_with_fewer_heads_are_standard_and_generate(kind, tied, tmp_path):
    model = tiny.prunable(kind, heads=4, kv_heads=2, tied=tied)
    model.compact(equal_widths(model, [1], range(0, 16, 2)))
    folder = save_model(model, tmp_path / "out", merged=True)
    assert read_manifest(folder).standard
    assert_read_alone(model, folder)
    inputs = tiny.batch(model)
    assert torch.equal(fedspine_edge.load_model(folder).merge()(**inputs).logits, model.merge()(**inputs).logits)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_equal_widths_with_all_heads_are_a_standard_checkpoint(kind, tmp_path):
    """What `min_heads` is for: an encoder whose heads all stay needs no loader of its own."""
    model = tiny.prunable(kind)
    model.compact(equal_widths(model, range(model.spec.num_kv_heads), range(1, 24, 3)))
    folder = save_model(model, tmp_path / "out", merged=True)
    assert read_manifest(folder).standard
    assert_read_alone(model, folder)


@pytest.mark.parametrize("kind", [kind for kind in FREE if kind in DECODERS])
def test_head_count_not_dividing_hidden_size_is_not_standard(kind, tmp_path):
    """LLaMA's config rejects it and those of the other families do not; only loadable folders are called standard."""
    model = tiny.prunable(kind, heads=6, kv_heads=6)
    model.compact(equal_widths(model, range(5), range(8)))
    assert model.spec.hidden_size % 5
    folder = save_model(model, tmp_path / "out", merged=True)
    assert read_manifest(folder).standard == (tiny.task_of(kind)[0] != "llama")
    if read_manifest(folder).standard:
        assert_read_alone(model, folder)
    else:
        assert "transformers alone cannot build" in (folder / "README.md").read_text()
    inputs = tiny.batch(model)
    assert torch.equal(fedspine_edge.load_model(folder).merge()(**inputs).logits, model.merge()(**inputs).logits)


@pytest.mark.parametrize("kind", [kind for kind in FREE if kind in DECODERS])
def test_transformers_reads_weights_and_adapter_of_a_folder(kind, tmp_path):
    """transformers sees the adapter and applies it; PEFT puts it on the pruned base."""
    model = tiny.prunable(kind)
    model.compact(equal_widths(model, [0], range(8)))
    folder = save_model(model, tmp_path / "out")
    assert_read_alone(model, folder)
    assert "without peft, transformers ignores the adapter" in (folder / "README.md").read_text()
    loaded = fedspine_edge.load_model(folder)
    bare = tiny.PrunableModel.from_module(tiny.module(kind), task="causal_lm")
    bare.compact(model.layout)
    again = peft.PeftModel.from_pretrained(bare.merge(), folder).eval()
    inputs = tiny.batch(model)
    expected = model(**inputs).logits.detach()
    assert torch.equal(loaded(**inputs).logits, expected)
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_unequal_widths_are_readable_by_load_model_only(kind, tmp_path):
    """Not silently misread: the shapes do not fit the config."""
    model = tiny.prunable(kind)
    heads = tuple(np.arange(1 + i) for i in range(2))
    model.compact(Layout(model.spec, heads, (np.arange(8), np.arange(16))))
    folder = save_model(model, tmp_path / "out", merged=True)
    assert not read_manifest(folder).standard
    with pytest.raises((RuntimeError, ValueError)):
        tiny.AUTO[model.task].from_pretrained(folder)
    inputs = tiny.batch(model)
    expected = model(**inputs).logits.detach()
    torch.testing.assert_close(fedspine_edge.load_model(folder)(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
def test_save_model_writes_safetensors_and_text_only(merged, tmp_path):
    model = tiny.prunable("gpt2_lm")
    folder = save_model(model, tmp_path / "out", merged=merged)
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".md"}


# GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(module, path):
    """A decoder as llama.cpp stores it, in float32; LLaMA's q and k rows are interleaved there."""
    import gguf

    config = module.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in module.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = data.shape[0] // config.head_dim
            data = data.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(data.shape)
        for own_name, gguf_name in GGUF_NAMES.items():
            name = name.replace(own_name, gguf_name)
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_load_base_of_a_gguf_file_equals_its_source(family, tied, tmp_path):
    pytest.importorskip("gguf")
    # Qwen3's head_dim is not read from the file: transformers takes it to be 128, as in all models of that family
    original = tiny.module(f"{family}_lm", tied=tied, head_dim=128 if family == "qwen3" else 8)
    model = load_base(write_gguf(original, tmp_path / "tiny.gguf"), task="causal_lm")
    assert model.base == "tiny.gguf"
    model.module.config.pad_token_id = 0  # which a file without a tokenizer does not say
    inputs = tiny.batch(model)
    torch.testing.assert_close(model(**inputs).logits, original(**inputs).logits, rtol=1e-4, atol=1e-4)
    model.attach_lora(2, 1.0, 0)
    model.compact(equal_widths(model, [1], range(8)))
    folder = save_model(model, tmp_path / "out", merged=True)
    assert_read_alone(model, folder)


def test_load_base_names_a_damaged_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(tiny.module("llama_lm"), tmp_path / "tiny.gguf")
    data = path.read_bytes()
    for size in (0, 3, 40, 400, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf") as caught:
            load_base(path, task="causal_lm")
        assert caught.value.remedy
    path.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        load_base(path, task="causal_lm")
