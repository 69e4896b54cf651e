"""Refitting `o` and `down` at a cut, for every family."""

import numpy as np
import pytest
import tiny_models as tiny
import torch

from fedspine_edge.errors import DataError, LayoutError
from fedspine_edge.model.layout import Layout
from fedspine_edge.pruning import repair
from fedspine_edge.pruning.repair import repair_for


def texts(model, count=6, rows=8, tokens=9):
    """Model inputs without labels."""
    batches = []
    for seed in range(count):
        batch = tiny.batch(model, rows=rows, tokens=tokens, seed=seed)
        batches.append({name: value for name, value in batch.items() if name != "labels"})
    return batches


def logits(model, batches):
    with torch.no_grad():
        return (
            torch.cat([model(**batch).logits[batch["attention_mask"].bool()].reshape(-1) for batch in batches])
            if (model.task != "classification")
            else torch.cat([model(**batch).logits.reshape(-1) for batch in batches])
        )


def half(model):
    """Keep the first half of the channels and all heads but the last."""
    heads = tuple(np.arange(max(1, model.spec.num_kv_heads - 1)) for _ in range(model.spec.num_layers))
    channels = tuple(np.arange(model.spec.intermediate_size // 2) for _ in range(model.spec.num_layers))
    return Layout(model.spec, heads, channels)


def weights(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_repair_brings_the_pruned_model_closer_to_the_unpruned_one(kind):
    model, plain, reference = (tiny.prunable(kind, seed=1, channels=48) for _ in range(3))
    layout, batches = half(model), texts(model, count=24)
    done = repair_for(model, layout, batches)
    model.compact(layout)
    plain.compact(layout)
    wanted = logits(reference, batches)
    assert [entry.name for entry in done] == [f"layers.{i}.{part}" for i in range(2) for part in ("o", "down")]
    assert all(entry.error_after <= entry.error_before for entry in done)
    assert (logits(model, batches) - wanted).square().mean() < 0.9 * (logits(plain, batches) - wanted).square().mean()


@pytest.mark.parametrize("kind", ["bert", "llama_lm"])
def test_repair_recovers_a_duplicated_channel_exactly(kind):
    """What a removed channel contributed can be computed from an identical one that stays."""
    model, reference = tiny.prunable(kind, live_b=False), tiny.prunable(kind, live_b=False)
    spec, last = model.spec, model.spec.intermediate_size - 1
    for each in (model, reference):
        for layer in range(spec.num_layers):
            for part in ("up", "gate") if spec.gated_ffn else ("up",):
                base = each.linear(f"layers.{layer}.{part}").base_layer
                base.weight.data[last] = base.weight.data[0]
                if base.bias is not None:
                    base.bias.data[last] = base.bias.data[0]
    everything = tuple(np.arange(spec.num_kv_heads) for _ in range(spec.num_layers))
    layout = Layout(spec, everything, tuple(np.arange(last) for _ in range(spec.num_layers)))
    batches = texts(model, count=12)
    repair_for(model, layout, batches)
    model.compact(layout)
    for layer in range(spec.num_layers):
        kept = model.linear(f"layers.{layer}.down").merged_weight()
        full = reference.linear(f"layers.{layer}.down").merged_weight()
        both = full[:, 0] + full[:, last]
        assert torch.linalg.norm(kept[:, 0] - both) < 0.1 * torch.linalg.norm(both - full[:, 0])


def test_repaired_model_computes_the_same_before_and_after_compaction():
    model = tiny.prunable("bert")
    layout, batches = half(model), texts(model)
    repair_for(model, layout, batches)
    before = logits(model, batches)
    model.compact(layout)
    torch.testing.assert_close(logits(model, batches), before)


def test_interrupted_repair_leaves_every_weight_as_it_was(monkeypatch):
    model = tiny.prunable("llama_lm")
    before, calls = weights(model), []
    solve = repair._solve

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(repair, "_solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        repair_for(model, half(model), texts(model))
    assert len(calls) > 20
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("base_dtype", ["int8", "int4", "bfloat16"])
def test_repair_of_a_narrow_base_keeps_its_dtype(base_dtype):
    model, plain, reference = (tiny.prunable("llama_lm", seed=1, channels=48) for _ in range(3))
    for each in (model, plain, reference):
        each.set_base_dtype(base_dtype)
    layout, batches = half(model), texts(model, count=24)
    repair_for(model, layout, batches)
    model.compact(layout)
    plain.compact(layout)
    assert model.base_dtype == base_dtype
    wanted = logits(reference, batches).float()
    error, without = ((logits(each, batches).float() - wanted).square().mean() for each in (model, plain))
    assert error < without


def test_repair_of_the_same_texts_gives_the_same_bits():
    first, second = tiny.prunable("bert"), tiny.prunable("bert")
    for model in (first, second):
        repair_for(model, half(model), texts(model))
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


def test_repair_without_two_batches_is_a_data_error():
    model = tiny.prunable("bert")
    with pytest.raises(DataError, match="at least two batches"):
        repair_for(model, half(model), texts(model, count=1))


def test_repair_for_a_layout_that_keeps_removed_groups_is_refused():
    model = tiny.prunable("bert")
    full = model.layout
    model.compact(half(model))
    with pytest.raises(LayoutError, match="models only shrink"):
        repair_for(model, full, texts(model))
