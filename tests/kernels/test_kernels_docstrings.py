"""The examples in the docstrings of the ops."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from fedspine_edge.kernels import elementwise, lora_linear, ops, quantized, shared_input


@pytest.mark.parametrize("module", [elementwise, lora_linear, ops, quantized, shared_input], ids=lambda m: m.__name__)
def test_docstring_examples_print_what_they_show(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
