"""One test per malformed input: the error names the file and the remedy, and nothing is written."""

import hashlib
import json
import pickle
import re
import struct

import numpy as np
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file

from fedspine_edge.errors import CheckpointError, ConfigError, UnknownArchitecture
from fedspine_edge.model.checkpoint import load_model, save_model
from fedspine_edge.model.families import SUPPORTED
from fedspine_edge.model.loading import load_base, load_tokenizer
from fedspine_edge.model.peft_format import load_adapter

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def refused(match, call, folder, *args, error=CheckpointError, **kwargs):
    """`call(folder)` fails as it should and leaves every file as it was."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} if folder.is_dir() else {}
    with pytest.raises(error, match=match) as caught:
        call(folder, *args, **kwargs)
    assert caught.value.remedy
    if folder.is_dir():
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def forge(folder, name, data):
    """Replace a file of a saved model together with its hash, as who tampers with it would."""
    (folder / name).write_bytes(data)
    hashes = json.loads((folder / "layout.json").read_text())["sha256"]
    edit_json(folder / "layout.json", sha256={**hashes, name: hashlib.sha256(data).hexdigest()})


def with_header(data, change):
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + size :]


def overlap(header):
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def grow(header):
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [1 << 40]


MALFORMED = {
    "empty": lambda data: b"",
    "header cut": lambda data: data[:60],
    "body cut": lambda data: data[: len(data) // 2],
    "last byte missing": lambda data: data[:-1],
    "one byte too many": lambda data: data + b"\0",
    "oversize header": lambda data: struct.pack("<Q", 1 << 40) + data[8:],
    "header larger than the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header is no JSON": lambda data: data[:8] + b"x" + data[9:],
    "tensors overlap": lambda data: with_header(data, overlap),
    "a shape that the bytes do not fill": lambda data: with_header(data, grow),
    "unknown dtype": lambda data: data.replace(b'"F32"', b'"X32"', 1),
    "a pickle under this name": lambda data: pickle.dumps({"weight": [1.0]}),
}


@pytest.mark.parametrize("damage", MALFORMED)
def test_load_base_rejects_malformed_weights(base, damage):
    data = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(MALFORMED[damage](data))
    refused(re.escape(f"{base / WEIGHTS} cannot be read"), load_base, base)


@pytest.mark.parametrize("name", [WEIGHTS, ADAPTER])
@pytest.mark.parametrize("damage", MALFORMED)
def test_load_model_rejects_malformed_weights_with_a_forged_hash(saved, name, damage):
    forge(saved, name, MALFORMED[damage]((saved / name).read_bytes()))
    refused(re.escape(f"{saved / name} cannot be read"), load_model, saved)


@pytest.mark.parametrize("name", [WEIGHTS, ADAPTER, "adapter_config.json", "config.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_load_model_rejects_every_altered_file(saved, name, damage):
    path = saved / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    refused(re.escape(str(path)), load_model, saved)


@pytest.mark.parametrize("damage", ["empty", "body cut", "tensors overlap"])
def test_load_base_names_a_malformed_shard(tmp_path, damage):
    tiny.module("llama_lm").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(MALFORMED[damage](shard.read_bytes()))
    refused(f"{shard.name} cannot be read", load_base, tmp_path, task="causal_lm")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_load_base_rejects_non_finite_weights(base, saved, bad):
    tensors = load_file(base / WEIGHTS)
    name = "encoder.layer.1.attention.self.query.weight"
    tensors[name][2, 3] = bad
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    refused(r"base: weight 'bert.encoder.*query.weight' has non-finite", load_base, base)
    for file in (WEIGHTS, ADAPTER):
        tensors = load_file(saved / file)
        good = (saved / file).read_bytes()
        next(iter(tensors.values())).view(-1)[0] = bad
        save_file(tensors, saved / "draft", metadata={"format": "pt"})
        data = (saved / "draft").read_bytes()
        (saved / "draft").unlink()
        forge(saved, file, data)
        refused("non-finite", load_model, saved)
        forge(saved, file, good)


def test_load_base_rejects_weights_of_another_config(base):
    tensors = load_file(base / WEIGHTS)
    name = "encoder.layer.1.attention.self.query.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, base / WEIGHTS, metadata={"format": "pt"})
    refused("no tensor of the right shape for 1 parameters .*query.weight", load_base, base)
    save_file({**tensors, name: torch.zeros(4, 4)}, base / WEIGHTS, metadata={"format": "pt"})
    refused("no tensor of the right shape for 1 parameters .*query.weight", load_base, base)


class Payload:
    """What runs when a pickle of it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickled_weights_are_rejected_by_name_and_never_run(base, tmp_path, name):
    trap = pickle.dumps(Payload(tmp_path / "ran"))
    (base / name).write_bytes(trap)
    load_base(base)  # a pickle beside safetensors is ignored
    (base / WEIGHTS).unlink()
    refused(f"(?s)pickled weights .{name}.*Convert", load_base, base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(trap)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    model = tiny.prunable("bert")
    refused(r"pickled weights .adapter_model\.bin", lambda folder: load_adapter(model, folder), adapter)
    assert not (tmp_path / "ran").exists()


def test_loading_rejects_missing_and_misplaced_folders(base, saved, tmp_path):
    refused("does not exist", load_base, tmp_path / "no/such/folder")
    refused("does not exist", load_model, tmp_path / "none")
    with pytest.raises(CheckpointError, match="hf download some-org/some-model"):
        load_base("some-org/some-model")
    refused("was not saved by this package", load_model, base)
    with pytest.raises(CheckpointError) as caught:
        load_model(base)
    assert "`tune`" in caught.value.remedy  # as in the error of `fedspine-edge compile` for a plain folder
    refused("saved by this package, not a plain one", load_base, saved)
    refused("is a file", load_base, base / "config.json")
    refused("has no file 'x.gguf'", load_base, base, gguf_file="x.gguf")
    (base / WEIGHTS).unlink()
    refused("no model.safetensors", load_base, base)


def test_load_base_rejects_missing_damaged_and_unknown_configs(base):
    edit_json(base / "config.json", model_type="mamba")
    refused(f"(?s)'mamba' is not supported.*{', '.join(sorted(SUPPORTED))}", load_base, base, error=UnknownArchitecture)
    for text in ("{", "[]", '"bert"', "\xff"):
        (base / "config.json").write_text(text, encoding="latin-1")
        refused(r"config\.json is damaged", load_base, base)
    (base / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": "two"}')
    refused("the config in .* cannot be read", load_base, base)
    for text in ("{}", '{"model_type": null}'):
        (base / "config.json").write_text(text)
        refused("has no model_type", load_base, base)
    (base / "config.json").unlink()
    refused("has no config.json", load_base, base)


def test_load_tokenizer_rejects_missing_damaged_and_unpadded(base):
    refused("(?s)has no tokenizer.*tokenizer.json", load_tokenizer, base)
    (base / "tokenizer.json").write_text('{"version": "1.0"')
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refused("the tokenizer in .* cannot be read", load_tokenizer, base)
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(base / "tokenizer.json"))
    refused("neither a padding nor an end token", load_tokenizer, base)


def test_load_base_rejects_unsupported_tasks_and_labels(base):
    settings = [
        ({"task": "causal_lm"}, "(?s)bert models do not support task 'causal_lm'.*classification"),
        ({"num_labels": 1}, "`num_labels` is 1"),
        ({"num_labels": 2, "labels": ["a", "b", "c"]}, "3 label names"),
    ]
    for options, message in settings:
        refused(message, load_base, base, error=ConfigError, **options)


LAYOUTS = {
    "wider than the weights": (
        {"heads": [[0, 1, 2, 3]] * 2, "channels": [list(range(24))] * 2},
        "does not have the widths of layout.json",
    ),
    "a head that does not exist": ({"heads": [[0], [99]]}, "layout.json: layer 1, heads"),
    "not sorted": ({"heads": [[1, 0], [0]]}, "layout.json: layer 0, heads"),
    "twice the same": ({"channels": [[0, 0], [0]]}, "layout.json: layer 0, channels"),
    "an empty layer": ({"heads": [[], [0]]}, "layout.json: layer 0, heads"),
    "layers missing": ({"heads": [[0]]}, "layout has heads for 1 layers"),
    "an unknown field": ({"surprise": 1}, "layout.json is damaged.*surprise"),
    "a later version": ({"version": 2}, "layout.json is damaged"),
    "an unknown task": ({"task": "poetry"}, "layout.json is damaged"),
    "no hashes": ({"sha256": {}}, "has no hash for adapter_config.json"),
}


@pytest.mark.parametrize("damage", LAYOUTS)
def test_load_model_rejects_a_layout_that_does_not_match(saved, damage):
    changes, message = LAYOUTS[damage]
    edit_json(saved / "layout.json", **changes)
    refused(message, load_model, saved)


def test_load_model_rejects_a_truncated_or_escaping_manifest(saved):
    text = (saved / "layout.json").read_text()
    edit_json(saved / "layout.json", sha256={**json.loads(text)["sha256"], "../config.json": "0" * 64})
    refused("outside its folder", load_model, saved)
    (saved / "layout.json").write_text(text[:100])
    refused("layout.json is damaged", load_model, saved)


def test_compact_rejects_the_layout_of_another_model(saved, tmp_path):
    """Kept indices are not shapes: the weights' hash is what ties them together."""
    other = tiny.prunable("bert", seed=5)
    other.compact(load_model(saved).layout.__class__.from_dict(other.spec, load_model(saved).layout.to_dict()))
    save_model(other, tmp_path / "other")
    (saved / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    refused(r"model\.safetensors is not the file that was saved", load_model, saved)


# Adapters


@pytest.fixture
def adapter(tmp_path):
    """An adapter of rank 4 for an unpruned tiny BERT, as PEFT writes it."""
    return save_model(tiny.prunable("bert", r=4), tmp_path / "adapter")


def bare_folder(adapter):
    """Only the two files, as a user copies them."""
    for path in adapter.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    return adapter


@pytest.mark.parametrize("damage", MALFORMED)
def test_load_adapter_rejects_malformed_weights(adapter, damage):
    folder = bare_folder(adapter)
    (folder / ADAPTER).write_bytes(MALFORMED[damage]((folder / ADAPTER).read_bytes()))
    unchanged(r"adapter_model\.safetensors cannot be read", tiny.prunable("bert"), folder)


CONFIGS = {
    "another method": ({"peft_type": "IA3"}, "only plain LoRA"),
    "DoRA": ({"use_dora": True}, "only plain LoRA"),
    "trained biases": ({"bias": "all"}, "only plain LoRA"),
    "rank zero": ({"r": 0}, "only plain LoRA"),
    "a rank that is no number": ({"r": "four"}, "is damaged"),
    "another rank than the weights'": ({"r": 8}, "has rank 4; adapter_config.json states 8"),
    "an initialisation that changed the base": ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_load_adapter_rejects_an_unusable_adapter_config(adapter, damage):
    changes, message = CONFIGS[damage]
    folder = bare_folder(adapter)
    edit_json(folder / "adapter_config.json", **changes)
    unchanged(message, tiny.prunable("bert"), folder)


def test_load_adapter_without_config_raises(adapter):
    folder = bare_folder(adapter)
    (folder / "adapter_config.json").write_text("[]")
    unchanged("is damaged", tiny.prunable("bert"), folder)
    (folder / "adapter_config.json").unlink()
    unchanged(r"has no adapter_config\.json", tiny.prunable("bert"), folder)


def test_load_adapter_rejects_the_adapter_of_another_base(adapter):
    first = tiny.PrunableModel.from_module(tiny.module("bert"), task="classification", base_sha256="b" * 64)
    unchanged(r"(?s)trained on base 000000000000; this model has base bbbb.*Load the base", first, adapter)
    folder = bare_folder(adapter)
    unchanged("fits neither", tiny.prunable("bert", heads=2), folder)
    unchanged("(?s)neither a prunable linear.*another base", tiny.prunable("llama"), folder)
    unchanged("neither a prunable linear", tiny.prunable("bert", layers=1), folder)
    unchanged("number of labels", tiny.prunable("bert", num_labels=5), folder)


def unchanged(message, model, folder):
    """Loading is refused, and neither the model nor a file is another than before."""
    before = model.adapter_state()
    refused(message, lambda f: load_adapter(model, f), folder)
    after = model.adapter_state()
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)
