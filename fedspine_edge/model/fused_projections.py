"""Projections that a family stores as one matrix, taken apart into the linears that are pruned, and put together again.

GPT-2 keeps q, k and v in `c_attn`, ModernBERT also up and gate in `Wi`; GPT-2's weights are (in, out) besides. Inside
this package every prunable linear is an `nn.Linear` of its own; in files and in merged models the family's own form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedspine_edge.model.lora import plain_linear

if TYPE_CHECKING:
    from fedspine_edge.model.architecture import Architecture

Tensors = Mapping[str, Tensor]


class FusedLinear(nn.Module):  # type: ignore[misc]  # torch is not analysed
    """Several linears of one input; the output is their outputs side by side, as the fused matrix gave it.

    Args:
        linears: By part name, in the order of the fused rows.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for part, linear in linears.items():
            self.add_module(part, linear)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., sum of outs)."""
        return torch.cat([linear(x) for linear in self.children()], dim=-1)


def split_fused(module: nn.Module, architecture: Architecture) -> None:
    """Give every prunable linear of `module` a module of its own, in place; nothing to do for most families."""
    if not (architecture.fused or architecture.transposed):
        return
    for layer in _layers(module, architecture):
        for path, parts in architecture.fused.items():
            original = layer.get_submodule(path)
            if isinstance(original, FusedLinear):
                continue
            weight = original.weight.detach()
            weights = (weight.T if architecture.transposed else weight).chunk(len(parts))
            biases = [None] * len(parts) if original.bias is None else original.bias.detach().chunk(len(parts))
            pieces: dict[str, nn.Module] = {
                p: plain_linear(_own(w), None if b is None else _own(b)) for p, w, b in zip(parts, weights, biases)
            }
            _set(layer, path, FusedLinear(pieces))
        for path in architecture.transposed_alone:
            original = layer.get_submodule(path)
            if not isinstance(original, nn.Linear):
                _set(layer, path, plain_linear(_own(original.weight.detach().T), _own(original.bias.detach())))


def merge_fused(module: nn.Module, architecture: Architecture) -> None:
    """The inverse of `split_fused` on a model without adapters, in place."""
    if not (architecture.fused or architecture.transposed):
        return
    for layer in _layers(module, architecture):
        for path, parts in architecture.fused.items():
            linears = [layer.get_submodule(f"{path}.{part}") for part in parts]
            weight = torch.cat([x.weight.detach() for x in linears])
            bias = None if linears[0].bias is None else torch.cat([x.bias.detach() for x in linears])
            _set(layer, path, _native(weight, bias, architecture.transposed))
        for path in architecture.transposed_alone:
            linear = layer.get_submodule(path)
            _set(layer, path, _native(linear.weight.detach(), linear.bias.detach(), True))


def to_files(tensors: Tensors, architecture: Architecture, num_layers: int) -> dict[str, Tensor]:
    """State-dict entries of separate linears → those of the family's own modules."""
    found = dict(tensors)
    for i in range(num_layers):
        for path, parts in architecture.fused.items():
            for kind in ("weight", "bias"):
                names = [f"{architecture.layer_path(i)}.{path}.{part}.{kind}" for part in parts]
                if names[0] in found:
                    whole = torch.cat([found.pop(name) for name in names])
                    found[f"{architecture.layer_path(i)}.{path}.{kind}"] = whole
        for path in architecture.transposed_paths:
            name = f"{architecture.layer_path(i)}.{path}.weight"
            found[name] = found[name].T.contiguous()
    return found


def from_files(tensors: Tensors, architecture: Architecture, num_layers: int) -> dict[str, Tensor]:
    """The inverse of `to_files`. Entries that are absent are left for the caller to miss."""
    found = dict(tensors)
    for i in range(num_layers):
        for path in architecture.transposed_paths:
            name = f"{architecture.layer_path(i)}.{path}.weight"
            if name in found:
                found[name] = found[name].T.contiguous()
        for path, parts in architecture.fused.items():
            for kind in ("weight", "bias"):
                name = f"{architecture.layer_path(i)}.{path}.{kind}"
                if name in found:
                    for part, piece in zip(parts, found.pop(name).chunk(len(parts))):
                        found[f"{architecture.layer_path(i)}.{path}.{part}.{kind}"] = _own(piece)
    return found


def _layers(module: nn.Module, architecture: Architecture) -> list[nn.Module]:
    return list(module.get_submodule(f"{architecture.backbone}.{architecture.layers}"))


def _own(tensor: Tensor) -> Tensor:
    """A copy that does not keep the fused matrix alive."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _native(weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    """A linear of weight (out, in) as the family itself would hold it."""
    if not transposed:
        return plain_linear(weight, bias)
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        module = Conv1D(weight.shape[0], weight.shape[1])
    module.weight = nn.Parameter(_own(weight.T), requires_grad=False)
    module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _set(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    module.train(layer.training)
    setattr(layer.get_submodule(parent), attribute, module)
