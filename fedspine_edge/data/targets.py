"""Which tokens a model is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Token = TypeVar("Token")
IGNORED = -100
"""Label of a token that is not to be predicted, as torch's cross entropy and transformers have it."""


def answered_within(prompt: list[Token], answer: list[Token], max_tokens: int) -> tuple[list[Token], list[Token]]:
    """What is kept of a prompt and its answer: of a prompt its end, at least a token; then of an answer its beginning.

    Args:
        prompt: Its tokens, at least one.
        answer: The tokens to be predicted.
        max_tokens: Of both together, at least 2.
    """
    answer = answer[: max_tokens - 1]
    return prompt[-(max_tokens - len(answer)) :], answer


def first_tokens(words: Sequence[int | None]) -> dict[int, int]:
    """Position of every word's first token, which stands for the word; a word that was cut off is absent.

    Args:
        words: For each token the word that it belongs to, None for special tokens, as tokenizers say.
    """
    first: dict[int, int] = {}
    for position, word in enumerate(words):
        if word is not None:
            first.setdefault(word, position)
    return first


def word_targets(words: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """One label per token: a word's own on its first token, IGNORED elsewhere. `words` as for `first_tokens`."""
    targets = [IGNORED] * len(words)
    for word, position in first_tokens(words).items():
        targets[position] = labels[word]
    return targets
