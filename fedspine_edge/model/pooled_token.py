"""A classifier reads one token of every text, and in the last layer only that token has to pass what follows attention.

There o, gate, up and down take each token for itself. With the read tokens alone as their input, o and down return
(rows, 1, hidden_size), which the family's residual additions spread over all tokens: right for the one that is read,
meaningless for the others, which nobody looks at and whose gradients are zero. docs/decisions/0027.
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

READING_PARTS: tuple[Part, ...] = ("o", "gate", "up")
"""Linears of the last layer that take the read token alone; down follows them."""
Positions: TypeAlias = "Tensor | int | None"


class PooledToken:
    """While entered, `read_token` gives these tokens alone; nestable and enterable again, by thread.

    Args:
        positions: Which token is read: one number for all rows, or (rows,); None: all tokens are.
        tokens: Length of the rows.
    """

    def __init__(self, positions: Positions, tokens: int) -> None:
        self.positions = positions
        self.tokens = tokens
        self._entered: list[Token[PooledToken | None]] = []

    def __enter__(self) -> None:
        self._entered.append(_current.set(self))

    def __exit__(self, *_: object) -> None:
        _current.reset(self._entered.pop())


_current: ContextVar[PooledToken | None] = ContextVar("reading", default=None)


def current() -> PooledToken | None:
    """What is being read; None outside of a model's call, where every token may be wanted."""
    return _current.get()


def read_positions(architecture: Architecture, config: Any, input_ids: Tensor) -> Positions:
    """The position of the one token of each row of (rows, tokens) that a classifier reads; None if it reads more."""
    if architecture.pooling and getattr(config, architecture.pooling) != "cls":
        return None
    if not architecture.last_token_pools:
        return 0
    tokens = input_ids.shape[1]
    if config.pad_token_id is None:
        return tokens - 1
    # transformers' own expression, dtypes included: a row of padding alone must give the same position too
    present = (input_ids != config.pad_token_id).to(torch.int32)
    return (torch.arange(tokens, device=input_ids.device, dtype=torch.int32) * present).argmax(-1)


def read_token(x: Tensor) -> Tensor:
    """x (rows, tokens, in) → (rows, 1, in) where one token of each row is read, else x itself."""
    reading = current()
    if reading is None or reading.positions is None:
        return x
    position = reading.positions
    if x.dim() != 3 or x.shape[1] != reading.tokens:  # tokens in pieces, or all texts behind one another
        return x
    if isinstance(position, int):
        return x[:, position : position + 1].contiguous()  # a view would keep all tokens for the backward pass
    return x[torch.arange(x.shape[0], device=x.device), position].unsqueeze(1)


@contextlib.contextmanager
def only_pooled_token(module: nn.Module, architecture: Architecture, input_ids: Tensor) -> Iterator[None]:
    """Let a whole transformers classifier do what a `PrunableModel` does in its calls. For one thread at a time.

    Args:
        module: Without adapters of this package, with its fused linears together or apart.
        architecture: Its family.
        input_ids: (rows, tokens) of the calls.
    """
    layer = architecture.layer_path(int(module.config.num_hidden_layers) - 1)
    paths = {architecture.linears[part] for part in READING_PARTS if part in architecture.linears}
    parents = {path.rpartition(".")[0] for path in paths} & architecture.fused.keys()
    linears = parents | {path for path in paths if path.rpartition(".")[0] not in parents}
    hooked = [module.get_submodule(f"{layer}.{path}") for path in sorted(linears)]
    handles = [linear.register_forward_pre_hook(lambda _, args: (read_token(args[0]),)) for linear in hooked]
    try:
        with PooledToken(read_positions(architecture, module.config, input_ids), input_ids.shape[1]):
            yield
    finally:
        for handle in handles:
            handle.remove()


def recomputation() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """`context_fn` of torch's checkpointing: what is read in the forward pass is read when it is repeated."""
    return contextlib.nullcontext(), current() or contextlib.nullcontext()
