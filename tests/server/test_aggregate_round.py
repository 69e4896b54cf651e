"""Aggregation of a round: updates of low rank erase nothing."""

import numpy as np
import pytest

from fedspine_edge.config import AggregationSettings, FleetConfig
from fedspine_edge.model.layout import Layout, module_names
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import Report
from fedspine_edge.server.aggregate_round import aggregate_updates, initial_tensors
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
