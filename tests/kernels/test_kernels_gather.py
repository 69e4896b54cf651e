"""gather_rows and gather_cols: exact contiguous copies of any dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICES, needs_extension

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import native, ops

STORAGE = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 40), cols=st.integers(1, 40), dtype=st.sampled_from(STORAGE))
def test_gather_equals_indexing(data: st.DataObject, rows: int, cols: int, dtype: torch.dtype) -> None:
    t = torch.arange(rows * cols).reshape(rows, cols).to(dtype)
    if data.draw(st.booleans()):
        t = t.t().contiguous().t()
    row_index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=50)), dtype=torch.int64)
    col_index = torch.tensor(data.draw(st.lists(st.integers(0, cols - 1), max_size=50)), dtype=torch.int32)
    by_row, by_col = ops.gather_rows(t, row_index), ops.gather_cols(t, col_index)
    assert torch.equal(by_row, t[row_index])
    assert torch.equal(by_col, t[:, col_index.long()])
    assert by_row.is_contiguous()
    assert by_col.is_contiguous()
    assert by_col.data_ptr() != t.data_ptr() or by_col.numel() == 0


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
def test_native_gather_equals_indexing(device: str, dtype: torch.dtype, by_row: bool) -> None:
    t = (torch.arange(57 * 83).reshape(57, 83) % 251).to(device, dtype)
    index = torch.tensor([3, 3, 0, 56, 11], device=device)
    for source in (t, t.t().contiguous().t()):
        expected = source[index] if by_row else source[:, index]
        assert torch.equal(native.gather(source, index, by_row), expected)


def test_gather_rows_of_vector_returns_elements() -> None:
    assert ops.gather_rows(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0])).tolist() == [7.0, 5.0]


@pytest.mark.parametrize(
    ("op", "t", "index", "message"),
    [
        (ops.gather_rows, torch.zeros(2, 3), torch.tensor([2]), r"gather_rows: index contains 2, outside 0\.\.1"),
        (ops.gather_cols, torch.zeros(2, 3), torch.tensor([-1]), r"gather_cols: index contains -1, outside 0\.\.2"),
        (ops.gather_rows, torch.zeros(2, 3), torch.tensor([[0]]), "index must be a vector"),
        (ops.gather_rows, torch.zeros(2, 3), torch.tensor([0.0]), "index must be int32 or int64"),
        (ops.gather_cols, torch.zeros(3), torch.tensor([0]), r"t must be a matrix, but it has shape \(3,\)"),
    ],
)
def test_gather_with_invalid_argument_names_it(op: object, t: torch.Tensor, index: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        op(t, index)  # type: ignore[operator]


@needs_extension
def test_native_gather_with_index_outside_raises() -> None:
    with pytest.raises(KernelError, match=r"gather_cols: index\[1\] is 9, outside 0\.\.2"):
        native.gather(torch.zeros(2, 3), torch.tensor([0, 9]), by_row=False)
