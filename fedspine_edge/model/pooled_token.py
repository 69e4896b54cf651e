"""Computation of only the pooled token in the last layer of a text classifier.

A classifier uses one token per sequence, so everything after the last layer's attention is needed for that token alone.
The linears o, gate, up and down treat every token separately. When o, gate and up receive only the pooled tokens, o and
down return (rows, 1, hidden_size), which the family's residual additions broadcast over all tokens. The result is right
for the pooled token and meaningless for the others, which nothing reads and whose gradients are zero. See
docs/decisions/0027.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from fedspine_edge.model.layout import Part

if TYPE_CHECKING:
    from fedspine_edge.model.architecture import Architecture

POOLED_PARTS: tuple[Part, ...] = ("o", "gate", "up")
"""Linears of the last layer that receive only the pooled token; down receives it from them."""
Positions: TypeAlias = "Tensor | int | None"


class PooledToken:
    """Context in which `select_pooled_token` returns these tokens only. It is per thread, nestable and reusable.

    Args:
        positions: Position of the pooled token: one number for all rows, or (rows,). None if all tokens are needed.
        tokens: Length of the rows in tokens.
    """

    def __init__(self, positions: Positions, tokens: int) -> None:
        self.positions = positions
        self.tokens = tokens
        self._entered: list[Token[PooledToken | None]] = []

    def __enter__(self) -> None:
        self._entered.append(_current.set(self))

    def __exit__(self, *_: object) -> None:
        _current.reset(self._entered.pop())


_current: ContextVar[PooledToken | None] = ContextVar("pooled_token", default=None)


def current_pooled_token() -> PooledToken | None:
    """Return the active context, or None outside of a model's call, where every token may be needed."""
    return _current.get()


def pooled_positions(architecture: Architecture, config: Any, input_ids: Tensor) -> Positions:
    """Return the position of each row's pooled token in (rows, tokens), or None if a classifier reads more tokens."""
    if architecture.pooling and getattr(config, architecture.pooling) != "cls":
        return None
    if not architecture.last_token_pools:
        return 0
    tokens = input_ids.shape[1]
    if config.pad_token_id is None:
        return tokens - 1
    # This is transformers' own expression, dtypes included: a row of padding alone must give the same position.
    present = (input_ids != config.pad_token_id).to(torch.int32)
    return (torch.arange(tokens, device=input_ids.device, dtype=torch.int32) * present).argmax(-1)


def select_pooled_token(x: Tensor) -> Tensor:
    """Return x (rows, tokens, in) reduced to (rows, 1, in) in a `PooledToken` context, and x itself elsewhere."""
    pooled = current_pooled_token()
    if pooled is None or pooled.positions is None:
        return x
    position = pooled.positions
    if x.dim() != 3 or x.shape[1] != pooled.tokens:  # chunked feed-forward, or rows that were concatenated
        return x
    if isinstance(position, int):
        return x[:, position : position + 1].contiguous()  # a view would keep all tokens for the backward pass
    return x[torch.arange(x.shape[0], device=x.device), position].unsqueeze(1)


@contextlib.contextmanager
def only_pooled_token(module: nn.Module, architecture: Architecture, input_ids: Tensor) -> Iterator[None]:
    """Let a plain transformers classifier compute what a `PrunableModel` computes. Not for use by several threads.

    Args:
        module: Task model without adapters of this package, with its fused linears split or not.
        architecture: Family of the module.
        input_ids: (rows, tokens), the input of the calls.
    """
    layer = architecture.layer_path(int(module.config.num_hidden_layers) - 1)
    paths = {architecture.linears[part] for part in POOLED_PARTS if part in architecture.linears}
    parents = {path.rpartition(".")[0] for path in paths} & architecture.fused.keys()
    linears = parents | {path for path in paths if path.rpartition(".")[0] not in parents}
    hooked = [module.get_submodule(f"{layer}.{path}") for path in sorted(linears)]
    handles = [linear.register_forward_pre_hook(lambda _, args: (select_pooled_token(args[0]),)) for linear in hooked]
    try:
        with PooledToken(pooled_positions(architecture, module.config, input_ids), input_ids.shape[1]):
            yield
    finally:
        for handle in handles:
            handle.remove()


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Return the contexts of a checkpointed forward pass and of its recomputation, which selects the same tokens.

    Pass this function to torch's checkpointing as `context_fn`.
    """
    return contextlib.nullcontext(), current_pooled_token() or contextlib.nullcontext()
