"""Aggregation of a round: updates of low rank erase nothing."""

from dataclasses import replace

import numpy as np
import pytest

from fedspine_edge.config import AggregationSettings, FleetConfig
from fedspine_edge.model.layout import Layout, module_names
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import Report
from fedspine_edge.server.aggregate_round import aggregate_updates, example_weights, initial_tensors
from fedspine_edge.server.update_validation import AcceptedUpdate

SPEC = ModelSpec(
    family="bert",
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=16,
    gated_ffn=False,
    attention_bias=True,
    ffn_bias=True,
    num_parameters=2000,
    base_sha256="0" * 64,
)
R_MAX = 8


def blob(seed: int = 0) -> dict[str, np.ndarray]:
    """Return an adapter in which no component is zero."""
    rng = np.random.default_rng(seed)
    tensors = initial_tensors(FleetConfig(ranks=(2, 4, R_MAX)), SPEC)
    return {name: rng.normal(size=value.shape).astype(np.float32) for name, value in tensors.items()}


def product(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    return tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]


def update(sent: dict[str, np.ndarray], r: int, layout: Layout) -> AcceptedUpdate:
    """Return the update of a device of rank `r` that learned nothing."""
    factors = {
        name: (sent[f"{name}.lora_A"][:r, layout.cols(name)], sent[f"{name}.lora_B"][layout.rows(name), :r])
        for name in module_names(SPEC)
    }
    return AcceptedUpdate("d", 10, layout, factors, head={}, scores={})


def aggregated(sent: dict[str, np.ndarray], ranks: list[int], **aggregation: object) -> dict[str, np.ndarray]:
    config = FleetConfig(ranks=(2, 4, R_MAX), aggregation=AggregationSettings(**aggregation))
    layout = Layout.full(SPEC)
    devices = [
        (
            Report(
                run_id="r",
                device_id=f"d{i}",
                server_round=2,
                plan_sha256="0" * 64,
                status="ok",
                num_examples=10 * (i + 1),
            ),
            lambda r=r: update(sent, r, layout),
        )
        for i, r in enumerate(ranks)
    ]
    result = aggregate_updates(devices, rule="reconstruct", config=config, spec=SPEC, order=None, layouts={}, sent=sent)
    return result.tensors


@pytest.mark.parametrize("ranks", [[2], [2, 4, 8], [8, 8], [4, 2]])
def test_aggregate_of_unchanged_updates_is_unchanged_at_any_rank(ranks: list[int]) -> None:
    sent = blob()
    result = aggregated(sent, ranks)
    for name in module_names(SPEC):
        np.testing.assert_allclose(product(result, name), product(sent, name), rtol=1e-4, atol=1e-4)


def test_low_rank_update_without_completion_erases_higher_components() -> None:
    sent = blob()
    result = aggregated(sent, [2], complete_ranks=False)
    name = "layers.0.q"
    np.testing.assert_allclose(
        product(result, name), sent[f"{name}.lora_B"][:, :2] @ sent[f"{name}.lora_A"][:2], rtol=1e-4, atol=1e-4
    )


def test_claimed_examples_count_up_to_a_multiple_of_the_median() -> None:
    reports = [
        Report(run_id="r", device_id=i, server_round=1, plan_sha256="0" * 64, status="ok", num_examples=n)
        for i, n in (("a", 100), ("b", 120), ("c", 10**9), ("d", 80), ("e", 110))
    ]
    assert example_weights(reports, FleetConfig()) == {"a": 100.0, "b": 120.0, "c": 220.0, "d": 80.0, "e": 110.0}
    unlimited = FleetConfig(aggregation=AggregationSettings(max_examples_ratio=0.0))
    assert example_weights(reports, unlimited)["c"] == 1e9


@pytest.mark.parametrize("factor", [50.0, 1000.0])
@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_scaled_update_is_clipped_by_default(factor: float, cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedspine_edge.server.aggregate_round.CACHE_BYTES", cache_bytes)
    sent, layout = blob(), Layout.full(SPEC)
    updates = [update(sent, R_MAX, layout) for _ in range(5)]
    scaled = {name: (A, factor * B) for name, (A, B) in updates[4].factors.items()}
    updates[4] = replace(updates[4], factors=scaled)
    devices = [
        (
            Report(run_id="r", device_id=f"d{i}", server_round=2, plan_sha256="0" * 64, status="ok", num_examples=10),
            lambda one=one: one,
        )
        for i, one in enumerate(updates)
    ]
    config = FleetConfig(ranks=(2, 4, R_MAX))
    result = aggregate_updates(devices, rule="reconstruct", config=config, spec=SPEC, order=None, layouts={}, sent=sent)
    assert result.aggregate.clipped == {"d4": pytest.approx(10.0 / factor)}
    for name in module_names(SPEC):  # (4 · 1 + 10) / 5
        np.testing.assert_allclose(product(result.tensors, name), 2.8 * product(sent, name), rtol=1e-3, atol=1e-3)
