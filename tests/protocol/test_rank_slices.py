"""Slices of the adapter by rank: a device of any rank and layout receives what it needs and no more bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import BlobError
from fedspine_edge.model.layout import Layout, module_names
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.codec import check_tensors, pack, unpack
from fedspine_edge.protocol.rank_slices import merge_slices, slice_by_rank, slice_starts
from fedspine_edge.server.aggregate_round import initial_tensors

SPEC = ModelSpec(
    family="llama",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    intermediate_size=12,
    gated_ffn=True,
    attention_bias=False,
    ffn_bias=False,
    num_parameters=2000,
    base_sha256="0" * 64,
)


def whole(r_max, seed=0):
    """An adapter in which no number is zero, with head and order."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(size=value.shape).astype(np.float32)
        for name, value in initial_tensors(FleetConfig(ranks=(r_max,)), SPEC).items()
    }
    tensors["head.score.weight"] = rng.normal(size=(2, 8)).astype(np.float32)
    for layer in range(2):
        tensors[f"order.{layer}.heads"] = rng.permutation(2).astype(np.int32)
        tensors[f"order.{layer}.channels"] = rng.permutation(12).astype(np.int32)
    return tensors


def some(size):
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda kept: np.array(sorted(kept), dtype=np.int64))


layouts = st.builds(
    lambda heads, channels: Layout(SPEC, heads, channels), st.tuples(some(2), some(2)), st.tuples(some(12), some(12))
)


@given(st.sets(st.integers(1, 9), min_size=1), layouts, st.data())
def test_merged_slices_equal_the_adapter_of_the_device(ranks, held, data):
    ranks = sorted(ranks)
    r = data.draw(st.sampled_from(ranks))
    tensors = whole(max(ranks))
    slices = [unpack(pack(one)) for one in slice_by_rank(tensors, ranks, held, "float32")]
    wanted = [one for one, start in zip(slices, slice_starts(ranks, max(ranks)), strict=True) if start < r]
    for one in slices:
        check_tensors(one, "round")
    merged, layout = merge_slices(wanted, SPEC)
    assert layout.to_dict() == held.to_dict()
    for name in module_names(SPEC):
        A, B = merged[f"{name}.lora_A"], merged[f"{name}.lora_B"]
        rows, cols = held.rows(name), held.cols(name)
        assert A.shape[0] == B.shape[1] == r, "ranks are where slices end, so no unused component is downloaded"
        np.testing.assert_array_equal(A[:, cols], tensors[f"{name}.lora_A"][:r, cols])
        np.testing.assert_array_equal(B[rows], tensors[f"{name}.lora_B"][rows, :r])
        assert np.count_nonzero(A) == r * cols.size
        assert np.count_nonzero(B) == r * rows.size
    for name in tensors:
        if not name.startswith("layers."):
            np.testing.assert_array_equal(merged[name], tensors[name])


def test_half_precision_slices_stay_finite():
    tensors = whole(8)
    tensors["layers.1.up.lora_B"][3, 5] = 1e6
    full = Layout.full(SPEC)
    half, single = slice_by_rank(tensors, [8], full), slice_by_rank(tensors, [8], full, "float32")
    assert half[0]["layers.0.q.lora_A"].dtype == half[0]["head.score.weight"].dtype == np.float16
    assert half[0]["layers.1.up.lora_B"].dtype == np.float32, "what half precision cannot hold stays as it is"
    assert 2 * half[0]["layers.0.down.lora_A"].nbytes == single[0]["layers.0.down.lora_A"].nbytes
    merged, _ = merge_slices(half, SPEC)
    assert merged["layers.1.up.lora_B"][3, 5] == 1e6
    np.testing.assert_allclose(merged["layers.0.q.lora_A"], tensors["layers.0.q.lora_A"], rtol=2**-11)


@pytest.mark.parametrize("damage", ["a module is missing", "other widths", "an index outside", "no layout"])
def test_slices_of_another_adapter_raise_blob_error(damage):
    slices = slice_by_rank(whole(4), [2, 4], Layout.full(SPEC))
    if damage == "a module is missing":
        del slices[1]["layers.1.gate.lora_A"]
    elif damage == "other widths":
        slices[0]["layers.0.q.lora_A"] = slices[0]["layers.0.q.lora_A"][:, :3]
    elif damage == "an index outside":
        slices[0]["held.0.channels"] = slices[0]["held.0.channels"] + 1
    else:
        del slices[0]["held.1.heads"]
    with pytest.raises(BlobError, match="does not fit the model"):
        merge_slices(slices, SPEC)
