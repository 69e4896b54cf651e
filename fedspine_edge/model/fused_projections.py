"""Splits projections that a family stores as one matrix into prunable linears, and merges them again.

GPT-2 stores q, k and v in `c_attn`; ModernBERT also stores up and gate in `Wi`. GPT-2's weights are (in, out). Within
this package every prunable linear is a separate `nn.Linear`; files and merged models have the family's own form.
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
    """Several linears with one input, whose outputs are concatenated like those of the fused matrix.

    Args:
        linears: Linears by part name, in the order of the fused rows.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for part, linear in linears.items():
            self.add_module(part, linear)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., sum of outs)."""
        return torch.cat([linear(x) for linear in self.children()], dim=-1)


def split_fused(module: nn.Module, architecture: Architecture) -> None:
    """Replace the fused linears of `module` by separate ones, in place. Most families have none."""
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
                p: plain_linear(_copy(w), None if b is None else _copy(b)) for p, w, b in zip(parts, weights, biases)
            }
            _set(layer, path, FusedLinear(pieces))
        for path in architecture.transposed_unfused:
            original = layer.get_submodule(path)
            if not isinstance(original, nn.Linear):
                _set(layer, path, plain_linear(_copy(original.weight.detach().T), _copy(original.bias.detach())))


def merge_fused(module: nn.Module, architecture: Architecture) -> None:
    """Undo `split_fused` on a model without adapters, in place."""
    if not (architecture.fused or architecture.transposed):
        return
    for layer in _layers(module, architecture):
        for path, parts in architecture.fused.items():
            linears = [layer.get_submodule(f"{path}.{part}") for part in parts]
            weight = torch.cat([x.weight.detach() for x in linears])
            bias = None if linears[0].bias is None else torch.cat([x.bias.detach() for x in linears])
            _set(layer, path, _native(weight, bias, architecture.transposed))
        for path in architecture.transposed_unfused:
            linear = layer.get_submodule(path)
            _set(layer, path, _native(linear.weight.detach(), linear.bias.detach(), True))


def to_files(tensors: Tensors, architecture: Architecture, num_layers: int) -> dict[str, Tensor]:
    """Convert state-dict entries of separate linears to those of the family's own modules."""
    found = dict(tensors)
    for i in range(num_layers):
        for path, parts in architecture.fused.items():
            for kind in ("weight", "bias"):
                names = [f"{architecture.layer_path(i)}.{path}.{part}.{kind}" for part in parts]
                if names[0] in found:
                    fused = torch.cat([found.pop(name) for name in names])
                    found[f"{architecture.layer_path(i)}.{path}.{kind}"] = fused
        for path in architecture.transposed_paths:
            name = f"{architecture.layer_path(i)}.{path}.weight"
            found[name] = found[name].T.contiguous()
    return found


def from_files(tensors: Tensors, architecture: Architecture, num_layers: int) -> dict[str, Tensor]:
    """Undo `to_files`. Absent entries stay absent; the caller reports them."""
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
                        found[f"{architecture.layer_path(i)}.{path}.{part}.{kind}"] = _copy(piece)
    return found


def _layers(module: nn.Module, architecture: Architecture) -> list[nn.Module]:
    return list(module.get_submodule(f"{architecture.backbone}.{architecture.layers}"))


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy that does not keep the fused matrix alive."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _native(weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    """Return a linear with a weight (out, in) in the form of the family."""
    if not transposed:
        return plain_linear(weight, bias)
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        module = Conv1D(weight.shape[0], weight.shape[1])
    module.weight = nn.Parameter(_copy(weight.T), requires_grad=False)
    module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _set(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    module.train(layer.training)
    setattr(layer.get_submodule(parent), attribute, module)
