"""Initialization, loading and validation of adapters."""

import numpy as np
import pytest
import tiny_models as tiny
import torch

from fedspine_edge.errors import CheckpointError, ModelError
from fedspine_edge.model.deterministic_init import kaiming_uniform, uniform
from fedspine_edge.model.layout import full_shape, module_names, split_name


def fleet_adapter(model, r, seed=0):
    """A round blob: full coordinates at the largest rank, with a head and an order."""
    rng = np.random.default_rng(seed)
    state = {}
    for name in module_names(model.spec):
        rows, cols = full_shape(model.spec, split_name(name)[1])
        state[f"{name}.lora_A"] = rng.normal(size=(r, cols)).astype(np.float32)
        state[f"{name}.lora_B"] = rng.normal(size=(rows, r)).astype(np.float32)
    for name in model.head_names:
        state[f"head.{name}"] = rng.normal(size=tuple(model.module.get_parameter(name).shape)).astype(np.float32)
    return state


def test_seeded_numbers_never_change():
    """Pinned: devices with other versions of numpy and torch must start from the same adapter."""
    np.testing.assert_array_equal(uniform(7, "x", (3,), 1.0), np.float32(PINNED))
    assert np.abs(uniform(7, "x", (10_000,), 0.5)).max() <= 0.5
    assert abs(uniform(7, "x", (10_000,), 0.5).mean()) < 0.02


PINNED = [0.9144868850708008, -0.9670614004135132, 0.007592304609715939]


def test_attach_lora_changes_nothing_and_is_reproducible():
    bare = tiny.PrunableModel.from_module(tiny.module("bert"), task="classification")
    inputs = tiny.batch(bare)
    before = bare(**inputs).logits.detach()
    bare.attach_lora(4, 2.0, seed=3)
    torch.testing.assert_close(bare(**inputs).logits.detach(), before)
    lora_A = bare.adapter_state()["layers.1.down.lora_A"]
    np.testing.assert_array_equal(lora_A, kaiming_uniform(3, "layers.1.down", 4, 24))
    assert np.abs(lora_A).max() <= 24**-0.5
    assert not bare.adapter_state()["layers.1.down.lora_B"].any()
    assert bare.r == 4
    assert bare.scaling == 2.0


def test_attach_lora_on_a_compact_model_gathers_and_ranks_nest():
    full, compact = tiny.prunable("llama", r=6, live_b=False), tiny.prunable("llama", live_b=False)
    layout = tiny.random_layout(full, 2)
    compact.compact(layout)
    compact.attach_lora(2, 0.5, seed=0)
    full.compact(layout)
    for name, value in compact.adapter_state().items():
        expected = full.adapter_state()[name]
        np.testing.assert_array_equal(
            value, expected[:2] if name.endswith("lora_A") else expected[..., :2] if "lora_B" in name else expected
        )


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_load_adapter_takes_leading_ranks_and_kept_groups(kind):
    model = tiny.prunable(kind)
    layout = tiny.random_layout(model, 1)
    model.compact(layout)
    state = fleet_adapter(model, 5)
    model.load_adapter({**state, "order.0.heads": np.arange(4)}, r=2)
    loaded = model.adapter_state()
    assert model.r == 2
    for name in module_names(model.spec):
        np.testing.assert_array_equal(loaded[f"{name}.lora_A"], state[f"{name}.lora_A"][:2][:, layout.cols(name)])
        np.testing.assert_array_equal(loaded[f"{name}.lora_B"], state[f"{name}.lora_B"][layout.rows(name)][:, :2])
    for name in model.head_names:
        np.testing.assert_array_equal(loaded[f"head.{name}"], state[f"head.{name}"])
    model(**tiny.batch(model)).loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters().values())


def test_adapter_state_round_trips_in_compact_coordinates():
    model = tiny.prunable("bert")
    model.compact(tiny.random_layout(model, 1))
    state = model.adapter_state()
    model.attach_lora(2, 1.0, 9)
    model.load_adapter({name: value.astype(np.float16) for name, value in state.items()})
    for name, value in model.adapter_state().items():
        np.testing.assert_allclose(value, state[name], rtol=1e-3, atol=1e-4)
        assert value.dtype == np.float32


def test_adapter_state_is_a_copy():
    model = tiny.prunable("bert")
    state = model.adapter_state()
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(1.0)
    assert all((model.adapter_state()[name] != value).all() for name, value in state.items())


def test_load_adapter_without_a_head_keeps_the_head():
    model = tiny.prunable("bert")
    before = model.adapter_state()["head.classifier.weight"]
    model.load_adapter({n: v for n, v in fleet_adapter(model, 4).items() if not n.startswith("head.")})
    np.testing.assert_array_equal(model.adapter_state()["head.classifier.weight"], before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("layers.1.q.lora_B"), "has no 'layers.1.q.lora_B'"),
        (
            lambda s: s.update({"layers.7.q.lora_A": np.ones((4, 32))}),
            "'layers.7.q.lora_A', which this model does",
        ),
        (lambda s: s.update({"layers.0.q.lora_A": np.ones((4, 31))}), "fits neither the full linear"),
        (lambda s: s.update({"layers.0.q.lora_A": np.ones((3, 32))}), "are not .r, in., .out, r."),
        (lambda s: s["layers.0.up.lora_B"].fill(np.nan), "layers.0.up: the adapter has non-finite"),
        (lambda s: s["head.classifier.bias"].fill(np.inf), "head.classifier.bias"),
        (lambda s: s.pop("head.classifier.bias"), "head has no 'classifier.bias'"),
        (lambda s: s.update({"head.classifier.bias": np.zeros(9, np.float32)}), "number of labels"),
        (lambda s: s.update({"head.bert.embeddings": np.zeros(9, np.float32)}), "which this model does not have"),
    ],
)
def test_load_adapter_rejects_bad_state_without_changes(damage, message):
    model = tiny.prunable("bert")
    state = fleet_adapter(model, 4)
    damage(state)
    before = model.adapter_state()
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(state)
    after = model.adapter_state()
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_impossible_ranks_raise():
    model = tiny.prunable("bert")
    with pytest.raises(CheckpointError, match="rank 5 was requested from an adapter of rank 4"):
        model.load_adapter(fleet_adapter(model, 4), r=5)
    with pytest.raises(ModelError, match="at least 1"):
        model.attach_lora(0, 1.0, 0)


def test_merge_of_a_diverged_adapter_names_the_module():
    model = tiny.prunable("bert")
    with torch.no_grad():
        model.linear("layers.1.o").lora_B.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"layers\.1\.o: .*non-finite"):
        model.merge()
