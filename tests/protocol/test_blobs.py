"""Tensor names of blobs, and their conversion from and to layouts, orders and adapters."""

from __future__ import annotations

import numpy as np
import pytest

from fedspine_edge.errors import BlobError, LayoutError
from fedspine_edge.model.layout import Layout, Order, full_shape, module_names, split_name
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.blobs import (
    HELD,
    KEEP,
    adapter_tensors,
    gather_adapter,
    order_from_tensors,
    order_to_tensors,
    scores_to_tensors,
)

SPEC = ModelSpec(
    family="llama",
    num_layers=2,
    hidden_size=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    intermediate_size=8,
    gated_ffn=True,
    attention_bias=False,
    ffn_bias=False,
    num_parameters=10_000,
    base_sha256="a" * 64,
)
KEPT = Layout(SPEC, (np.array([1]), np.array([0, 1])), (np.array([0, 3, 7]), np.arange(8)))


def make_order(seed: int = 0) -> Order:
    rng = np.random.default_rng(seed)
    return Order(tuple(rng.permutation(2) for _ in range(2)), tuple(rng.permutation(8) for _ in range(2)))


def make_factors(r: int = 4):
    rng = np.random.default_rng(1)
    shapes = {name: full_shape(SPEC, split_name(name)[1]) for name in module_names(SPEC)}
    return {name: (rng.normal(size=(r, cols)), rng.normal(size=(rows, r))) for name, (rows, cols) in shapes.items()}


@pytest.mark.parametrize("prefix", ["layout", HELD, KEEP])
def test_layout_survives_the_conversion_to_tensors(prefix):
    tensors = KEPT.to_tensors(prefix)
    assert set(tensors) == {f"{prefix}.{i}.{kind}" for i in range(2) for kind in ("heads", "channels")}
    assert {tensor.dtype.name for tensor in tensors.values()} == {"int32"}
    assert Layout.from_tensors(SPEC, tensors, prefix).to_dict() == KEPT.to_dict()


def test_layout_with_a_missing_tensor_is_rejected():
    tensors = KEPT.to_tensors(KEEP)
    del tensors["keep.1.channels"]
    with pytest.raises(LayoutError, match=r"keep\.1\.channels is missing"):
        Layout.from_tensors(SPEC, tensors, KEEP)


def test_order_survives_the_conversion_to_tensors():
    order = make_order()
    found = order_from_tensors(SPEC, order_to_tensors(order))
    assert found is not None
    for kind in ("heads", "channels"):
        for mine, other in zip(getattr(order, kind), getattr(found, kind), strict=True):
            assert mine.tolist() == other.tolist()
    assert order_from_tensors(SPEC, {}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"order.0.heads": None},
        {"order.1.channels": None},
        {"order.0.heads": np.array([0, 0], np.int32)},
        {"order.0.heads": np.array([0, 2], np.int32)},
        {"order.1.channels": np.arange(7, dtype=np.int32)},
        {"order.1.channels": np.arange(8, dtype=np.int32).reshape(2, 4)},
    ],
    ids=["no first", "no last", "repeated", "beyond", "short", "two-dimensional"],
)
def test_order_that_is_no_permutation_is_rejected(change):
    tensors = {n: v for n, v in (order_to_tensors(make_order()) | change).items() if v is not None}
    with pytest.raises(BlobError, match="not a permutation"):
        order_from_tensors(SPEC, tensors)


def test_gathered_adapter_has_kept_rows_columns_and_components():
    factors = make_factors()
    gathered = gather_adapter(adapter_tensors(factors), KEPT, 2)
    assert len(gathered) == 2 * len(factors)
    for name, (A, B) in factors.items():
        assert np.array_equal(gathered[f"{name}.lora_A"], A[:2, KEPT.cols(name)])
        assert np.array_equal(gathered[f"{name}.lora_B"], B[KEPT.rows(name), :2])


def test_scatter_inverts_gather_and_leaves_zeros_elsewhere():
    for name, (A, B) in make_factors().items():
        full_A, full_B = KEPT.scatter(name, *KEPT.gather(name, A, B))
        assert full_A.shape == A.shape
        assert full_B.shape == B.shape
        kept_A, kept_B = np.zeros(A.shape[1], bool), np.zeros(B.shape[0], bool)
        kept_A[KEPT.cols(name)], kept_B[KEPT.rows(name)] = True, True
        assert np.array_equal(full_A, np.where(kept_A, A, 0.0))
        assert np.array_equal(full_B, np.where(kept_B[:, None], B, 0.0))


def test_conversions_use_only_allowed_names():
    factors = {name: (A.astype("float16"), B.astype("float16")) for name, (A, B) in make_factors().items()}
    head = {"head.out.weight": np.zeros((2, 12), np.float32)}
    scores = [[np.ones(index.size) for index in kept] for kept in (KEPT.heads, KEPT.channels)]
    adapter = adapter_tensors(factors) | head
    codec.check_tensors(adapter | KEPT.to_tensors(HELD) | order_to_tensors(make_order()), "round")
    codec.check_tensors(adapter | KEPT.to_tensors(KEEP) | scores_to_tensors(KEPT, *scores), "update")
