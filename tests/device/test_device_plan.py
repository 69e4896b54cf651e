"""A plan says what would go and why, changes nothing, and is carried out as it says; memory can be traded for time."""

import numpy as np
import pytest
import tiny_bert
import torch

from fedspine_edge import EdgeTuner
from fedspine_edge.errors import ConfigError, DataError, LayoutError


def tuner_of(folder, **options):
    return EdgeTuner.from_pretrained(folder, r=4, learning_rate=1e-2, torch_device="cpu", **options)


@pytest.mark.parametrize(("criterion", "scope"), [("lora", "layer"), ("apt", "global")])
def test_a_plan_explains_itself_changes_nothing_and_is_carried_out(tiny_folder, criterion, scope):
    tuner = tuner_of(tiny_folder, criterion=criterion, scope=scope)
    tuner.fit(tiny_bert.sentences(80), steps=8)
    size, layout = tuner.model.num_parameters(), tuner.layout
    plan = tuner.plan(0.5)
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
    assert len(text.splitlines()) == 2 + 2
    tuner.apply(plan)
    assert tuner.model.num_parameters() == size - plan.parameters_saved
    assert tuner.layout.pruning_ratio == plan.pruning_ratio == pytest.approx(0.5, abs=0.05)
    tuner.fit(tiny_bert.sentences(80), steps=2)


def test_a_plan_needs_scores_a_possible_ratio_and_the_model_it_was_made_for(tiny_folder):
    tuner = tuner_of(tiny_folder)
    with pytest.raises(DataError, match="planning needs scores"):
        tuner.plan(0.5)
    tuner.fit(tiny_bert.sentences(40), steps=3)
    with pytest.raises(ConfigError, match=r"pruning_ratio is 1\.0"):
        tuner.plan(1.0)
    gentle, hard = tuner.plan(0.25), tuner.plan(0.7)
    with pytest.raises(ConfigError, match="base_latency_ms is 0"):
        hard.predicted_latency_ms(0)
    tuner.apply(hard)
    with pytest.raises(LayoutError, match="removed earlier"):
        tuner.apply(gentle)
    assert tuner.layout is hard.after


@pytest.mark.parametrize("criterion", ["lora", "apt"])
def test_recomputing_layers_trains_the_same_and_keeps_less(tiny_folder, criterion):
    data = tiny_bert.sentences(40)
    kept: dict[bool, int] = {}
    results = {}
    for recompute in (False, True):
        tuner = tuner_of(tiny_folder, criterion=criterion, gradient_checkpointing=recompute)
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
