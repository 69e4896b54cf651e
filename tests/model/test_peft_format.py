"""Adapters of the package load in PEFT, and those of PEFT load here, with equal outputs."""

import json

import numpy as np
import peft
import pytest
import tiny_models as tiny
import torch

from fedspine_edge.errors import CheckpointError
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.model.families import SUPPORTED
from fedspine_edge.model.peft_format import load_adapter

TYPES = {"classification": "SEQ_CLS", "token_classification": "TOKEN_CLS", "causal_lm": "CAUSAL_LM"}


def bare(kind, **shape):
    return tiny.PrunableModel.from_module(tiny.module(kind, **shape), task=tiny.task_of(kind)[1])


def peft_adapter(kind, folder, **settings):
    """A live PEFT adapter in `folder`; returns the adapted module."""
    family, task = tiny.task_of(kind)
    entry = SUPPORTED[family]
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(entry.lora_targets), **settings}
    config["fan_in_fan_out"] = entry.transposed
    adapted = peft.get_peft_model(tiny.module(kind), peft.LoraConfig(task_type=TYPES[task], **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_peft_loads_a_saved_adapter_and_head(kind, tmp_path):
    model = tiny.prunable(kind, r=3)
    inputs = tiny.batch(model)
    folder = save_model(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny.module(kind), folder).eval()
    expected = model(**inputs).logits.detach()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"RANK": 2}, "alpha_pattern": {"RANK": 5}},
        {"target_modules": "SOME"},
    ],
    ids=["plain", "rslora", "mixed", "some"],
)
def test_peft_adapter_gives_the_same_logits(kind, settings, tmp_path):
    """Mixed ranks and alphas, rank-stabilised scaling, and adapters on some modules only."""
    entry = SUPPORTED[tiny.task_of(kind)[0]]
    path = entry.linears["v"]
    target = (path.rpartition(".")[0] if path.rpartition(".")[0] in entry.fused else path).rpartition(".")[2]
    settings = json.loads(json.dumps(settings).replace("RANK", target))
    if "target_modules" in settings:
        settings["target_modules"] = [target]
    adapted = peft_adapter(kind, tmp_path, **settings)
    model = bare(kind)
    load_adapter(model, tmp_path)
    inputs = tiny.batch(model)
    torch.testing.assert_close(model(**inputs).logits.detach(), adapted(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)
    assert model.r == 4
    model(**inputs).loss.backward()
    dead = [
        name
        for name in model.adapter_state()
        if name.endswith("lora_A") and (np.abs(model.adapter_state()[name]).max(1) == 0).any()
    ]
    assert not dead  # every component can learn


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind not in tiny.FAMILIES])
def test_peft_head_is_loaded_with_the_adapter(kind, tmp_path):
    adapted = peft_adapter(kind, tmp_path)
    model = bare(kind)
    before = {n: p.clone() for n, p in model.trainable_parameters().items()}
    load_adapter(model, tmp_path)
    assert any(not torch.equal(p, before[n]) for n, p in model.trainable_parameters().items() if n in before)
    inputs = tiny.batch(model)
    torch.testing.assert_close(model(**inputs).logits.detach(), adapted(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)


def test_peft_modules_to_save_are_the_head(tmp_path):
    adapted = peft_adapter("bert", tmp_path, modules_to_save=["classifier", "pooler"])
    model = bare("bert")
    load_adapter(model, tmp_path)
    inputs = tiny.batch(model)
    torch.testing.assert_close(model(**inputs).logits.detach(), adapted(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)
    peft_adapter("bert", tmp_path / "more", modules_to_save=["classifier", "word_embeddings"])
    with pytest.raises(CheckpointError, match=r"word_embeddings.*neither a prunable linear nor the head"):
        load_adapter(bare("bert"), tmp_path / "more")


@pytest.mark.parametrize("kind", ["roberta", "gpt2_lm", "llama_lm"])
def test_peft_adapter_round_trips_through_save(kind, tmp_path):
    """Mixed ranks and alphas, evened out on the way."""
    path = SUPPORTED[tiny.task_of(kind)[0]].lora_targets[0]
    adapted = peft_adapter(kind, tmp_path / "first", rank_pattern={path: 2}, alpha_pattern={path: 5})
    model = bare(kind)
    load_adapter(model, tmp_path / "first")
    again = peft.PeftModel.from_pretrained(tiny.module(kind), save_model(model, tmp_path / "second")).eval()
    inputs = tiny.batch(model)
    torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_peft_adapter_of_the_full_model_is_gathered(tmp_path):
    peft_adapter("llama", tmp_path)
    first, second = bare("llama"), bare("llama")
    layout = tiny.random_layout(first, 3)
    load_adapter(first, tmp_path)
    first.compact(layout)
    second.compact(layout)
    load_adapter(second, tmp_path)
    inputs = tiny.batch(first)
    torch.testing.assert_close(first(**inputs).logits, second(**inputs).logits)


def test_load_adapter_rejects_a_saved_adapter_of_another_base(tmp_path):
    first = tiny.PrunableModel.from_module(tiny.module("bert"), task="classification", base_sha256="a" * 64)
    second = tiny.PrunableModel.from_module(tiny.module("bert"), task="classification", base_sha256="b" * 64)
    first.attach_lora(2, 1.0, 0)
    folder = save_model(first, tmp_path / "first")
    with pytest.raises(CheckpointError, match=r"(?s)trained on base aaaaaaaaaaaa.*this model has base bbbb"):
        load_adapter(second, folder)
    load_adapter(first, folder)
