"""Frozen weights with 8 and 4 bits: quantization error, memory, and pruning without changes to remaining values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import ops
from fedspine_edge.kernels.quantized import QuantizedWeight

BITS = (8, 4)


def normal(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.009), (4, 0.1)])
def test_quantization_error_is_that_of_the_format(bits, largest):
    weight = normal(64, 512)
    error = (QuantizedWeight.of(weight, bits).dense() - weight).norm() / weight.norm()
    assert largest / 3 < error < largest


def test_quantization_to_8_bits_errs_by_half_a_step_at_most():
    weight = normal(16, 40)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((QuantizedWeight.of(weight, 8).dense() - weight).abs() <= 0.5001 * steps).all()


def test_quantization_to_4_bits_keeps_zero_and_maxima():
    weight = normal(4, 128)
    weight[1, 5] = 0.0
    dense = QuantizedWeight.of(weight, 4).dense()
    assert dense[1, 5] == 0
    for start in (0, 64):
        group = weight[:, start : start + 64]
        largest = group.amax(1)  # 1 and -1 are among the values
        row = int(torch.where(largest == group.abs().amax(1))[0][0])
        torch.testing.assert_close(dense[row, start : start + 64].amax(), largest[row])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 200),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_take_twice_keeps_every_value_exactly(rows, cols, bits, seed, dtype):
    rng = np.random.default_rng(seed)
    weight = QuantizedWeight.of(normal(rows, cols, seed).to(dtype), bits)
    expected = weight.dense()
    for _ in range(2):
        r, c = (
            torch.from_numpy(np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False)))
            for size in weight.shape
        )
        weight, expected = weight.take(r, c), expected[r][:, c]
        assert weight.shape == expected.shape
        assert torch.equal(weight.dense(), expected)
        assert weight.scales.shape[1] == weight.group_of_col.unique().numel()  # scales without columns are dropped


@pytest.mark.parametrize("bits", BITS)
def test_take_of_rows_or_columns_with_zero_row_is_exact(bits):
    matrix = normal(6, 70)
    matrix[2] = 0
    weight = QuantizedWeight.of(matrix, bits)
    dense = weight.dense()
    assert not dense[2].any()
    index = torch.tensor([0, 2, 5])
    assert torch.equal(weight.take(index, None).dense(), dense[index])
    assert torch.equal(weight.take(None, index).dense(), dense[:, index])


@pytest.mark.parametrize("bits", BITS)
def test_quantized_weight_memory_is_as_documented(bits):
    weight = QuantizedWeight.of(normal(256, 512), bits)
    stored = sum(t.numel() * t.element_size() for t in (weight.codes, weight.scales, weight.group_of_col))
    assert stored / (256 * 512) < (1.02 if bits == 8 else 0.575)


def adapter(out, n, r=4):
    return normal(r, n, 1).requires_grad_(), normal(out, r, 2).requires_grad_()


@pytest.mark.parametrize("bits", BITS)
def test_lora_linear_of_quantized_weight_saves_only_codes(bits):
    weight, x = QuantizedWeight.of(normal(24, 96), bits), normal(10, 96, 3).requires_grad_()
    results = []
    for stored in (weight, weight.dense()):
        a, b = adapter(24, 96)
        kept = []
        x.grad = None
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            y = ops.lora_linear(x, stored, None, a, b, 0.5)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, a.grad, b.grad])
        assert ((24, 96) in [tuple(shape) for shape in kept]) == (stored is not weight)
    for actual, dense in zip(*results):
        assert torch.equal(actual, dense)


@pytest.mark.parametrize("bits", BITS)
def test_lora_gate_up_with_one_quantized_weight_is_exact(bits):
    x = normal(10, 96, 3).requires_grad_()
    gate, up = QuantizedWeight.of(normal(24, 96), bits), normal(16, 96, 5)
    results = []
    for first in (gate, gate.dense()):
        x.grad = None
        projections = [ops.Projection(w, None, *adapter(w.shape[0], 96)) for w in (first, up)]
        y, z = ops.lora_gate_up(x, *projections, 0.5)
        (y.square().sum() + z.sum()).backward()
        results.append([y.detach(), z.detach(), x.grad, *(p.lora_A.grad for p in projections)])
    for actual, dense in zip(*results):
        assert torch.equal(actual, dense)


def test_quantization_of_other_tensors_raises():
    with pytest.raises(KernelError, match="floating-point matrix"):
        QuantizedWeight.of(torch.zeros(3), 8)
    with pytest.raises(KernelError, match="floating-point matrix"):
        QuantizedWeight.of(torch.zeros(3, 3, dtype=torch.int8), 8)
