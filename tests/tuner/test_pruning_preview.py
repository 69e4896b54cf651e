"""A preview explains what pruning removes without changing anything, and `prune` follows it."""

import json

import numpy as np
import pytest
import tiny_bert
import torch

from fedspine_edge import EdgeTuner, MemorySettings, PruningSettings
from fedspine_edge.errors import ConfigError, DataError, LayoutError


def tuner_of(folder, **options):
    return EdgeTuner.from_pretrained(folder, r=4, learning_rate=1e-2, torch_device="cpu", **options)


@pytest.mark.parametrize(("criterion", "scope"), [("lora", "layer"), ("apt", "global")])
def test_preview_changes_nothing_and_prune_follows_it(tiny_folder, criterion, scope):
    tuner = tuner_of(tiny_folder, pruning=PruningSettings(criterion=criterion, scope=scope))
    tuner.fit(tiny_bert.sentences(80), steps=8)
    size, layout = tuner.model.num_parameters(), tuner.layout
    plan = tuner.preview(0.5)
    assert tuner.layout is layout
    assert tuner.model.num_parameters() == size
    for layer, (heads, channels) in zip(plan.layers, plan.after.counts):
        assert layer.heads_removed.size == 4 - heads == layer.head_scores.size
        assert layer.channels_removed.size == 64 - channels == layer.channel_scores.size
    for i, layer in enumerate(plan.layers):  # what goes scored less than everything that stays
        kept = plan.scores.channels[i][plan.after.channels[i]]
        assert layer.channels_removed.size == 0 or layer.channel_scores.max() <= kept.min()
    assert plan.predicted_latency_ms(10.0) == pytest.approx(10.0 * (1 - plan.flops_saved))
    assert 0.3 < plan.flops_saved < 0.6
    text = str(plan)
    assert f"{plan.parameters_saved:,} parameters" in text
    assert "(asked 0.5)" in text
    assert len(text.splitlines()) == 2 + 2
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["pruning_ratio"] == {"now": 0.0, "asked": 0.5, "after": plan.pruning_ratio}
    assert found["latency_ms"] is None
    for layer, planned in zip(found["layers"], plan.layers):
        assert layer["heads_removed"] == planned.heads_removed.tolist()
        assert layer["channel_scores"] == planned.channel_scores.tolist()
        assert (layer["heads_kept"], layer["channels_kept"]) == (planned.heads_kept, planned.channels_kept)
    tuner.prune(plan)
    assert tuner.model.num_parameters() == size - plan.parameters_saved
    assert tuner.layout.pruning_ratio == plan.pruning_ratio == pytest.approx(0.5, abs=0.05)
    tuner.fit(tiny_bert.sentences(80), steps=2)


def test_preview_needs_scores_a_valid_ratio_and_its_model(tiny_folder):
    tuner = tuner_of(tiny_folder)
    with pytest.raises(DataError, match="a preview needs scores"):
        tuner.preview(0.5)
    tuner.fit(tiny_bert.sentences(40), steps=3)
    with pytest.raises(ConfigError, match=r"`pruning_ratio` is 1\.0"):
        tuner.preview(1.0)
    gentle, hard = tuner.preview(0.25), tuner.preview(0.7)
    with pytest.raises(ConfigError, match="base_latency_ms is 0"):
        hard.predicted_latency_ms(0)
    tuner.prune(hard)
    with pytest.raises(LayoutError, match="removed earlier"):
        tuner.prune(gentle)
    assert tuner.layout is hard.after


@pytest.mark.parametrize("criterion", ["lora", "apt"])
def test_gradient_checkpointing_trains_the_same_in_less_memory(tiny_folder, criterion):
    data = tiny_bert.sentences(40)
    kept: dict[bool, int] = {}
    results = {}
    for recompute in (False, True):
        tuner = tuner_of(
            tiny_folder,
            pruning=PruningSettings(criterion=criterion),
            memory=MemorySettings(gradient_checkpointing=recompute),
        )
        tuner.fit(data, steps=4)
        results[recompute] = (tuner.model.adapter_state(), tuner._tracker.scores())
        saved: dict[int, int] = {}
        trainer = tuner._trainer(tuner._encoded(data), 1)
        trainer.model.module.train(recompute)
        batch = {
            "input_ids": torch.ones(8, 24, dtype=torch.long),
            "attention_mask": torch.ones(8, 24, dtype=torch.long),
        }

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = trainer.model.module(**batch).logits
        kept[recompute] = sum(saved.values())
        assert logits.requires_grad
    for name, value in results[False][0].items():
        np.testing.assert_array_equal(results[True][0][name], value, err_msg=name)
    np.testing.assert_array_equal(results[True][1].channels[1], results[False][1].channels[1])
    assert kept[True] < 0.5 * kept[False]


def test_preview_predicts_from_a_measured_latency(tiny_folder):
    tuner = tuner_of(tiny_folder, pruning=PruningSettings(criterion="magnitude"))
    with pytest.raises(ConfigError, match="needs a measured latency"):
        tuner.preview(0.5).predicted_latency_ms()
    with pytest.raises(ConfigError, match="repeats is 0"):
        tuner.measure_latency(repeats=0)
    latency = tuner.measure_latency(length_tokens=32, repeats=3)
    assert 0 < latency.layers_ms < latency.total_ms
    assert "one text of 32 tokens, median of 3" in latency.conditions
    plan = tuner.preview(0.5)
    share = plan.flops_after / plan.flops_before
    rest = latency.total_ms - latency.layers_ms
    assert plan.predicted_latency_ms() == pytest.approx(rest + latency.layers_ms * share)
    assert plan.predicted_latency_ms() > latency.total_ms * share  # embeddings and head do not shrink
    assert f"latency {latency.total_ms:.1f} ms -> {plan.predicted_latency_ms():.1f} ms predicted" in str(plan)
    assert plan.to_dict()["latency_ms"]["measured"] == latency.total_ms
    tuner.prune(plan)
    with pytest.raises(ConfigError, match="needs a measured latency"):  # it was of the wider model
        tuner.preview(0.6).predicted_latency_ms()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_minimum_widths_are_kept_at_any_ratio(tiny_folder, scope):
    tuner = tuner_of(
        tiny_folder, pruning=PruningSettings(criterion="magnitude", scope=scope, min_heads=3, min_channels=20)
    )
    plan = tuner.preview(0.95)
    assert plan.after.counts == [(3, 24)] * 2  # 20 channels rounded up to a multiple of 8
    assert "(asked 0.95)" in str(plan)
    tuner.prune(plan)
    assert tuner.preview(0.95).after.counts == [(3, 24)] * 2
    for wrong in ({"min_heads": 5}, {"min_heads": 0}, {"min_channels": 65}, {"round_to": 0}):
        with pytest.raises(ConfigError):
            tuner_of(tiny_folder, pruning=PruningSettings(**wrong))


def test_min_heads_prunes_channels_only(tiny_folder, tmp_path):
    """So that a BERT remains a checkpoint that transformers reads by itself."""
    from transformers import AutoModelForSequenceClassification

    tuner = tuner_of(tiny_folder, pruning=PruningSettings(criterion="magnitude", min_heads=4))
    tuner.fit(tiny_bert.sentences(40), steps=2).prune(0.3, stages=2, steps=1)
    assert {heads for heads, _ in tuner.layout.counts} == {4}
    assert tuner.layout.pruning_ratio == pytest.approx(0.3, abs=0.05)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tuner.save(tmp_path / "out", merged=True)).eval()
    inputs = dict(tuner.tokenizer("a good film", return_tensors="pt"))
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, tuner.model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("stages", [2, 3])
def test_pruning_in_stages_ends_at_the_widths_of_one_stage(tiny_folder, ratio, stages):
    """The rounding of an early part to whole heads must not take channels that the end would keep."""
    tuner = tuner_of(tiny_folder, pruning=PruningSettings(criterion="magnitude"))
    expected = tuner.preview(ratio).after.counts
    tuner.prune(ratio, tiny_bert.sentences(16), stages=stages, steps=1)
    assert tuner.layout.counts == expected


@pytest.mark.parametrize("metric", ["square", "signed"])
def test_importance_metrics_rank_differently(tiny_folder, metric):
    scores = []
    for one in ("abs", metric):
        tuner = tuner_of(tiny_folder, pruning=PruningSettings(importance_metric=one)).fit(
            tiny_bert.sentences(40), steps=3
        )
        scores.append(tuner.preview(0.5).scores.channels[0])
        tuner.prune(0.5, stages=1)
        assert tuner.layout.pruning_ratio == pytest.approx(0.5, abs=0.05)
    assert (np.argsort(scores[0]) != np.argsort(scores[1])).any()
