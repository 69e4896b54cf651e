"""Activation times gradient at the inputs of linears, summed over the tokens of an iteration.

Source: APT (arXiv 2401.12200), salience of hidden units; docs/concepts/pruning.md, "Importance", criterion "apt".
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.errors import ModelError


class InputSaliency:
    """Σ over tokens of |x · dL/dx| for every input of the watched linears.

    The sums of micro-batches are added. The hooks are removed when this object is deleted.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | None] = {}
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)

    def watch(self, linears: Mapping[str, nn.Module]) -> None:
        """Start an iteration with empty sums on these linears."""
        self.stop()
        self._sums = dict.fromkeys(linears)
        for name, linear in linears.items():
            self._handles.append(linear.register_forward_pre_hook(_hook(weakref.ref(self), name)))

    def stop(self) -> None:
        """Remove all hooks and discard the sums."""
        _remove(self._handles)
        self._sums = {}

    def take(self) -> dict[str, Tensor]:
        """Return the float32 sums (in,) of each linear, and start the next iteration with empty sums.

        Raises `ModelError` if a linear received no gradient.
        """
        found = {name: value for name, value in self._sums.items() if value is not None}
        if not found or len(found) != len(self._sums):
            raise ModelError(
                "no gradient reached the inputs of the adapted linears in this iteration.",
                remedy="Call the tracker's begin(True) before the forward pass, also after loading adapters.",
            )
        self._sums = dict.fromkeys(self._sums)
        return found

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add the contribution of x and its gradient, both (..., in)."""
        if name in self._sums:
            value = (x.float() * gradient.float()).abs().flatten(0, -2).sum(0)
            before = self._sums[name]
            self._sums[name] = value if before is None else before + value


def _hook(owner: weakref.ref[InputSaliency], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before_forward(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if not (torch.is_grad_enabled() and x.requires_grad):
            return

        def on_gradient(gradient: Tensor) -> None:
            saliency = owner()
            if saliency is not None:
                saliency.add(name, x.detach(), gradient.detach())

        x.register_hook(on_gradient)

    return before_forward


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
