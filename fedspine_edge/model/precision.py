"""Data types of the frozen base weights. Adapters, task head and optimizer state are always float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn

from fedspine_edge.errors import ConfigError
from fedspine_edge.kernels.quantized import Bits

BaseDtype = Literal["float32", "bfloat16", "float16", "int8", "int4"]
BASE_DTYPES: tuple[BaseDtype, ...] = get_args(BaseDtype)
QUANTIZED_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
"""Bits per weight of the base dtypes that quantize the prunable linears."""


def compute_dtype(base_dtype: str) -> torch.dtype:
    """Return the dtype of activations and of unquantized weights. Raises `ConfigError` for an unknown name."""
    if base_dtype not in BASE_DTYPES:
        raise ConfigError(f"base_dtype {base_dtype!r} is unknown.", remedy=f"Use one of {', '.join(BASE_DTYPES)}.")
    return torch.bfloat16 if base_dtype in QUANTIZED_BITS else getattr(torch, base_dtype)


def upcast_head_inputs(module: nn.Module, head_names: Iterable[str]) -> None:
    """Convert the inputs of the head's modules to float32 where the base computes in another dtype.

    Args:
        module: Task model; hooks are added in place.
        head_names: Names of the head's parameters.
    """
    head = frozenset(head_names)
    frozen = {p.dtype for n, p in module.named_parameters() if n not in head and ".lora_" not in n}
    for path in sorted({name.rpartition(".")[0] for name in head}):
        child = module.get_submodule(path)
        mixed = any(p.dtype not in frozen for p in child.parameters(recurse=False))
        if mixed and not any(hook is _upcast_inputs for hook in child._forward_pre_hooks.values()):
            child.register_forward_pre_hook(_upcast_inputs)


def to_one_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert all parameters to `dtype` in place, and remove what `upcast_head_inputs` added."""
    for child in module.modules():
        for key in [key for key, hook in child._forward_pre_hooks.items() if hook is _upcast_inputs]:
            del child._forward_pre_hooks[key]
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _upcast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
