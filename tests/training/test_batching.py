"""Batches are reproducible, cover the data and have little padding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.data.examples import Example
from fedspine_edge.training import batching


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=90),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_batch_order_is_reproducible_and_covers_an_epoch(lengths, batch_size, seed):
    order = batching.BatchOrder(lengths, batch_size, seed)
    epoch = [order.indices(step) for step in range(order.batches_per_epoch)]
    seen = np.concatenate(epoch)
    assert len(set(seen.tolist())) == seen.size
    assert seen.size == len(lengths) // min(batch_size, len(lengths)) * min(batch_size, len(lengths))
    late = batching.BatchOrder(lengths, batch_size, seed).indices(order.batches_per_epoch + 1)
    np.testing.assert_array_equal(order.indices(order.batches_per_epoch + 1), late)


def test_batch_order_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(3, 48, 1000)
    order = batching.BatchOrder(lengths.tolist(), 8, 0)
    padded = sum(lengths[order.indices(step)].max() * 8 for step in range(order.batches_per_epoch))
    assert padded < 1.15 * lengths.sum()


def test_collate_pads_to_the_longest_example():
    first, second = batching.Encoded([5, 6, 7], 1, [0, 0, 1]), batching.Encoded([8], 0, [0])
    encoded = [first, second, batching.Encoded([9] * 9, 0, [0] * 9)]
    batch = batching.collate(encoded, [1, 0], pad_id=4)
    np.testing.assert_array_equal(batch["input_ids"], [[8, 4, 4], [5, 6, 7]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(batch["token_type_ids"], [[0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(batch["labels"], [0, 1])
    assert sorted(np.concatenate(list(batching.evaluation_batches(encoded, 2))).tolist()) == [0, 1, 2]


def test_encode_truncates_to_the_maximum_length(tiny_folder):
    from fedspine_edge.model.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_folder)
    pair = batching.encode([Example("good " * 30, 1, "bad")], tokenizer, 10)[0]
    assert len(pair.input_ids) == 10
    assert pair.token_type_ids[-1] == 1
    assert pair.label == 1
