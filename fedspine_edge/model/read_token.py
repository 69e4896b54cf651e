"""A classifier reads one token of every text, and in the last layer only that token has to pass what follows attention.

There o, gate, up and down take each token for itself. With the read tokens alone as their input, o and down return
(rows, 1, hidden_size), which the family's residual additions spread over all tokens: right for the one that is read,
meaningless for the others, which nobody looks at and whose gradients are zero. docs/decisions/0027.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedspine_edge.model.architecture import Architecture


class Reading:
    """While entered, `read_token` gives these tokens alone; nestable and enterable again, by thread.

    Args:
        positions: (rows,), which token of every row is read; None: all of them.
        tokens: Length of the rows.
    """

    def __init__(self, positions: Tensor | None, tokens: int) -> None:
        self.positions = positions
        self.tokens = tokens
        self._entered: list[Token[Reading | None]] = []

    def __enter__(self) -> None:
        self._entered.append(_current.set(self))

    def __exit__(self, *_: object) -> None:
        _current.reset(self._entered.pop())


_current: ContextVar[Reading | None] = ContextVar("reading", default=None)


def current() -> Reading | None:
    """What is being read; None outside of a model's call, where every token may be wanted."""
    return _current.get()


def read_positions(architecture: Architecture, config: Any, input_ids: Tensor) -> Tensor | None:
    """Per row of (rows, tokens) the position of the one token that a classifier reads; None if it reads more.

    None also in a model of one layer: behind its first DeBERTa may have a convolution over the tokens.
    """
    rows, tokens = input_ids.shape
    if int(config.num_hidden_layers) == 1:
        return None
    if architecture.pooling and getattr(config, architecture.pooling) != "cls":
        return None
    if not architecture.last_token_pools:
        return torch.zeros(rows, dtype=torch.int64, device=input_ids.device)
    if config.pad_token_id is None:
        return torch.full((rows,), tokens - 1, device=input_ids.device)
    # transformers' own expression, dtypes included: a row of padding alone must give the same position too
    present = (input_ids != config.pad_token_id).to(torch.int32)
    return (torch.arange(tokens, device=input_ids.device, dtype=torch.int32) * present).argmax(-1)


def read_token(x: Tensor) -> Tensor:
    """x (rows, tokens, in) → (rows, 1, in) where one token of each row is read, else x itself."""
    reading = current()
    if reading is None or reading.positions is None:
        return x
    rows = reading.positions.shape[0]
    if x.shape[:-1] != (rows, reading.tokens):  # a piece of the tokens, where the feed-forward network takes pieces
        return x
    return x[torch.arange(rows, device=x.device), reading.positions].unsqueeze(1)


def recomputation() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """`context_fn` of torch's checkpointing: what is read in the forward pass is read when it is repeated."""
    return contextlib.nullcontext(), current() or contextlib.nullcontext()
