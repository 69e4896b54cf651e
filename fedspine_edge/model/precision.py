"""In how many bits the frozen base is kept, while adapters, head and optimizer stay float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from fedspine_edge.errors import ConfigError, ModelError
from fedspine_edge.kernels.quantized import Bits
from fedspine_edge.model.layout import module_names
from fedspine_edge.model.lora import LoraLinear, QuantizedLinear

if TYPE_CHECKING:
    from fedspine_edge.model.prunable import PrunableModel

BaseDtype = Literal["float32", "bfloat16", "float16", "int8", "int4"]
BASE_DTYPES: tuple[BaseDtype, ...] = get_args(BaseDtype)
_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}


def compute_dtype(base_dtype: str) -> torch.dtype:
    """The dtype of activations and of what is not quantised. Raises `ConfigError` for an unknown name."""
    if base_dtype not in BASE_DTYPES:
        raise ConfigError(f"base_dtype {base_dtype!r} is unknown.", remedy=f"Use one of {', '.join(BASE_DTYPES)}.")
    return torch.bfloat16 if base_dtype in _BITS else getattr(torch, base_dtype)


def cast_base(model: PrunableModel, base_dtype: BaseDtype) -> None:
    """See `PrunableModel.keep_base_in`."""
    dtype = compute_dtype(base_dtype)
    if model.base_dtype == base_dtype:
        return
    if model.base_dtype in _BITS:
        raise ModelError(
            f"the base is already kept in {model.base_dtype}; its exact weights are gone.",
            remedy=f"Load the model again with base_dtype={base_dtype!r}.",
        )
    for name, parameter in model.module.named_parameters():
        if name in model.head_names:
            parameter.data = parameter.data.clone()  # a view of the mapped file would keep all of it in memory
        elif not name.endswith((".lora_A", ".lora_B")):
            parameter.data = parameter.data.to(dtype)
    if base_dtype in _BITS:
        for name in module_names(model.spec):
            _quantise(model, name, _BITS[base_dtype])
    upcast_head_inputs(model.module, model.head_names)


def _quantise(model: PrunableModel, name: str, bits: Bits) -> None:
    linear = model.linear(name)
    if isinstance(linear, LoraLinear):
        linear.base_layer = QuantizedLinear.of(linear.base_layer, bits)
    else:
        parent, _, attribute = model.architecture.path(name).rpartition(".")
        setattr(model.module.get_submodule(parent), attribute, QuantizedLinear.of(linear, bits))


def upcast_head_inputs(module: nn.Module, head_names: Iterable[str]) -> None:
    """Give the head's modules float32 inputs where the activations before them have fewer bits."""
    head = frozenset(head_names)
    frozen = {p.dtype for n, p in module.named_parameters() if n not in head and ".lora_" not in n}
    for path in sorted({name.rpartition(".")[0] for name in head}):
        child = module.get_submodule(path)
        mixed = any(p.dtype not in frozen for p in child.parameters(recurse=False))
        if mixed and not any(hook is _widened for hook in child._forward_pre_hooks.values()):
            child.register_forward_pre_hook(_widened)


def to_one_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """The parameters in one dtype and the head's modules without `upcast_head_inputs`."""
    for child in module.modules():
        for key in [key for key, hook in child._forward_pre_hooks.items() if hook is _widened]:
            del child._forward_pre_hooks[key]
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _widened(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
